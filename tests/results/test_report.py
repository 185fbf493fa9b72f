from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.results.report import write_report
from fedsq_plugin.results.rundir import RunDirectory

from .rows import NAN, table

TWO = {("FedSQ", 0): [0.25, 0.75], ("FedSQ", 1): [0.5, NAN], ("FedAvg", 0): [0.5, 0.5], ("FedAvg", 1): [0.25, 0.25]}


SILOS = {("FedSQ", 0): [0.25, 0.75], ("FedSQ", 1): [0.75, 0.25], ("FedAvg", 0): [0.5, 0.5], ("FedAvg", 1): [0.25, 0.5]}
TUNED = {("FedSQ", 0): [1.0], ("FedSQ", 1): [0.5], ("FedRep", 1): [0.75]}


def directory(
    path: Path,
    accuracies: Mapping[tuple[str, int], Sequence[float]],
    **splits: Mapping[tuple[str, int], Sequence[float]],
) -> RunDirectory:
    """A run with these rows of the test split, and of others that have no released accuracy."""
    run = RunDirectory.create(path / "run")
    others = [table(of, split, accuracy_released=NAN) for split, of in splits.items()]
    for rows in (table(accuracies), *others):
        run.add(rows.to_dict("records"))  # type: ignore[arg-type]
    return run


def text(shown: RenderableType) -> str:
    file = io.StringIO()
    Console(width=100, file=file).print(shown)
    return file.getvalue()


def strict(path: Path) -> Any:
    """The JSON in `path`, refusing the NaN and Infinity that Python's own reader accepts."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(path.read_text(), parse_constant=refuse)


def test_summary_by_hand(tmp_path: Path) -> None:
    run = directory(tmp_path, TWO)
    run.write_summary({"note": "kept", "runs": "replaced"})
    write_report(run)
    summary = strict(run.path / "summary.json")
    assert summary["note"] == "kept"
    assert [(r["algorithm"], r["seed"]) for r in summary["runs"]] == list(TWO)
    assert summary["runs"][1] == {
        "algorithm": "FedSQ",
        "seed": 1,
        "best_accuracy": 0.5,
        "rounds_to_best": 1,
        "final_accuracy": None,
        "final_accuracy_released": 0.25,
        "seconds_per_round": 2.0,
        "bytes_per_round": 7_000_000.0,
    }
    fedsq = summary["algorithms"]["FedSQ"]
    # .75 and .5: mean .625, deviations .125 both: sqrt(2 / 64) = .17678
    assert fedsq["seeds"] == 2
    assert fedsq["best_accuracy"] == {"mean": 0.625, "std": pytest.approx(0.1767767)}
    assert fedsq["final_accuracy"] == {"mean": None, "std": None}
    assert summary["paired"]["reference"] == "FedAvg"
    # .75 - .5 and .5 - .25
    difference = {"mean": 0.25, "std": 0.0, "n": 2, "wins": 2}
    assert summary["paired"]["best_accuracy"] == {"FedSQ": difference}


def test_splits_by_hand(tmp_path: Path) -> None:
    write_report(directory(tmp_path / "alone", TWO))
    alone = strict(tmp_path / "alone" / "run" / "summary.json")
    run = directory(tmp_path, TWO, silos=SILOS, silos_tuned=TUNED)
    write_report(run)
    summary = strict(run.path / "summary.json")
    assert "splits" not in alone
    assert {key: summary[key] for key in alone} == alone and set(summary) - set(alone) == {"splits"}
    silos, tuned = summary["splits"]["silos"], summary["splits"]["silos_tuned"]
    best = {"best_accuracy": 0.75, "rounds_to_best": 1, "final_accuracy": 0.25}
    assert silos["runs"][1] == {"algorithm": "FedSQ", "seed": 1, **best}
    # rounds to best 2 and 1: mean 1.5, deviations .5 both: sqrt(1 / 2)
    rounds = {"mean": 1.5, "std": pytest.approx(0.7071068)}
    assert silos["algorithms"]["FedSQ"]["rounds_to_best"] == rounds
    assert silos["algorithms"]["FedAvg"]["best_accuracy"] == {"mean": 0.5, "std": 0.0}
    # .75 - .5 twice; rounds 2 - 1 and 1 - 2; final .75 - .5 and .25 - .5
    assert silos["paired"] == {
        "reference": "FedAvg",
        "best_accuracy": {"FedSQ": {"mean": 0.25, "std": 0.0, "n": 2, "wins": 2}},
        "rounds_to_best": {"FedSQ": {"mean": 0.0, "std": pytest.approx(2**0.5), "n": 2, "wins": 1}},
        "final_accuracy": {"FedSQ": {"mean": 0.0, "std": pytest.approx(0.125**0.5), "n": 2, "wins": 1}},
    }
    assert tuned["runs"][0] == {"algorithm": "FedSQ", "seed": 0, "final_accuracy": 1.0}
    assert set(tuned["algorithms"]["FedRep"]) == {"seeds", "final_accuracy"}
    # FedAvg was not tuned, so FedSQ is the reference; seed 1 is all that both have: .75 - .5
    assert tuned["paired"] == {
        "reference": "FedSQ",
        "final_accuracy": {"FedRep": {"mean": 0.25, "std": None, "n": 1, "wins": 1}},
    }


def test_every_split_has_its_table_under_a_line(tmp_path: Path) -> None:
    shown = text(write_report(directory(tmp_path, TWO, silos=SILOS, silos_tuned=TUNED, **{"[x]/y": TUNED})))
    line = "each silo's own model on its own test data"
    lines = [line.rstrip() for line in shown.splitlines()]
    places = [lines.index(title) for title in (line, f"{line}, after the final fine-tuning", "split [x]/y")]
    test, silos, tuned = ("\n".join(lines[first:last]) for first, last in pairwise([0, *places]))
    assert "released" in test and "MB" in test and "difference to FedAvg" in test
    assert "released" not in silos and "MB" not in silos and "difference to FedAvg" in silos
    assert "+25.0 ± 0.0 points (2/2 seeds)" in silos
    assert "best" not in tuned and "difference to FedSQ" in tuned and "+25.0 points (1/1 seed)" in tuned


def test_a_single_run_has_a_row_in_every_table(tmp_path: Path) -> None:
    run = directory(
        tmp_path, {("FedSQ", 3): [0.5, 0.25]}, silos={("FedSQ", 3): [0.625, 0.75]}, silos_tuned={("FedSQ", 3): [1]}
    )
    shown = text(write_report(run))
    rows = [line.split() for line in shown.splitlines() if line.startswith("FedSQ")]
    assert rows == [
        ["FedSQ", "50.0", "1", "25.0", "25.0", "2.0", "7.0"],
        ["FedSQ", "75.0", "2", "75.0"],
        ["FedSQ", "100.0"],
    ]
    assert "seeds" not in shown and "difference" not in shown


def test_splits_of_several_rounds_have_pictures(tmp_path: Path) -> None:
    run = directory(tmp_path, TWO, silos=SILOS, silos_tuned=TUNED, **{"../x": SILOS})
    write_report(run)
    pictures = {"accuracy.png", "accuracy-silos.png"}
    assert {file.name for file in run.path.iterdir()} == {"metrics.csv", "summary.json", *pictures}
    short = directory(tmp_path / "short", {("FedSQ", 0): [0.5]}, silos={("FedSQ", 0): [0.5]})
    write_report(short)
    assert {file.name for file in short.path.glob("*.png")} == {"accuracy.png"}


def test_a_second_report_is_the_same(tmp_path: Path) -> None:
    run = directory(tmp_path, TWO)
    write_report(run, label_counts=[[1, 2], [3, 4]])
    before = {file.name: file.read_bytes() for file in run.path.iterdir()}
    assert set(before) == {"metrics.csv", "summary.json", "accuracy.png", "labels.png"}
    write_report(RunDirectory.open(run.path))
    assert {file.name: file.read_bytes() for file in run.path.iterdir()} == before
    assert strict(run.path / "summary.json")["label_counts"] == [[1, 2], [3, 4]]


def test_without_label_counts_there_is_no_such_plot(tmp_path: Path) -> None:
    run = directory(tmp_path, TWO)
    write_report(run)
    assert not (run.path / "labels.png").exists() and (run.path / "accuracy.png").exists()


def test_the_table_fits_the_run(tmp_path: Path) -> None:
    one = text(write_report(directory(tmp_path / "one", {("FedSQ", 3): [0.5]})))
    assert "seeds" not in one and "50.0" in one
    seeds = {("FedSQ", 0): [0.5], ("FedSQ", 1): [0.5]}
    assert "50.0 ± 0.0" in text(write_report(directory(tmp_path / "seeds", seeds)))
    two = text(write_report(directory(tmp_path / "two", TWO)))
    assert "difference to FedAvg" in two and "+25.0 ± 0.0 points (2/2 seeds)" in two
    others = {("FedBN", 0): [0.5], ("FedSQ", 0): [0.5]}
    assert "difference to FedBN" in text(write_report(directory(tmp_path / "others", others)))


@pytest.mark.parametrize(
    ("summary", "message"),
    [
        ({"label_counts": {"a": 1}}, "label_counts is a dict"),
        ({"label_counts": [1, 2]}, "expected a list for each silo"),
        ({"label_counts": [[1, 2]], "classes": ["a"]}, "1 names for the 2 classes"),
        ({"label_counts": [[1, 2]], "classes": "ab"}, "classes is a str"),
        ({"label_counts": [[1], [2, 3]]}, "no full table"),
        ({"warm_start": 0.5}, "warm_start is 0.5; expected an accuracy from 0 to 1 per seed"),
        ({"warm_start": {"0": {"loss": 1}}}, "warm_start is "),
        ({"warm_start": {"0": {"accuracy": 57.9}}}, "warm_start is "),
    ],
)
def test_a_bad_summary_is_refused_before_anything_is_written(
    tmp_path: Path, summary: dict[str, Any], message: str
) -> None:
    run = directory(tmp_path, TWO)
    run.write_summary(summary)
    with pytest.raises(ConfigError, match=message) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    assert run.summary == summary and not list(run.path.glob("*.png"))


def test_no_rows_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rows of split 'test'"):
        write_report(RunDirectory.create(tmp_path / "run"))


def test_the_plots_get_what_the_runner_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    module = "fedsq_plugin.results.report"
    monkeypatch.setattr(f"{module}.accuracy_over_rounds", lambda *_, **options: given.update(options))
    monkeypatch.setattr(
        f"{module}.label_distribution", lambda counts, _, classes: given.update(counts=counts, classes=classes)
    )
    run = directory(tmp_path, TWO)
    # (.25 + .5) / 2 = .375; seed 2 had none
    warm = {"0": {"accuracy": 0.25}, "1": {"accuracy": 0.5}, "2": {"accuracy": NAN}}
    stored = {"warm_start": warm, "label_counts": [[1, 2]], "classes": ["no", "yes"], "metric": "Dice"}
    run.write_summary(stored)
    write_report(run)
    assert given == {"warm_start": 0.375, "counts": [[1, 2]], "classes": ["no", "yes"], "metric": "Dice"}


def test_without_a_warm_start_none_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    module = "fedsq_plugin.results.report"
    monkeypatch.setattr(f"{module}.accuracy_over_rounds", lambda *_, **options: given.update(options))
    write_report(directory(tmp_path, TWO))
    assert given == {"warm_start": None, "metric": "accuracy"}
