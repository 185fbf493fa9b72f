"""The registry: the published algorithms, their names, and the compositions of them."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsq_plugin.algorithms import Algorithm, algorithm, algorithms, find, known
from fedsq_plugin.algorithms.registry import builtin, builtin_options
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.settings.config import Config

# view, objective, phases, exchange, server
TABLE = {
    "FedAvg": ("plain", "none", "all", "all", "average"),
    "FedProx": ("plain", "proximal", "all", "all", "average"),
    "FedSQ": ("dualcopy", "none", "all", "all", "average"),
    "FedMR": ("plain", "none", "all", "all", "recombine"),
    "FedAvgM": ("plain", "none", "all", "all", "momentum"),
    "FedAdam": ("plain", "none", "all", "all", "adam"),
    "FedYogi": ("plain", "none", "all", "all", "yogi"),
    "FedBN": ("plain", "none", "all", "without norm layers", "average"),
    "FedBABU": ("plain", "none", "body only", "body only", "average"),
    "FedRep": ("plain", "none", "head then body", "body only", "average"),
    "LP-FT": ("plain", "none", "head first", "all", "average"),
    "FedNCM": ("plain", "none", "class means first", "all", "average"),
    "FrozenBN": ("plain", "none", "without norm layers", "all", "average"),
    "FrozenEarly": ("plain", "none", "without early layers", "all", "average"),
}


def choices(found: Algorithm) -> tuple[str, ...]:
    return tuple(value.name for value in found.choices.values())


@pytest.mark.parametrize("name", sorted(TABLE))
def test_algorithm_is_the_published_one(name: str) -> None:
    assert choices(algorithm(name)) == TABLE[name]


def test_there_are_no_others() -> None:
    assert set(builtin()) == set(TABLE)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FedAvg", ()),
        ("FedProx", ("fedprox_mu",)),
        (
            "FedSQ",
            (
                *("structural_copy", "structural_rounds", "structural_decay"),
                *("keep_gates", "gate_pooling", "gate_accept", "structural_precision"),
            ),
        ),
        ("FedMR", ("fedmr_unit", "first_stage_bound")),
        ("FedAvgM", ("server_lr", "server_momentum")),
        ("FedAdam", ("server_lr", "server_momentum", "server_beta2", "server_tau")),
        ("FedYogi", ("server_lr", "server_momentum", "server_beta2", "server_tau")),
        ("FedBN", ()),
        ("FedBABU", ()),
        ("FedRep", ("head_epochs",)),
        ("LP-FT", ("probe_rounds",)),
        ("FedNCM", ()),
        ("FrozenBN", ()),
        ("FrozenEarly", ("frozen_modules",)),
    ],
)
def test_options_that_an_algorithm_reads(name: str, options: tuple[str, ...]) -> None:
    assert algorithm(name).option_names == options


@pytest.mark.parametrize("name", sorted(builtin()))
def test_algorithm_has_its_own_name_and_a_source(name: str) -> None:
    source = builtin()[name].source
    ablation = name.startswith("Frozen")
    assert (builtin()[name].name, "arXiv" in source, source.startswith("ablation: ")) == (name, not ablation, ablation)


def test_no_two_algorithms_are_the_same() -> None:
    assert len({choices(one) for one in builtin().values()}) == len(builtin())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("FedSq", "FedSQ"), ("fedavg", "FedAvg"), ("FedProxx", "FedProx"), ("LPFT", "LP-FT"), ("fedyogy", "FedYogi")],
)
def test_unknown_name_gives_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown algorithm '{name}'; did you mean '{nearest}'\?"):
        algorithm(name)


def test_name_like_no_other_gives_the_known_ones() -> None:
    expected = (
        "unknown algorithm 'xyz'; known: FedAdam, FedAvg, FedAvgM, FedBABU, FedBN, FedMR, FedNCM, FedProx, "
        "FedRep, FedSQ, FedYogi, FrozenBN, FrozenEarly, LP-FT"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        algorithm("xyz")


# Composition


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FedSQ+FedMR", ("dualcopy", "none", "all", "all", "recombine")),
        ("FedMR+FedSQ", ("dualcopy", "none", "all", "all", "recombine")),
        ("FedSQ+FedAdam", ("dualcopy", "none", "all", "all", "adam")),
        ("FedAvg+FedSQ", ("dualcopy", "none", "all", "all", "average")),
        ("FedSQ+FedProx+FedYogi", ("dualcopy", "proximal", "all", "all", "yogi")),
        ("FedSQ+FedProx+FedRep+FedAvgM", ("dualcopy", "proximal", "head then body", "body only", "momentum")),
        ("FrozenBN+FedBN", ("plain", "none", "without norm layers", "without norm layers", "average")),
    ],
)
def test_composition_makes_every_choice_that_a_part_makes(name: str, expected: tuple[str, ...]) -> None:
    assert choices(algorithm(name)) == expected


def test_composition_names_its_parts_their_sources_and_options() -> None:
    found = algorithm("FedSQ+FedMR")
    assert found.name == "FedSQ+FedMR"
    assert found.source == "arXiv 2604.02990; Hu et al. 2024, arXiv 2305.10730"
    assert found.option_names == (*algorithm("FedSQ").option_names, "fedmr_unit", "first_stage_bound")


def test_three_parts_are_named_in_their_order() -> None:
    assert algorithm("FedSQ+FedProx+FedYogi").name == "FedSQ+FedProx+FedYogi"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FedAdam+FedYogi", "FedAdam and FedYogi do not go together: both choose server (adam; yogi)"),
        ("FedMR+FedAvgM", "FedMR and FedAvgM do not go together: both choose server (recombine; momentum)"),
        ("FedRep+FedBABU", "FedRep and FedBABU do not go together: both choose phases (head then body; body only)"),
        (
            "FedSQ+FedBN+FedRep",
            "FedSQ+FedBN and FedRep do not go together: both choose exchange (without norm layers; body only)",
        ),
    ],
)
def test_parts_that_make_a_choice_differently_are_an_error(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        algorithm(name)
    assert str(caught.value) == message


def test_unknown_part_gives_the_nearest_and_the_whole() -> None:
    with pytest.raises(ConfigError) as caught:
        algorithm("FedSQ+FedMr")
    assert str(caught.value) == "unknown algorithm 'FedMr' in 'FedSQ+FedMr'; did you mean 'FedMR'?"


@pytest.mark.parametrize("name", ["FedSQ+", "+FedSQ", "FedSQ++FedMR", ""])
def test_empty_part_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown algorithm ''"):
        algorithm(name)


@pytest.mark.parametrize("name", ["FedSQ+FedSQ", "FedMR+FedSQ+FedMR"])
def test_part_that_is_named_twice_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        algorithm(name)
    assert str(caught.value) == f"algorithm '{name}' names an algorithm twice"


def free(names: tuple[str, ...]) -> bool:
    """Whether no choice is made differently by two of the algorithms, from the table above."""
    default = TABLE["FedAvg"]
    made = [{TABLE[n][i] for n in names} - {default[i]} for i in range(5)]
    return all(len(values) <= 1 for values in made)


@given(st.lists(st.sampled_from(sorted(TABLE)), min_size=2, max_size=4, unique=True))
def test_order_of_the_parts_does_not_matter(names: list[str]) -> None:
    orders = ["+".join(order) for order in itertools.permutations(names)]
    found = [find(order) for order in orders]
    if free(tuple(names)):
        assert len({choices(one) for one in found if one}) == 1
        assert [one.name for one in found if one] == orders
    else:
        assert found == [None] * len(orders)


# Look-ups


@pytest.mark.parametrize(
    ("name", "expected"),
    [("FedSQ", True), ("FedSQ+FedMR", True), ("FedSq", False), ("FedSQ+x", False), ("", False), ("FedSQ+", False)],
)
def test_known_names(name: str, expected: bool) -> None:
    assert known(name) is expected


def test_known_parts_may_not_go_together() -> None:
    assert known("FedAdam+FedYogi")
    assert find("FedAdam+FedYogi") is None


def test_find_is_the_algorithm() -> None:
    assert find("FedSQ+FedMR") == algorithm("FedSQ+FedMR")


@pytest.mark.parametrize("name", ["FedSq", "FedSQ+FedSQ", ""])
def test_find_gives_none_instead_of_an_error(name: str) -> None:
    assert find(name) is None


@pytest.mark.parametrize("name", sorted(TABLE))
def test_algorithms_that_need_a_head(name: str) -> None:
    assert algorithm(name).needs_head is (name in {"FedBABU", "FedRep", "LP-FT", "FedNCM"})


def test_composition_needs_a_head_where_a_part_does() -> None:
    assert algorithm("FedSQ+FedRep").needs_head
    assert not algorithm("FedSQ+FedMR").needs_head


@pytest.mark.parametrize("name", sorted(TABLE))
def test_algorithms_with_models_of_the_silos_own(name: str) -> None:
    assert algorithm(name).personal is (name in {"FedBN", "FedBABU", "FedRep"})


def test_algorithms_without_other_packages_are_ours_and_composition_adds_none() -> None:
    algorithm("FedSQ+FedMR")
    assert dict(algorithms()) == dict(builtin())


def test_options_of_all_algorithms_are_the_recipes() -> None:
    ours = {key for one in builtin().values() for key in one.option_names}
    assert set(builtin_options().model_fields) == ours
    assert ours <= set(Config.model_fields)


def test_defaults_are_the_recipes() -> None:
    for key, field in builtin_options().model_fields.items():
        assert field.default == Config.model_fields[key].default, key
