"""Models for the tests: torchvision's, made small, and a few tiny ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn


class Shifted(nn.Module):
    """f(x + shift): the smallest model whose two copies can disagree."""

    def __init__(self, f: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.f = f
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        return self.f(x + self.shift)


class SmallNet(nn.Module):
    """Convolution, BatchNorm, in-place ReLU, max-pooling, PReLU, dropout, a functional ReLU."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.slope = nn.PReLU(6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.norm(self.conv(x))))
        x = self.slope(self.conv2(x)).mean((2, 3))
        out: Tensor = self.head(self.dropout(F.relu(x)))
        return out


SMALL_INPUT = (3, 3, 8, 8)


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and buffer drawn anew, at a scale that keeps activations alive."""
    with torch.no_grad():
        random = torch.Generator().manual_seed(seed)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                tensor.zero_()
            elif tensor.dim() > 1:
                tensor.normal_(0.0, (2.0 / tensor[0].numel()) ** 0.5, generator=random)
            elif name.endswith(("weight", "running_var")):
                tensor.uniform_(0.5, 1.0, generator=random)
            else:
                tensor.normal_(0.0, 0.1, generator=random)
    return model


def move(model: nn.Module, seed: int = 1, by: float = 0.3) -> nn.Module:
    """Every floating-point parameter and buffer moved, as training would."""
    with torch.no_grad():
        random = torch.Generator().manual_seed(seed)
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=random, dtype=torch.float64) - 0.5
                tensor.add_((by * tensor.abs().mean() * 2 * noise).to(tensor.dtype))
    return model


def backbone(name: str, **options: Any) -> nn.Module:
    """A torchvision model with ten classes; AlexNet's and VGG's wide classifiers are narrowed."""
    if name == "googlenet":
        options = {"aux_logits": False, "init_weights": False} | options
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None, num_classes=10, **options)
        if name.startswith(("alexnet", "vgg")):
            wide = [i for i, m in enumerate(model.classifier) if isinstance(m, nn.Linear)]
            sizes = [model.classifier[wide[0]].in_features, 32, 32, 10]
            for i, n, m in zip(wide, sizes[:-1], sizes[1:], strict=True):
                model.classifier[i] = nn.Linear(n, m)
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return fill(model)


BACKBONES = {
    "resnet18": 32,
    "resnet50": 32,
    "alexnet": 64,
    "vgg11_bn": 32,
    "densenet121": 32,
    "googlenet": 32,
    "mobilenet_v2": 32,
    "shufflenet_v2_x1_0": 32,
    "squeezenet1_1": 32,
}
"""Name -> input size that is enough for it."""


def every_activation(dims: int) -> nn.Module:
    """A small 1D or 3D net with each gated activation and both kinds of max-pooling."""
    conv: Any = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    norm: Any = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dims]
    pool: Any = {1: nn.MaxPool1d, 3: nn.MaxPool3d}[dims]
    adaptive: Any = {1: nn.AdaptiveMaxPool1d, 3: nn.AdaptiveMaxPool3d}[dims]
    layers: list[nn.Module] = []
    channels = 2
    for act in (
        nn.ReLU(),
        nn.LeakyReLU(0.2, inplace=True),
        nn.PReLU(3),
        nn.PReLU(),
        nn.Hardtanh(-0.4, 0.7),
        nn.ReLU6(inplace=True),
        nn.RReLU(),
        nn.Threshold(0.1, -0.3),
    ):
        layers += [conv(channels, 3, 3, padding=1), norm(3), act]
        channels = 3
        if isinstance(act, nn.LeakyReLU):
            layers.append(pool(3, stride=2, padding=1, ceil_mode=True))
    return fill(nn.Sequential(*layers, adaptive(2), nn.Flatten(), nn.Linear(3 * 2**dims, 4)))


class Scaled(nn.Module):
    """f(x * scale). With the scale -1 in the quantitative copy, what was the maximum is the minimum."""

    def __init__(self, f: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.f = f
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Any:
        return self.f(x * self.scale)
