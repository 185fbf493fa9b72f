"""FedML's start without its side effects: no network unless asked, logging and printing left alone.

Nothing here imports FedML.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .distributed.mpi import abort_on_error
from .names import MPI_DEFAULTS
from .tracking import start_failure, tracking_problems


def require_home() -> None:
    """Raise ConfigError where FedML cannot write under the home folder, which it does as it is imported."""
    try:
        home = Path.home()
        there = next(path for path in (home / ".fedml", home, *home.parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except (OSError, RuntimeError, ValueError) as error:
        where = os.environ.get("HOME") or "(not set)"
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"HOME {where} cannot be written ({reason}), and FedML keeps its files under ~/.fedml: "
            "set HOME to a writable folder"
        ) from None


def quiet_start(mlops: Any) -> None:
    """Keep `fedml.init` from fetching FedML's platform configuration when nothing asks for it.

    FedML asks its platform five times, with a pause after each failure, even for a local run.
    """
    fetch = mlops.fetch_config

    @functools.wraps(fetch)
    def fetch_config(args: Any, *rest: Any, **options: Any) -> Any:
        if mlops.mlops_enabled(args) or mlops.mlops_parrot_enabled(args):
            return fetch(args, *rest, **options)
        return None

    mlops.fetch_config = fetch_config


def no_diagnosis() -> None:
    """In place of `fedml.collect_env`, which `fedml.init` calls across silos: it prints a description of the
    machine, and asks FedML's platform, its store and its broker whether they are there."""


def checked_start(fedml: Any) -> None:
    """Give `fedml.init` what it reads under MPI, and let what it fails with there, or in W&B, be one line."""
    start = fedml.init

    @functools.wraps(start)
    def init(args: Any = None, *rest: Any, **options: Any) -> Any:
        if args is None:
            args = fedml.load_arguments(fedml._global_training_type, fedml._global_comm_backend)
        if getattr(args, "backend", None) == "MPI":
            for key, value in MPI_DEFAULTS.items():
                setattr(args, key, getattr(args, key, value))
            _count_processes(args)
        if wrong := list(tracking_problems(vars(args))):
            raise ConfigError(" | ".join(wrong))
        try:
            return start(args, *rest, **options)
        except Exception as error:
            if (failure := start_failure(error)) is not None:
                raise failure from error
            raise

    fedml.init = init


def _count_processes(args: Any) -> None:
    """In a simulation FedML counts them itself; across silos it ends with a bare AssertionError."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(f"comm_args.backend MPI: {error}; pip install 'fedsq-plugin[mpi]'") from None
    if getattr(args, "training_type", None) != "cross_silo":
        return
    clients, wanted = MPI.COMM_WORLD.Get_size() - 1, getattr(args, "worker_num", None)
    if clients != wanted:
        raise ConfigError(
            f"train_args.worker_num is {wanted}, and this run has {clients} client processes: start it with "
            "mpirun -np worker_num + 1"
        )


def own_logging(runtime_log: Any) -> None:
    """Let FedML add its log handler without replacing `logging.root` and `sys.stdout.write`.

    FedML points `logging.root` at a logger of its own, so that every named logger loses its INFO
    lines, and turns prints into log lines.
    """
    init_logs = runtime_log.init_logs

    @functools.wraps(init_logs)
    def wrapped(self: Any, *args: Any, **options: Any) -> None:
        root, write = logging.root, vars(sys.stdout).get("write")
        if not getattr(self.args, "using_mlops", False):
            # It makes the folder for its log file also where it writes none.
            self.args.log_file_dir = str(Path(tempfile.gettempdir()) / "fedml-logs")
        init_logs(self, *args, **options)
        abort_on_error()  # what it put in place of sys.excepthook lets the other processes wait
        theirs, logging.root = logging.root, root
        if write is None:
            vars(sys.stdout).pop("write", None)
        else:
            vars(sys.stdout)["write"] = write
        theirs.propagate = False
        if not root.handlers:
            # Nobody has set up logging: FedML's handler serves everyone, its own modules included.
            for handler in theirs.handlers:
                root.addHandler(handler)
            root.setLevel(logging.INFO)

    runtime_log.init_logs = wrapped
