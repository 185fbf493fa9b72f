"""A folder of images by class: `train/<class>/*` and `test/<class>/*`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import ConfigError, first_line
from .loaders import InMemory
from .options import DataOptions
from .partition import Labels
from .silos import Splits

MEMORY = 2**30
"""Bytes up to which the decoded images of a split are kept in memory."""
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's channels."""


def read_image_folder(options: DataOptions) -> Splits:
    """The images in `data_cache_dir`, normalised with ImageNet's mean and deviation, and resized where
    `image_size` is given.

    Raises:
        ConfigError: a folder is missing, the splits have other classes, an image cannot be read, or images
            differ in size.
    """
    from torchvision import transforms

    root = Path(options.data_cache_dir).expanduser()
    resize: Sequence[Any] = ()
    if options.image_size:
        resize = (transforms.Resize((options.image_size, options.image_size)),)
    transform = transforms.Compose([*resize, transforms.ToTensor(), transforms.Normalize(*_IMAGENET)])
    train, test = folders = [_open_split(options, root / split, transform) for split in ("train", "test")]
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        raise ConfigError(f"image_folder: the class {odd} is in only one of {root}/train and {root}/test")
    if not options.image_size:
        _refuse_differing_sizes([path for folder in folders for path, _ in folder.samples])
    labels = [np.asarray(folder.targets) for folder in folders]
    kept = [_keep_in_memory(folder, targets) for folder, targets in zip(folders, labels, strict=True)]
    return Splits(kept[0], labels[0], kept[1], labels[1], [str(name) for name in train.classes])


def _open_split(options: DataOptions, folder: Path, transform: Any) -> Any:
    from torchvision.datasets import ImageFolder

    if not options.data_cache_dir or not folder.is_dir():
        raise ConfigError(
            f"image_folder: no folder {folder}; data_cache_dir must hold train/<class>/ and test/<class>/"
        )
    try:
        return ImageFolder(str(folder), transform, loader=_open_image)
    except FileNotFoundError as error:
        raise ConfigError(f"image_folder: {first_line(error)}") from None


def _keep_in_memory(folder: Any, labels: Labels) -> Dataset[Any]:
    """The folder's images, decoded once, where they fit into memory; else the folder itself, whose images
    are decoded anew in every pass."""
    size = folder[0][0].numel() * 4 * len(folder)
    if size > MEMORY:
        return folder  # type: ignore[no-any-return]
    return InMemory(torch.stack([image for image, _ in folder]), labels)


def _refuse_differing_sizes(paths: Sequence[str]) -> None:
    sizes: dict[tuple[int, int], str] = {}
    for path in paths:
        sizes.setdefault(_with_image(path, lambda image: image.size), path)  # width and height, from its header
        if len(sizes) > 1:
            (one, first), (other, second) = sizes.items()
            raise ConfigError(
                f"image_folder: {first} has {one[0]}x{one[1]} pixels and {second} {other[0]}x{other[1]}; "
                "set fedsq_args.image_size"
            )


def _open_image(path: str) -> Any:
    return _with_image(path, lambda image: image.convert("RGB"))


def _with_image(path: str, use: Callable[[Any], Any]) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return use(image)
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"image_folder: {path} cannot be read as an image ({error})") from None
