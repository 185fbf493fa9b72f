"""Torchvision's backbones by name, with a new head, a chosen stem and a warm start."""

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
from ..errors import ConfigError, WeightsError, nearest
from .weights import load_weights, read_state

log = logging.getLogger(__name__)

PREFIX = "dualcopy_"
_HEADS = {
    "alexnet": "classifier.6",
    "resnet18": "fc",
    "resnet34": "fc",
    "resnet50": "fc",
    "resnet101": "fc",
    "resnet152": "fc",
}


def names() -> list[str]:
    """Every name that `create` knows: the plain models, then the same ones as DualCopies."""
    return [*_HEADS, *(PREFIX + name for name in _HEADS)]


def head(name: str) -> str:
    """The head's module path in the model called `name`, plain or DualCopy.

    Raises:
        ConfigError: no such model.

    >>> head("dualcopy_alexnet")
    'classifier.6'
    """
    return _HEADS[_plain(name)]


def create(
    name: str,
    num_classes: int,
    weights: str | os.PathLike[str] | None = None,
    small_images: bool = False,
    in_channels: int = 3,
) -> nn.Module:
    """A torchvision backbone with a head of `num_classes` outputs, in training mode.

    What the weights do not give is initialised as torchvision does it, from torch's global generator:
    seed it first. The same seed gives the same head with weights and without.

    Args:
        name: one of `names()`. `dualcopy_<name>` is the same model wrapped in a DualCopy, whose
            structural copy is taken last, so it holds the weights and the new head too.
        num_classes: outputs of the head.
        weights: None, "imagenet" (torchvision's IMAGENET1K_V1, downloaded once), or a file that
            `read_state` reads. A head with another number of outputs is left out, and logged.
        small_images: a 3x3 stem of stride 1 without the first pooling, for images of 8 to 64 pixels
            a side. The state-dict keys stay torchvision's, the stem's shape does not. Without it,
            alexnet needs at least 63 pixels a side.
        in_channels: channels of the images. ImageNet's weights need 3; a file, what it was made with.

    Raises:
        ConfigError: an unknown name, or a number that is none.
        WeightsError: weights that cannot be had, or do not fit.

    >>> create("resnet18", num_classes=10, small_images=True).fc
    Linear(in_features=512, out_features=10, bias=True)
    """
    plain = _plain(name)
    num_classes = _count("num_classes", num_classes)
    in_channels = _count("in_channels", in_channels)
    if weights is not None and not isinstance(weights, (str, os.PathLike)):
        raise ConfigError(f"weights is {weights!r}; it must be null, 'imagenet' or a file's path")
    # The weights come first: a wrong path must not cost the seconds that a large model takes.
    state = None if weights is None else pretrained_state(weights, plain, small_images, in_channels)
    model = _build(plain, num_classes, small_images, in_channels)
    if state is not None:
        try:
            left_out = load_weights(model, state, _HEADS[plain])
        except WeightsError as error:
            raise WeightsError(f"weights {weights} for {name}: {error}") from None
        for line in left_out:
            log.info("weights %s for %s: %s", weights, name, line)
    return model if name == plain else DualCopy(model)


def _plain(name: str) -> str:
    plain = str(name).removeprefix(PREFIX)
    if plain not in _HEADS:
        raise ConfigError(f"unknown model {name!r}{nearest(str(name), names())}")
    return plain


def _count(what: str, value: Any) -> int:
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ConfigError(f"{what} is {value!r}; it must be a whole number, at least 1")
    return number


def _build(name: str, num_classes: int, small_images: bool, in_channels: int) -> nn.Module:
    from torchvision.models import get_model

    model: Any = get_model(name, weights=None, num_classes=num_classes)
    if small_images or in_channels != 3:
        parent, key = (model.features, "0") if name == "alexnet" else (model, "conv1")
        stem = _stem(getattr(parent, key), small_images, in_channels)
        if name != "alexnet":
            # As in torchvision's ResNet; its AlexNet keeps torch's default.
            nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        setattr(parent, key, stem)
    if small_images and name == "alexnet":
        model.features[2] = nn.Identity()
    elif small_images:
        model.maxpool = nn.Identity()
    return model  # type: ignore[no-any-return]


def _stem(old: nn.Conv2d, small_images: bool, in_channels: int) -> nn.Conv2d:
    geometry: dict[str, Any] = (
        {"kernel_size": 3, "stride": 1, "padding": 1}
        if small_images
        else {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
    )
    return nn.Conv2d(in_channels, old.out_channels, **geometry, bias=old.bias is not None)


def pretrained_state(
    weights: str | os.PathLike[str], name: str, small_images: bool = False, in_channels: int = 3
) -> Mapping[str, Tensor]:
    """The state dict that `weights` stands for: "imagenet" (torchvision's, for the plain model called
    `name`) or a file.

    Raises:
        WeightsError: it cannot be had, or ImageNet's weights do not fit the stem that is asked for.
        ConfigError: ImageNet's weights for a model that is not ours.
    """
    if weights != "imagenet":
        return read_state(weights)
    name = _plain(name)
    if small_images or in_channels != 3:
        option = "small_images: false" if small_images else "in_channels: 3"
        raise WeightsError(
            f"ImageNet's weights for {name} have torchvision's own stem, for large images of three "
            f"channels; they need {option}; else use weights: null, or a file made for this stem"
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
            f"cannot fetch ImageNet's weights for {name} from {entry.url} ({reason[:200]}); "
            "fetch that file elsewhere and give its path as weights"
        ) from None
    return state
