from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.results.rundir import METRICS, RunDirectory, atomic_write

from .rows import NAN, row


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def refused(path: Path, opening: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        (RunDirectory.open if opening else RunDirectory.create)(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_create_makes_the_folder_with_its_parents_and_leaves_it_empty(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a" / "b")
    assert names(run.path) == []
    assert RunDirectory.create(run.path).path == run.path


def test_create_refuses_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "dangling"):
        assert "not an empty folder" in refused(tmp_path / name)


def test_create_refuses_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(tmp_path / "file" / "run")

    def read_only(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    # A folder without write permission would not stop root, who runs many a test.
    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    assert "Read-only file system" in refused(tmp_path / "run")


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    assert "no run folder" in refused(tmp_path / "missing", opening=True)
    assert "no metrics.csv" in refused(tmp_path, opening=True)
    (tmp_path / "metrics.csv").write_text("round\n")
    assert "line 1: the columns are round" in refused(tmp_path, opening=True)
    (tmp_path / "metrics.csv").write_bytes(b"\xff\n")
    assert "cannot be read" in refused(tmp_path, opening=True)


def test_rows_come_back_and_a_second_run_writes_the_same_bytes(tmp_path: Path) -> None:
    rows = [row(round=1, accuracy=1 / 3), row(round=2, accuracy=NAN, loss=float("inf"))]
    for name in ("one", "two"):
        run = RunDirectory.create(tmp_path / name)
        for one in rows:
            run.add([one])
    written = (tmp_path / "one" / "metrics.csv").read_bytes()
    assert written == (tmp_path / "two" / "metrics.csv").read_bytes()
    read = RunDirectory.open(tmp_path / "one")
    assert tuple(read.metrics.columns) == METRICS
    assert read.metrics.equals(run.metrics) and read.metrics["accuracy"][0] == 1 / 3
    read.add([row(round=3)])
    assert len(RunDirectory.open(read.path).metrics) == 3


def test_a_refused_row_changes_nothing(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    run.add([row()])
    before = (run.path / "metrics.csv").read_bytes()
    for bad in ([row(round=2), row(round=2)], [row()], [row(round=2), row(round=-1)]):
        with pytest.raises(ValueError):
            run.add(bad)
    assert (run.path / "metrics.csv").read_bytes() == before and len(run.metrics) == 1


def test_changing_the_frame_does_not_change_the_run(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    run.add([row()])
    given = run.metrics
    given.loc[0, "accuracy"] = 0.0
    assert run.metrics["accuracy"][0] == 0.5


def test_config_keeps_its_order_and_json_has_no_nan(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    run.write_config({"zeta": 1e-3, "alpha": [1, 2], "name": "größe"})
    run.write_environment({"torch": "2.6", "threads": np.int64(2)})
    run.write_summary({"best": NAN, "list": (np.float64("inf"), 0.1), "counts": np.eye(2, dtype=int)})
    assert list(run.config) == ["zeta", "alpha", "name"] and run.config["zeta"] == 1e-3
    assert run.environment == {"torch": "2.6", "threads": 2}
    assert run.summary == {"best": None, "list": [None, 0.1], "counts": [[1, 0], [0, 1]]}
    assert "NaN" not in (run.path / "summary.json").read_text()
    assert names(run.path) == ["config.yaml", "environment.json", "summary.json"]


def test_readers_name_the_file_that_is_missing_or_broken(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    assert run.summary == {}
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        _ = run.config
    for name in ("config.yaml", "environment.json", "summary.json"):
        for broken in ("[1]", "{\n'a': [\n"):
            (run.path / name).write_text(broken)
            with pytest.raises(ConfigError, match=name) as caught:
                getattr(run, name.split(".")[0])
            assert "\n" not in str(caught.value)


def test_path_for_stays_inside(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    assert run.path_for("checkpoints/1.json").parent.is_dir()
    with pytest.raises(ValueError, match="leads out"):
        run.path_for("../other")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.json"
    atomic_write(target, b"old")

    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(target, fails)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"x\.json cannot be written: No space left"):
        atomic_write(target, b"new")
    assert target.read_bytes() == b"old" and names(tmp_path) == ["x.json"]


def test_a_writer_gets_a_name_in_the_same_folder(tmp_path: Path) -> None:
    seen: list[Path] = []

    def write(path: Path) -> None:
        seen.append(path)
        path.write_text(json.dumps({}))

    atomic_write(tmp_path / "x.json", write)
    assert seen[0].parent == tmp_path and seen[0].name != "x.json"
    assert names(tmp_path) == ["x.json"]


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "missing" / "x", tmp_path / "file" / "x"):
        with pytest.raises(ConfigError, match="cannot be written"):
            atomic_write(place, b"")


@pytest.mark.parametrize("links", [True, False])
def test_one_of_two_runs_gets_the_folder_that_both_saw_empty(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a file system that has no links."""

    def no_link(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    first, second = RunDirectory.create(tmp_path / "run"), RunDirectory.create(tmp_path / "run")
    first.write_config({"a": 1})
    with pytest.raises(ConfigError, match=r"^output folder .*run is another run's by now; name a new one$"):
        second.write_config({"a": 2})
    assert second.config == {"a": 1}
    assert names(tmp_path / "run") == ["config.yaml"]
    assert "not an empty folder" in refused(tmp_path / "run")
