"""The end of an MPI run. Nothing here imports FedML or MPI."""

from __future__ import annotations

import atexit
import sys
import time
from types import TracebackType

from ....errors import FedSQError


def abort(status: int) -> None:
    """End all processes of an MPI run: where one merely exits, the others wait for ever. Does nothing in a
    process that is alone."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized() or mpi.COMM_WORLD.Get_size() == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    mpi.COMM_WORLD.Abort(status)


def leave_within(seconds: float) -> None:
    """Let this process wait only so long for the others at its end, where MPI by itself waits for ever for
    one that hangs or is stopped. What is waited for in vain is ended, with a line; the status stays 0,
    because this process has done its work."""
    if not _patience:
        atexit.register(_leave)
    _patience[:] = [seconds]


_patience: list[float] = []


def _leave() -> None:
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or mpi.Is_finalized() or mpi.COMM_WORLD.Get_size() == 1:
        return
    left, until = mpi.COMM_WORLD.Ibarrier(), time.monotonic() + _patience[0]
    while not left.Test():
        if time.monotonic() > until:
            print("a process of this run does not end, and is ended", file=sys.stderr)
            abort(0)
        time.sleep(0.01)


def abort_on_error() -> None:
    """Let an exception that nobody catches end all processes of an MPI run, where this is one."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, FedSQError):
            print(f"fedsq: error: {error}", file=sys.stderr)
        else:
            before(kind, error, trace)
        abort(2)

    sys.excepthook = hook
