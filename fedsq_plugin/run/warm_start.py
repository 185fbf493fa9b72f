"""Warm start on a public split: the server trains the model before the first round."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..dualcopy.reluise import replace_by_lambda, replace_by_relu
from ..errors import ConfigError, WeightsError
from ..federation import checkpoint
from ..federation.evaluate import evaluate
from ..federation.local import LocalTraining, Phase, local_update
from ..federation.roles import Role, check_finite, roles
from ..federation.state import fingerprint, state_of
from .reluise import Hardening, Reluised, relu_ise

Batches = Iterable[tuple[Tensor, Tensor]]


def public_warm_start(
    model: nn.Module,
    batches: Batches,
    content: str,
    training: LocalTraining,
    epochs: int,
    seed: int,
    cache: Path,
    device: torch.device | str = "cpu",
) -> bool:
    """Train `model` in place on public data, or load the result of having done so before.

    The cache is keyed by content: the model as printed, its initial weights, the data (`content` is
    their fingerprint), the options, the seed, the threads and the versions. A damaged entry is made anew.

    Returns:
        Whether the result came from the cache.
    """

    def train() -> Mapping[str, Any]:
        everything = (Phase(epochs, frozenset(Role)),)
        local_update(model, batches, training, everything, roles(model), round=0, seed=seed, device=device)
        if not all(check_finite(value) for value in model.state_dict().values() if value.is_floating_point()):
            raise ConfigError(
                f"the warm start diverged: weights are not finite after {epochs} epochs; "
                "lower warm_start_learning_rate"
            )
        return {"epochs": epochs, "seed": seed, "public_data": content}

    parts = (content, training, epochs, seed)
    return _cached("warm-start", model, parts, cache, device, train)[1]


def public_relu_ise(
    model: nn.Module,
    batches: Batches,
    validation: Batches,
    content: str,
    training: LocalTraining,
    hardening: Hardening,
    seed: int,
    cache: Path,
    device: torch.device | str = "cpu",
) -> tuple[Reluised, bool]:
    """`relu_ise` in place on public data, measured on public data that nothing trained on; or the result of
    having done so before, with a cache as `public_warm_start` has it.

    Returns:
        What it did, and whether that came from the cache.
    """

    def accuracy(model: nn.Module) -> float:
        return evaluate(model, validation, device).accuracy

    def train() -> Mapping[str, Any]:
        done = relu_ise(model, batches, training, hardening, seed=seed, device=device, evaluate=accuracy)
        return asdict(done)

    def prepare() -> None:
        replace_by_lambda(model)
        replace_by_relu(model)

    about, cached = _cached(
        "relu-ise", model, (content, training, hardening, seed), cache, device, train, prepare
    )
    return Reluised(**{name: about[name] for name in Reluised.__dataclass_fields__}), cached


def _cached(
    kind: str,
    model: nn.Module,
    options: Iterable[object],
    cache: Path,
    device: torch.device | str,
    make: Callable[[], Mapping[str, Any]],
    prepare: Callable[[], None] = lambda: None,
) -> tuple[Mapping[str, Any], bool]:
    """What `make` says of what it made of the model, and whether it had been made before.

    `prepare` gives the model the modules that `make` gives it.
    """
    parts: tuple[object, ...] = (
        model,
        fingerprint(model.state_dict()),
        *options,
        torch.__version__,
        torch.get_num_threads(),
        __version__,
        str(device),
    )
    name = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]
    path = cache / f"{kind}-{name}.safetensors"
    if path.exists():
        try:
            state, about = checkpoint.load(path)
            if state.keys() == model.state_dict().keys():
                prepare()
                model.load_state_dict(state)
                model.to(device)
                return about, True
        except (WeightsError, RuntimeError):
            pass  # written by another version, or damaged: train again and replace it
    _refuse_unwritable(cache)
    about = dict(make())
    model.to(device)
    checkpoint.save(path, state_of(model), about)
    return about, False


def _refuse_unwritable(cache: Path) -> None:
    """Before the training rather than after it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise ConfigError(f"warm_start_cache_dir {cache} cannot be written: {error.strerror}") from None
