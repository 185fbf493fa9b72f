"""A labelled data set, divided over silos: the digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsq_plugin.data.registry import load
from fedsq_plugin.data.silos import SilosData
from fedsq_plugin.errors import ConfigError

from .recipes import config


def images_of(loader: Any) -> set[bytes]:
    return {image.numpy().tobytes() for batch, _ in loader for image in batch}


def test_digits_are_divided_over_the_silos() -> None:
    data = load(config())
    # 1,797 images; 1797 // 4 = 449 are the test split.
    assert (data.outputs, data.classes) == (10, [str(digit) for digit in range(10)])
    assert (sum(data.sizes.values()), data.global_test_size) == (1348, 449)
    assert len(data.global_train.dataset) == 1348
    assert len(data.global_test.dataset) == 449
    assert sum(len(loader.dataset) for loader in data.test.values()) == 449
    images, labels = next(iter(data.train[0]))
    assert images.shape == (32, 3, 8, 8)
    assert labels.dtype == torch.int64


def test_silos_train_and_test_splits_are_disjoint_and_complete() -> None:
    data = load(config(partition_method="hetero", partition_alpha=0.3))
    silos = [images_of(loader) for loader in data.train.values()]
    together: set[bytes] = set().union(*silos)
    assert sum(map(len, silos)) == len(together)
    assert together == images_of(data.global_train)
    assert not together & images_of(data.global_test)


def test_the_public_split_is_held_by_no_silo() -> None:
    data = load(config(warm_start="public", warm_start_public=0.25))
    assert data.public is not None
    assert len(data.public.dataset) == 337  # a quarter of 1,348
    public = images_of(data.public)
    assert not public & images_of(data.global_train)
    assert not public & images_of(data.global_test)


def test_without_a_public_warm_start_nothing_is_held_back() -> None:
    assert load(config()).public is None


def test_counts_are_those_of_the_silos() -> None:
    data = load(config(partition_method="hetero", partition_alpha=0.2))
    assert data.counts is not None
    for silo, loader in data.train.items():
        labels = torch.cat([batch for _, batch in loader])
        assert torch.bincount(labels, minlength=10).tolist() == data.counts[silo]
        assert len(labels) == data.sizes[silo]


def test_every_silo_has_the_minimum() -> None:
    options = {"partition_method": "hetero", "partition_alpha": 0.1, "min_client_samples": 20}
    assert min(load(config(**options)).sizes.values()) >= 20


def test_the_data_seed_decides_the_split() -> None:
    first, again, other = (load(config(random_seed=r, data_seed=d)).counts for r, d in ((0, 1), (7, 1), (0, 2)))
    assert first == again != other


def test_a_silos_test_split_follows_its_training_split() -> None:
    data = load(config(partition_method="hetero", partition_alpha=0.1))
    assert data.counts is not None
    for silo, loader in data.test.items():
        labels = {int(label) for _, batch in loader for label in batch}
        assert labels <= {c for c, count in enumerate(data.counts[silo]) if count}


def test_digits_are_resized_where_asked() -> None:
    images, _ = next(iter(load(config(image_size=16)).global_test))
    assert images.shape[-2:] == (16, 16)


def test_a_silo_that_has_samples_and_no_loader_is_named() -> None:
    found = SilosData(train={0: [], 1: None}, test={}, sizes={0: 4, 1: 4, 2: 0}, outputs=3)
    found.refuse_missing([0, 2])
    with pytest.raises(ConfigError, match="silo 1 has 4 samples, and no loader of its training data"):
        found.refuse_missing(found.sizes)
