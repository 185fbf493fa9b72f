"""A multilayer perceptron with ReLU for tabular data. It has gates; a linear baseline has none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Hidden layers `features` of the given widths, each a linear layer and a ReLU, then a linear head `fc`.

    Input: batch x `inputs`. Output: batch x `outputs`. Initialised as torch does. With `norm`, BatchNorm is
    between each hidden linear layer and its ReLU. With `sigmoid`, the outputs are probabilities, for BCELoss.

    >>> import torch
    >>> MLP(inputs=13, outputs=1)(torch.zeros(2, 13)).shape
    torch.Size([2, 1])
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: Sequence[int] = (64, 64), sigmoid: bool = False, norm: bool = False
    ) -> None:
        super().__init__()
        widths = (inputs, *hidden)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(widths[-1], outputs)
        self._sigmoid = sigmoid

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.features(x))
        return torch.sigmoid(scores) if self._sigmoid else scores
