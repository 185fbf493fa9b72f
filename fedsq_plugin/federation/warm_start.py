"""Warm start on a public split: the server trains the model before the first round."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import ConfigError, WeightsError
from . import checkpoint
from .local import LocalTraining, Phase, local_update
from .roles import Role, check_finite, roles
from .state import fingerprint, state_of


def public_warm_start(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
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
    parts: Sequence[object] = (
        model,
        fingerprint(model.state_dict()),
        content,
        training,
        epochs,
        seed,
        torch.__version__,
        torch.get_num_threads(),
        __version__,
        str(device),
    )
    name = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]
    path = cache / f"warm-start-{name}.safetensors"
    if path.exists():
        try:
            model.load_state_dict(checkpoint.load(path)[0])
            model.to(device)
            return True
        except (WeightsError, RuntimeError):
            pass  # written by another version, or damaged: train again and replace it
    _refuse_unwritable(cache)
    everything = (Phase(epochs, frozenset(Role)),)
    local_update(model, batches, training, everything, roles(model), round=0, seed=seed, device=device)
    if not all(check_finite(value) for value in model.state_dict().values() if value.is_floating_point()):
        raise ConfigError(
            f"the warm start diverged: weights are not finite after {epochs} epochs; "
            "lower warm_start_learning_rate"
        )
    checkpoint.save(path, state_of(model), {"epochs": epochs, "seed": seed, "public_data": content})
    return False


def _refuse_unwritable(cache: Path) -> None:
    """Before the training rather than after it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise ConfigError(f"warm_start_cache_dir {cache} cannot be written: {error.strerror}") from None
