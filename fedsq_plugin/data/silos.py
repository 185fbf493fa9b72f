"""The data of a run, by name: what every silo holds, and what the server holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset

from ..errors import ConfigError
from ..federation.seeding import derive
from ..federation.task import CLASSIFICATION, Task
from .loaders import make_loader
from .options import DataOptions
from .partition import Labels, count_labels, partition, partition_like

VALIDATION = 5
"""One of so many public samples is kept for validation."""
BATCH_SIZE = 32
"""Where the recipe gives none, and the data set has none of its own."""


@dataclass
class SilosData:
    """The data of a run. A loader is whatever gives batches `(inputs, targets)` anew in every pass.

    A process that serves some silos only has the loaders of these; others may be missing, or be None.
    """

    train: Mapping[int, Any]
    """Loader of the training data, by silo."""
    test: Mapping[int, Any]
    """Loader of the test data, by silo."""
    sizes: Mapping[int, int]
    """Number of training samples, by silo. Updates are weighted by it."""
    outputs: int
    """Number of outputs of a model: the classes, where the task is a classification."""
    global_train: Any = None
    """Loader of the training data of all silos together."""
    global_test: Any = None
    """Loader of the data on which the global model is tested."""
    global_test_size: int = 0
    """Number of samples in `global_test`."""
    task: Task = CLASSIFICATION
    """The loss that is trained, and the metric that is reported."""
    public: Any = None
    """Loader of the public split, which no silo holds."""
    public_content: str = ""
    """SHA-256 of the public split."""
    validation: Any = None
    """Loader of the part of the public data on which ReLU-isation is measured; nothing is trained on it."""
    counts: Sequence[Sequence[int]] | None = None
    """Training samples of every silo (rows) per class (columns); None: unknown."""
    classes: Sequence[str] | None = None
    """Names of the classes; None: unknown."""

    def refuse_missing(self, silos: Iterable[int]) -> None:
        """Raise ConfigError for a silo of these that has samples, and no loader in this process."""
        for silo in silos:
            if self.sizes.get(silo) and self.train.get(silo) is None:
                raise ConfigError(
                    f"silo {silo} has {self.sizes[silo]} samples, and no loader of its training data: give one, or say "
                    "that it has 0 samples"
                )


@dataclass
class Splits:
    """A labelled data set before it is divided over silos."""

    train: Dataset[Any]
    train_labels: Labels
    test: Dataset[Any]
    test_labels: Labels
    classes: list[str]
    """Names of the classes, in the order of their labels."""


def divide(splits: Splits, options: DataOptions) -> SilosData:
    """Divide a labelled data set over the silos, as `partition_method` says.

    A silo's share of a class is the same in the test split as in the training split. With
    `warm_start: public` or `relu_ise`, a share of the training data goes to no silo; with `relu_ise`, a fifth
    of that share is kept for validation.

    Raises:
        ConfigError: there is no such partition.
    """
    seed = options.seed("data")
    size = BATCH_SIZE if options.batch_size is None else options.batch_size
    order = np.random.default_rng(derive("public", seed)).permutation(len(splits.train_labels))
    public = round(options.warm_start_public * len(order)) if options.has_public_split else 0
    kept = public // VALIDATION if options.relu_ise else 0
    private = np.sort(order[public:])
    parts = [
        private[part]
        for part in partition(
            splits.train_labels[private],
            options.client_num_in_total,
            options.partition_method,
            options.partition_alpha,
            derive("partition", seed),
            options.min_client_samples,
        )
    ]
    labels = [splits.train_labels[part] for part in parts]
    tests = partition_like(splits.test_labels, labels, derive("test", seed))

    def batches(dataset: Dataset[Any], indices: Labels, size: int, shuffle: bool = False) -> DataLoader[Any]:
        return make_loader(Subset(dataset, indices.tolist()), size, shuffle)

    data = SilosData(
        train={silo: batches(splits.train, part, size, shuffle=True) for silo, part in enumerate(parts)},
        test={silo: batches(splits.test, part, size) for silo, part in enumerate(tests)},
        sizes={silo: len(part) for silo, part in enumerate(parts)},
        outputs=len(splits.classes),
        global_train=batches(splits.train, private, size, shuffle=True),
        global_test=make_loader(splits.test, max(size, 256)),
        global_test_size=len(splits.test_labels),
        counts=count_labels(labels, len(splits.classes)),
        classes=splits.classes,
    )
    if public:
        held = np.sort(order[kept:public])
        data.public = batches(splits.train, held, options.warm_start_batch_size, shuffle=True)
        data.public_content = _hash_content(batches(splits.train, held, 256))
    if kept:
        data.validation = batches(splits.train, np.sort(order[:kept]), 256)
    return data


def _hash_content(batches: DataLoader[Any]) -> str:
    digest = hashlib.sha256()
    for images, labels in batches:
        digest.update(images.numpy().tobytes())
        digest.update(labels.numpy().tobytes())
    return digest.hexdigest()
