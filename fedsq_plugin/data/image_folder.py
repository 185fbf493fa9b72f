"""A folder of images by class: `train/<class>/*` and `test/<class>/*`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ConfigError, first_line
from .images import Header, read_header, read_image
from .loaders import InMemory
from .options import DataOptions
from .partition import Labels
from .silos import Splits

MEMORY = 2**30
"""Bytes up to which the decoded images of a split are kept in memory."""
KINDS = 1000
"""So many pictures of other formats, modes or sizes are tried at the start; of more, the header alone is read."""
OTHER_IMAGES = (".dcm", ".nii", ".gz", ".npy", ".npz", ".heic", ".heif", ".svs", ".mha", ".nrrd")
"""Suffixes of images that PIL does not read, either."""
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
    transform = transforms.Compose([*resize, transforms.ToTensor(), _to_colour, transforms.Normalize(*_IMAGENET)])
    train, test = folders = [_open_split(options, root / split, transform) for split in ("train", "test")]
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        raise ConfigError(f"image_folder: the class {odd} is in only one of {root}/train and {root}/test")
    _inspect([path for folder in folders for path, _ in folder.samples], resized=options.image_size is not None)
    labels = [np.asarray(folder.targets) for folder in folders]
    kept = [_keep_in_memory(folder, targets) for folder, targets in zip(folders, labels, strict=True)]
    return Splits(kept[0], labels[0], kept[1], labels[1], [str(name) for name in train.classes])


def _open_split(options: DataOptions, folder: Path, transform: Any) -> Any:
    from torchvision.datasets import ImageFolder

    if not options.data_cache_dir or not folder.is_dir():
        raise ConfigError(
            f"image_folder: no folder {folder}; data_cache_dir must hold train/<class>/ and test/<class>/"
        )
    _refuse_unread(folder)
    try:
        return ImageFolder(str(folder), transform, loader=read_image)
    except FileNotFoundError as error:
        raise ConfigError(f"image_folder: {first_line(error)}") from None


def _keep_in_memory(folder: Any, labels: Labels) -> Dataset[Any]:
    """The folder's images, decoded once, where they fit into memory; else the folder itself, whose images
    are decoded anew in every pass."""
    size = folder[0][0].numel() * 4 * len(folder)
    if size > MEMORY:
        return folder  # type: ignore[no-any-return]
    return InMemory(torch.stack([image for image, _ in folder]), labels)


def _inspect(paths: Sequence[str], resized: bool) -> None:
    """Read the beginning of every file, and one whole picture of each format, mode and size.

    Raises:
        ConfigError: a file cannot be read, or sizes differ and images are not resized.
    """
    kinds: dict[Header, str] = {}
    sizes: dict[tuple[int, int], str] = {}
    for path in paths:
        header = read_header(path)
        sizes.setdefault(header.size, path)
        if len(sizes) > 1 and not resized:
            (one, first), (other, second) = sizes.items()
            raise ConfigError(
                f"image_folder: {first} has {one[0]}x{one[1]} pixels and {second} {other[0]}x{other[1]}; "
                "set fedsq_args.image_size"
            )
        if header not in kinds and len(kinds) < KINDS:
            kinds[header] = path
            read_image(path)


def _refuse_unread(folder: Path) -> None:
    """Raise ConfigError for a file, or a folder, that looks like an image and is not read as one."""
    from PIL import Image
    from torchvision.datasets.folder import IMG_EXTENSIONS

    others = {*Image.registered_extensions(), *OTHER_IMAGES}.difference(IMG_EXTENSIONS)
    for path in sorted(folder.rglob("*")):
        suffix = path.suffix.lower()
        if path.parent != folder and suffix in IMG_EXTENSIONS and path.is_dir():
            raise ConfigError(f"image_folder: {path} is a folder; rename it, or take its images out")
        if suffix in others and path.is_file():
            raise ConfigError(
                f"image_folder: {path} is not read, only {', '.join(IMG_EXTENSIONS)} are; convert it, or move it away"
            )


def _to_colour(image: Tensor) -> Tensor:
    """Three channels: of grey levels, three equal ones."""
    return image.expand(3, -1, -1)
