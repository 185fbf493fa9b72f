"""The table of algorithms and the choices its rows are made of."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import fields

import pytest
from fedsq_plugin.algorithms.exchange import EXCHANGES, personal
from fedsq_plugin.algorithms.phases import PHASES
from fedsq_plugin.algorithms.table import CHOICES
from hypothesis import given
from hypothesis import strategies as st

from fedsq_plugin.algorithms import ALGORITHMS, Algorithm, algorithm, find, known, rows
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.local import LocalTraining, Phase
from fedsq_plugin.federation.roles import Role
from fedsq_plugin.settings.config import OPTIONS

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

from tests.algorithms.task import AllOptions


def choices(row: Algorithm) -> tuple[str, ...]:
    return (row.view, row.objective, row.phases, row.exchange, row.server)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_row_is_the_published_method(name: str) -> None:
    assert choices(algorithm(name)) == TABLE[name]


def test_table_has_no_other_rows() -> None:
    assert set(ALGORITHMS) == set(TABLE)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FedAvg", ()),
        ("FedProx", ("fedprox_mu",)),
        (
            "FedSQ",
            (
                *("structural_copy", "structural_rounds", "structural_decay"),
                *("keep_gates", "gate_pooling", "gate_accept"),
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
def test_options_that_a_row_reads(name: str, options: tuple[str, ...]) -> None:
    assert algorithm(name).options == options


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_options_of_a_row_are_the_recipes(name: str) -> None:
    assert set(ALGORITHMS[name].options) <= set(OPTIONS)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_row_has_its_own_name_and_a_source(name: str) -> None:
    source = ALGORITHMS[name].source
    ablation = name.startswith("Frozen")
    assert (ALGORITHMS[name].name, "arXiv" in source, source.startswith("ablation: ")) == (
        name,
        not ablation,
        ablation,
    )


def test_no_two_rows_are_the_same() -> None:
    assert len({choices(row) for row in ALGORITHMS.values()}) == len(ALGORITHMS)


def test_choices_are_the_fields_of_a_row() -> None:
    assert ["name", "source", *CHOICES, "options"] == [field.name for field in fields(Algorithm)]


def test_default_of_every_choice_is_fedavgs() -> None:
    assert Algorithm("FedAvg", algorithm("FedAvg").source) == algorithm("FedAvg")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("FedSq", "FedSQ"),
        ("fedavg", "FedAvg"),
        ("FedProxx", "FedProx"),
        ("LPFT", "LP-FT"),
        ("fedyogy", "FedYogi"),
    ],
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


@pytest.mark.parametrize(
    ("choice", "value", "message"),
    [
        ("view", "dualcpy", r"Own: view is 'dualcpy'; did you mean 'dualcopy'\?"),
        ("objective", "proximl", r"Own: objective is 'proximl'; did you mean 'proximal'\?"),
        ("phases", "al", r"Own: phases is 'al'; did you mean 'all'\?"),
        ("exchange", "nothing at all", r"Own: exchange is 'nothing at all'; known: all"),
        ("server", "avrage", r"Own: server is 'avrage'; did you mean 'average'\?"),
    ],
)
def test_unknown_value_of_a_choice_gives_the_nearest(choice: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Algorithm("Own", "nowhere", **{choice: value}).check()


@pytest.mark.parametrize("name", sorted(TABLE))
def test_rows_of_the_table_pass_their_check(name: str) -> None:
    ALGORITHMS[name].check()


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a\nb", "..\\x", "a:b"])
def test_name_that_could_name_no_file_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="a name has letters, digits"):
        Algorithm(name, "nowhere")


def test_any_combination_is_legal() -> None:
    assert Algorithm("FedSQ+Prox", "nowhere", view="dualcopy", objective="proximal").name == "FedSQ+Prox"


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
    assert found.options == (*algorithm("FedSQ").options, "fedmr_unit", "first_stage_bound")


def test_three_parts_are_named_in_their_order() -> None:
    assert algorithm("FedSQ+FedProx+FedYogi").name == "FedSQ+FedProx+FedYogi"


def test_shared_options_are_named_once() -> None:
    # Two rows of a third party with one server rule.
    one = Algorithm("One", "x", server="adam", options=("server_lr", "server_tau"))
    other = Algorithm("Other", "x", server="adam", view="dualcopy", options=("server_tau", "keep_gates"))
    from fedsq_plugin.algorithms.table import _both

    assert _both(one, other).options == ("server_lr", "server_tau", "keep_gates")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FedAdam+FedYogi", "FedAdam and FedYogi do not go together: both choose server (adam; yogi)"),
        ("FedMR+FedAvgM", "FedMR and FedAvgM do not go together: both choose server (recombine; momentum)"),
        (
            "FedRep+FedBABU",
            "FedRep and FedBABU do not go together: both choose phases (head then body; body only)",
        ),
        (
            "FedSQ+FedBN+FedRep",
            "FedSQ+FedBN and FedRep do not go together: both choose exchange "
            "(without norm layers; body only)",
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
    assert str(caught.value) == f"algorithm '{name}' names a row twice"


def free(names: tuple[str, ...]) -> bool:
    """Whether no choice is made differently by two of the rows, from the table above."""
    default = TABLE["FedAvg"]
    made = [{TABLE[n][i] for n in names} - {default[i]} for i in range(5)]
    return all(len(values) <= 1 for values in made)


@given(st.lists(st.sampled_from(sorted(TABLE)), min_size=2, max_size=4, unique=True))
def test_order_of_the_parts_does_not_matter(names: list[str]) -> None:
    orders = ["+".join(order) for order in itertools.permutations(names)]
    found = [find(order) for order in orders]
    if free(tuple(names)):
        assert len({choices(row) for row in found if row}) == 1
        assert [row.name for row in found if row] == orders
    else:
        assert found == [None] * len(orders)


def test_table_is_not_changed_by_composition() -> None:
    before = dict(ALGORITHMS)
    algorithm("FedSQ+FedMR")
    assert before == ALGORITHMS


# Look-ups


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FedSQ", True),
        ("FedSQ+FedMR", True),
        ("FedSq", False),
        ("FedSQ+x", False),
        ("", False),
        ("FedSQ+", False),
    ],
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


def test_rows_are_the_named_ones() -> None:
    assert dict(rows()) == ALGORITHMS


@pytest.mark.parametrize("name", sorted(TABLE))
def test_rows_that_need_a_head(name: str) -> None:
    assert algorithm(name).needs_head is (name in {"FedBABU", "FedRep", "LP-FT", "FedNCM"})


def test_composition_needs_a_head_where_a_part_does() -> None:
    assert algorithm("FedSQ+FedRep").needs_head
    assert not algorithm("FedSQ+FedMR").needs_head


def test_exchange_without_the_head_needs_it_too() -> None:
    assert Algorithm("Own", "nowhere", exchange="body only").needs_head


def test_third_partys_exchange_without_the_head_needs_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXCHANGES, "own", frozenset({Role.BODY}))
    assert Algorithm("Own", "nowhere", exchange="own").needs_head


@pytest.mark.parametrize("name", sorted(TABLE))
def test_rows_with_models_of_the_silos_own(name: str) -> None:
    assert personal(algorithm(name).exchange) is (name in {"FedBN", "FedBABU", "FedRep"})


def test_row_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        algorithm("FedSQ").view = "plain"  # type: ignore[misc]


# Options


def test_all_exchanges_every_role() -> None:
    assert EXCHANGES["all"] == frozenset(Role)


def test_all_trains_every_role_for_the_local_epochs() -> None:
    assert PHASES["all"].parts(AllOptions(epochs=3), 0) == (Phase(3, frozenset(Role)),)


@pytest.mark.parametrize("options", [Options, LocalTraining])
def test_defaults_are_the_recipes(options: Callable[[], object]) -> None:
    # `optimizer` is the recipe's client_optimizer and `rounds` its comm_round, which has no default.
    own = {"optimizer": "client_optimizer"}
    given = {k: v for k, v in vars(options()).items() if k != "rounds"}
    assert given == {key: OPTIONS[own.get(key, key)].default for key in given}
