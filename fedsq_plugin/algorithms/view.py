"""View: what the client trains."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..dualcopy import DualCopy
from ..errors import ConfigError
from .options import Options


def plain(model: nn.Module, options: Options) -> nn.Module:
    """The model as it is. A DualCopy is refused: training it would be FedSQ under another name."""
    if isinstance(model, DualCopy):
        raise ConfigError(
            "the model is a DualCopy, which this algorithm would train as FedSQ does; "
            "use the plain model (`model: resnet18`, not `dualcopy_resnet18`)"
        )
    return model


def dualcopy(model: nn.Module, options: Options) -> nn.Module:
    """The model under the gates of a structural copy taken now. A DualCopy is taken anew: what it
    held was its state before the warm start."""
    network = model.quantitative if isinstance(model, DualCopy) else model
    return DualCopy(
        network,
        accept=options.gate_accept,
        pooling=options.gate_pooling,
        structural_precision=options.structural_precision,
    )


VIEWS: dict[str, Callable[[nn.Module, Options], nn.Module]] = {"plain": plain, "dualcopy": dualcopy}
