"""The command line, as a user types it: one process per command where imports matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from fedsq_plugin import cli
from fedsq_plugin.hosts.fedml.offline import require_home

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
SMALL = {
    **{"comm_round": 2, "client_num_in_total": 2, "client_num_per_round": 2, "epochs": 1},
    **{"warm_start_public": 0.3, "warm_start_epochs": 1, "partition_method": "homo"},
    **{"threads": 1, "min_client_samples": 1, "dataset": "image_folder"},
}


def fedsq(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["fedsq", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def settings(**options: Any) -> list[str]:
    return [word for key, value in options.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> list[str]:
    """Settings that turn the quickstart into a run of seconds, on a small folder of images."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 8)):
        for label in range(3):
            (root / split / str(label)).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 150, (8, 8, 3), dtype=np.uint8) + np.uint8(50 * label)
                Image.fromarray(pixels).save(root / split / str(label) / f"{number}.png")
    return settings(**SMALL, data_cache_dir=root, warm_start_cache_dir=cache)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Path:
    """One comparison, in a process of its own and far from the repository."""
    folder = tmp_path_factory.mktemp("compare")
    command = [sys.executable, "-m", "fedsq_plugin.cli", "compare", str(QUICKSTART)]
    command += ["--algorithms", "FedAvg,FedSQ", "--seeds", "0,1", "--out", "out"]
    command += small
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_a_comparison_prints_rounds_and_a_table(compared: Path) -> None:
    text = (compared / "stdout.txt").read_text()
    assert "FedSQ seed 1: round 2/2 accuracy" in text
    assert "±" in text
    assert "FedML" not in text.replace("starting FedML", "")


def test_metrics_have_a_row_per_algorithm_seed_and_round(compared: Path) -> None:
    metrics = pd.read_csv(compared / "out" / "metrics.csv")
    keys = {(r.algorithm, r.seed, r.round, r.split) for r in metrics.itertuples()}
    assert keys == {(a, s, r, "test") for a in ("FedAvg", "FedSQ") for s in (0, 1) for r in (1, 2)}
    assert len(metrics) == 8
    assert (metrics.seconds > 0).all()
    assert metrics.accuracy.between(0, 1).all()


def test_both_algorithms_send_the_same_bytes(compared: Path) -> None:
    metrics = pd.read_csv(compared / "out" / "metrics.csv")
    assert metrics.bytes_up.nunique() == metrics.bytes_down.nunique() == 1


def test_a_plain_models_released_accuracy_is_its_accuracy(compared: Path) -> None:
    metrics = pd.read_csv(compared / "out" / "metrics.csv").query("algorithm == 'FedAvg'")
    assert (metrics.accuracy == metrics.accuracy_released).all()


def test_the_run_directory_describes_the_run(compared: Path) -> None:
    out = compared / "out"
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["train_args"]["momentum"] == 0.9
    assert config["fedsq_args"]["clip_norm"] is None  # a default, resolved
    environment = json.loads((out / "environment.json").read_text())
    assert environment["threads"] == 1
    assert environment["packages"]["fedml"] == "0.9.6"
    summary = json.loads((out / "summary.json").read_text())
    assert {run["algorithm"] for run in summary["runs"]} == {"FedAvg", "FedSQ"}
    for name in ("accuracy.png", "labels.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_the_export_keeps_both_copies(compared: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(compared / "out" / "FedSQ-seed0.safetensors")
    plain = load_file(compared / "out" / "FedAvg-seed0.safetensors")
    assert {f"{copy}.{key}" for copy in ("quantitative", "structural") for key in plain} == set(tensors)


def test_seeds_share_the_cached_warm_start(compared: Path, cache: Path) -> None:
    assert len(list(cache.glob("warm-start-*.safetensors"))) == 2  # one per seed, for both algorithms
    log = (compared / "out" / "fedml.log").read_text()
    assert log.count("trained for 1 epochs") == 2
    assert log.count("read from the cache") == 2


def test_a_run_repeats_itself_exactly(
    compared: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same seed, same metrics, alone or within a comparison; only the clock differs."""
    out = tmp_path / "again"
    assert fedsq("run", str(QUICKSTART), *small, "--out", str(out), monkeypatch=monkeypatch) == 0
    columns = ["round", "loss", "accuracy", "accuracy_released", "bytes_up", "bytes_down"]
    before = pd.read_csv(compared / "out" / "metrics.csv").query("algorithm == 'FedSQ' and seed == 0")
    again = pd.read_csv(out / "metrics.csv")
    pd.testing.assert_frame_equal(again[columns], before[columns].reset_index(drop=True))


def test_report_makes_tables_and_pictures_anew(
    compared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (compared / "out" / "accuracy.png").unlink()
    assert fedsq("report", str(compared / "out"), monkeypatch=monkeypatch) == 0
    assert "FedSQ" in capsys.readouterr().out
    assert (compared / "out" / "accuracy.png").exists()


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("fedsq: error: ")
    return error


BAD: list[tuple[list[str], str]] = [
    (["run", "missing.yaml"], "missing.yaml: No such file"),
    (["run", str(QUICKSTART), "--set", "comm_round"], "write key=value"),
    (["run", str(QUICKSTART), "--set", "comm_rounds=3"], "did you mean 'comm_round'"),
    (["run", str(QUICKSTART), "--set", "comm_round=0"], "train_args.comm_round is 0"),
    (["run", str(QUICKSTART), "--set", "federated_optimizer=FedSG"], "did you mean 'FedSQ'"),
    (["run", str(QUICKSTART), "--set", "model=resnet19"], "resnet19"),
    (["run", str(QUICKSTART), "--set", "dataset=digitz"], "did you mean 'digits'"),
    (["run", str(QUICKSTART), "--set", "using_gpu=maybe"], "device_args.using_gpu"),
    (["compare", str(QUICKSTART), "--algorithms", "FedAvg,FedXY"], "unknown algorithm 'FedXY'"),
    (["compare", str(QUICKSTART), "--algorithms", "FedAvg", "--seeds", "a"], "whole numbers"),
    (["compare", str(QUICKSTART), "--algorithms", "FedAvg,FedAvg"], "given twice"),
    (["compare", str(QUICKSTART), "--algorithms", ","], "name at least one"),
    (["run", str(QUICKSTART), "--set", "model=alexnet", "--set", "small_images=false"], "small_images"),
    (["report", "nowhere"], "nowhere"),
    (["run"], "name a RECIPE, or --resume DIR"),
    (["run", "--resume", "nowhere"], "no run folder nowhere"),
    (["launch", "--resume", "nowhere"], "no run folder nowhere"),
    (["run", str(QUICKSTART), "--resume", "nowhere"], "give nothing else"),
    (["run", "--resume", "nowhere", "--set", "comm_round=3"], "give nothing else"),
    (["run", str(QUICKSTART), "--set", "resume=true"], "resume needs checkpoint_dir"),
    (["ruin"], "No such command"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fedsq(*arguments, monkeypatch=monkeypatch) == 2
    assert expected in one_line(capsys)
    assert not list(tmp_path.rglob("metrics.csv"))


def test_a_folder_that_holds_something_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").touch()
    assert fedsq("run", str(QUICKSTART), "--out", str(tmp_path), monkeypatch=monkeypatch) == 2
    assert "not an empty folder" in one_line(capsys)


def test_check_says_everything_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(
        """
data_args: {dataset: image_folder, data_cache_dir: nowhere, partition_alpha: -1}
model_args: {model: resnet81}
train_args: {federated_optimizer: FedSO, client_num_in_total: 6, client_num_per_round: 2, comm_round: x}
comm_args: {backend: NCCL}
fedsq_args: {small_image: true}
"""
    )
    assert fedsq("check", str(recipe), monkeypatch=monkeypatch) == 2
    lines = capsys.readouterr().out.splitlines()
    for expected in (
        *("partition_alpha is -1", "resnet81", "did you mean 'FedSQ'", "comm_round is 'x'"),
        *("backend NCCL", "did you mean 'small_images'"),
    ):
        assert sum(expected in line for line in lines) == 1, (expected, lines)


def test_check_says_a_repeated_key_with_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "twice.yaml"
    recipe.write_text(QUICKSTART.read_text() + "  warm_start: file\n  xyz: 1\n")
    assert fedsq("check", str(recipe), monkeypatch=monkeypatch) == 2
    out = capsys.readouterr().out
    for expected in ("warm_start stands twice", "warm_start_args.xyz is unknown", "must name the weights"):
        assert out.count(expected) == 1


def test_an_option_without_effect_is_a_note_and_nothing_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = settings(federated_optimizer="FedAvg", keep_gates="true")
    assert fedsq("check", str(QUICKSTART), *options, monkeypatch=monkeypatch) == 0
    note, end = capsys.readouterr().out.splitlines()
    assert note == "note: fedsq_args.keep_gates has no effect: FedAvg trains the plain model, without gates"
    assert end.endswith("nothing wrong")


def test_check_finds_missing_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = settings(
        dataset="image_folder", data_cache_dir=tmp_path, warm_start="file", warm_start_file=tmp_path / "none.pt"
    )
    assert fedsq("check", str(QUICKSTART), *options, monkeypatch=monkeypatch) == 2
    out = capsys.readouterr().out
    assert "no file" in out
    assert out.count("no folder") == 2


RECIPES = [
    path
    for path in sorted((ROOT / "recipes").rglob("*.yaml"))
    # Those need FLamby and its data: tests/hosts/flamby
    if path.parent.name != "flamby"
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_our_recipes_have_nothing_wrong(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedsq("check", str(recipe), monkeypatch=monkeypatch) == 0
    assert "nothing wrong" in capsys.readouterr().out


SHARED = """
x-shared: &shared {learning_rate: 1e-2, batch_size: 32, comm_round: 3}
common_args: {training_type: simulation, random_seed: 0}
data_args: {dataset: digits, partition_method: homo, partition_alpha: 0.5}
model_args: {model: gelunet}
train_args: {<<: *shared, federated_optimizer: FedAvg, client_num_in_total: 2, client_num_per_round: 2, comm_round: 1}
"""


@pytest.mark.parametrize(
    ("added", "settings", "status", "said"),
    [
        ("", (), 0, "nothing wrong"),
        ("", ("fedsq_args.threads=1",), 0, "nothing wrong"),
        ("", ("data_args.threads=1",), 2, "threads stands in fedsq_args, not in data_args"),
        (
            "more_args: {learning_rat: 1}",
            (),
            0,
            "note: more_args.learning_rat looks like a misspelling of 'learning_rate'",
        ),
        ("more_args: {batch_size: 1}", (), 2, "batch_size stands in train_args and in more_args"),
        ("more_args: {a: 1, a: 1}", (), 2, "a stands twice, again at line 7, column 19"),
        ("fedsq_args: {thread: 1}", (), 2, "fedsq_args.thread is unknown; did you mean 'threads'?"),
    ],
)
def test_a_recipe_with_shared_values(
    added: str,
    settings: tuple[str, ...],
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "r.yaml").write_text(SHARED + added)
    words = [word for setting in settings for word in ("--set", setting)]
    assert fedsq("check", str(tmp_path / "r.yaml"), *words, monkeypatch=monkeypatch) == status
    out, err = capsys.readouterr()
    assert said in out + err


def test_the_readme_lists_every_option() -> None:
    from fedsq_plugin.settings.config import reference

    assert reference() in (ROOT / "README.md").read_text()


def test_the_readme_lists_every_algorithm() -> None:
    from fedsq_plugin.algorithms.registry import builtin
    from fedsq_plugin.federation.algorithm import CHOICES

    text = (ROOT / "README.md").read_text()
    for row in builtin().values():
        cells = [row.name, *(row.described()[choice] for choice in CHOICES)]
        options = ", ".join(f"`{key}`" for key in row.option_names) or "–"
        assert f"| {' | '.join([*cells, options, row.source])} |\n" in text


def test_the_readme_has_no_gap() -> None:
    assert "@@" not in (ROOT / "README.md").read_text()


def test_ci_installs_by_the_readmes_line_and_runs_every_check() -> None:
    install, ci = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]'", (ROOT / ".ci" / "run").read_text()
    assert f"{install} && .venv/bin/pytest" in (ROOT / "README.md").read_text()
    assert install in ci.replace(" -q", "")
    checks = [line.split()[1] for line in ci.splitlines() if line.startswith("check ")]
    assert checks == ["ruff", "mypy", "lint-imports", "pytest"]


def test_ci_runs_every_check_and_fails_where_one_fails(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    script = tmp_path / ".ci" / "run"
    script.write_text((ROOT / ".ci" / "run").read_text())
    fake = tmp_path / "python3"
    (tmp_path / ".venv" / "bin" / "pip").symlink_to(fake)
    for failing in (None, "ruff", "mypy", "lint-imports", "pytest"):
        for name in ("python3", ".venv/bin/ruff", ".venv/bin/mypy", ".venv/bin/lint-imports", ".venv/bin/pytest"):
            path = tmp_path / name
            path.write_text(f'#!/bin/sh\necho "{path.name} ran: $*"\nexit {int(path.name == failing)}\n')
            path.chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        run = subprocess.run(["bash", script, "tests/x.py"], env=environment, capture_output=True, text=True)
        assert [word in run.stdout for word in ("ruff ran", "mypy ran", "lint-imports ran", "tests/x.py")] == [True] * 4
        assert (run.returncode, run.stdout.splitlines()[-1].startswith("failed: ")) == (
            (0, False) if failing is None else (1, True)
        )
        assert failing is None or run.stdout.endswith(f"failed: {failing}\n")


def test_help_and_import_stay_light() -> None:
    code = (
        "import sys; sys.argv = ['fedsq', '--help']\n"
        "import fedsq_plugin\n"
        "from fedsq_plugin.cli import cli\n"
        "try: cli()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'fedml', 'torchvision', 'pandas', 'matplotlib', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_core_needs_no_host() -> None:
    code = (
        "import sys\n"
        "import fedsq_plugin.dualcopy, fedsq_plugin.algorithms, fedsq_plugin.run.warm_start\n"
        "heavy = {'fedml', 'flamby', 'torchvision', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", ["run", "launch", "compare"])
def test_a_home_that_cannot_be_written_ends_with_one_line(command: str, tmp_path: Path) -> None:
    """A process of its own: what is imported too early complains of it in lines of its own."""
    (tmp_path / "file").touch()
    home = tmp_path / "file" / "home"
    environment = {**os.environ, "HOME": str(home)}
    words = [command, str(QUICKSTART), "--out", str(tmp_path / "out")]
    words += ["--algorithms", "FedSQ"] if command == "compare" else []
    done = subprocess.run(
        [sys.executable, "-m", "fedsq_plugin.cli", *words], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"fedsq: error: HOME {tmp_path}/file/home cannot be written (Not a directory)")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_home_that_can_be_written_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for home in (tmp_path, tmp_path / "not" / "yet"):
        monkeypatch.setenv("HOME", str(home))
        require_home()
    assert list(tmp_path.iterdir()) == []
