"""Batches as FLamby counts them: a round is a number of updates, from a loader that starts again when it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


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

    def get_samples(self) -> Any:
        """The next batch."""
        try:
            return next(self._batches)
        except StopIteration:
            self._batches = iter(self.loader)
            return next(self._batches)


class Updates(Iterable[Any]):
    """The next `count` batches, each time that it is iterated. The core takes them for an epoch."""

    def __init__(self, batches: EndlessBatches, count: int) -> None:
        self._batches, self._count = batches, count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._count):
            try:
                yield self._batches.get_samples()
            except StopIteration:  # a loader without a batch: the silo is idle
                return
