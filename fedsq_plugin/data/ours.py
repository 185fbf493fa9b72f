"""Data sets for `fedml.data.load`: scikit-learn's digits, and folders of images by class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate

from ..errors import ConfigError, first_line
from ..federation.seeding import derive
from ..federation.task import CLASSIFICATION, Task
from ..settings.config import Config
from .partition import Labels, label_counts, matching, partition

_MEMORY = 2**30
"""Bytes up to which the decoded images of a split are kept."""
VALIDATION = 5
"""One public sample in so many is kept for validation."""
BATCH_SIZE = 32
"""Where the recipe gives none, and the data set has none of its own."""
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class SiloData(list[Any]):
    """FedML's 8-tuple, with what it has no place for."""

    public: DataLoader[Any] | None = None
    """The public split, that no silo holds."""
    public_content: str = ""
    """A fingerprint of the public split."""
    validation: DataLoader[Any] | None = None
    """The part of the public split on which ReLU-isation is measured; nothing trains on it."""
    task: Task = CLASSIFICATION
    counts: list[list[int]]
    """Training samples of every silo (rows) per class (columns)."""
    classes: list[str]


@dataclass
class _Splits:
    train: Dataset[Any]
    train_labels: Labels
    test: Dataset[Any]
    test_labels: Labels
    classes: list[str]


class _Batches(Sampler[list[int]]):
    """Batches of indices; `begin` is called before the first one of a pass.

    For training, which is shuffled, a last batch of one sample joins the one before it: batch normalisation
    cannot train on a single value per channel, and no sample is to be lost. Batches of one were asked for.
    """

    def __init__(
        self, samples: int, batch_size: int, shuffle: bool, begin: Callable[[], None] | None = None
    ) -> None:
        self._samples, self._shuffle, self._begin = samples, shuffle, begin
        size = max(samples, 1) if batch_size < 1 else batch_size
        self._starts = list(range(0, samples, size))
        if shuffle and size > 1 and len(self._starts) > 1 and samples - self._starts[-1] == 1:
            self._starts.pop()

    def __iter__(self) -> Iterator[list[int]]:
        if self._begin is not None:
            self._begin()
        order = (torch.randperm(self._samples) if self._shuffle else torch.arange(self._samples)).tolist()
        for start, end in pairwise([*self._starts, self._samples]):
            yield order[start:end]

    def __len__(self) -> int:
        return len(self._starts)


class _Tensors(Dataset[Any]):
    """Images and labels in memory, fetched a batch at a time."""

    def __init__(self, images: Tensor, labels: Labels) -> None:
        self.images, self.labels = images, torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


def _collate(batch: Any) -> Any:
    return batch if isinstance(batch, tuple) else default_collate(batch)


def loader(
    dataset: Dataset[Any],
    batch_size: int,
    shuffle: bool = False,
    collate: Callable[[Any], Any] | None = None,
    begin: Callable[[], None] | None = None,
) -> DataLoader[Any]:
    """Batches of a data set, for training shuffled by the global torch generator; `begin` is called before
    every pass."""
    size = len(dataset)  # type: ignore[arg-type]
    sampler = _Batches(size, batch_size, shuffle, begin)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate or _collate)


def load(config: Config) -> tuple[SiloData, int]:
    """FedML's 8-tuple and the number of classes, for a data set of ours.

    The test split of a silo has the silo's share of every class. With `warm_start: public` or `relu_ise`,
    a share of the training data goes to no silo; of that share, `relu_ise` keeps a fifth for validation.
    """
    splits = DATASETS[config.dataset](config)
    seed = config.seed("data")
    size = BATCH_SIZE if config.batch_size is None else config.batch_size
    order = np.random.default_rng(derive("public", seed)).permutation(len(splits.train_labels))
    public = round(config.warm_start_public * len(order)) if config.has_public_split else 0
    kept = public // VALIDATION if config.relu_ise else 0
    held, private = np.sort(order[kept:public]), np.sort(order[public:])
    parts = [
        private[part]
        for part in partition(
            splits.train_labels[private],
            config.client_num_in_total,
            config.partition_method,
            config.partition_alpha,
            derive("partition", seed),
            config.min_client_samples,
        )
    ]
    labels = [splits.train_labels[part] for part in parts]
    tests = matching(splits.test_labels, labels, derive("test", seed))

    def batches(dataset: Dataset[Any], indices: Labels, shuffle: bool) -> DataLoader[Any]:
        return loader(Subset(dataset, indices.tolist()), size, shuffle)

    data = SiloData(
        [
            len(private),
            len(splits.test_labels),
            batches(splits.train, private, shuffle=True),
            loader(splits.test, max(size, 256)),
            {silo: len(part) for silo, part in enumerate(parts)},
            {silo: batches(splits.train, part, shuffle=True) for silo, part in enumerate(parts)},
            {silo: batches(splits.test, part, shuffle=False) for silo, part in enumerate(tests)},
            len(splits.classes),
        ]
    )
    data.counts, data.classes = label_counts(labels, len(splits.classes)), splits.classes
    if public:
        subset = Subset(splits.train, held.tolist())
        data.public = loader(subset, config.warm_start_batch_size, shuffle=True)
        data.public_content = _content(loader(subset, 256))
    if kept:
        data.validation = loader(Subset(splits.train, np.sort(order[:kept]).tolist()), 256)
    return data, len(splits.classes)


def _content(batches: DataLoader[Any]) -> str:
    digest = hashlib.sha256()
    for images, labels in batches:
        digest.update(images.numpy().tobytes())
        digest.update(labels.numpy().tobytes())
    return digest.hexdigest()


def _digits(config: Config) -> _Splits:
    """scikit-learn's 1,797 handwritten digits (8x8 grey levels; UCI, Alpaydin and Kaynak 1998), as
    three equal channels. A quarter is the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32) / 16)
    images = ((images - images.mean()) / images.std()).unsqueeze(1)
    if config.image_size:
        images = F.interpolate(images, config.image_size, mode="bilinear", align_corners=False)
    images = images.expand(-1, 3, -1, -1).contiguous()
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(derive("digits", config.seed("data"))).permutation(len(labels))
    test, train = np.sort(order[: len(order) // 4]), np.sort(order[len(order) // 4 :])
    return _Splits(
        _Tensors(images[train], labels[train]),
        labels[train],
        _Tensors(images[test], labels[test]),
        labels[test],
        [str(name) for name in digits.target_names],
    )


def _image_folder(config: Config) -> _Splits:
    """`train/<class>/*` and `test/<class>/*` in `data_cache_dir`, normalised with ImageNet's mean and
    deviation; resized where `image_size` is given."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    root = Path(config.data_cache_dir).expanduser()
    resize: Sequence[Any] = ()
    if config.image_size:
        resize = (transforms.Resize((config.image_size, config.image_size)),)
    transform = transforms.Compose([*resize, transforms.ToTensor(), transforms.Normalize(*_IMAGENET)])
    folders = []
    for split in ("train", "test"):
        if not config.data_cache_dir or not (root / split).is_dir():
            raise ConfigError(
                f"image_folder: no folder {root / split}; "
                "data_cache_dir must hold train/<class>/ and test/<class>/"
            )
        try:
            folders.append(ImageFolder(str(root / split), transform, loader=_open_image))
        except FileNotFoundError as error:
            raise ConfigError(f"image_folder: {first_line(error)}") from None
    train, test = folders
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        raise ConfigError(f"image_folder: the class {odd} is in only one of {root}/train and {root}/test")
    if not config.image_size:
        _refuse_differing_sizes([path for folder in folders for path, _ in folder.samples])
    labels = [np.asarray(folder.targets) for folder in folders]
    kept = [_in_memory(folder, targets) for folder, targets in zip(folders, labels, strict=True)]
    return _Splits(kept[0], labels[0], kept[1], labels[1], [str(name) for name in train.classes])


def _in_memory(folder: Any, labels: Labels) -> Dataset[Any]:
    """The folder decoded once where it fits into memory; as it is, decoded in every epoch, else."""
    size = folder[0][0].numel() * 4 * len(folder)
    if size > _MEMORY:
        return folder  # type: ignore[no-any-return]
    return _Tensors(torch.stack([image for image, _ in folder]), labels)


def _refuse_differing_sizes(paths: Sequence[str]) -> None:
    sizes: dict[tuple[int, int], str] = {}
    for path in paths:
        sizes.setdefault(_image_size(path), path)
        if len(sizes) > 1:
            (one, first), (other, second) = sizes.items()
            raise ConfigError(
                f"image_folder: {first} has {one[0]}x{one[1]} pixels and {second} {other[0]}x{other[1]}; "
                "set fedsq_args.image_size"
            )


def _image_size(path: str) -> tuple[int, int]:
    """Width and height, from the file's header."""
    width, height = _with_image(path, lambda image: image.size)
    return width, height


def _open_image(path: str) -> Any:
    return _with_image(path, lambda image: image.convert("RGB"))


def _with_image(path: str, use: Callable[[Any], Any]) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return use(image)
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"image_folder: {path} cannot be read as an image ({error})") from None


DATASETS = {"digits": _digits, "image_folder": _image_folder}
