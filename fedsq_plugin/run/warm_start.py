"""The model before the first round: pretrained weights, training on public data, and ReLU-isation."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import __version__, models
from ..data.registry import OURS
from ..data.silos import VALIDATION, SilosData
from ..dualcopy import DualCopy
from ..errors import ConfigError, WeightsError, worded
from ..federation import state_files
from ..federation.evaluate import evaluate
from ..federation.local import Phase, local_update
from ..federation.roles import Role, roles
from ..federation.seeding import derive
from ..federation.state import fingerprint, no_less_finite, state_of, tensors_of, with_extras
from ..federation.task import CLASSIFICATION, Batches, Task
from ..federation.training import LocalTraining
from ..models.backbones import PREFIX
from ..settings.config import Config
from ..settings.warm_start import Hardening
from .plan import RECIPE, head_of
from .reluise import Reluised, relu_ise, replace_smooth


class WarmStart(NamedTuple):
    """What a warm start did."""

    reluised: Reluised | None
    """What ReLU-isation did; None: it was not asked for."""
    notes: list[str]
    """Lines for the user: where the weights came from."""


def warm_start(
    model: nn.Module, config: Config, data: SilosData | None, device: torch.device, task: Task = CLASSIFICATION
) -> WarmStart:
    """Give the model its pretrained weights, and ReLUs in place of its smooth activations where `relu_ise` asks
    for that, in place. The structural copy of a DualCopy is taken anew.

    Args:
        data: read only where the recipe has a public split.
        task: of the data.

    Raises:
        ConfigError: the warm start cannot be had, or has diverged.
        WeightsError: a weights file does not fit.
    """
    plain = model.quantitative if isinstance(model, DualCopy) else model
    refuse_warm_start(config)
    notes, reluised = [], None
    if config.warm_start == "public":
        notes.append(_train_on_public(plain, config, data, device, task))
    elif config.warm_start != "none":
        notes += [f"warm start: {line}" for line in load_pretrained(plain, config)]
    if config.relu_ise:
        reluised, note = _relu_ise_on_public(plain, config, data, device, task)
        notes.append(note)
    if isinstance(model, DualCopy):
        model.refresh()
    return WarmStart(reluised, notes)


def refuse_warm_start(config: Config) -> None:
    """Raise ConfigError where the names alone tell that this model or data set cannot have this warm start."""
    if config.has_public_split and config.dataset not in OURS:
        what = "relu_ise" if config.relu_ise else "warm_start 'public'"
        raise ConfigError(
            f"warm_start_args.{what}: {config.dataset} has no public split; "
            f"use the data sets {' or '.join(OURS)}, or warm_start: file"
        )
    if config.warm_start == "imagenet" and config.model not in models.names():
        raise ConfigError(
            f"warm_start_args.warm_start 'imagenet': there are no such weights for {config.model}; "
            f"use {', '.join(n for n in models.names() if not n.startswith(PREFIX))}, or warm_start: file"
        )
    if config.warm_start == "imagenet" and config.small_images:
        raise ConfigError(
            "warm_start_args.warm_start 'imagenet': ImageNet's weights have torchvision's own stem; "
            "set fedsq_args.small_images: false (and image_size for small images), or use warm_start: public"
        )


def load_pretrained(model: nn.Module, config: Config) -> list[str]:
    """Load ImageNet's weights, or those of a file, into a plain model, in place. Returns a line where the head was
    left out."""
    weights = config.warm_start_file or "imagenet"
    with worded(RECIPE):
        state = models.pretrained_state(weights, config.model, config.small_images)
        try:
            return models.load_weights(model, state, head_of(config, model))
        except WeightsError as error:
            raise error.after(f"warm start from {weights}: ") from None


def _train_on_public(model: nn.Module, config: Config, data: SilosData | None, device: torch.device, task: Task) -> str:
    data = with_public_split(data, config)
    content, training = _content(data, config), _training(config, config.warm_start_learning_rate)
    epochs, seed = config.warm_start_epochs, derive("warm start", config.seed("model"))
    cached = public_warm_start(model, data.public, content, training, epochs, seed, config.cache_dir, device, task)
    how = "read from the cache" if cached else f"trained for {epochs} epochs"
    return f"warm start on {len(data.public.dataset)} public samples: {how}"


def _relu_ise_on_public(
    model: nn.Module, config: Config, data: SilosData | None, device: torch.device, task: Task
) -> tuple[Reluised, str]:
    """Run `relu_ise`, or load its result from the cache. Accuracies are measured on samples on which nothing is
    trained."""
    data = with_public_split(data, config)
    public, validation = data.public, data.validation
    training = _training(config, config.relu_ise_learning_rate or config.warm_start_learning_rate)
    hardening, seed = config.only(Hardening), derive("relu-ise", config.seed("model"))

    def accuracy(model: nn.Module) -> float:
        return evaluate(model, validation, device, *task).accuracy

    def train() -> Mapping[str, Any]:
        how: Any = {"seed": seed, "device": device, "task": task, "evaluate": accuracy}
        return asdict(relu_ise(model, public, training, hardening, **how))

    parts = (_content(data, config), training, hardening, seed, task.reading)
    about, cached = _cached("relu-ise", model, parts, config.cache_dir, device, train, replace_smooth)
    done = Reluised(**{name: about[name] for name in Reluised.__dataclass_fields__})
    return done, (
        f"ReLU-isation of {len(done.target)} activations{' (read from the cache)' if cached else ''}: accuracy on "
        f"{len(validation.dataset)} public samples {100 * done.original:.1f} % smooth, "
        f"{100 * done.hardened:.1f} % at the target lambda, {100 * done.relu:.1f} % with ReLU "
        f"(drop {100 * done.drop:.1f} points)"
    )


def _content(data: SilosData, config: Config) -> str:
    """What names the public batches in the cache."""
    return f"{data.public_content}/{config.warm_start_batch_size}"


def _training(config: Config, rate: float) -> LocalTraining:
    return LocalTraining(learning_rate=rate, momentum=config.warm_start_momentum, augmentation=config.augmentation)


def with_public_split(data: SilosData | None, config: Config) -> SilosData:
    """The data, with a public split that is large enough to train on. Raises ConfigError where it is not."""
    size = 0 if data is None or data.public is None else len(data.public.dataset)
    if data is None or size < 2 or (config.relu_ise and data.validation is None):
        raise ConfigError(
            f"warm_start_args.warm_start_public {config.warm_start_public} leaves {size} of the training "
            f"samples public, at least {VALIDATION if config.relu_ise else 2} are needed; raise it"
        )
    return data


def public_warm_start(
    model: nn.Module,
    batches: Batches,
    content: str,
    training: LocalTraining,
    epochs: int,
    seed: int,
    cache: Path,
    device: torch.device | str = "cpu",
    task: Task = CLASSIFICATION,
) -> bool:
    """Train `model` on public data, in place, or load the result from the cache.

    An entry of the cache is used where everything is the same: the printed model, its initial weights, the data
    (`content` is their SHA-256), the options, the seed, the number of threads, the device and the versions. A
    damaged entry is made again.

    Returns:
        Whether the result came from the cache.

    Raises:
        ConfigError: the training diverged, or the cache cannot be written.
    """

    def train() -> Mapping[str, Any]:
        everything = (Phase(epochs, frozenset(Role)),)
        before = state_of(model)
        how: Any = {"seed": seed, "device": device, "loss": task.loss, "reading": task.reading}
        local_update(model, batches, training, everything, roles(model), round=0, **how)
        if not all(no_less_finite(value, before[key]) for key, value in tensors_of(model).items()):
            raise ConfigError(
                f"the warm start diverged: weights are not finite after {epochs} epochs; lower warm_start_learning_rate"
            )
        return {"epochs": epochs, "seed": seed, "public_data": content}

    parts = (content, training, epochs, seed, task.reading)
    return _cached("warm-start", model, parts, cache, device, train)[1]


def _cached(
    kind: str,
    model: nn.Module,
    options: Iterable[object],
    cache: Path,
    device: torch.device | str,
    make: Callable[[], Mapping[str, Any]],
    prepare: Callable[[nn.Module], None] = lambda model: None,
) -> tuple[Mapping[str, Any], bool]:
    """Let `make` change the model in place, or load the result from the cache.

    Args:
        make: changes the model, and returns metadata.
        prepare: gives the model the modules that `make` would give it, so that the cached weights fit.

    Returns:
        The metadata, and whether they came from the cache.
    """
    versions = (torch.__version__, torch.get_num_threads(), __version__, str(device))
    parts = (model, fingerprint(tensors_of(model)), *options, *versions)
    name = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]
    path = cache / f"{kind}-{name}.safetensors"
    if path.exists():
        try:
            state, about = state_files.load(path)
            if state.keys() == tensors_of(model).keys():
                prepare(model)
                model.load_state_dict(with_extras(model, state))
                model.to(device)
                return about, True
        except (WeightsError, RuntimeError):
            pass  # damaged, or from another version: it is made again
    try:  # before a training that takes long
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise ConfigError(f"warm_start_cache_dir {cache} cannot be written: {error.strerror}") from None
    about = dict(make())
    model.to(device)
    state_files.save(path, state_of(model), about)
    return about, False
