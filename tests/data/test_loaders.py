"""Batches: none is lost, and none is too small for batch normalisation."""

from __future__ import annotations

import pytest

from fedsq_plugin.data.loaders import Batches


@pytest.mark.parametrize(
    ("samples", "size", "expected"),
    [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (1, 4, [1]), (0, 4, []), (5, -1, [5]), (8, 4, [4, 4])],
)
def test_a_single_left_over_sample_joins_the_batch_before(samples: int, size: int, expected: list[int]) -> None:
    batches = list(Batches(samples, size, shuffle=True))
    assert [len(batch) for batch in batches] == expected
    assert sorted(index for batch in batches for index in batch) == list(range(samples))
    assert len(Batches(samples, size, shuffle=True)) == len(expected)


def test_in_testing_a_single_left_over_sample_is_a_batch() -> None:
    assert list(Batches(9, 4, shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_every_pass_is_announced() -> None:
    passes: list[int] = []
    batches = Batches(4, 2, shuffle=False, begin=lambda: passes.append(len(passes)))
    assert passes == []
    for expected in ([0], [0, 1]):
        assert len(list(batches)) == 2
        assert passes == expected
