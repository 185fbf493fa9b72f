"""FedML's start without its side effects: no network unless asked, logging and printing left alone."""

from __future__ import annotations

import functools
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from .distributed.mpi import abort_on_error


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


def no_diagnosis(fedml: Any) -> None:
    """Keep `fedml.init` of a cross-silo process from asking three servers of FedML's platform whether they
    are there, without a time-out; `fedml env` still does."""
    fedml.collect_env = lambda: None


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
