"""A multilayer perceptron with ReLU, for tabular data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Hidden layers `features` of the given widths, each a linear layer and a ReLU, and a linear head `fc`.

    With `norm`, BatchNorm stands between a hidden linear layer and its ReLU.
    Batch x `inputs` to batch x `outputs`, initialised as torch does. With `sigmoid`, the scores pass one
    more module, `output`, for losses that take probabilities (BCELoss).

    >>> import torch
    >>> MLP(inputs=13, outputs=1)(torch.zeros(2, 13)).shape
    torch.Size([2, 1])
    """

    ungated = ("output",)
    """For `DualCopy(accept=...)`: a sigmoid over the scores is no hidden activation, so it needs no gate."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: Sequence[int] = (64, 64),
        sigmoid: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        widths = (inputs, *hidden)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(widths[-1], outputs)
        self.output: nn.Module = nn.Sigmoid() if sigmoid else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.output(self.fc(self.features(x)))
        return scores
