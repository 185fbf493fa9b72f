"""Augmentation of an image batch (N, C, H, W), drawn from the global torch generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dualcopy.precision import to_device
from ..errors import ConfigError
from .reading import describe

_PADDING = 8  # a crop moves an image by up to 1/8 of its size, as 4 pixels do at 32


def crop(images: Tensor) -> Tensor:
    """Random crop after reflecting a border of 1/8 of the size (at least 1 pixel)."""
    count, _, height, width = images.shape
    top, left = max(height // _PADDING, 1), max(width // _PADDING, 1)
    padded = F.pad(images, (left, left, top, top), mode="reflect")
    rows = torch.randint(2 * top + 1, (count, 1, 1)) + torch.arange(height).view(1, -1, 1)
    columns = torch.randint(2 * left + 1, (count, 1, 1)) + torch.arange(width).view(1, 1, -1)
    sample = torch.arange(count).view(-1, 1, 1)
    index = [to_device(i, images.device) for i in (sample, rows, columns)]
    return padded.permute(0, 2, 3, 1)[index[0], index[1], index[2]].permute(0, 3, 1, 2).contiguous()


def flip(images: Tensor) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    chosen = to_device(torch.rand(len(images)) < 0.5, images.device)
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {"crop": crop, "flip": flip}


def augment(images: Any, names: Sequence[str]) -> Any:
    """Apply augmentations by name, in order. Raises ConfigError where there are some and the inputs are no images."""
    if names and not isinstance(images, Tensor):
        raise ConfigError(f"augmentation is for images (N, C, H, W), not for {describe(images)}; set augmentation: []")
    if names and images.dim() != 4:
        raise ConfigError(
            f"augmentation is for images (N, C, H, W), not for inputs of shape {tuple(images.shape)}; "
            "set augmentation: []"
        )
    for name in names:
        images = AUGMENTATIONS[name](images)
    return images
