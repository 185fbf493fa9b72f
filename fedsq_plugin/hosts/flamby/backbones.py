"""Networks in place of FLamby's own baselines, which mostly have nothing to gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ... import models
from ...errors import ConfigError
from ...models.backbones import PREFIX
from ...models.mlp import MLP

TABULAR: dict[str, dict[str, Any]] = {
    "fed_heart_disease": {"inputs": 13, "outputs": 1, "sigmoid": True},  # its loss takes probabilities
    "fed_tcga_brca": {"inputs": 39, "outputs": 1},
    "fed_synthetic": {"inputs": 10, "outputs": 3},
}
"""Arguments of an MLP, as the data set's own baseline has them."""
MLPS: dict[str, dict[str, Any]] = {"mlp": {}, "mlp_bn": {"norm": True}}
IMAGES = {"fed_isic2019": 8}
"""Classes of the data sets of images with three channels."""


def factory(dataset: str, backbone: str, weights: str | None, own: Any) -> Callable[..., nn.Module]:
    """What makes the model of a data set, as FLamby calls its `Baseline`.

    Args:
        backbone: `baseline`, `mlp`, `mlp_bn` (with BatchNorm), or one of ours by name.
        weights: a file, or "imagenet" for a backbone of ours; None: newly initialised.
        own: the data set's own `Baseline`.

    Raises:
        ConfigError: no such backbone for this data set.
    """
    ours = [name for name in models.names() if not name.startswith(PREFIX)] if dataset in IMAGES else []
    known = ["baseline", *(MLPS if dataset in TABULAR else []), *ours]
    if backbone not in known:
        raise ConfigError(f"--backbone {backbone}: {dataset} can have {', '.join(known)}")
    if weights == "imagenet" and backbone not in ours:
        raise ConfigError(f"--weights imagenet: there are none for {backbone}; give a file")

    def make(*arguments: Any) -> nn.Module:
        if backbone in ours:
            return models.create(backbone, IMAGES[dataset], weights)
        layers = MLPS.get(backbone)
        model: nn.Module = own(*arguments) if layers is None else MLP(**TABULAR[dataset], **layers)
        if weights is not None:
            models.load_weights(model, models.read_state(weights), head=None)
        return model

    return make
