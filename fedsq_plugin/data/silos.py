"""The data of a run, by name: what every silo holds, and what the server holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..federation.task import CLASSIFICATION, Task


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
