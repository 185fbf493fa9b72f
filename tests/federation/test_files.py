"""Files that are either whole or not there."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.files import atomic_write


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0)
    os.umask(before)
    yield lambda mask: os.umask(mask) and None
    os.umask(before)


def half_written(path: Path) -> None:
    path.write_bytes(b"half")
    raise ZeroDivisionError


def test_bytes_are_written(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file.txt", b"content")
    assert (tmp_path / "file.txt").read_bytes() == b"content"


def test_writer_is_given_a_path_in_the_same_folder(tmp_path: Path) -> None:
    given: list[Path] = []

    def writer(path: Path) -> None:
        given.append(path)
        path.write_bytes(b"content")

    atomic_write(tmp_path / "file.txt", writer)
    assert (given[0].parent, given[0] == tmp_path / "file.txt") == (tmp_path, False)
    assert (tmp_path / "file.txt").read_bytes() == b"content"


def test_name_may_be_a_string(tmp_path: Path) -> None:
    atomic_write(str(tmp_path / "file.txt"), b"content")
    assert (tmp_path / "file.txt").read_bytes() == b"content"


def test_old_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_bytes(b"a longer old content")
    atomic_write(tmp_path / "file.txt", b"new")
    assert (tmp_path / "file.txt").read_bytes() == b"new"


def test_nothing_else_is_left_in_the_folder(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file.txt", b"content")
    assert os.listdir(tmp_path) == ["file.txt"]


def test_failing_writer_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        atomic_write(tmp_path / "file.txt", half_written)
    assert os.listdir(tmp_path) == ["file.txt"]
    assert (tmp_path / "file.txt").read_bytes() == b"old"


def test_failing_writer_of_a_new_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        atomic_write(tmp_path / "file.txt", half_written)
    assert os.listdir(tmp_path) == []


def test_old_file_is_there_while_the_new_one_is_written(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_bytes(b"old")
    seen: list[bytes] = []

    def writer(path: Path) -> None:
        path.write_bytes(b"new")
        seen.append((tmp_path / "file.txt").read_bytes())

    atomic_write(tmp_path / "file.txt", writer)
    assert seen == [b"old"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_mode_follows_the_umask(tmp_path: Path, umask: Callable[[int], None], mask: int, mode: int) -> None:
    umask(mask)
    atomic_write(tmp_path / "file.txt", b"content")
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == mode


def test_umask_is_left_alone(tmp_path: Path, umask: Callable[[int], None]) -> None:
    umask(0o027)
    atomic_write(tmp_path / "file.txt", b"content")
    assert os.umask(0o027) == 0o027


def test_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        atomic_write(tmp_path / "file" / "below.txt", b"content")
    assert "\n" not in str(caught.value)


def test_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        atomic_write(tmp_path / "folder", b"content")
    assert os.listdir(tmp_path) == ["folder"]
