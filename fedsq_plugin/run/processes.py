"""The processes of a launched run on this machine: started, watched, and ended, over GRPC or by mpirun."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from ..errors import ConfigError, RunError
from .ending import endings

GRACE_S = 20.0
"""How long the other processes may go on when one ended: they find out by themselves, by 15 s of silence."""
KILL_S = 5.0
"""How long a process may take to end when it is told to."""
COME_S = 120.0
"""How long the server may take to make the run directory."""


def run_over_grpc(
    command: Sequence[str], clients: int, environment: Mapping[str, str], least: int, folder: Path
) -> int:
    """Run a server and its client processes, and wait for them: the server's exit status.

    The server has this terminal. What it says to standard error is passed on at the end, with a line for every
    client process that failed by itself. The processes write to `folder` how they ended.

    Raises:
        RunError: fewer than `least` clients are left, and the server does not end.
    """
    with ExitStack() as stack:
        processes: dict[int, subprocess.Popen[bytes]] = {}
        for rank in (*range(1, clients + 1), 0):  # the server last: what is left at the end is ended in reverse
            said = stack.enter_context((folder / f"{rank}.txt").open("wb"))
            streams = {"stderr": said} if rank == 0 else {"stdout": said, "stderr": said}
            own = _process([*command, "--rank", str(rank)], environment, **streams)
            processes[rank] = stack.enter_context(own)
        server = processes.pop(0)
        lacking_since: float | None = None
        while server.poll() is None:
            failed = [rank for rank, client in processes.items() if client.poll()]
            if clients - len(failed) < least:
                lacking_since = lacking_since or time.monotonic()
            if lacking_since and time.monotonic() - lacking_since > GRACE_S:
                raise RunError("; ".join(_failure(rank, processes[rank].poll(), folder) for rank in failed))
            time.sleep(0.1)
        until = time.monotonic() + GRACE_S
        while any(client.poll() is None for client in processes.values()) and time.monotonic() < until:
            time.sleep(0.1)
        sys.stderr.write(_said(0, folder))
        if server.returncode < 0:
            print(f"fedsq: error: the server was ended by signal {-server.returncode}", file=sys.stderr)
        told = {ending.rank for ending in endings(folder) if ending.told_by_server}
        for rank, client in processes.items():
            if client.poll() != 0 and rank not in told:
                print(f"fedsq launch: {_failure(rank, client.poll(), folder)}", file=sys.stderr)
    return _status(server)


def _failure(rank: int, status: int | None, folder: Path) -> str:
    """How a client process ended, in one line, for the user. A process that could not write a reason down may have
    said something: its last line is shown as it is."""
    written = next((ending.reason for ending in endings(folder) if ending.rank == rank), None)
    why = written or _said(rank, folder).strip().rpartition("\n")[2]
    how = f"ended with {status}"
    if status is None:
        how = f"does not end, and is ended {GRACE_S:.0f} s after the server"
    elif status < 0:
        how = f"was ended by signal {-status}"
    return f"client process {rank} {how}{': ' if why else ''}{why}"


def _said(rank: int, folder: Path) -> str:
    return (folder / f"{rank}.txt").read_text(errors="replace")


def run_over_mpi(command: Sequence[str], clients: int, environment: Mapping[str, str], out: Path, folder: Path) -> int:
    """Run a server and its client processes by mpirun, and wait for it: its exit status. Where it failed, one line
    on standard error says why.

    Args:
        out: the run directory that the server makes.
        folder: where the processes write how they ended.

    Raises:
        ConfigError: there is no mpirun.
        RunError: the processes do not start.
    """
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise ConfigError("comm_args.backend MPI needs mpirun: pip install 'fedsq-plugin[mpi]'")
    # Bound to one core, as mpirun does by itself, a process has one core for all its threads.
    options = ["--oversubscribe", "--bind-to", "none", "-np", str(clients + 1)]
    if os.geteuid() == 0:
        options.insert(0, "--allow-run-as-root")
    if not sys.stdout.isatty():
        command = [*command, "--plain"]  # mpirun gives its processes a terminal of their own
    with _process([mpirun, *options, *command], environment, stderr=subprocess.PIPE) as job:
        assert job.stderr is not None
        lines: list[str] = []
        reader = threading.Thread(target=_read, args=(job.stderr, lines), daemon=True)
        reader.start()
        until = time.monotonic() + COME_S
        while job.poll() is None:
            # MPI's own start waits for every process, for ever.
            if time.monotonic() > until and not (out / "config.yaml").exists():
                raise RunError(f"the processes made no run directory {out} within {COME_S:.0f} s")
            time.sleep(0.1)
        reader.join()
    # What the processes say to standard error is in there, too, between MPI's own words; it is not searched.
    reason = _first_reason(folder)
    if job.returncode and reason is None:
        reason = _lost_rank(lines) or f"mpirun ended with status {job.returncode}"
    if reason is not None:
        print(f"fedsq: error: {reason}", file=sys.stderr)
    return _status(job)


def _first_reason(folder: Path) -> str | None:
    """The reason from which the others followed. A client that was told of it may have ended all processes before
    the server has written it."""
    found = [ending for ending in endings(folder) if ending.reason is not None]
    first = sorted(found, key=lambda ending: ending.told_by_server)[:1]
    return first[0].reason if first else None


def _lost_rank(said: Sequence[str]) -> str | None:
    """The process that mpirun saw ending by a signal, in one line. Only MPI's own words tell this."""
    found = re.search(r"process rank (\d+) .*?signal (\d+)", " ".join(said))
    return found and f"the process of rank {found[1]} was ended by signal {found[2]}"


def _read(stream: IO[bytes], lines: list[str]) -> None:
    lines.extend(line.decode(errors="replace").strip() for line in stream)


def _status(process: subprocess.Popen[bytes]) -> int:
    """The exit status, as a shell gives it."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


@contextmanager
def _process(
    command: Sequence[str], environment: Mapping[str, str], **options: object
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended after the block, with those that it started."""
    process = subprocess.Popen(command, env=dict(environment), start_new_session=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        for number in (signal.SIGINT, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=KILL_S)
