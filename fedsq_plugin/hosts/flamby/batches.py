"""Batches as FLamby counts them: a round is so many updates, from a loader that begins anew when it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

Batch = tuple[Tensor, Tensor]


class EndlessBatches:
    """A loader that goes on for ever, across rounds.

    Its iterator is made at once and stays, as in FLamby's DataLoaderWithMemory: both make the same draws
    from torch's generator at the same moments, so that strategies see the same batches.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._batches = iter(loader)

    def __len__(self) -> int:
        """Samples."""
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
    """So many of the next batches, every time that it is iterated: what stands for an epoch in the core."""

    def __init__(self, batches: EndlessBatches, count: int) -> None:
        self._batches, self._count = batches, count

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self._count):
            yield self._batches.get_samples()
