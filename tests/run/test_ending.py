"""Why a process of a launched run ended: what it writes, and which of several reasons the user is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedsq_plugin.errors import ConfigError, EndedByServer
from fedsq_plugin.run.ending import Ending, endings, record, recorded
from fedsq_plugin.run.processes import _failure, _first_reason


def write(folder: Path, rank: int, reason: str | None, at: int, told: bool = False) -> None:
    """What a process of this rank wrote at this second."""
    with recorded(folder, rank):
        pass
    record(reason, 2, told)
    os.utime(folder / f"{rank}.end.json", (at, at))


@pytest.mark.parametrize(
    ("error", "status", "reason", "told"),
    [
        (None, 0, None, False),
        (ConfigError("two\nlines"), 2, "two lines", False),
        (EndedByServer("rank 2 is lost"), 2, "rank 2 is lost", True),
        (KeyError("a bug"), 2, "KeyError: 'a bug'", False),
        (KeyboardInterrupt(), 130, "interrupted", False),
    ],
)
def test_how_a_process_ended_is_written(
    error: BaseException | None, status: int, reason: str | None, told: bool, tmp_path: Path
) -> None:
    def end() -> None:
        with recorded(tmp_path, 3):
            if error is not None:
                raise error

    if error is None:
        end()
    else:
        with pytest.raises(type(error)):
            end()
    assert endings(tmp_path) == [Ending(3, status, reason, told)]


def test_nothing_is_written_where_nobody_reads_it(tmp_path: Path) -> None:
    with recorded(None, 0):
        pass
    with recorded(tmp_path / "gone", 0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_reason_from_which_the_others_followed(tmp_path: Path) -> None:
    assert _first_reason(tmp_path) is None
    write(tmp_path, 3, None, at=1)
    assert _first_reason(tmp_path) is None
    write(tmp_path, 1, "it told others", at=2, told=True)
    assert _first_reason(tmp_path) == "it told others"
    write(tmp_path, 2, "the server is gone", at=4)
    assert _first_reason(tmp_path) == "the server is gone"
    write(tmp_path, 0, "rank 2 is lost", at=3)
    assert _first_reason(tmp_path) == "rank 2 is lost"


def test_a_client_that_could_write_nothing_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("Traceback\nImportError: no module\n")
    (tmp_path / "2.txt").write_text("")
    assert _failure(1, 1, tmp_path) == "client process 1 ended with 1: ImportError: no module"
    assert _failure(2, -9, tmp_path) == "client process 2 was ended by signal 9"
    write(tmp_path, 1, "no such file", at=1)
    assert _failure(1, 2, tmp_path) == "client process 1 ended with 2: no such file"
