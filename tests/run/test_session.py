"""The folders of runs that begin at the same moment."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.run.session import new_folder


@pytest.fixture(autouse=True)
def one_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form, *moment: "20270115-080000")


def test_runs_of_one_second_have_a_folder_each() -> None:
    with ExitStack() as stack:
        names = [str(stack.enter_context(new_folder(Path("a/my recipe.yaml")))) for _ in range(3)]
        other = stack.enter_context(new_folder(Path("other.yaml")))
        assert all(Path(name).is_dir() for name in names)
    assert names == [f"runs/my-recipe-20270115-080000{end}" for end in ("", "-2", "-3")]
    assert str(other) == "runs/other-20270115-080000"


def test_runs_of_one_moment_have_a_folder_each() -> None:
    ready, done = threading.Barrier(16), threading.Barrier(16)

    def begin(_: int) -> Path:
        ready.wait()
        with new_folder(Path("r.yaml")) as out:
            done.wait()
            (out / "x").touch()
            return out

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(begin, range(16)))) == 16


def test_a_folder_without_a_run_is_gone_and_one_with_a_run_stays() -> None:
    with new_folder(Path("r.yaml")):
        pass
    assert not Path("runs").exists()
    Path("runs").mkdir()
    with pytest.raises(ConfigError), new_folder(Path("r.yaml")):
        raise ConfigError("wrong")
    assert list(Path("runs").iterdir()) == []
    with new_folder(Path("r.yaml")) as out:
        (out / "metrics.csv").touch()
    assert (out / "metrics.csv").exists()


def test_a_folder_that_cannot_be_made_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("runs").touch()
    with pytest.raises(ConfigError, match=r"^output folder runs/r-20270115-080000 cannot be made: runs is no folder"):
        new_folder(Path("r.yaml")).__enter__()
    Path("runs").unlink()

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(ConfigError, match=r"cannot be made: Read-only file system; name one by --out$"):
        new_folder(Path("r.yaml")).__enter__()
