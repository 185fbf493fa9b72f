"""`fedsq run` and `fedsq compare`: runs of a recipe, their directory, and what the user sees."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import __version__
from ..algorithms import algorithm
from ..dualcopy import DualCopy
from ..errors import ConfigError, FedSQError, RunError
from ..federation import checkpoint
from ..federation.evaluate import Metrics
from ..federation.record import RoundRecord
from ..hosts.fedml.host import Outcome, Start, execute
from ..hosts.fedml.names import ROADS
from ..results.report import write_report
from ..results.rundir import RunDirectory
from ..settings.config import Config
from ..settings.recipe import Families, flat, overridden, resolve, resolved_families
from .check import check

NO_METRICS = Metrics(float("nan"), float("nan"), 0)
"""Of a round without an evaluation."""


@dataclass(frozen=True)
class _Variant:
    """One run: its name in the tables, and its recipe."""

    label: str
    families: Families

    @property
    def stem(self) -> str:
        """The name of its files."""
        return f"{_file_name(self.label)}-seed{flat(self.families).get('random_seed', 0)}"


@dataclass
class _Session:
    """What a command collects while its runs go on."""

    directory: RunDirectory
    console: Console
    progress: Progress
    notes: list[str] = field(default_factory=list)
    ended_early: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


def run(families: Families, out: Path, console: Console, server: bool = False, resume: bool = False) -> None:
    """One run of a recipe's own algorithm and seed; the server's part of it, where it has clients to serve
    it. `resume` goes on with the one in `out`."""
    if not server:
        _refuse_many_processes(families)
    _all([_single(families)], 1, families, out, console, {}, resume)


def checkpoint_settings(families: Families, out: Path, resume: bool) -> list[str]:
    """The settings that let a process of the run in `out` write its checkpoints there."""
    return _checkpointed(_single(families), out, resume)


def interrupted(out: Path) -> tuple[Families, dict[str, Any]]:
    """The recipe of the run or the comparison in a run directory, and the summary's part of it.

    Raises:
        ConfigError: there is none.
    """
    directory = RunDirectory.resume(out)
    return directory.config, directory.summary


def compare(
    families: Families,
    algorithms: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    console: Console,
    resume: bool = False,
) -> None:
    """Every algorithm with every seed, all else equal. A run that ends early does not end the others.
    `resume` goes on with those in `out` that are not finished.

    An algorithm may bring options of its own, as in FedSQ:structural_copy=refresh:structural_rounds=3.
    """
    _refuse_many_processes(families)
    names = {label: label.split(":")[0] for label in algorithms}
    for name in names.values():
        algorithm(name)
    repeated = {label for label in algorithms if list(algorithms).count(label) > 1}
    if repeated or len(set(seeds)) < len(seeds):
        raise ConfigError(f"compare: {sorted(repeated)[0] if repeated else 'a seed'} is given twice")
    shared = _shared(families, list(names.values()))
    families = overridden(families, shared)
    variants = []
    for seed in seeds:
        for label, name in names.items():
            own = [f"federated_optimizer={name}", f"random_seed={seed}", *label.split(":")[1:]]
            variants.append(_Variant(label, overridden(families, own)))
    about = {"algorithms_compared": list(algorithms), "seeds": list(seeds)}
    # Algorithms and seeds differ in nothing else that can be wrong with a recipe.
    if shared:
        console.print(f"for every algorithm: {', '.join(shared)}", highlight=False)
    _all(variants, len(algorithms), families, out, console, about, resume)


def _single(families: Families) -> _Variant:
    return _Variant(str(flat(families).get("federated_optimizer", "")), families)


def _checkpointed(variant: _Variant, out: Path, resume: bool) -> list[str]:
    given = flat(variant.families).get("checkpoint_dir")
    folder = (Path(given) if given else out.absolute() / "checkpoints") / variant.stem
    return [f"checkpoint_dir={json.dumps(str(folder))}", *(["resume=true"] if resume else [])]


def _refuse_many_processes(families: Families) -> None:
    values = flat(families)
    road = values.get("training_type", "simulation"), values.get("backend", "sp")
    if road in ROADS and road != ("simulation", "sp"):
        raise ConfigError(
            f"training_type {road[0]} with backend {road[1]} takes several processes: use `fedsq launch`, or "
            "--set training_type=simulation --set backend=sp"
        )


def _shared(families: Families, algorithms: Sequence[str]) -> list[str]:
    """What one of the algorithms does by itself, and a fair comparison does for all: testing silos on their
    own data, the final fine-tuning. What the recipe says goes before."""
    given, rows = flat(families), [algorithm(name) for name in algorithms]
    epochs = max(row.finetune_epochs for row in rows)
    settings = []
    if given.get("silo_evaluation") is None and any(row.personal for row in rows):
        settings.append("silo_evaluation=true")
    if given.get("finetune_epochs") is None and epochs:
        settings.append(f"finetune_epochs={epochs}")
    return settings


def _all(
    variants: Sequence[_Variant],
    to_check: int,
    base: Families,
    out: Path,
    console: Console,
    about: Mapping[str, Any],
    resume: bool,
) -> None:
    found = [line for variant in variants[:to_check] for line in check(variant.families)]
    if found:
        raise ConfigError(" | ".join(dict.fromkeys(found)))
    configs = [resolve(variant.families) for variant in variants]
    with _session(base, resolve(base), out, console, len(variants), resume) as session:
        session.summary.update(about)
        session.directory.write_summary(session.summary)
        for variant, config in zip(variants, configs, strict=True):
            if session.directory.path_for(f"{variant.stem}.json").exists():
                session.progress.update(session.progress.task_ids[0], advance=config.comm_round)
                console.print(f"{variant.label} seed {config.random_seed}: finished before", highlight=False)
                continue
            try:
                _one(session, variant, config, resume)
            except FedSQError as error:
                if isinstance(error, ConfigError) and session.directory.metrics.empty:
                    raise
                name = f"{variant.label} seed {config.random_seed}"
                session.ended_early.append(f"{name} ended early: {error}")
                console.print(session.ended_early[-1], highlight=False, markup=False)


def default_out(recipe: Path) -> Path:
    """`runs/<recipe>-<time>` in the current folder."""
    return Path("runs") / f"{_file_name(recipe.stem) or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name)


@contextmanager
def _session(
    families: Families, config: Config, out: Path, console: Console, runs: int, resume: bool
) -> Iterator[_Session]:
    import torch

    if config.threads:
        torch.set_num_threads(config.threads)
    directory = RunDirectory.resume(out) if resume else RunDirectory.create(out)
    if not resume:
        directory.write_config(resolved_families(families, config))
    directory.write_environment(environment())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("round"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    session = _Session(directory, console, progress, summary=directory.summary)
    console.print(f"results go to {out}; CPU threads: {torch.get_num_threads()}", highlight=False)
    try:
        with progress:
            session.progress.add_task("starting FedML", total=runs * config.comm_round, accuracy="")
            yield session
    except KeyboardInterrupt:
        session.summary["ended_early"] = ["interrupted"]
        directory.write_summary(session.summary)
        console.print(
            f"the finished rounds are in {out}; `fedsq report {out}` shows them, --resume {out} goes on",
            highlight=False,
        )
        raise
    except ConfigError:
        if directory.metrics.empty and not resume:
            shutil.rmtree(out, ignore_errors=True)  # nothing ran: the same command may be given again
        raise
    for note in session.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    session.summary["ended_early"] = session.ended_early
    directory.write_summary(session.summary)
    if not directory.metrics.empty:
        console.print(write_report(directory))
    console.print(f"results are in {out}", highlight=False)
    if session.ended_early:
        raise RunError(" | ".join(session.ended_early))


def _one(session: _Session, variant: _Variant, config: Config, resume: bool) -> None:
    name, seed = variant.label, config.random_seed
    task = session.progress.task_ids[0]
    session.progress.update(task, description=f"{name} seed {seed}")

    def on_start(start: Start) -> None:
        session.directory.forget(name, seed, after=start.finished)
        session.progress.update(task, advance=start.finished)
        if not start.finished:
            before = {"accuracy": start.metrics.accuracy, "loss": start.metrics.loss}
            kind = "initial" if config.warm_start == "none" else "warm_start"
            session.summary.setdefault(kind, {})[str(seed)] = before
        for note in start.notes:
            session.console.print(f"{name} seed {seed}: {note}", highlight=False, markup=False)
        session.summary.update(device=start.device, metric=start.metric)
        if start.reluised is not None:
            done, learned = start.reluised, config.relu_ise_learn_epochs
            about = {**asdict(done), "drop": done.drop, "learn_epochs": learned}
            session.summary.setdefault("relu_ise", {})[str(seed)] = about
        if start.counts is not None and "label_counts" not in session.summary:
            session.summary.update(label_counts=start.counts, classes=start.classes, label_counts_seed=seed)
        session.directory.write_summary(session.summary)

    def on_round(record: RoundRecord) -> None:
        metric = session.summary.get("metric")
        accuracy = f"{metric} {100 * record.metrics.accuracy:.1f} %" if record.metrics else ""
        session.progress.update(task, advance=1, accuracy=accuracy)
        if not session.console.is_terminal:
            line = f"{name} seed {seed}: round {record.round}/{config.comm_round} {accuracy}"
            session.console.print(line, highlight=False)
        session.notes += [f"{name} seed {seed}, {note}" for note in record.notes]
        common = {
            "algorithm": name,
            "seed": seed,
            "round": record.round,
            "seconds": record.seconds,
            "seconds_evaluation": record.seconds_evaluation,
            "bytes_up": record.bytes_up,
            "bytes_down": record.bytes_down,
        }
        measured = (
            ("test", record.metrics or NO_METRICS, record.released),
            ("silos", record.silos, None),
            ("silos_tuned", record.silos_tuned, None),
        )
        rows = [
            {**common, "split": split, "loss": found.loss, "accuracy": found.accuracy,
             "accuracy_released": (released or NO_METRICS).accuracy}
            for split, found, released in measured
            if found is not None
        ]  # fmt: skip
        session.directory.add(rows)
        if record.by_silo:
            found = {str(silo): measured.accuracy for silo, measured in record.by_silo.items()}
            session.summary.setdefault("by_silo", {}).setdefault(name, {})[str(seed)] = found

    log_file = session.directory.path_for("fedml.log")
    settings = _checkpointed(variant, session.directory.path, resume)
    outcome: Outcome = execute(overridden(variant.families, settings), log_file, on_start, on_round)
    model = outcome.model
    tensors = model.full_state_dict() if isinstance(model, DualCopy) else model.state_dict()
    about: Mapping[str, Any] = {
        "algorithm": algorithm(config.federated_optimizer).described(),
        "seed": seed,
        "model": config.model,
        "small_images": config.small_images,
        "relu_ise": config.relu_ise,
        "head": outcome.head,
        "rounds": config.comm_round,
        "structural_fingerprint": outcome.structural_fingerprint,
        "plugin": __version__,
    }
    if outcome.silos:
        parts = {**about, "content": "what stayed with each silo, as <silo>/<key>"}
        silos = session.directory.path_for(f"{variant.stem}-silos.safetensors")
        checkpoint.save(silos, outcome.silos, parts)
    # Last: where it is, the run is finished.
    checkpoint.save(session.directory.path_for(f"{variant.stem}.safetensors"), tensors, about)
    if config.checkpoint_dir is None:
        shutil.rmtree(session.directory.path / "checkpoints" / variant.stem, ignore_errors=True)
        with suppress(OSError):
            (session.directory.path / "checkpoints").rmdir()


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
