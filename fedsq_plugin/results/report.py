"""Writes the report on a run directory (summary.json and plots) and makes the tables to print."""

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
"""Statistics whose paired differences are in summary.json, if a split has them."""


def write_report(directory: RunDirectory, label_counts: Sequence[Sequence[int]] | None = None) -> Group:
    """Write summary.json and the plots of a run from its metrics. Return the tables to print.

    summary.json gets "runs", "algorithms" and "paired" of the test split (accuracies in [0, 1]), and the same
    for every other split under "splits". Its other keys stay. Five of them are read:

    - "label_counts" (a list per silo; `label_counts` replaces it) and "classes" (their names) give labels.png.
    - "metric" is the name to show in place of accuracy.
    - "warm_start" ({seed: {"accuracy": in [0, 1]}}): the mean over seeds is drawn in accuracy.png.
    - "relu_ise" ({seed: result of ReLU-isation}) gives lambdas-seed<seed>.png.

    Splits in SPLITS with several rounds get accuracy-<split>.png. Algorithms are compared with FedAvg if it
    takes part, else with the first algorithm.

    Raises:
        ConfigError: the test split has no rows, or one of the five keys holds something else. Then nothing is
            written.
    """
    metrics = directory.metrics
    of_test = runs(metrics)
    others = {split: runs(metrics, split) for split in metrics["split"].unique() if split != "test"}
    summary = directory.summary
    if label_counts is not None:
        summary["label_counts"] = [list(row) for row in label_counts]
    source = directory.path / "summary.json"
    warm_start = _read_warm_start(summary.get("warm_start"), source)
    counts, classes = _read_labels(summary.get("label_counts"), summary.get("classes"), source)
    metric = _read_metric(summary.get("metric"), source)
    profiles = _read_profiles(summary.get("relu_ise"), source)
    # The summary is written last: if it exists, the plots exist too.
    for seed, (history, learned, target) in profiles.items():
        lambda_profile(history, learned, target, directory.path_for(f"lambdas-seed{seed}.png"))
    if counts is not None:
        label_distribution(counts, directory.path_for("labels.png"), classes)
    accuracy_over_rounds(metrics, directory.path_for("accuracy.png"), warm_start=warm_start, metric=metric)
    for split, of_runs in others.items():
        # Names of other splits may not be valid file names. Runs of one round have no best accuracy.
        if split in SPLITS and "best_accuracy" in of_runs:
            path = directory.path_for(f"accuracy-{split}.png")
            accuracy_over_rounds(metrics, path, split, metric=metric)
    summary.update(_summarise(of_test))
    if others:
        summary["splits"] = {split: _summarise(of_runs) for split, of_runs in others.items()}
    directory.write_summary(summary)
    tables: list[RenderableType] = [Text(SPLITS["test"])] if others else []
    tables.append(_make_table(of_test, metric))
    for split, of_runs in others.items():
        tables += ["", Text(SPLITS.get(split, f"split {split}")), _make_table(of_runs, metric)]
    return Group(*tables)


def _choose_reference(of_runs: pd.DataFrame) -> str:
    algorithms = list(of_runs["algorithm"].unique())
    return "FedAvg" if "FedAvg" in algorithms else algorithms[0]


def _make_table(of_runs: pd.DataFrame, metric: str) -> RenderableType:
    if len(of_runs) == 1:
        return run_table(of_runs, metric)
    return compare_table(of_runs, _choose_reference(of_runs), metric)


def _summarise(of_runs: pd.DataFrame) -> dict[str, Any]:
    """Return "runs", "algorithms", and "paired": the reference, then {statistic: {algorithm: differences}}."""
    reference = _choose_reference(of_runs)
    return {
        "runs": [_restore_integer(run) for run in of_runs.to_dict("records")],
        "algorithms": {
            row["algorithm"]: {
                "seeds": int(row["seeds"]),
                **{s: {"mean": row[f"{s}_mean"], "std": row[f"{s}_std"]} for s in measured(of_runs)},
            }
            for row in over_seeds(of_runs).to_dict("records")
        },
        "paired": {
            "reference": reference,
            **{
                statistic: {
                    row["algorithm"]: {key: row[key] for key in ("mean", "std", "n", "wins")}
                    for row in paired(of_runs, reference, statistic).to_dict("records")
                }
                for statistic in PAIRED
                if statistic in of_runs
            },
        },
    }


def _restore_integer(run: dict[Any, Any]) -> dict[str, Any]:
    """Make `rounds_to_best` an int or None. pandas stores a column with NaN as floats."""
    if "rounds_to_best" not in run:
        return run
    best = run["rounds_to_best"]
    return {**run, "rounds_to_best": None if pd.isna(best) else int(best)}


def _read_warm_start(value: Any, source: Path) -> float | None:
    """Return the mean accuracy over seeds, without seeds whose accuracy is null (NaN)."""
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


def _read_metric(value: Any, source: Path) -> str:
    if value is not None and not (isinstance(value, str) and value and value.isprintable()):
        raise ConfigError(f"{source}: metric is {value!r}; expected the name of what was measured")
    return value or "accuracy"


def _read_profiles(value: Any, source: Path) -> dict[str, tuple[Any, int, Any]]:
    """Return for each seed the history of λ, the number of epochs that learned it, and its targets."""
    try:
        return {
            str(int(seed)): (done["history"], int(done["learn_epochs"]), done["target"])
            for seed, done in (value or {}).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ConfigError(f"{source}: relu_ise holds something else than `fedsq run` wrote") from None


def _read_labels(counts: Any, classes: Any, source: Path) -> tuple[list[list[int]] | None, list[str] | None]:
    if counts is not None and not (isinstance(counts, list) and all(isinstance(row, list) for row in counts)):
        raise ConfigError(f"{source}: label_counts is a {type(counts).__name__}; expected a list for each silo")
    if classes is not None and not isinstance(classes, list):
        raise ConfigError(f"{source}: classes is a {type(classes).__name__}; expected a list of names")
    return counts, None if classes is None else [str(name) for name in classes]
