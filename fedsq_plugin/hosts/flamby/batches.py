"""Batches as FLamby counts them: a round is a number of updates, from a loader that starts again when it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

Batch = tuple[Tensor, Tensor]


class EndlessBatches:
    """A loader that never ends, across rounds.

    Its iterator is made at once and kept, as in FLamby's DataLoaderWithMemory. So both draw from torch's generator at
    the same moments, and see the same batches.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._batches = iter(loader)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.loader.dataset)

    def get_samples(self) -> Batch:
        """The next batch."""
        try:
            inputs, labels = next(self._batches)
        except StopIteration:
            self._batches = iter(self.loader)
            inputs, labels = next(self._batches)
        return inputs, labels


class Updates(Iterable[Batch]):
    """The next `count` batches, each time that it is iterated. The core takes them for an epoch."""

    def __init__(self, batches: EndlessBatches, count: int) -> None:
        self._batches, self._count = batches, count

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self._count):
            yield self._batches.get_samples()
