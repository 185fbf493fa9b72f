"""Why a process of a launched run ended: a small JSON file that the process writes and `fedsq launch` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import ConfigError, EndedByServer, FedSQError, RunError, in_one_line
from ..federation.files import atomic_write

_SUFFIX = ".end.json"
_BEGUN = "begun"


@dataclass(frozen=True)
class Ending:
    """How a process ended."""

    rank: int
    status: int
    """The exit status that it is about to have."""
    reason: str | None
    """One line; None where nothing went wrong. Where the server told it, the server's own reason."""
    told_by_server: bool = False
    """Whether it ended only because the server told it to."""


_own: tuple[Path, int] | None = None
"""Folder and rank of this process, where `fedsq launch` started it."""


@contextmanager
def recorded(folder: Path | None, rank: int) -> Iterator[None]:
    """Write down how the block ends, also where it ends by an error; nothing where there is no folder."""
    global _own
    _own = None if folder is None else (folder, rank)
    try:
        yield
    except KeyboardInterrupt:
        record("interrupted", 130)
        raise
    except EndedByServer as error:
        record(error.reason, 2, told_by_server=True)
        raise
    except BaseException as error:
        record(str(error) if isinstance(error, FedSQError) else in_one_line(error), 2)
        raise
    record(None, 0)


def record(reason: str | None, status: int, told_by_server: bool = False) -> None:
    """Write down how this process is about to end. It must come before the process ends all of an MPI run."""
    if _own is not None:
        folder, rank = _own
        ending = Ending(rank, status, reason and " ".join(reason.split()), told_by_server)
        with suppress(ConfigError):  # the folder is gone: `fedsq launch` was ended, and nobody reads it
            atomic_write(folder / f"{rank}{_SUFFIX}", json.dumps(asdict(ending)).encode())


def begin() -> None:
    """Write down that this process, the server, has made the run directory."""
    if _own is not None:
        with suppress(ConfigError):  # as in `record`
            atomic_write(_own[0] / _BEGUN, b"")


def has_begun(folder: Path) -> bool:
    """Whether the server has made the run directory.

    Raises:
        EndedByServer: it has ended before.
        RunError: the run is over, and nothing is left of it.
    """
    if (folder / _BEGUN).exists():
        return True
    if server := [ending for ending in endings(folder) if ending.rank == 0]:
        raise EndedByServer(server[0].reason or "it is over")
    if not folder.is_dir():
        raise RunError("the run that this process was started for is over")
    return False


def endings(folder: Path) -> list[Ending]:
    """What the processes have written so far, the earliest first."""
    written = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
    return [Ending(**json.loads(path.read_text())) for path in written]
