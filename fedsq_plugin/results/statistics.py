"""Statistics over rounds and over seeds, as the FedSQ paper's reviewers asked for them.

Best accuracy and rounds-to-best are the paper's metrics (arXiv 2604.02990). Every sum runs in the
order of rounds or seeds, so the order of the rows in metrics.csv does not change a bit.
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
"""What `runs` computes of each run; accuracies in [0, 1], seconds and bytes per round."""

_OTHER_SPLITS = ("best_accuracy", "rounds_to_best", "final_accuracy")
"""Those of a split other than test, whose rows repeat the test rows' seconds and bytes."""

_LESS_IS_BETTER = {"rounds_to_best", "seconds_per_round", "bytes_per_round"}


def of_split(metrics: pd.DataFrame, split: str) -> pd.DataFrame:
    """The rows of one split. ConfigError if there are none."""
    rows: pd.DataFrame = metrics[metrics["split"] == split]
    if rows.empty:
        near = nearest(split, metrics["split"].unique())
        raise ConfigError(f"the metrics have no rows of split '{split}'{near}")
    return rows


def runs(metrics: pd.DataFrame, split: str = "test") -> pd.DataFrame:
    """One row per algorithm (in order of appearance) and seed (ascending), from one split.

    Columns: algorithm, seed, then STATISTICS; of a split other than test only the best accuracy, the
    rounds to it and the final accuracy, or the final accuracy alone where no run has a second round.
    Best is the highest accuracy over the rounds, rounds without one left out; `rounds_to_best` the
    first round that reaches it; both are NaN if no round has an accuracy. Final is the last round's,
    NaN if it diverged. ConfigError without such a split.
    """
    rows = of_split(metrics, split)
    records = [
        {"algorithm": algorithm, "seed": seed, **_run(run)}
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
    """The STATISTICS that these runs have."""
    return [statistic for statistic in STATISTICS if statistic in runs]


def over_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per algorithm: `seeds`, then `<statistic>_mean` and `<statistic>_std` of each.

    The deviation is the sample's (ddof=1), NaN for one seed. A seed without a number makes both
    NaN: a mean over the seeds that survived would flatter a method that diverges.
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
    """One row per other algorithm: its difference to `reference` over the seeds that both have.

    Columns: algorithm, mean, std (ddof=1), n (seeds both have), wins (seeds where it is strictly
    better: higher for an accuracy, lower for rounds, seconds and bytes). A seed without a number
    makes mean and std NaN and is nobody's win. ConfigError for an unknown reference or column.
    """
    algorithms = list(runs["algorithm"].unique())
    if reference not in algorithms:
        raise ConfigError(f"reference '{reference}' is not in this comparison{nearest(reference, algorithms)}")
    if column not in measured(runs):
        raise ConfigError(f"no statistic '{column}' of a run{nearest(column, measured(runs))}")
    by_seed = {
        algorithm: runs[runs["algorithm"] == algorithm].set_index("seed")[column].sort_index()
        for algorithm in algorithms
    }
    sign = -1 if column in _LESS_IS_BETTER else 1
    records = []
    for algorithm in algorithms:
        if algorithm == reference:
            continue
        both = by_seed[algorithm].index.intersection(by_seed[reference].index)
        difference = by_seed[algorithm].loc[both] - by_seed[reference].loc[both]
        records.append(
            {
                "algorithm": algorithm,
                "mean": difference.mean(skipna=False),
                "std": difference.std(ddof=1, skipna=False),
                "n": len(difference),
                "wins": int((sign * difference > 0).sum()),
            }
        )
    columns = ["algorithm", "mean", "std", "n", "wins"]
    table: pd.DataFrame = pd.DataFrame(records, columns=columns)
    return table


def _run(run: pd.DataFrame) -> dict[str, float]:
    """STATISTICS of the rows of one run, which are in the order of rounds."""
    best = float(run["accuracy"].max())
    return {
        "best_accuracy": best,
        "rounds_to_best": float(run.loc[run["accuracy"] == best, "round"].min()),
        "final_accuracy": float(run["accuracy"].iloc[-1]),
        "final_accuracy_released": float(run["accuracy_released"].iloc[-1]),
        "seconds_per_round": float(run["seconds"].mean(skipna=False)),
        "bytes_per_round": float((run["bytes_up"] + run["bytes_down"]).mean()),
    }
