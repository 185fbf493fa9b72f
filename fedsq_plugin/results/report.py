"""The report on a run directory: summary.json, the plots, and the tables to print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.text import Text

from ..errors import ConfigError
from .lambdas import lambda_profile
from .metrics import SPLITS
from .plots import accuracy_over_rounds, label_distribution
from .rundir import RunDirectory
from .statistics import measured, over_seeds, paired, runs
from .tables import compare_table, run_table

PAIRED = ("best_accuracy", "rounds_to_best", "final_accuracy", "final_accuracy_released")
"""The statistics whose paired differences are kept in summary.json, where a split has them."""


def write_report(directory: RunDirectory, label_counts: Sequence[Sequence[int]] | None = None) -> Group:
    """Write summary.json and the plots of a run from its metrics; return the tables to print.

    summary.json gets "runs", "algorithms" and "paired" of the test split, accuracies in [0, 1], and
    the same of every other split in "splits"; it keeps its other keys. Five of those are read:
    "label_counts" (a list per silo, which `label_counts` replaces) and "classes" (their names) make
    labels.png; "metric" names what is measured where this says accuracy; "warm_start" ({seed: {"accuracy":
    in [0, 1]}}) is drawn, as the mean over seeds, in accuracy.png; "relu_ise" ({seed: what ReLU-isation
    did}) makes lambdas-seed<seed>.png. The splits of SPLITS that have several rounds get an
    accuracy-<split>.png. In every
    split the reference is FedAvg where it takes part, else the first algorithm. ConfigError, before
    anything is written, if the test split has no rows or one of the five keys holds something else.
    """
    metrics = directory.metrics
    of_test = runs(metrics)
    others = {split: runs(metrics, split) for split in metrics["split"].unique() if split != "test"}
    summary = directory.summary
    if label_counts is not None:
        summary["label_counts"] = [list(row) for row in label_counts]
    source = directory.path / "summary.json"
    warm_start = _warm_start(summary.get("warm_start"), source)
    counts, classes = _labels(summary.get("label_counts"), summary.get("classes"), source)
    metric = _metric(summary.get("metric"), source)
    profiles = _profiles(summary.get("relu_ise"), source)
    # The plots first: a summary that lies there says that its plots do too.
    for seed, (history, learned, target) in profiles.items():
        lambda_profile(history, learned, target, directory.path_for(f"lambdas-seed{seed}.png"))
    if counts is not None:
        label_distribution(counts, directory.path_for("labels.png"), classes)
    accuracy_over_rounds(metrics, directory.path_for("accuracy.png"), warm_start=warm_start, metric=metric)
    for split, of_runs in others.items():
        # Other splits' names may be no file names; runs of one round have no best one.
        if split in SPLITS and "best_accuracy" in of_runs:
            path = directory.path_for(f"accuracy-{split}.png")
            accuracy_over_rounds(metrics, path, split, metric=metric)
    summary.update(_summary(of_test))
    if others:
        summary["splits"] = {split: _summary(of_runs) for split, of_runs in others.items()}
    directory.write_summary(summary)
    tables: list[RenderableType] = [Text(SPLITS["test"])] if others else []
    tables.append(_table(of_test, metric))
    for split, of_runs in others.items():
        tables += ["", Text(SPLITS.get(split, f"split {split}")), _table(of_runs, metric)]
    return Group(*tables)


def _reference(of_runs: pd.DataFrame) -> str:
    algorithms = list(of_runs["algorithm"].unique())
    return "FedAvg" if "FedAvg" in algorithms else algorithms[0]


def _table(of_runs: pd.DataFrame, metric: str) -> RenderableType:
    if len(of_runs) == 1:
        return run_table(of_runs, metric)
    return compare_table(of_runs, _reference(of_runs), metric)


def _summary(of_runs: pd.DataFrame) -> dict[str, Any]:
    return {
        "runs": [_whole(run) for run in of_runs.to_dict("records")],
        "algorithms": _algorithms(of_runs),
        "paired": _paired(of_runs, _reference(of_runs)),
    }


def _algorithms(of_runs: pd.DataFrame) -> dict[str, Any]:
    return {
        row["algorithm"]: {
            "seeds": int(row["seeds"]),
            **{s: {"mean": row[f"{s}_mean"], "std": row[f"{s}_std"]} for s in measured(of_runs)},
        }
        for row in over_seeds(of_runs).to_dict("records")
    }


def _paired(of_runs: pd.DataFrame, reference: str) -> dict[str, Any]:
    """{"reference": its name, statistic: {algorithm: {mean, std, n, wins}}}."""
    return {
        "reference": reference,
        **{
            statistic: {
                row["algorithm"]: {key: row[key] for key in ("mean", "std", "n", "wins")}
                for row in paired(of_runs, reference, statistic).to_dict("records")
            }
            for statistic in PAIRED
            if statistic in of_runs
        },
    }


def _whole(run: dict[Any, Any]) -> dict[str, Any]:
    """The row of one run, its round number as a whole one (a column with NaN holds floats)."""
    if "rounds_to_best" not in run:
        return run
    best = run["rounds_to_best"]
    return {**run, "rounds_to_best": None if pd.isna(best) else int(best)}


def _warm_start(value: Any, source: Path) -> float | None:
    """The mean accuracy over seeds; seeds whose accuracy was NaN, null in JSON, left out."""
    try:
        found = [seed["accuracy"] for seed in (value or {}).values()]
        accuracies = [float(accuracy) for accuracy in found if accuracy is not None]
    except (AttributeError, KeyError, TypeError, ValueError):
        accuracies = [-1.0]
    if not all(0 <= accuracy <= 1 for accuracy in accuracies):
        raise ConfigError(
            f"{source}: warm_start is {value!r}; "
            "expected an accuracy from 0 to 1 per seed, as {'0': {'accuracy': 0.5}}"
        )
    return sum(accuracies) / len(accuracies) if accuracies else None


def _metric(value: Any, source: Path) -> str:
    if value is not None and not (isinstance(value, str) and value and value.isprintable()):
        raise ConfigError(f"{source}: metric is {value!r}; expected the name of what was measured")
    return value or "accuracy"


def _profiles(value: Any, source: Path) -> dict[str, tuple[Any, int, Any]]:
    """By seed: the history of λ, the epochs that learned it, its targets."""
    try:
        return {
            str(int(seed)): (done["history"], int(done["learn_epochs"]), done["target"])
            for seed, done in (value or {}).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ConfigError(f"{source}: relu_ise holds something else than `fedsq run` wrote") from None


def _labels(counts: Any, classes: Any, source: Path) -> tuple[list[list[int]] | None, list[str] | None]:
    if counts is not None and not (_is_list(counts) and all(map(_is_list, counts))):
        kind = type(counts).__name__
        raise ConfigError(f"{source}: label_counts is a {kind}; expected a list for each silo")
    if classes is not None and not _is_list(classes):
        kind = type(classes).__name__
        raise ConfigError(f"{source}: classes is a {kind}; expected a list of names")
    return counts, None if classes is None else [str(name) for name in classes]


def _is_list(value: Any) -> bool:
    return isinstance(value, list)
