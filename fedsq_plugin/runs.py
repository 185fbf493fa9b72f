"""`fedsq run` and `fedsq compare`: runs of a recipe, their directory, and what the user sees."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import __version__
from .algorithms import algorithm
from .analysis.report import write_report
from .analysis.rundir import RunDirectory
from .config import Config
from .dualcopy import DualCopy
from .errors import ConfigError
from .federation import checkpoint
from .federation.record import RoundRecord
from .hosts.fedml.run import Outcome, Start, execute
from .recipe import Families, overridden, resolve, resolved_families

SPLIT = "test"


@dataclass
class _Session:
    """What a command collects while its runs go on."""

    directory: RunDirectory
    console: Console
    progress: Progress
    notes: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


def run(families: Families, out: Path, console: Console) -> None:
    """One run of a recipe's own algorithm and seed."""
    config = resolve(families)
    algorithm(config.federated_optimizer)
    with _session(families, config, out, console, runs=1) as session:
        _one(session, families, config)


def compare(
    families: Families, algorithms: Sequence[str], seeds: Sequence[int], out: Path, console: Console
) -> None:
    """Every algorithm with every seed, all else equal."""
    for name in algorithms:
        algorithm(name)
    repeated = {name for name in algorithms if list(algorithms).count(name) > 1}
    if repeated or len(set(seeds)) < len(seeds):
        raise ConfigError(f"compare: {sorted(repeated)[0] if repeated else 'a seed'} is given twice")
    variants = [
        overridden(families, [f"federated_optimizer={name}", f"random_seed={seed}"])
        for seed in seeds
        for name in algorithms
    ]
    configs = [resolve(variant) for variant in variants]
    with _session(families, configs[0], out, console, runs=len(variants)) as session:
        session.summary.update(algorithms_compared=list(algorithms), seeds=list(seeds))
        for variant, config in zip(variants, configs, strict=True):
            _one(session, variant, config)


def default_out(recipe: Path) -> Path:
    """`runs/<recipe>-<time>` in the current folder."""
    name = re.sub(r"[^\w.-]+", "-", recipe.stem) or "run"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


@contextmanager
def _session(
    families: Families, config: Config, out: Path, console: Console, runs: int
) -> Iterator[_Session]:
    import torch

    if config.threads:
        torch.set_num_threads(config.threads)
    directory = RunDirectory.create(out)
    directory.write_config(resolved_families(families, config))
    directory.write_environment(environment())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    session = _Session(directory, console, progress)
    console.print(f"results go to {out}; {torch.get_num_threads()} threads")
    with progress:
        session.progress.add_task("starting FedML", total=runs * config.comm_round, accuracy="")
        yield session
    for note in session.notes:
        console.print(f"note: {note}", highlight=False)
    directory.write_summary(session.summary)
    console.print(write_report(directory))
    console.print(f"results are in {out}", highlight=False)


def _one(session: _Session, families: Families, config: Config) -> None:
    name, seed = config.federated_optimizer, config.random_seed
    task = session.progress.task_ids[0]
    session.progress.update(task, description=f"{name} seed {seed}")

    def on_start(start: Start) -> None:
        warm = {"accuracy": start.warm_start.accuracy, "loss": start.warm_start.loss}
        session.summary.setdefault("warm_start", {})[str(seed)] = warm
        session.summary["device"] = start.device
        if start.counts is not None and "label_counts" not in session.summary:
            session.summary.update(label_counts=start.counts, classes=start.classes, label_counts_seed=seed)

    def on_round(record: RoundRecord) -> None:
        accuracy = f"accuracy {100 * record.metrics.accuracy:.1f} %" if record.metrics else ""
        session.progress.update(task, advance=1, accuracy=accuracy)
        if not session.console.is_terminal:
            line = f"{name} seed {seed}: round {record.round}/{config.comm_round} {accuracy}"
            session.console.print(line, highlight=False)
        session.notes += [f"{name} seed {seed}, {note}" for note in record.notes]
        if record.metrics and record.released:
            session.directory.add(
                [
                    {
                        "algorithm": name,
                        "seed": seed,
                        "round": record.round,
                        "split": SPLIT,
                        "loss": record.metrics.loss,
                        "accuracy": record.metrics.accuracy,
                        "accuracy_released": record.released.accuracy,
                        "seconds": record.seconds,
                        "seconds_evaluation": record.seconds_evaluation,
                        "bytes_up": record.bytes_up,
                        "bytes_down": record.bytes_down,
                    }
                ]
            )

    log_file = session.directory.path_for("fedml.log")
    outcome: Outcome = execute(families, log_file, on_start, on_round)
    model = outcome.model
    tensors = model.full_state_dict() if isinstance(model, DualCopy) else model.state_dict()
    about: Mapping[str, Any] = {
        "algorithm": asdict(algorithm(name)),
        "seed": seed,
        "model": config.model,
        "small_images": config.small_images,
        "head": outcome.head,
        "rounds": config.comm_round,
        "structural_fingerprint": outcome.structural_fingerprint,
        "plugin": __version__,
    }
    checkpoint.save(session.directory.path_for(f"{name}-seed{seed}.safetensors"), tensors, about)


def environment() -> dict[str, Any]:
    """Where a run was made: versions, processor, threads."""
    import torch

    packages = ("fedml", "torch", "torchvision", "numpy", "pandas", "scikit-learn", "safetensors")
    return {
        "plugin": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: version(name) for name in packages},
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
