"""Loaders: batches of a data set, and data sets that are held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .partition import Labels


class Batches(Sampler[list[int]]):
    """Indices of the samples of each batch.

    In training, which is shuffled, a last batch of one sample joins the batch before it: batch normalisation
    cannot train on one value per channel, and no sample should be lost. Where batches of one were asked for,
    they stay.

    Args:
        batch_size: samples of a batch; below 1: all samples in one batch.
        shuffle: whether every pass has a new order, drawn from torch's global generator.
        begin: called before the first batch of every pass.
    """

    def __init__(self, samples: int, batch_size: int, shuffle: bool, begin: Callable[[], None] | None = None) -> None:
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


class InMemory(Dataset[Any]):
    """Images and labels as tensors; a whole batch is taken at once."""

    def __init__(self, images: Tensor, labels: Labels) -> None:
        self.images, self.labels = images, torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


def make_loader(
    dataset: Dataset[Any],
    batch_size: int,
    shuffle: bool = False,
    collate: Callable[[Any], Any] | None = None,
    begin: Callable[[], None] | None = None,
) -> DataLoader[Any]:
    """A loader with the batches of `Batches`. `collate` makes a batch of samples; None: torch's own way."""
    sampler = Batches(count_samples(dataset), batch_size, shuffle, begin)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate or _collate)


def count_samples(dataset: Dataset[Any]) -> int:
    return len(dataset)  # type: ignore[arg-type]


def _collate(batch: Any) -> Any:
    # `__getitems__` has made a batch already.
    return batch if isinstance(batch, tuple) else default_collate(batch)
