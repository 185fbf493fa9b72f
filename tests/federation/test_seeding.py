"""Seeds and the random states that they leave alone."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
import torch

from fedsq_plugin.federation.seeding import derive, isolated, sample_clients


@pytest.mark.parametrize(
    ("keys", "text", "literal"),
    [(("clients", 0, 3), b"str:clients/int:0/int:3", 463_031_427), ((1, "1"), b"int:1/str:1", 1_467_293_484)],
)
def test_derive_is_the_same_on_every_machine(keys: tuple[int | str, ...], text: bytes, literal: int) -> None:
    # The first four bytes of SHA-256, big endian, by the definition and as a number written down once.
    by_hand = int(hashlib.sha256(text).hexdigest()[:8], 16)
    assert (derive(*keys), by_hand) == (literal, literal)


def test_derive_depends_on_the_order_of_the_keys() -> None:
    assert derive("a", "b") != derive("b", "a")


def test_derive_tells_a_number_from_its_text() -> None:
    assert derive(1) != derive("1")


def test_derive_tells_where_one_key_ends() -> None:
    assert derive("ab", "c") != derive("a", "bc")


def test_derive_gives_what_numpy_takes_as_a_seed() -> None:
    assert all(0 <= derive("x", number) < 2**32 for number in range(1000))


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_isolated_draws_depend_on_the_seed_alone() -> None:
    found = []
    for outside in (1, 2):
        random.seed(outside), np.random.seed(outside), torch.manual_seed(outside)
        with isolated(7):
            found.append(draws())
    assert found[0] == found[1]


def test_isolated_draws_change_with_the_seed_in_all_three_generators() -> None:
    with isolated(7):
        one = draws()
    with isolated(8):
        other = draws()
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_isolated_puts_all_three_states_back() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with isolated(7):
        draws()
    assert draws() == expected


def test_isolated_puts_the_states_back_after_an_exception() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError), isolated(7):
        draws()
        raise ZeroDivisionError
    assert draws() == expected


def test_isolated_blocks_nest() -> None:
    with isolated(7):
        expected = (draws(), draws())
    with isolated(7):
        first = draws()
        with isolated(8):
            draws()
        assert (first, draws()) == expected


def test_isolated_takes_the_largest_derived_seed() -> None:
    with isolated(2**32 - 1):
        draws()


def test_sample_clients_is_deterministic() -> None:
    assert sample_clients(100, 10, 3, 0) == sample_clients(100, 10, 3, 0)


def test_sample_clients_is_ascending_without_replacement_and_in_range() -> None:
    for round in range(50):
        chosen = sample_clients(12, 5, round, 0)
        assert len(chosen) == 5
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= set(range(12))


def test_sample_clients_gives_plain_integers() -> None:
    # As dictionary keys and in JSON numpy's integers are not the same thing.
    assert {type(client) for client in sample_clients(10, 3, 0, 0)} == {int}


def test_sample_clients_neither_reads_nor_moves_the_global_generators() -> None:
    found = []
    for outside in (1, 2):
        np.random.seed(outside)
        found.append(sample_clients(100, 10, 0, 0))
    np.random.seed(2)
    expected = np.random.rand()
    np.random.seed(2)
    sample_clients(100, 10, 0, 0)
    assert (found[0], np.random.rand()) == (found[1], expected)


def test_sample_clients_changes_with_the_round() -> None:
    assert len({tuple(sample_clients(100, 10, round, 0)) for round in range(20)}) == 20


def test_sample_clients_changes_with_the_seed() -> None:
    assert len({tuple(sample_clients(100, 10, 0, seed)) for seed in range(20)}) == 20


def test_sample_clients_reaches_every_client() -> None:
    assert set().union(*(sample_clients(10, 3, round, 0) for round in range(60))) == set(range(10))


@pytest.mark.parametrize("per_round", [4, 5])
def test_sample_clients_takes_all_where_as_many_are_wanted(per_round: int) -> None:
    assert sample_clients(4, per_round, 0, 0) == [0, 1, 2, 3]
