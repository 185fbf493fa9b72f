"""What `run` and `compare` do with the rounds they are told of; the FedML run itself is a stand-in here
(tests/test_cli.py runs the real one)."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from rich.console import Console
from torch import nn

from fedsq_plugin import runs
from fedsq_plugin.errors import ConfigError, RunError, UpdateError
from fedsq_plugin.federation.evaluate import Metrics
from fedsq_plugin.federation.record import RoundRecord
from fedsq_plugin.hosts.fedml.run import Outcome, Start

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"


def recipe(**options: Any) -> dict[str, dict[str, Any]]:
    families: dict[str, dict[str, Any]] = yaml.safe_load(QUICKSTART.read_text())
    families["train_args"].update(comm_round=3)
    for key, value in options.items():
        home = next(family for family, known in families.items() if key in known)
        families[home][key] = value
    return families


Execute = Callable[..., Outcome]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[Execute], io.StringIO]:
    def use(execute: Execute) -> io.StringIO:
        monkeypatch.setattr(runs, "execute", execute)
        monkeypatch.setattr(runs, "check", lambda families: [])
        return io.StringIO()

    return use


def start(on_start: Callable[[Start], None]) -> None:
    on_start(
        Start("cpu", [[3, 1], [0, 4]], ["a", "b"], Metrics(2.0, 0.5, 10), ["head fc: newly initialised"])
    )


def record(number: int, accuracy: float | None = 0.5, **options: Any) -> RoundRecord:
    metrics = None if accuracy is None else Metrics(1.0, accuracy, 10)
    return RoundRecord(number, 1.5, 0.5, 10, 20, metrics, metrics, **options)


def good(families: Any, log_file: Path, on_start: Any, on_round: Any) -> Outcome:
    start(on_start)
    for number in (1, 2, 3):
        on_round(record(number, 0.1 * number))
    return Outcome(nn.Linear(2, 2), None, "fc")


def test_how_the_model_came_by_its_weights_is_said(told: Any, tmp_path: Path) -> None:
    out = told(good)
    runs.run(recipe(), tmp_path / "out", Console(file=out))
    assert "FedSQ seed 0: head fc: newly initialised" in out.getvalue()


def test_skipped_silos_are_said(told: Any, tmp_path: Path) -> None:
    def execute(families: Any, log_file: Path, on_start: Any, on_round: Any) -> Outcome:
        start(on_start)
        on_round(record(1, notes=["round 1: silo 2 has no samples and is skipped"]))
        return Outcome(nn.Linear(2, 2), None, None)

    out = told(execute)
    runs.run(recipe(), tmp_path / "out", Console(file=out, width=200))
    assert "note: FedSQ seed 0, round 1: silo 2 has no samples and is skipped" in out.getvalue()


def test_a_model_without_a_warm_start_has_no_warm_start_in_the_summary(told: Any, tmp_path: Path) -> None:
    told(good)
    runs.run(recipe(warm_start="none"), tmp_path / "out", Console(file=io.StringIO()))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "warm_start" not in summary
    assert summary["initial"] == {"0": {"accuracy": 0.5, "loss": 2.0}}


def test_rounds_without_an_evaluation_have_a_row(told: Any, tmp_path: Path) -> None:
    def execute(families: Any, log_file: Path, on_start: Any, on_round: Any) -> Outcome:
        start(on_start)
        for number, accuracy in ((1, 0.4), (2, None), (3, 0.6)):
            on_round(record(number, accuracy))
        return Outcome(nn.Linear(2, 2), None, None)

    told(execute)
    runs.run(recipe(), tmp_path / "out", Console(file=io.StringIO()))
    metrics = pd.read_csv(tmp_path / "out" / "metrics.csv")
    assert metrics.accuracy.isna().tolist() == [False, True, False]
    assert metrics.seconds.tolist() == [1.5, 1.5, 1.5]


def test_a_run_that_ends_early_does_not_end_the_comparison(told: Any, tmp_path: Path) -> None:
    def execute(families: Any, log_file: Path, on_start: Any, on_round: Any) -> Outcome:
        if families["train_args"]["federated_optimizer"] == "FedProx":
            start(on_start)
            on_round(record(1))
            raise UpdateError("no update is left to aggregate: round 2: NaN")
        return good(families, log_file, on_start, on_round)

    out = told(execute)
    with pytest.raises(RunError, match=r"^FedProx seed 0 ended early: no update is left"):
        runs.compare(recipe(), ["FedAvg", "FedProx", "FedSQ"], [0], tmp_path / "out", Console(file=out))
    metrics = pd.read_csv(tmp_path / "out" / "metrics.csv")
    assert metrics.groupby("algorithm").size().to_dict() == {"FedAvg": 3, "FedProx": 1, "FedSQ": 3}
    assert "difference to FedAvg" in out.getvalue()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["ended_early"] == [
        "FedProx seed 0 ended early: no update is left to aggregate: round 2: NaN"
    ]


def test_the_same_command_may_be_given_again_after_a_mistake(told: Any, tmp_path: Path) -> None:
    def execute(*_: Any) -> Outcome:
        raise ConfigError("no such data")

    told(execute)
    with pytest.raises(ConfigError):
        runs.run(recipe(), tmp_path / "out", Console(file=io.StringIO()))
    told(good)
    runs.run(recipe(), tmp_path / "out", Console(file=io.StringIO()))


def test_what_check_finds_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"partition_alpha.*comm_round"):
        runs.run(recipe(partition_alpha=-1, comm_round=0), tmp_path / "out", Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()
