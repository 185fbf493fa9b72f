"""A run directory while its runs go on: what is written there, and what the user sees."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..errors import ConfigError, RunError
from ..federation.evaluate import Metrics
from ..federation.record import RoundRecord
from ..results.report import write_report
from ..results.rundir import RunDirectory
from ..settings.config import Config
from ..settings.recipe import Families, resolved_families
from . import ending
from .environment import environment
from .host import Start

NO_METRICS = Metrics(float("nan"), float("nan"), 0)
"""Metrics of a round that is not evaluated."""


@dataclass
class Session:
    """What a command collects while its runs go on."""

    directory: RunDirectory
    console: Console
    progress: Progress
    task: TaskID
    summary: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    ended_early: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    def advance(self, rounds: int, **shown: Any) -> None:
        self.progress.update(self.task, advance=rounds, **shown)


@dataclass(frozen=True)
class Recorder:
    """Writes down the start and the rounds of one run of a session. `label` names the run in the tables."""

    session: Session
    label: str
    config: Config

    @property
    def name(self) -> str:
        return f"{self.label} seed {self.config.random_seed}"

    def on_start(self, start: Start) -> None:
        session, seed = self.session, self.config.random_seed
        session.directory.forget(self.label, seed, after=start.finished)
        session.advance(start.finished)
        if not start.finished:
            before = {"accuracy": start.metrics.accuracy, "loss": start.metrics.loss}
            kind = "initial" if self.config.warm_start == "none" else "warm_start"
            session.summary.setdefault(kind, {})[str(seed)] = before
        for note in start.notes:
            session.say(f"{self.name}: {note}")
        session.summary.update(device=start.device, metric=start.metric)
        if start.reluised is not None:
            done, learned = start.reluised, self.config.relu_ise_learn_epochs
            about = {**asdict(done), "drop": done.drop, "learn_epochs": learned}
            session.summary.setdefault("relu_ise", {})[str(seed)] = about
        if start.counts is not None and "label_counts" not in session.summary:
            session.summary.update(label_counts=start.counts, classes=start.classes, label_counts_seed=seed)
        session.directory.write_summary(session.summary)

    def on_round(self, record: RoundRecord) -> None:
        session, seed = self.session, self.config.random_seed
        metric = session.summary.get("metric")
        accuracy = f"{metric} {100 * record.metrics.accuracy:.1f} %" if record.metrics else ""
        session.advance(1, accuracy=accuracy)
        if not session.console.is_terminal:
            session.say(f"{self.name}: round {record.round}/{self.config.comm_round} {accuracy}")
        session.notes += [f"{self.name}, {note}" for note in record.notes]
        session.directory.add(self._rows(record))
        if record.by_silo:
            found = {str(silo): measured.accuracy for silo, measured in record.by_silo.items()}
            session.summary.setdefault("by_silo", {}).setdefault(self.label, {})[str(seed)] = found

    def _rows(self, record: RoundRecord) -> list[dict[str, Any]]:
        """The lines of metrics.csv, one per split that was evaluated; the test set always has one."""
        kept = ("round", "seconds", "seconds_evaluation", "bytes_up", "bytes_down")
        common = {"algorithm": self.label, "seed": self.config.random_seed}
        common |= {name: getattr(record, name) for name in kept}
        measured = (
            ("test", record.metrics or NO_METRICS, record.released),
            ("silos", record.silos, None),
            ("silos_tuned", record.silos_tuned, None),
        )
        return [
            {**common, "split": split, "loss": found.loss, "accuracy": found.accuracy,
             "accuracy_released": (released or NO_METRICS).accuracy}
            for split, found, released in measured
            if found is not None
        ]  # fmt: skip


@contextmanager
def session(
    families: Families, config: Config, out: Path, console: Console, runs: int, resume: bool
) -> Iterator[Session]:
    """The run directory `out` for so many runs of a recipe. At the end, the report is written and shown.

    Raises:
        RunError: at the end, when a run ended early.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    directory = RunDirectory.resume(out) if resume else RunDirectory.create(out)
    if not resume:
        directory.write_config(resolved_families(families, config))
    directory.write_environment(environment())
    ending.begin()
    progress = _progress(console)
    task = progress.add_task("starting FedML", total=runs * config.comm_round, accuracy="")
    found = Session(directory, console, progress, task, directory.summary)
    found.say(f"results go to {out}; CPU threads: {torch.get_num_threads()}")
    try:
        with progress:
            yield found
    except KeyboardInterrupt:
        found.summary["ended_early"] = ["interrupted"]
        directory.write_summary(found.summary)
        found.say(f"the finished rounds are in {out}; `fedsq report {out}` shows them, --resume {out} goes on")
        raise
    except ConfigError:
        if directory.metrics.empty and not resume:
            shutil.rmtree(out, ignore_errors=True)  # nothing ran: the same command may be given again
        raise
    for note in found.notes:
        found.say(f"note: {note}")
    found.summary["ended_early"] = found.ended_early
    directory.write_summary(found.summary)
    if not directory.metrics.empty:
        console.print(write_report(directory))
    found.say(f"results are in {out}")
    if found.ended_early:
        raise RunError(" | ".join(found.ended_early))


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("round"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


@contextmanager
def new_folder(recipe: Path) -> Iterator[Path]:
    """`runs/<recipe>-<time>` in the current folder, with a number where another run has that name. It is made at once,
    so that no other run gets it, and goes where nothing was written into it.

    Raises:
        ConfigError: it cannot be made.
    """
    name = f"{file_name(recipe.stem) or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    home, number = Path("runs"), 1
    was_there = home.exists()
    while True:
        out = home / (name if number == 1 else f"{name}-{number}")
        try:
            home.mkdir(exist_ok=True)
            out.mkdir()
            break
        except FileExistsError:
            if not home.is_dir():
                raise ConfigError(
                    f"output folder {out} cannot be made: {home} is no folder; name one by --out"
                ) from None
            number += 1
        except FileNotFoundError:  # a run that ended took `runs` with it just now
            continue
        except OSError as error:
            raise ConfigError(f"output folder {out} cannot be made: {error.strerror}; name one by --out") from None
    try:
        yield out
    finally:
        for folder in (out, *(() if was_there else (home,))):
            with suppress(OSError):  # something is in there
                folder.rmdir()


def file_name(name: str) -> str:
    """`name` with the characters that are safe in names of files."""
    return re.sub(r"[^\w.+-]+", "-", name)
