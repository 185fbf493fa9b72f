"""scikit-learn's 1,797 handwritten digits (8x8 grey levels; UCI, Alpaydin and Kaynak 1998)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ..federation.seeding import derive
from .loaders import InMemory
from .options import DataOptions
from .silos import Splits


def read_digits(options: DataOptions) -> Splits:
    """The digits with three equal channels, resized where `image_size` is given. A quarter is the test
    split, drawn with the data seed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32) / 16)
    images = ((images - images.mean()) / images.std()).unsqueeze(1)
    if options.image_size:
        images = F.interpolate(images, options.image_size, mode="bilinear", align_corners=False)
    images = images.expand(-1, 3, -1, -1).contiguous()
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(derive("digits", options.seed("data"))).permutation(len(labels))
    test, train = np.sort(order[: len(order) // 4]), np.sort(order[len(order) // 4 :])
    return Splits(
        InMemory(images[train], labels[train]),
        labels[train],
        InMemory(images[test], labels[test]),
        labels[test],
        [str(name) for name in digits.target_names],
    )
