"""The table of backbones: what differs between them, a row each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .gelunet import GeluNet


def torch_default(stem: nn.Conv2d) -> None:
    """Leave the stem as torch initialises a convolution."""


def he(stem: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")


def truncated(stem: nn.Conv2d, deviation: float = 0.02) -> None:
    """Weights from a normal distribution cut off at -2 and 2, no bias."""
    nn.init.trunc_normal_(stem.weight, std=deviation)
    if stem.bias is not None:
        nn.init.zeros_(stem.bias)


def truncated_by_fan_in(stem: nn.Conv2d) -> None:
    truncated(stem, math.sqrt(1 / stem.weight[0].numel()))


@dataclass(frozen=True)
class Backbone:
    """One backbone. Paths are module paths in the plain model."""

    name: str
    """Torchvision's, unless `ours` is given."""
    head: str
    """The last layer, of `num_classes` outputs."""
    stem: str
    """The first convolution."""
    initialise: Callable[[nn.Conv2d], None] = torch_default
    """Initialises a new stem as the model's own code does."""
    first_pooling: str | None = None
    """The pooling right after the stem, which small images do without."""
    for_small: Mapping[str, Any] = field(default_factory=dict)
    """Torchvision's arguments for small images. Empty: they get a 3x3 stem of stride 1 instead."""
    ours: Callable[[int, int], nn.Module] | None = None
    """Makes a model that is not torchvision's, from the numbers of classes and of channels."""
    smooth: bool = False
    """Whether it has activations without a fixed linear gate, to be replaced by ReLUs before gating."""
    early: tuple[str, ...] = ()
    """The first modules, up to a third of the depth or so: what an ablation freezes."""
    ungated: tuple[str, ...] = ()
    """Patterns of the activations that stay ungated after that."""


def _resnet(name: str) -> Backbone:
    return Backbone(
        name, head="fc", stem="conv1", initialise=he, first_pooling="maxpool", early=("conv1", "bn1", "layer1")
    )


BACKBONES: dict[str, Backbone] = {
    row.name: row
    for row in (
        Backbone(
            "alexnet",
            head="classifier.6",
            stem="features.0",
            first_pooling="features.2",
            early=("features.0", "features.3"),
        ),
        *map(_resnet, ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")),
        Backbone(
            "convnext_tiny", "classifier.2", "features.0.0", truncated, smooth=True, early=("features.0", "features.1")
        ),
        Backbone(
            "vit_b_16",
            head="heads.head",
            stem="conv_proj",
            initialise=truncated_by_fan_in,
            for_small={"image_size": 32},
            early=("conv_proj", "encoder.layers.encoder_layer_[0-3]"),
            smooth=True,
        ),
        Backbone(
            "efficientnet_b0",
            head="classifier.1",
            stem="features.0.0",
            initialise=he,
            early=("features.[0-2]",),
            smooth=True,
            # The sigmoids of squeeze-and-excitation, which scale channels and are no activation to replace.
            ungated=("features.*.scale_activation",),
        ),
        Backbone(
            "gelunet", head="fc", stem="features.0", ours=GeluNet, smooth=True, early=("features.0", "features.1")
        ),
    )
}
