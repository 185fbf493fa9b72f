"""`fedsq launch`: all processes of a run over MPI or GRPC, on one machine."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from .errors import ConfigError, RunError
from .run import ending
from .run.check import check
from .run.host import host
from .run.processes import COME_S, run_over_grpc, run_over_mpi
from .settings.recipe import Families, flat, overridden, resolve
from .wire import certificates
from .wire.tls import credentials

if TYPE_CHECKING:
    from rich.console import Console

TRIAL_DAYS = 30
"""How long the certificates of a launched run are valid."""


def launch(families: Families, clients: int | None, out: Path, tls: bool = False, resume: bool = False) -> int:
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
        command += ["--endings", folder, *(["--resume"] if resume else [])]
        environment = {"OMP_NUM_THREADS": str(config.threads or _cores() // count or 1), **os.environ}
        if config.backend == "MPI":
            return run_over_mpi(command, count, environment, out, Path(folder))
        return run_over_grpc(command, count, environment, config.min_clients or count, Path(folder))


def _terminated(number: int, frame: object) -> None:
    """End as by an interrupt, so that the processes that were started end, too."""
    raise SystemExit(128 + number)


def node(families: Families, rank: int | None, out: Path, console: Console, resume: bool, endings: Path | None) -> None:
    """Run one process of a run: the server where `rank` is 0. How it ends is written to the folder `endings`."""
    from .run import run as runs

    rank = host().rank() if rank is None else rank
    with ending.recorded(endings, rank):
        if rank == 0:
            runs.run(families, out, console, server=True, resume=resume)
            return
        until = time.monotonic() + COME_S
        # By the run's own word where it has one: the folder may be another run's by now.
        while not ((out / "config.yaml").exists() if endings is None else ending.has_begun(endings)):
            if time.monotonic() > until:
                raise RunError(f"rank {rank}: the server made no run directory {out} within {COME_S:.0f} s")
            time.sleep(0.1)
        families = overridden(families, runs.single(families).checkpoint_settings(out, resume))
        host().serve(families, out / f"client-{rank}.log", rank)


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
