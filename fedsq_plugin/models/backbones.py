"""Creates backbones by name, with a new head, a stem for the image size, and weights from a file."""

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
from .weights import load_weights
from .weights_file import WeightsFile, open_weights

log = logging.getLogger(__name__)

PREFIX = "dualcopy_"


def names() -> list[str]:
    """List every name that `create` knows: the plain models, then the DualCopies of models that can be gated."""
    return [*BACKBONES, *(PREFIX + name for name, backbone in BACKBONES.items() if not backbone.smooth)]


def find_backbone(name: str) -> Backbone:
    """Return the table's entry for the model called `name`, plain or DualCopy.

    Raises:
        ConfigError: the name is unknown.

    >>> find_backbone("dualcopy_alexnet").head
    'classifier.6'
    >>> find_backbone("convnext_tiny").smooth
    True
    >>> find_backbone("efficientnet_b0").ungated
    ('features.*.scale_activation',)
    """
    plain = str(name).removeprefix(PREFIX)
    if plain not in BACKBONES:
        raise ConfigError(f"unknown model {name!r}{nearest(str(name), names())}")
    backbone = BACKBONES[plain]
    if backbone.smooth and name != plain:
        raise ConfigError(
            f"unknown model {name!r}: the smooth activations of {plain} have no gates; use model: {plain} "
            "with federated_optimizer: FedSQ and warm_start_args.relu_ise: true"
        )
    return backbone


def create(
    name: str,
    num_classes: int,
    weights: str | os.PathLike[str] | None = None,
    small_images: bool = False,
    in_channels: int = 3,
) -> nn.Module:
    """Create a backbone (torchvision's, or our gelunet) with a head of `num_classes` outputs, in training mode.

    Parameters that are not in the weights are initialised as torchvision does, from torch's global generator;
    seed it first. The same seed gives the same head with and without weights.

    Args:
        name: one of `names()`. `dualcopy_<name>` is the same model in a DualCopy. The structural copy is made
            last, so it has the weights and the new head. Models with smooth activations have no such name:
            FedSQ replaces their activations by ReLUs and then makes the DualCopy.
        num_classes: outputs of the head.
        weights: None, "imagenet" (torchvision's IMAGENET1K_V1, downloaded once; gelunet has none), or a file for
            `read_state`. A head with another number of outputs is not loaded; the log says so.
        small_images: use a 3x3 stem of stride 1 and no first pooling, for images of 8 to 64 pixels a side. The
            state-dict keys stay the same, the shape of the stem changes. Without it, alexnet needs at least 63
            pixels a side. vit_b_16 keeps its 16x16 stem and accepts one size only: 32 pixels a side with
            small_images (five tokens), else 224. It does not change gelunet.
        in_channels: channels of the images. ImageNet's weights need 3; a file needs the number it was made with.

    Raises:
        ConfigError: the name is unknown, or a number is not a whole number of at least 1.
        WeightsError: the weights cannot be loaded, or do not fit.

    >>> create("resnet18", num_classes=10, small_images=True).fc
    Linear(in_features=512, out_features=10, bias=True)
    """
    backbone = find_backbone(name)
    num_classes = _count("num_classes", num_classes)
    in_channels = _count("in_channels", in_channels)
    if weights is not None and not isinstance(weights, (str, os.PathLike)):
        raise ConfigError(f"weights is {weights!r}; it must be null, 'imagenet' or a file's path")
    # The weights are read first: building a large model takes seconds, and a wrong path is reported before.
    state = None if weights is None else pretrained_state(weights, backbone.name, small_images, in_channels)
    model = _build(backbone, num_classes, small_images, in_channels)
    if state is not None:
        try:
            left_out = load_weights(model, state, backbone.head)
        except WeightsError as error:
            raise error.after(f"weights {weights} for {name}: ") from None
        for line in left_out:
            log.warning("weights %s for %s: %s", weights, name, line)
    return model if name == backbone.name else DualCopy(model)


def _count(what: str, value: Any) -> int:
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ConfigError(f"{what} is {value!r}; it must be a whole number, at least 1")
    return number


def _build(backbone: Backbone, num_classes: int, small_images: bool, in_channels: int) -> nn.Module:
    if backbone.ours is not None:
        model = backbone.ours(num_classes, in_channels)
    else:
        from torchvision.models import get_model

        options = backbone.for_small if small_images else {}
        model = get_model(backbone.name, weights=None, num_classes=num_classes, **options)
    old = model.get_submodule(backbone.stem)
    assert isinstance(old, nn.Conv2d)
    geometry: dict[str, Any] = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
    if small_images and not backbone.for_small:
        geometry = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1)}
    if any(getattr(old, k) != v for k, v in {"in_channels": in_channels, **geometry}.items()):
        stem = nn.Conv2d(in_channels, old.out_channels, **geometry, bias=old.bias is not None)
        backbone.initialise(stem)
        model.set_submodule(backbone.stem, stem)
    if small_images and backbone.first_pooling is not None:
        model.set_submodule(backbone.first_pooling, nn.Identity())
    return model


def pretrained_state(
    weights: str | os.PathLike[str], name: str, small_images: bool = False, in_channels: int = 3
) -> WeightsFile | Mapping[str, Tensor]:
    """Return the weights: an opened file, or the state dict for "imagenet" (torchvision's, for the model `name`).

    Raises:
        WeightsError: the weights cannot be loaded, or ImageNet's weights do not fit `small_images` or `in_channels`.
        ConfigError: the name is unknown, for "imagenet".
    """
    if weights != "imagenet":
        return open_weights(weights)
    backbone = find_backbone(name)
    name = backbone.name
    if backbone.ours is not None:
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

    # Not DEFAULT: it changes with torchvision, and models then come from two different training recipes.
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
