"""One run through FedML, from a checked recipe: what `fedsq run` and `fedsq compare` do per run."""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ...errors import ConfigError, FedSQError, RunError, in_one_line
from ...federation.record import RoundRecord
from ...run.host import Outcome, Start
from ...settings.recipe import Families, flat
from .devices import described
from .names import with_host_defaults

log = logging.getLogger(__name__)


def execute(
    families: Families, log_file: Path, on_start: Callable[[Start], None], on_round: Callable[[RoundRecord], None]
) -> Outcome:
    """Run a recipe by FedML's own five lines, with our FedAvg and FedProx in place of its own: all of it, or the
    server process of it where the recipe has several.

    FedML's log lines and prints go to `log_file`.
    """
    with _recipe(families, log_file) as path:
        made = _runner(path, _fedml_arguments(families, rank=0))
        main = made.runner
        main.on_round = on_round
        scoring, data = main.scoring, main.scoring.data
        metrics, metric = scoring.evaluate()[0], main.plan.task.metric.name
        device, finished = described(scoring.device), main.checkpoints.round
        on_start(Start(device, data.counts, data.classes, metrics, made.reluised, made.notes, finished, metric))
        made.run()
        if getattr(main.args, "enable_wandb", False):
            import wandb

            wandb.finish()  # the next run of a comparison is a run of its own
        return Outcome(main.aggregator.model, main.server.structural_fingerprint, main.plan.head, main.silo_parts)


def serve(families: Families, log_file: Path, rank: int) -> None:
    """A client process of a run over MPI or GRPC, until the server ends it."""
    with _recipe(families, log_file) as path:
        _runner(path, _fedml_arguments(families, rank)).runner.run()


def _fedml_arguments(families: Families, rank: int) -> list[str]:
    """What FedML takes from the command line alone."""
    if flat(families).get("training_type", "simulation") == "simulation":
        return []
    return ["--rank", str(rank), "--role", "client" if rank else "server", "--run_id", "1"]


@contextlib.contextmanager
def _recipe(families: Families, log_file: Path) -> Iterator[Path]:
    """A recipe as a file, while FedML runs it; what FedML and a user's code raise becomes one line."""
    with _logged(log_file), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(with_host_defaults(families), sort_keys=False))
        try:
            yield path
        except FedSQError as error:
            log.error("%s", error)
            raise
        except SystemExit as error:
            log.exception("the run called sys.exit(%r) before its end", error.code)
            raise RunError(f"the run called sys.exit({error.code!r}) before its end") from error
        except Exception as error:
            log.exception("%s", in_one_line(error))
            raise RunError(f"{in_one_line(error)} (full trace in {log_file})") from error


def _runner(path: Path, arguments: list[str]) -> Any:
    """FedMLRunner, by FedML's five lines without the last one."""
    import fedml

    from . import choice, hook

    hook.register()
    args = _init(fedml, path, arguments)
    setattr(args, choice.OWN_ROWS, True)
    device = fedml.device.get_device(args)
    dataset, classes = _load(fedml, args)
    return fedml.FedMLRunner(args, device, dataset, fedml.model.create(args, classes))


def _init(fedml: Any, path: Path, arguments: list[str]) -> Any:
    """`fedml.init` for a recipe, as a `main.py --cf path` gets it."""
    argv, excepthook = sys.argv, sys.excepthook
    sys.argv = ["fedsq", "--cf", str(path), *arguments]
    try:
        args = fedml.init()
    finally:
        sys.argv, sys.excepthook = argv, excepthook
    args.yaml_paths = []  # the recipe was checked before; the file is gone after
    return args


def _load(fedml: Any, args: Any) -> Any:
    try:
        return fedml.data.load(args)
    except OSError as error:
        raise ConfigError(
            f"data_args: {args.dataset} cannot be loaded from data_cache_dir '{args.data_cache_dir}': {error}"
        ) from None


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Send all that FedML logs, warns of and prints to a file; put the root logger back afterwards."""
    root = logging.root
    handlers, level = list(root.handlers), root.level
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        with path.open("a") as out, contextlib.redirect_stdout(out):
            yield
    finally:
        logging.captureWarnings(False)
        handler.close()
        root.handlers = handlers
        root.setLevel(level)
