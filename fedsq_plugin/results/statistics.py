"""Statistics over rounds and over seeds, as the FedSQ paper's reviewers asked for them.

Best accuracy and rounds-to-best are the paper's metrics (arXiv 2604.02990). Sums are in the order of rounds or
seeds, so the results do not depend on the order of the rows in metrics.csv.
"""

from __future__ import annotations

import pandas as pd

from ..errors import ConfigError, nearest

STATISTICS = (
    "best_accuracy",
    "rounds_to_best",
    "final_accuracy",
    "final_accuracy_released",
    "seconds_per_round",
    "bytes_per_round",
)
"""The statistics that `runs` computes for each run. Accuracies are in [0, 1]."""

_OTHER_SPLITS = ("best_accuracy", "rounds_to_best", "final_accuracy")
"""Statistics of splits other than test. Their seconds and bytes are those of the test rows."""

_LESS_IS_BETTER = {"rounds_to_best", "seconds_per_round", "bytes_per_round"}


def of_split(metrics: pd.DataFrame, split: str) -> pd.DataFrame:
    """Return the rows of one split. ConfigError if there are none."""
    rows: pd.DataFrame = metrics[metrics["split"] == split]
    if rows.empty:
        near = nearest(split, metrics["split"].unique())
        raise ConfigError(f"the metrics have no rows of split '{split}'{near}")
    return rows


def runs(metrics: pd.DataFrame, split: str = "test") -> pd.DataFrame:
    """Return a table with one row per algorithm (in order of appearance) and seed (ascending) of one split.

    Columns: algorithm, seed, then STATISTICS. Splits other than test have only the best accuracy, the rounds to
    it and the final accuracy; if no run has a second round, only the final accuracy.

    The best accuracy is the highest one over the rounds that have an accuracy; `rounds_to_best` is the first
    round that reaches it. Both are NaN if no round has an accuracy. The final accuracy is that of the last
    round, NaN if it diverged.

    Raises:
        ConfigError: the metrics have no such split.
    """
    rows = of_split(metrics, split)
    records = [
        {"algorithm": algorithm, "seed": seed, **_compute(run)}
        for algorithm in rows["algorithm"].unique()
        for seed, run in rows[rows["algorithm"] == algorithm].sort_values("round").groupby("seed")
    ]
    columns: tuple[str, ...] = STATISTICS
    if split != "test":
        several_rounds = rows.duplicated(["algorithm", "seed"]).any()
        columns = _OTHER_SPLITS if several_rounds else ("final_accuracy",)
    table: pd.DataFrame = pd.DataFrame(records, columns=["algorithm", "seed", *columns])
    return table


def measured(runs: pd.DataFrame) -> list[str]:
    """List the STATISTICS that these runs have."""
    return [statistic for statistic in STATISTICS if statistic in runs]


def over_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a table with one row per algorithm: `seeds`, then each `<statistic>_mean` and `<statistic>_std`.

    The deviation is the sample deviation (ddof=1), NaN for one seed. If a seed has no number, both are NaN: a
    mean over the other seeds would be too good for an algorithm that diverges.
    """
    records = []
    for algorithm in runs["algorithm"].unique():
        of = runs[runs["algorithm"] == algorithm].sort_values("seed")
        record: dict[str, object] = {"algorithm": algorithm, "seeds": len(of)}
        for column in measured(runs):
            record[f"{column}_mean"] = of[column].mean(skipna=False)
            record[f"{column}_std"] = of[column].std(ddof=1, skipna=False)
        records.append(record)
    table: pd.DataFrame = pd.DataFrame(records)
    return table


def paired(runs: pd.DataFrame, reference: str, column: str = "best_accuracy") -> pd.DataFrame:
    """Return a table with one row per other algorithm: its difference to `reference`, paired by seed.

    Columns: algorithm, mean, std (ddof=1), n (seeds that both have), wins (seeds where the algorithm is strictly
    better: a higher accuracy, or fewer rounds, seconds or bytes). If a seed has no number, mean and std are
    NaN, and the seed does not count as a win.

    Raises:
        ConfigError: the reference or the column is unknown.
    """
    algorithms = list(runs["algorithm"].unique())
    if reference not in algorithms:
        raise ConfigError(f"reference '{reference}' is not in this comparison{nearest(reference, algorithms)}")
    if column not in measured(runs):
        raise ConfigError(f"no statistic '{column}' of a run{nearest(column, measured(runs))}")
    by_seed = {name: runs[runs["algorithm"] == name].set_index("seed")[column].sort_index() for name in algorithms}
    sign = -1 if column in _LESS_IS_BETTER else 1
    records = []
    for algorithm in algorithms:
        if algorithm == reference:
            continue
        both = by_seed[algorithm].index.intersection(by_seed[reference].index)
        difference = by_seed[algorithm].loc[both] - by_seed[reference].loc[both]
        mean, deviation = difference.mean(skipna=False), difference.std(ddof=1, skipna=False)
        records.append((algorithm, mean, deviation, len(difference), int((sign * difference > 0).sum())))
    columns = ["algorithm", "mean", "std", "n", "wins"]
    table: pd.DataFrame = pd.DataFrame(records, columns=columns)
    return table


def _compute(run: pd.DataFrame) -> dict[str, float]:
    """Compute the STATISTICS of one run, whose rows are in the order of rounds."""
    best = float(run["accuracy"].max())
    return {
        "best_accuracy": best,
        "rounds_to_best": float(run.loc[run["accuracy"] == best, "round"].min()),
        "final_accuracy": float(run["accuracy"].iloc[-1]),
        "final_accuracy_released": float(run["accuracy_released"].iloc[-1]),
        "seconds_per_round": float(run["seconds"].mean(skipna=False)),
        "bytes_per_round": float((run["bytes_up"] + run["bytes_down"]).mean()),
    }
