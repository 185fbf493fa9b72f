"""What `run` and `compare` do with the rounds they are told of; the FedML run itself is a stand-in here
(tests/test_cli.py runs the real one)."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from torch import nn

from fedsq_plugin import cli
from fedsq_plugin.algorithms import algorithms
from fedsq_plugin.errors import ConfigError, RunError, UpdateError
from fedsq_plugin.federation import state_files
from fedsq_plugin.federation.algorithm import CHOICES
from fedsq_plugin.federation.evaluate import Metrics
from fedsq_plugin.federation.record import RoundRecord
from fedsq_plugin.hosts.fedml import execute as fedml_runs
from fedsq_plugin.run import run as runs
from fedsq_plugin.run.compare import compare
from fedsq_plugin.run.host import Outcome, Start
from fedsq_plugin.run.reluise import Reluised

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


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
        monkeypatch.setattr(fedml_runs, "execute", execute)
        monkeypatch.setattr(runs, "check", lambda families: [])
        return io.StringIO()

    return use


def start(on_start: Callable[[Start], None], reluised: Reluised | None = None) -> None:
    notes, metrics = ["head fc: newly initialised"], Metrics(2.0, 0.5, 10)
    on_start(Start("cpu", [[3, 1], [0, 4]], ["a", "b"], metrics, reluised=reluised, notes=notes))


def record(number: int, accuracy: float | None = 0.5, **options: Any) -> RoundRecord:
    metrics = None if accuracy is None else Metrics(1.0, accuracy, 10)
    return RoundRecord(number, 1.5, 0.5, 10, 20, metrics, metrics, **options)


PERSONAL = Metrics(0.7, 0.6, 30)
TUNED = Metrics(0.5, 0.8, 30)


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


def test_an_algorithm_may_bring_options_of_its_own(told: Any, tmp_path: Path) -> None:
    seen: list[Any] = []

    def execute(families: Any, log_file: Path, on_start: Any, on_round: Any) -> Outcome:
        ours = families["fedsq_args"]
        seen.append((ours.get("structural_copy"), ours.get("structural_rounds")))
        return good(families, log_file, on_start, on_round)

    told(execute)
    other = "FedSQ:structural_copy=refresh:structural_rounds=2"
    compare(recipe(), ["FedSQ", other], [0], tmp_path / "out", Console(file=io.StringIO()))
    assert seen == [(None, None), ("refresh", 2)]
    metrics = pd.read_csv(tmp_path / "out" / "metrics.csv")
    assert metrics.algorithm.unique().tolist() == ["FedSQ", other]
    assert (tmp_path / "out" / "FedSQ-structural_copy-refresh-structural_rounds-2-seed0.json").exists()
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["fedsq_args"]["structural_copy"] == "fixed"  # the recipe's


def test_what_stayed_with_the_silos_is_saved(told: Any, tmp_path: Path) -> None:
    def execute(families: Any, log_file: Path, on_start: Any, on_round: Any) -> Outcome:
        good(families, log_file, on_start, on_round)
        return Outcome(nn.Linear(2, 2), None, "fc", {"0/fc.bias": torch.ones(2)})

    told(execute)
    runs.run(recipe(), tmp_path / "out", Console(file=io.StringIO()))
    tensors, about = state_files.load(tmp_path / "out" / "FedSQ-seed0-silos.safetensors")
    assert tensors["0/fc.bias"].tolist() == [1.0, 1.0]
    assert "silo" in about["content"]


def test_a_run_that_ends_early_does_not_end_the_comparison(told: Any, tmp_path: Path) -> None:
    def execute(families: Any, log_file: Path, on_start: Any, on_round: Any) -> Outcome:
        if families["train_args"]["federated_optimizer"] == "FedProx":
            start(on_start)
            on_round(record(1))
            raise UpdateError("no update is left to aggregate: round 2: NaN")
        return good(families, log_file, on_start, on_round)

    out = told(execute)
    with pytest.raises(RunError, match=r"^FedProx seed 0 ended early: no update is left"):
        compare(recipe(), ["FedAvg", "FedProx", "FedSQ"], [0], tmp_path / "out", Console(file=out))
    metrics = pd.read_csv(tmp_path / "out" / "metrics.csv")
    assert metrics.groupby("algorithm").size().to_dict() == {"FedAvg": 3, "FedProx": 1, "FedSQ": 3}
    assert "difference to FedAvg" in out.getvalue()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["ended_early"] == ["FedProx seed 0 ended early: no update is left to aggregate: round 2: NaN"]


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


def test_silos_own_models_have_rows_of_their_own(told: Any, tmp_path: Path) -> None:
    def execute(families: Any, log_file: Path, on_start: Any, on_round: Any) -> Outcome:
        start(on_start)
        on_round(record(1, silos=PERSONAL))
        on_round(record(2, None))
        on_round(record(3, silos=PERSONAL, silos_tuned=TUNED))
        return Outcome(nn.Linear(2, 2), None, "fc")

    told(execute)
    runs.run(recipe(), tmp_path / "out", Console(file=io.StringIO()))
    metrics = pd.read_csv(tmp_path / "out" / "metrics.csv")
    assert list(zip(metrics["round"], metrics.split, strict=True)) == [
        *((1, "test"), (1, "silos"), (2, "test"), (3, "test"), (3, "silos"), (3, "silos_tuned"))
    ]
    by_split = metrics[metrics["round"] == 3].set_index("split")
    assert by_split.loss.to_dict() == {"test": 1.0, "silos": 0.7, "silos_tuned": 0.5}
    assert by_split.accuracy.to_dict() == {"test": 0.5, "silos": 0.6, "silos_tuned": 0.8}
    assert by_split.accuracy_released.notna().to_dict() == {**{"test": True, "silos": False, "silos_tuned": False}}
    assert set(by_split.bytes_up) == {10}


def test_what_relu_isation_did_is_in_the_summary_and_a_picture(told: Any, tmp_path: Path) -> None:
    history = [{"1": value} for value in (1.0, 1.5, 2.0, 4.0, 9.0, 19.0, 40.0)]
    found = Reluised(0.9, 0.85, 0.8, history, {"1": 2.0}, {"1": 40.0})

    def execute(families: Any, log_file: Path, on_start: Any, on_round: Any) -> Outcome:
        start(on_start, found)
        on_round(record(1))
        return Outcome(nn.Linear(2, 2), None, "fc")

    told(execute)
    runs.run(recipe(), tmp_path / "out", Console(file=io.StringIO()))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    learned = runs.resolve(recipe()).relu_ise_learn_epochs
    assert summary["relu_ise"] == {"0": {**vars(found), "drop": pytest.approx(0.05), "learn_epochs": learned}}
    assert (tmp_path / "out" / "lambdas-seed0.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("names", "given", "evaluates", "epochs"),
    [
        (["FedAvg", "FedRep", "FedBABU"], {}, True, 5),
        (["FedBABU", "FedAvg"], {"finetune_epochs": 2}, True, 2),
        (["FedAvg", "FedBABU"], {"finetune_epochs": 0, "silo_evaluation": False}, False, 0),
        (["FedAvg", "FedBN"], {}, True, None),
        (["FedSQ+FedRep", "FedSQ"], {}, True, None),
        (["FedAvg", "FedSQ"], {}, None, None),
        (["FedAvg", "FedSQ"], {"silo_evaluation": True, "finetune_epochs": 1}, True, 1),
    ],
)
def test_a_comparison_evaluates_and_tunes_all_alike(
    names: list[str], given: dict[str, Any], evaluates: bool | None, epochs: int | None, told: Any, tmp_path: Path
) -> None:
    seen: dict[str, tuple[Any, Any]] = {}

    def execute(families: Any, log_file: Path, on_start: Any, on_round: Any) -> Outcome:
        ours = families["fedsq_args"]
        seen[families["train_args"]["federated_optimizer"]] = (
            *(ours.get("silo_evaluation"), ours.get("finetune_epochs")),
        )
        return good(families, log_file, on_start, on_round)

    told(execute)
    families = recipe()
    families["fedsq_args"].update(given)
    compare(families, names, [0], tmp_path / "out", Console(file=io.StringIO()))
    assert seen == dict.fromkeys(names, (evaluates, epochs))
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["fedsq_args"]["silo_evaluation"] is evaluates
    assert config["fedsq_args"]["finetune_epochs"] == epochs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of images."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 8)):
        for label in range(3):
            (root / split / str(label)).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 150, (8, 8, 3), dtype=np.uint8) + np.uint8(50 * label)
                Image.fromarray(pixels).save(root / split / str(label) / f"{number}.png")
    return root


def test_a_real_comparison_tests_and_tunes_every_rows_silos(images: Path, tmp_path: Path) -> None:
    families = recipe(partition_method="homo", client_num_in_total=2, client_num_per_round=2, comm_round=2)
    families["data_args"].update(dataset="image_folder", data_cache_dir=str(images))
    families["fedsq_args"].update(min_client_samples=1)
    families["warm_start_args"] = {"warm_start": "none"}
    out, names = tmp_path / "out", ["FedAvg", "FedRep", "FedBABU"]
    compare(families, names, [0], out, Console(file=io.StringIO(), width=200))
    metrics = pd.read_csv(out / "metrics.csv")
    splits = [(1, "test"), (1, "silos"), (2, "test"), (2, "silos"), (2, "silos_tuned")]
    for _, found in metrics.groupby("algorithm"):
        assert list(zip(found["round"], found.split, strict=True)) == splits
        assert found.accuracy.notna().all()
    first = metrics[metrics["round"] == 1].set_index(["algorithm", "split"])
    # Every image is in the test set of every silo: one global model gives one number.
    assert first.accuracy["FedAvg", "silos"] == pytest.approx(first.accuracy["FedAvg", "test"])
    bytes_up = first.bytes_up[:, "test"]
    head = (512 * 3 + 3) * 4
    assert bytes_up["FedAvg"] - bytes_up["FedRep"] == bytes_up["FedAvg"] - bytes_up["FedBABU"] == 2 * head


def fedsq(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fedsq", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_algorithms_are_listed_with_choices_options_and_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedsq(monkeypatch, "algorithms") == 0
    # A long list of options goes on in the next line.
    text = capsys.readouterr().out
    first, second = (part.splitlines() for part in text.split("name ")[1:])
    assert first[0].split() == list(CHOICES)
    assert second[0].split() == ["options", "source"]
    for name, row in algorithms().items():
        (choices,) = (line for line in first if line.partition(" ")[0] == name)
        for choice in CHOICES:
            assert f" {row.described()[choice]} " in f"{choices} "
        start = next(n for n, line in enumerate(second) if line.partition(" ")[0] == name)
        length = next((n for n, line in enumerate(second[start + 1 :]) if line[:1] != " "), 0) + 1
        said = " ".join(second[start : start + length])
        assert all(f"{option}" in said for option in row.option_names)
        assert all(word in said for word in row.source.split())


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            ["run", str(QUICKSTART), "--set", "federated_optimizer=FedSq"],
            "train_args.federated_optimizer 'FedSq' is unknown; did you mean 'FedSQ'?",
        ),
        (
            ["compare", str(QUICKSTART), "--algorithms", "FedAvg,FedReb"],
            "unknown algorithm 'FedReb'; did you mean 'FedRep'?",
        ),
        (
            ["compare", str(QUICKSTART), "--algorithms", "FedAvg,FedSQ+FedMr"],
            "unknown algorithm 'FedMr' in 'FedSQ+FedMr'; did you mean 'FedMR'?",
        ),
        (
            ["run", str(QUICKSTART), "--set", "federated_optimizer=FedRep+FedBN"],
            "train_args.federated_optimizer: FedRep and FedBN do not go together: both choose exchange "
            "(body only; without norm layers)",
        ),
        (
            ["compare", str(QUICKSTART), "--algorithms", "FedAvg,FedAdam+FedMR"],
            "FedAdam and FedMR do not go together: both choose server (adam; recombine)",
        ),
        (
            ["compare", str(QUICKSTART), "--algorithms", "FedSQ+FedSQ"],
            "algorithm 'FedSQ+FedSQ' names an algorithm twice",
        ),
    ],
)
def test_a_name_that_is_none_is_one_line_and_status_2(
    command: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert fedsq(monkeypatch, *command, "--out", str(tmp_path / "out")) == 2
    assert capsys.readouterr().err == f"fedsq: error: {line}\n"
    assert not (tmp_path / "out").exists()
