"""The table of backbones: everything in which they differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .gelunet import GeluNet


def keep_default(stem: nn.Conv2d) -> None:
    """Keep torch's own initialisation of a convolution."""


def initialise_he(stem: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")


def initialise_truncated(stem: nn.Conv2d, deviation: float = 0.02) -> None:
    """Draw the weights from a normal distribution that is cut off at -2 and 2; set the bias to 0."""
    nn.init.trunc_normal_(stem.weight, std=deviation)
    if stem.bias is not None:
        nn.init.zeros_(stem.bias)


def initialise_by_fan_in(stem: nn.Conv2d) -> None:
    initialise_truncated(stem, math.sqrt(1 / stem.weight[0].numel()))


@dataclass(frozen=True)
class Backbone:
    """One backbone. All paths are module paths in the plain model."""

    name: str
    """Torchvision's name, unless `ours` is given."""
    head: str
    """Path of the last layer, with `num_classes` outputs."""
    stem: str
    """Path of the first convolution."""
    initialise: Callable[[nn.Conv2d], None] = keep_default
    """Initialises a new stem in the same way as the code of the model."""
    first_pooling: str | None = None
    """Path of the pooling directly after the stem. It is removed for small images."""
    for_small: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of torchvision for small images. If empty, the stem becomes 3x3 with stride 1."""
    ours: Callable[[int, int], nn.Module] | None = None
    """Makes a model that is not from torchvision: (number of classes, number of channels) -> model."""
    smooth: bool = False
    """Whether it has smooth activations (GELU, SiLU). They have no fixed gate; ReLUs must replace them first."""
    early: tuple[str, ...] = ()
    """Paths or patterns of the first modules, about a third of the depth. An ablation freezes them."""
    ungated: tuple[str, ...] = ()
    """Patterns, for `DualCopy(accept=...)`, of activations that no ReLU replaces and that have no gate."""


BACKBONES: dict[str, Backbone] = {
    backbone.name: backbone
    for backbone in (
        Backbone(
            "alexnet", "classifier.6", "features.0", first_pooling="features.2", early=("features.0", "features.3")
        ),
        *(
            Backbone(f"resnet{depth}", "fc", "conv1", initialise_he, "maxpool", early=("conv1", "bn1", "layer1"))
            for depth in (18, 34, 50, 101, 152)
        ),
        Backbone(
            "convnext_tiny",
            "classifier.2",
            "features.0.0",
            initialise_truncated,
            smooth=True,
            early=("features.0", "features.1"),
        ),
        Backbone(
            "vit_b_16",
            "heads.head",
            "conv_proj",
            initialise_by_fan_in,
            for_small={"image_size": 32},
            early=("conv_proj", "encoder.layers.encoder_layer_[0-3]"),
            smooth=True,
        ),
        Backbone(
            "efficientnet_b0",
            "classifier.1",
            "features.0.0",
            initialise_he,
            early=("features.[0-2]",),
            smooth=True,
            # The sigmoids of squeeze-and-excitation. They scale channels, so no ReLU can replace them.
            ungated=("features.*.scale_activation",),
        ),
        Backbone(
            "gelunet", head="fc", stem="features.0", ours=GeluNet, smooth=True, early=("features.0", "features.1")
        ),
    )
}
