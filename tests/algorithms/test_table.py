"""The table of algorithms and the choices its rows are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest

from fedsq_plugin.algorithms import ALGORITHMS, Algorithm, algorithm
from fedsq_plugin.algorithms.exchange import EXCHANGES
from fedsq_plugin.algorithms.options import Options
from fedsq_plugin.algorithms.phases import PHASES
from fedsq_plugin.algorithms.table import CHOICES
from fedsq_plugin.config import OPTIONS
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.local import LocalTraining, Phase
from fedsq_plugin.federation.roles import Role


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("FedAvg", ("plain", "none", "all", "all", "average")),
        ("FedProx", ("plain", "proximal", "all", "all", "average")),
        ("FedSQ", ("dualcopy", "none", "all", "all", "average")),
    ],
)
def test_row_is_the_published_method(name: str, row: tuple[str, ...]) -> None:
    found = algorithm(name)
    assert (found.view, found.objective, found.phases, found.exchange, found.server) == row


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_row_has_its_own_name_and_a_source(name: str) -> None:
    assert (ALGORITHMS[name].name, "arXiv" in ALGORITHMS[name].source) == (name, True)


def test_choices_are_the_fields_of_a_row() -> None:
    assert ["name", "source", *CHOICES] == [field.name for field in fields(Algorithm)]


def test_default_of_every_choice_is_fedavgs() -> None:
    assert Algorithm("FedAvg", algorithm("FedAvg").source) == algorithm("FedAvg")


@pytest.mark.parametrize(
    ("name", "nearest"), [("FedSq", "FedSQ"), ("fedavg", "FedAvg"), ("FedProxx", "FedProx")]
)
def test_unknown_name_gives_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown algorithm '{name}'; did you mean '{nearest}'\?"):
        algorithm(name)


def test_name_like_no_other_gives_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown algorithm 'xyz'; known: FedAvg, FedProx, FedSQ"):
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
        Algorithm("Own", "nowhere", **{choice: value})


def test_any_combination_is_legal() -> None:
    assert Algorithm("FedSQ+Prox", "nowhere", view="dualcopy", objective="proximal").name == "FedSQ+Prox"


def test_all_exchanges_every_role() -> None:
    assert EXCHANGES["all"] == frozenset(Role)


def test_all_trains_every_role_for_the_local_epochs() -> None:
    assert PHASES["all"](Options(epochs=3)) == (Phase(3, frozenset(Role)),)


@pytest.mark.parametrize("options", [Options, LocalTraining])
def test_defaults_are_the_recipes(options: Callable[[], object]) -> None:
    # `optimizer` is the recipe's client_optimizer and `rounds` its comm_round, which has no default.
    own = {"optimizer": "client_optimizer"}
    given = {k: v for k, v in vars(options()).items() if k != "rounds"}
    assert given == {key: OPTIONS[own.get(key, key)].default for key in given}
