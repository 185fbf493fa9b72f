"""A pytest plugin for FLamby's own tests: with ours registered, and without the internet.

    cd /path/to/FLamby
    PYTHONPATH=.:/path/to/fedsq-plugin/tests/hosts/flamby python -m pytest -p registered tests/strategies

MNIST, which they would download, is scikit-learn's digits in MNIST's shape.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset

from fedsq_plugin.hosts.flamby.hook import register

TRAINING = 1500
"""Of the 1797 digits."""


class Digits(Dataset[Any]):
    """Images (1, 28, 28) in [0, 1]. The tests remove the folder `root` at their end."""

    def __init__(self, root: str, train: bool, download: bool, transform: Callable[..., Any]) -> None:
        Path(root).mkdir(exist_ok=True)
        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        kept = order[:TRAINING] if train else order[TRAINING:]
        small = torch.tensor(images[kept] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        self.images, self.labels = torch.nn.functional.interpolate(small, size=(28, 28)), labels[kept]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


register()
torchvision.datasets.MNIST = Digits  # type: ignore[misc, assignment]


def pytest_collection_finish(session: Any) -> None:
    """A run that did not have the plugin in it would show nothing."""
    import flamby.strategies

    assert flamby.strategies.FedSQ.__module__ == "fedsq_plugin.hosts.flamby.strategy"
