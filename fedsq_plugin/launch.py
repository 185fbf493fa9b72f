"""`fedsq launch`: all processes of a run over MPI or GRPC, on one machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

import yaml

from .errors import ConfigError, RunError
from .run.check import check
from .run.host import host
from .settings.recipe import Families, flat, overridden, resolve
from .wire import certificates
from .wire.tls import credentials

if TYPE_CHECKING:
    from rich.console import Console

GRACE_S = 20.0
"""How long the other processes may go on when one ended: they find out by themselves, by 15 s of silence."""
KILL_S = 5.0
"""How long a process may take to end when it is told to."""
TOLD = "the server ended the run"
"""What a client says that ended for a reason that the server has said."""
TRIAL_DAYS = 30
"""How long the certificates of a launched run are valid."""
COME_S = 120.0
"""How long a client waits for the server to make the run directory."""


def launch(
    families: Families, clients: int | None, out: Path, tls: bool = False, resume: bool = False
) -> int:
    """Start the server and its clients, and wait for them: the server's exit status. `resume` goes on with
    the run in `out`.

    The server process writes the run directory as `fedsq run` does; the clients log there. With `tls`, they
    talk under certificates that are made for this run, in place of the recipe's, and gone after it.

    Raises:
        ConfigError: the recipe is wrong, or for one process.
        RunError: the clients ended, and the server did not.
    """
    if found := check(families):
        raise ConfigError(" | ".join(found))
    config = resolve(families, host().brings_silos)
    if config.backend == "sp":
        raise ConfigError("comm_args.backend sp is one process: use `fedsq run`, or --set backend=MPI")
    if tls and config.backend != "GRPC":
        raise ConfigError(f"--tls is for backend GRPC, and this recipe's is {config.backend}")
    if not resume and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"output folder {out} exists and is not an empty folder; name a new one")
    count = clients or _int(flat(families).get("worker_num")) or config.client_num_per_round
    settings = [] if config.threads else [f"threads={max(1, _cores() // count)}"]
    signal.signal(signal.SIGTERM, _terminated)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        if tls:
            certificates.write(Path(folder) / "tls", count, days=TRIAL_DAYS)
            files = {key: str(Path(folder) / "tls" / name) for key, name in certificates.OPTIONS.items()}
            settings += [f"{key}={json.dumps(file)}" for key, file in files.items()]
        families = host().local_recipe(overridden(families, settings), count, Path(folder))
        if config.backend == "GRPC":
            for rank in range(count + 1):
                credentials(resolve(families, host().brings_silos), rank)
        recipe.write_text(yaml.safe_dump(families, sort_keys=False))
        command = [sys.executable, "-m", "fedsq_plugin.cli", "node", str(recipe), "--out", str(out)]
        command += ["--resume"] if resume else []
        environment = {"OMP_NUM_THREADS": str(config.threads or _cores() // count or 1), **os.environ}
        if config.backend == "MPI":
            return _mpi(command, count, environment, out)
        return _grpc(command, count, environment, config.min_clients or count, Path(folder))


def _terminated(number: int, frame: object) -> None:
    """As for an interrupt: the processes that were started end, too."""
    raise SystemExit(128 + number)


def node(families: Families, rank: int | None, out: Path, console: Console, resume: bool) -> None:
    """One process of a launched run: the server where `rank` is 0."""
    from .run import run as runs

    rank = host().rank() if rank is None else rank
    if rank == 0:
        runs.run(families, out, console, server=True, resume=resume)
        return
    until = time.monotonic() + COME_S
    while not (out / "config.yaml").exists():
        if time.monotonic() > until:
            raise RunError(f"rank {rank}: the server made no run directory {out} within {COME_S:.0f} s")
        time.sleep(0.1)
    families = overridden(families, runs.single(families).checkpoint_settings(out, resume))
    host().serve(families, out / f"client-{rank}.log", rank)


def _grpc(
    command: Sequence[str], count: int, environment: Mapping[str, str], least: int, folder: Path
) -> int:
    """The server in the foreground of this terminal; what the processes say to standard error is said at the
    end, the clients' where the server failed."""
    with ExitStack() as stack:
        processes: dict[int, subprocess.Popen[bytes]] = {}
        for rank in (*range(1, count + 1), 0):  # the server last: what is left at the end is ended in reverse
            said = stack.enter_context((folder / f"{rank}.txt").open("wb"))
            streams = {"stderr": said} if rank == 0 else {"stdout": said, "stderr": said}
            own = _process([*command, "--rank", str(rank)], environment, **streams)
            processes[rank] = stack.enter_context(own)
        server = processes.pop(0)
        clients = processes
        lacking_since: float | None = None
        while server.poll() is None:
            ended = {rank: client.poll() for rank, client in clients.items() if client.poll() is not None}
            if count - sum(status != 0 for status in ended.values()) < least:
                lacking_since = lacking_since or time.monotonic()
            if lacking_since and time.monotonic() - lacking_since > GRACE_S:
                raise RunError(
                    "; ".join(_ending(rank, status, folder) for rank, status in ended.items() if status)
                )
            time.sleep(0.1)
        until = time.monotonic() + GRACE_S
        while any(client.poll() is None for client in clients.values()) and time.monotonic() < until:
            time.sleep(0.1)
        sys.stderr.write((folder / "0.txt").read_text(errors="replace"))
        if server.returncode < 0:
            print(f"fedsq: error: the server was ended by signal {-server.returncode}", file=sys.stderr)
        for rank, client in clients.items():
            line = _ending(rank, client.poll(), folder)
            if client.poll() != 0 and TOLD not in line:
                print(f"fedsq launch: {line}", file=sys.stderr)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def _ending(rank: int, status: int | None, folder: Path) -> str:
    """How a client process ended, in one line."""
    said = (folder / f"{rank}.txt").read_text(errors="replace").strip().rpartition("\n")[2]
    said = said.removeprefix("fedsq: error: ")
    how = f"ended with {status}"
    if status is None:
        how = f"does not end, and is ended {GRACE_S:.0f} s after the server"
    elif status < 0:
        how = f"was ended by signal {-status}"
    return f"client process {rank} {how}{': ' if said else ''}{said}"


def _mpi(command: Sequence[str], count: int, environment: Mapping[str, str], out: Path) -> int:
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise ConfigError("comm_args.backend MPI needs mpirun: pip install 'fedsq-plugin[mpi]'")
    # Bound to one core, as mpirun does by itself, a process has one core for all its threads.
    options = ["--oversubscribe", "--bind-to", "none", "-np", str(count + 1)]
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
    # MPI says at length that it was aborted; the processes say why.
    reasons = [line for line in lines if line.startswith("fedsq: error:") and TOLD not in line]
    if job.returncode and not reasons:
        reason = _lost_rank(lines) or _logged_reason(out) or f"mpirun ended with status {job.returncode}"
        reasons = [f"fedsq: error: {reason}"]
    for line in reasons[:1]:  # the others followed from it
        print(line, file=sys.stderr)
    return job.returncode if job.returncode >= 0 else 128 - job.returncode


def _read(stream: IO[bytes], lines: list[str]) -> None:
    lines.extend(line.decode(errors="replace").strip() for line in stream)


def _logged_reason(out: Path) -> str | None:
    """What a process wrote into its log before it ended all: mpirun may end before it passes on the line."""
    told = None
    for log in sorted(out.glob("*.log"), reverse=True):  # the server's first
        for line in log.read_text(errors="replace").splitlines():
            _, found, reason = line.partition(" ERROR fedsq_plugin.hosts.fedml.host: ")
            if found and TOLD not in reason:
                return reason
            # A client that was told of the end may end all before the server has said why.
            told = told or (reason.partition(f"{TOLD}: ")[2] or None)
    return told


def _lost_rank(said: Sequence[str]) -> str | None:
    """The process that mpirun saw ending by a signal, in one line."""
    found = re.search(r"process rank (\d+) .*?signal (\d+)", " ".join(said))
    return found and f"the process of rank {found[1]} was ended by signal {found[2]}"


@contextmanager
def _process(
    command: Sequence[str], environment: Mapping[str, str], **options: object
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone at the end, with those that it started."""
    process = subprocess.Popen(command, env=dict(environment), start_new_session=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        for number in (signal.SIGINT, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=KILL_S)


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
