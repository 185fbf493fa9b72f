"""Backbones by name, with a new head, a chosen stem and a warm start."""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Mapping
from http.client import HTTPException
from pickle import UnpicklingError
from typing import Any

from torch import Tensor, nn

from ..dualcopy import DualCopy
from ..errors import ConfigError, WeightsError, Word, nearest
from .table import BACKBONES, Backbone
from .weights import load_weights, read_state

log = logging.getLogger(__name__)

PREFIX = "dualcopy_"


def names() -> list[str]:
    """Every name that `create` knows: the plain models, then the DualCopies of those that can be gated
    as they are."""
    return [*BACKBONES, *(PREFIX + name for name, row in BACKBONES.items() if not row.smooth)]


def head(name: str) -> str:
    """The head's module path in the model called `name`, plain or DualCopy.

    Raises:
        ConfigError: no such model.

    >>> head("dualcopy_alexnet")
    'classifier.6'
    """
    return _row(name).head


def smooth(name: str) -> bool:
    """Whether the model called `name` has smooth activations (GELU, SiLU). It has no fixed gates, so a
    DualCopy can be made of it only once they are ReLUs.

    Raises:
        ConfigError: no such model.

    >>> smooth("convnext_tiny"), smooth("dualcopy_resnet18")
    (True, False)
    """
    return _row(name).smooth


def ungated(name: str) -> tuple[str, ...]:
    """Patterns, for `DualCopy(accept=...)`, of what has no gate in the model called `name` even when its
    smooth activations are ReLUs.

    Raises:
        ConfigError: no such model.

    >>> ungated("efficientnet_b0")
    ('features.*.scale_activation',)
    """
    return _row(name).ungated


def early(name: str) -> tuple[str, ...]:
    """Paths or patterns of the first modules of the model called `name`, which an ablation freezes.

    Raises:
        ConfigError: no such model.

    >>> early("resnet18")
    ('conv1', 'bn1', 'layer1')
    """
    return _row(name).early


def create(
    name: str,
    num_classes: int,
    weights: str | os.PathLike[str] | None = None,
    small_images: bool = False,
    in_channels: int = 3,
) -> nn.Module:
    """A backbone (torchvision's, or our gelunet) with a head of `num_classes` outputs, in training mode.

    What the weights do not give is initialised as torchvision does it, from torch's global generator:
    seed it first. The same seed gives the same head with weights and without.

    Args:
        name: one of `names()`. `dualcopy_<name>` is the same model wrapped in a DualCopy, whose
            structural copy is taken last, so it holds the weights and the new head too. Models with
            smooth activations have no such name: FedSQ makes a DualCopy of them once they are ReLUs.
        num_classes: outputs of the head.
        weights: None, "imagenet" (torchvision's IMAGENET1K_V1, downloaded once), or a file that
            `read_state` reads. A head with another number of outputs is left out, and logged. gelunet
            has no ImageNet weights.
        small_images: a 3x3 stem of stride 1 without the first pooling, for images of 8 to 64 pixels
            a side. The state-dict keys stay torchvision's, the stem's shape does not. Without it,
            alexnet needs at least 63 pixels a side. vit_b_16 takes images of one size only and keeps
            its 16x16 stem: 32 pixels a side with small_images (five tokens), 224 without. gelunet is
            the same with and without it.
        in_channels: channels of the images. ImageNet's weights need 3; a file, what it was made with.

    Raises:
        ConfigError: an unknown name, `dualcopy_` of smooth activations, or a number that is none.
        WeightsError: weights that cannot be had, or do not fit.

    >>> create("resnet18", num_classes=10, small_images=True).fc
    Linear(in_features=512, out_features=10, bias=True)
    """
    row = _row(name)
    num_classes = _count("num_classes", num_classes)
    in_channels = _count("in_channels", in_channels)
    if weights is not None and not isinstance(weights, (str, os.PathLike)):
        raise ConfigError(f"weights is {weights!r}; it must be null, 'imagenet' or a file's path")
    # The weights come first: a wrong path must not cost the seconds that a large model takes.
    state = None if weights is None else pretrained_state(weights, row.name, small_images, in_channels)
    model = _build(row, num_classes, small_images, in_channels)
    if state is not None:
        try:
            left_out = load_weights(model, state, row.head)
        except WeightsError as error:
            raise error.after(f"weights {weights} for {name}: ") from None
        for line in left_out:
            log.info("weights %s for %s: %s", weights, name, line)
    return model if name == row.name else DualCopy(model)


def _row(name: str) -> Backbone:
    plain = str(name).removeprefix(PREFIX)
    if plain not in BACKBONES:
        raise ConfigError(f"unknown model {name!r}{nearest(str(name), names())}")
    row = BACKBONES[plain]
    if row.smooth and name != plain:
        raise ConfigError(
            f"unknown model {name!r}: the smooth activations of {plain} have no gates; use model: {plain} "
            "with federated_optimizer: FedSQ and warm_start_args.relu_ise: true"
        )
    return row


def _count(what: str, value: Any) -> int:
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ConfigError(f"{what} is {value!r}; it must be a whole number, at least 1")
    return number


def _build(row: Backbone, num_classes: int, small_images: bool, in_channels: int) -> nn.Module:
    model = _made(row, num_classes, small_images, in_channels)
    old = model.get_submodule(row.stem)
    assert isinstance(old, nn.Conv2d)
    geometry: dict[str, Any] = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
    if small_images and not row.for_small:
        geometry = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1)}
    if any(getattr(old, k) != v for k, v in {"in_channels": in_channels, **geometry}.items()):
        stem = nn.Conv2d(in_channels, old.out_channels, **geometry, bias=old.bias is not None)
        row.initialise(stem)
        model.set_submodule(row.stem, stem)
    if small_images and row.first_pooling is not None:
        model.set_submodule(row.first_pooling, nn.Identity())
    return model


def _made(row: Backbone, num_classes: int, small_images: bool, in_channels: int) -> nn.Module:
    if row.ours is not None:
        return row.ours(num_classes, in_channels)
    from torchvision.models import get_model

    options = row.for_small if small_images else {}
    model: nn.Module = get_model(row.name, weights=None, num_classes=num_classes, **options)
    return model


def pretrained_state(
    weights: str | os.PathLike[str], name: str, small_images: bool = False, in_channels: int = 3
) -> Mapping[str, Tensor]:
    """The state dict that `weights` stands for: "imagenet" (torchvision's, for the plain model called
    `name`) or a file.

    Raises:
        WeightsError: it cannot be had, or ImageNet's weights do not fit the images that are asked for.
        ConfigError: ImageNet's weights for a model that is not ours.
    """
    if weights != "imagenet":
        return read_state(weights)
    row = _row(name)
    name = row.name
    if row.ours is not None:
        raise WeightsError(f"{name} is ours and has no ImageNet weights; use weights: null, or a file")
    if small_images or in_channels != 3:
        option = "small_images: false" if small_images else "in_channels: 3"
        raise WeightsError(
            f"ImageNet's weights for {name} are of torchvision's own form, for large images of three "
            f"channels; they need {option}; else use weights: null, or a file made with these options"
        )
    return _imagenet(name)


def _imagenet(name: str) -> Mapping[str, Tensor]:
    from torchvision.models import get_model_weights

    # Not DEFAULT, which changes with torchvision and mixes two training recipes over the names.
    entry = get_model_weights(name).IMAGENET1K_V1
    try:
        state: Mapping[str, Tensor] = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, HTTPException, RuntimeError, UnpicklingError, EOFError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise WeightsError(
            f"cannot fetch ImageNet's weights for {name} from {entry.url} ({reason[:200]}); ",
            "fetch that file elsewhere and ",
            Word("path of weights"),
        ) from None
    return state
