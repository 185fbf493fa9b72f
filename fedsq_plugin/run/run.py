"""`fedsq run`: a run of a recipe, and what it leaves in the run directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import __version__
from ..algorithms import algorithm
from ..dualcopy import DualCopy
from ..errors import ConfigError, FedSQError
from ..federation import state_files
from ..federation.state import EXTRA
from ..settings.config import Config
from ..settings.recipe import Families, flat, overridden, resolve
from .check import check
from .host import Outcome, host
from .session import Recorder, Session, file_name, session


@dataclass(frozen=True)
class Variant:
    """One run: its name in the tables, and its recipe."""

    label: str
    families: Families

    @property
    def stem(self) -> str:
        """The name of its files."""
        return f"{file_name(self.label)}-seed{flat(self.families).get('random_seed', 0)}"

    def checkpoint_settings(self, out: Path, resume: bool) -> list[str]:
        """The settings by which its processes write checkpoints in the run directory `out`."""
        given = flat(self.families).get("checkpoint_dir")
        folder = (Path(given) if given else out.absolute() / "checkpoints") / self.stem
        return [f"checkpoint_dir={json.dumps(str(folder))}", *(["resume=true"] if resume else [])]


def run(families: Families, out: Path, console: Console, server: bool = False, resume: bool = False) -> None:
    """Run a recipe's own algorithm and seed. `resume` goes on with the run in `out`.

    Args:
        server: this process is the server of a run that has client processes.
    """
    if not server:
        refuse_several_processes(families)
    run_all([single(families)], families, out, console, resume=resume)


def single(families: Families) -> Variant:
    """The run that a recipe describes by itself."""
    return Variant(str(flat(families).get("federated_optimizer", "")), families)


def refuse_several_processes(families: Families) -> None:
    """Raise ConfigError when a recipe needs several processes."""
    values = {"training_type": "simulation", "backend": "sp", **flat(families)}
    if host().needs_several_processes(values):
        raise ConfigError(
            f"training_type {values['training_type']} with backend {values['backend']} takes several "
            "processes: use `fedsq launch`, or --set training_type=simulation --set backend=sp"
        )


def run_all(
    variants: Sequence[Variant],
    base: Families,
    out: Path,
    console: Console,
    *,
    checked: int = 1,
    about: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> None:
    """Run the variants of the recipe `base`, one after the other. When one ends early, the others still run.

    Args:
        checked: how many of the variants are checked; what can be wrong with the others is the same.
        about: entries for the summary.
        resume: leave out the runs that are finished in `out`, and go on with the others.

    Raises:
        ConfigError: a recipe is wrong; nothing was written.
        RunError: a run ended early.
    """
    found = [line for variant in variants[:checked] for line in check(variant.families)]
    if found:
        raise ConfigError(" | ".join(dict.fromkeys(found)))
    configs = [resolve(variant.families, host().brings_silos) for variant in variants]
    with session(base, resolve(base, host().brings_silos), out, console, len(variants), resume) as current:
        current.summary.update(about or {})
        current.directory.write_summary(current.summary)
        for variant, config in zip(variants, configs, strict=True):
            recorder = Recorder(current, variant.label, config)
            if current.directory.path_for(f"{variant.stem}.json").exists():
                current.advance(config.comm_round)
                current.say(f"{recorder.name}: finished before")
                continue
            try:
                _run_one(recorder, variant, resume)
            except FedSQError as error:
                if isinstance(error, ConfigError) and current.directory.metrics.empty:
                    raise
                current.ended_early.append(f"{recorder.name} ended early: {error}")
                current.say(current.ended_early[-1])


def _run_one(recorder: Recorder, variant: Variant, resume: bool) -> None:
    current, config, directory = recorder.session, recorder.config, recorder.session.directory
    current.advance(0, description=recorder.name)
    families = overridden(variant.families, variant.checkpoint_settings(directory.path, resume))
    outcome = host().execute(families, directory.path_for("fedml.log"), recorder.on_start, recorder.on_round)
    _save(current, variant, config, outcome)
    if config.checkpoint_dir is None:
        checkpoints = directory.path / "checkpoints"
        shutil.rmtree(checkpoints / variant.stem, ignore_errors=True)
        with suppress(OSError):
            checkpoints.rmdir()


def _save(current: Session, variant: Variant, config: Config, outcome: Outcome) -> None:
    """Write the model, and what stayed with the silos, as safetensors with JSON beside them."""
    model = outcome.model
    state = model.full_state_dict() if isinstance(model, DualCopy) else model.state_dict()
    tensors = {key: value for key, value in state.items() if key.rpartition(".")[2] != EXTRA}
    about: Mapping[str, Any] = {
        "algorithm": algorithm(config.federated_optimizer).described(),
        "seed": config.random_seed,
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
        file = current.directory.path_for(f"{variant.stem}-silos.safetensors")
        state_files.save(file, outcome.silos, parts)
    # The last file: where it exists, the run is finished.
    state_files.save(current.directory.path_for(f"{variant.stem}.safetensors"), tensors, about)
