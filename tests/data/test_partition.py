"""Partitions of a labelled data set over silos."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsq_plugin.data.partition import Labels, count_labels, partition, partition_like
from fedsq_plugin.errors import ConfigError

LABELS = np.repeat(np.arange(5), [40, 30, 20, 7, 3]).astype(np.int64)
METHODS = ["homo", "hetero"]


def skew(parts: list[Labels]) -> float:
    """Mean over silos of the share of the most frequent class: 1/classes when even, 1 at most."""
    return float(np.mean([np.bincount(LABELS[part]).max() / len(part) for part in parts]))


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 4), min_size=20, max_size=60),
    st.integers(1, 6),
    st.sampled_from(METHODS),
    st.integers(0, 2**32 - 1),
)
def test_parts_are_disjoint_complete_and_ascending(labels: list[int], silos: int, method: str, seed: int) -> None:
    parts = partition(np.array(labels), silos, method, 0.5, seed, min_size=0)
    assert len(parts) == silos
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all((np.diff(part) > 0).all() for part in parts)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(5))
def test_every_silo_has_the_least_number_of_samples(method: str, seed: int) -> None:
    parts = partition(LABELS, 5, method, 0.3, seed, min_size=10)
    assert min(len(part) for part in parts) >= 10


def test_draw_with_too_small_a_silo_is_drawn_again() -> None:
    free, bounded = (partition(LABELS, 5, "hetero", 0.3, 1, min_size=least) for least in (0, 10))
    assert min(len(part) for part in free) < 10 <= min(len(part) for part in bounded)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_gives_the_same_parts(method: str) -> None:
    one, other = (partition(LABELS, 4, method, 0.5, 3) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_other_seed_gives_other_parts(method: str) -> None:
    one, other = (partition(LABELS, 4, method, 0.5, seed) for seed in (3, 4))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_global_generator_is_neither_read_nor_moved() -> None:
    np.random.seed(1)
    expected = np.random.rand()
    np.random.seed(1)
    partition(LABELS, 4, "hetero", 0.5, 3)
    assert np.random.rand() == expected


def test_homo_parts_differ_by_one_sample_at_most() -> None:
    # 100 = 5·14 + 2·15
    assert sorted(len(part) for part in partition(LABELS, 7, "homo", 0.5, 0)) == [14] * 5 + [15] * 2


def test_homo_ignores_alpha() -> None:
    one, other = (partition(LABELS, 4, "homo", alpha, 0) for alpha in (0.1, 100))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_small_alpha_is_more_skewed_than_large(seed: int) -> None:
    small, middle, large = (skew(partition(LABELS, 4, "hetero", a, seed)) for a in (0.05, 1.0, 100.0))
    assert small > middle > large


def test_huge_alpha_gives_every_silo_its_share_of_every_class() -> None:
    # Shares of 1/4 to within 1e-3: 40/4 = 10, 20/4 = 5.
    counts = count_labels([LABELS[p] for p in partition(LABELS, 4, "hetero", 1e8, 0)], 5)
    assert [(row[0], row[2]) for row in counts] == [(10, 5)] * 4


def test_tiny_alpha_gives_every_class_to_one_silo() -> None:
    counts = np.array(count_labels([LABELS[p] for p in partition(LABELS, 3, "hetero", 1e-6, 0, 0)], 5))
    assert (counts > 0).sum(0).tolist() == [1] * 5


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"partition_method is 'hetro'; did you mean 'hetero'\?"):
        partition(LABELS, 2, "hetro", 0.5, 0)


@pytest.mark.parametrize("method", METHODS)
def test_too_few_samples_for_the_silos_is_an_error(method: str) -> None:
    with pytest.raises(ConfigError, match="100 samples cannot give 11 silos 10 each"):
        partition(LABELS, 11, method, 0.5, 0, min_size=10)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_must_be_above_zero(alpha: float) -> None:
    with pytest.raises(ConfigError, match=f"partition_alpha is {alpha}; a Dirichlet needs a number above 0"):
        partition(LABELS, 2, "hetero", alpha, 0)


def test_bound_that_no_draw_meets_is_an_error() -> None:
    # 5 classes, each in one silo only, cannot give 6 silos a sample.
    with pytest.raises(ConfigError, match="no Dirichlet\\(1e-06\\) partition gives each of 6 silos 1 samples"):
        partition(LABELS, 6, "hetero", 1e-6, 0)


def matched(test: list[int], *like: list[int]) -> list[list[int]]:
    labels = np.array(test)
    parts = partition_like(labels, [np.array(part, dtype=np.int64) for part in like], seed=0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(test)))
    return count_labels([labels[part] for part in parts], 3)


def test_partition_like_follows_the_silos_shares_of_each_class() -> None:
    # Class 0: three of four in silo 0, so 6 of 8; class 1: one of four in silo 0, so 1 of 4.
    found = matched([0] * 8 + [1] * 4, [0, 0, 0, 1], [0, 1, 1, 1])
    assert found == [[6, 1, 0], [2, 3, 0]]


def test_partition_like_splits_a_class_that_no_silo_has_evenly() -> None:
    assert matched([2] * 6, [0], [0, 0], [1]) == [[0, 0, 2]] * 3


def test_partition_like_gives_a_silo_without_a_class_none_of_it() -> None:
    assert matched([0] * 5 + [1] * 5, [0], [1]) == [[5, 0, 0], [0, 5, 0]]


def test_partition_like_leaves_an_empty_silo_empty() -> None:
    assert matched([0] * 3, [0, 0], []) == [[3, 0, 0], [0, 0, 0]]


def test_partition_like_rounds_at_the_cumulated_shares() -> None:
    # Shares 1/3 each of 4 samples: cuts at 4/3 → 1 and 8/3 → 3, so 1, 2, 1.
    assert matched([0] * 4, [0], [0], [0]) == [[1, 0, 0], [2, 0, 0], [1, 0, 0]]


def test_partition_like_is_deterministic_by_seed() -> None:
    like = [LABELS[::2], LABELS[1::2]]
    one, same, other = (partition_like(LABELS, like, seed)[0].tolist() for seed in (0, 0, 1))
    assert one == same != other


def test_count_labels_has_silos_as_rows_and_classes_as_columns() -> None:
    parts = [np.array([0, 2, 2]), np.array([], dtype=np.int64), np.array([1])]
    assert count_labels(parts, 4) == [[1, 0, 2, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
