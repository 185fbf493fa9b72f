"""A small network for tabular data, with gates where a linear baseline has none."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HIDDEN = (64, 64)


class Mlp(nn.Module):
    """Linear layers with ReLUs between them; `head` is the last one.

    Args:
        features: of a sample; inputs are (N, features).
        outputs: of the head.
        hidden: widths of the hidden layers.
        probability: end in a sigmoid, for a loss on probabilities.
    """

    def __init__(
        self, features: int, outputs: int, hidden: tuple[int, ...] = HIDDEN, probability: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(features, width), nn.ReLU()]
            features = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(features, outputs)
        self._probability = probability

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(x))
        return torch.sigmoid(outputs) if self._probability else outputs
