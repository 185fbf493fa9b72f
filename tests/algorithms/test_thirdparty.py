"""Rows and values that another package brings, as an installed one would: a folder on the path."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fedsq_plugin.algorithms.table import CHOICES
from torch import nn

from fedsq_plugin.algorithms import ALGORITHMS, Algorithm, algorithm, find, known, rows, thirdparty
from fedsq_plugin.errors import ConfigError

from .task import AllOptions, Federation, mlp

Install = Callable[..., None]

VALUES = """
from collections import OrderedDict
from dataclasses import replace
from fedsq_plugin.algorithms.phases import Phases
from fedsq_plugin.algorithms.server import Server
from fedsq_plugin.federation.local import Phase
from fedsq_plugin.federation.roles import Role

def view(model, options):
    model.viewed = True
    return model

def objective(options):
    return lambda parameters, start: options.extra["weight"] * sum((p ** 2).sum() for p in parameters)

phases = Phases(lambda options, round: (Phase(round, frozenset(Role)),))
exchange = frozenset({Role.BODY})
server = Server(lambda server, mean, roles, options, seed: replace(server, model=OrderedDict(server.model)))
"""
ROW = """
from fedsq_plugin.algorithms import Algorithm
row = Algorithm("Own", "nowhere", view="dualcopy", server="adam")
"""
OWN = """
from fedsq_plugin.algorithms import Algorithm
row = Algorithm("Own", "nowhere", "own-view", "own-objective", "own-phases", "own-exchange", "own-server")
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Lay a package's folders, as pip would, and forget what was loaded before."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(thirdparty, "_loaded", False)
    tables = (ALGORITHMS, *CHOICES.values())
    before, modules = [dict(values) for values in tables], set(sys.modules)

    def lay(entries: dict[str, dict[str, str]], package: str = "fedsq-own", **files: str) -> None:
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        info = tmp_path / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [
            line
            for group, names in entries.items()
            for line in (f"[fedsq_plugin.{group}]", *(f"{name} = {at}" for name, at in names.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        importlib.invalidate_caches()

    yield lay
    for values, kept in zip(tables, before, strict=True):
        values.clear()
        values.update(kept)
    for name in set(sys.modules) - modules:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def refused() -> str:
    with pytest.raises(ConfigError) as caught:
        algorithm("FedAvg")
    assert "\n" not in str(caught.value)
    return str(caught.value)


EVERY = {choice: {f"own-{choice}": f"own_values:{choice}"} for choice in CHOICES}


def test_row_of_another_package(install: Install) -> None:
    install({"algorithms": {"Own": "own_row:row"}}, own_row=ROW)
    assert (algorithm("Own").view, algorithm("Own").server) == ("dualcopy", "adam")
    assert "Own" in rows()


def test_row_of_another_package_composes(install: Install) -> None:
    install({"algorithms": {"Own": "own_row:row"}}, own_row=ROW)
    assert algorithm("Own+FedRep").phases == "head then body"
    assert known("Own+FedRep")


def test_row_of_another_package_is_a_suggestion(install: Install) -> None:
    install({"algorithms": {"Own": "own_row:row"}}, own_row=ROW)
    with pytest.raises(ConfigError, match=r"unknown algorithm 'Ownn'; did you mean 'Own'\?"):
        algorithm("Ownn")


@pytest.mark.parametrize("choice", list(CHOICES))
def test_value_of_every_choice(install: Install, choice: str) -> None:
    install({choice: EVERY[choice]}, own_values=VALUES)
    row = Algorithm("Uses", "nowhere")
    assert known("FedAvg")
    assert f"own-{choice}" in CHOICES[choice]
    assert getattr(Algorithm("Uses", "nowhere", **{choice: f"own-{choice}"}), choice) != getattr(row, choice)


def test_row_of_its_own_values_runs(install: Install) -> None:
    install({**EVERY, "algorithms": {"Own": "own_row:row"}}, own_values=VALUES, own_row=OWN)
    row = algorithm("Own")
    found = Federation(row, options=AllOptions(epochs=1, extra={"weight": 0.5})).repeat(2)
    assert found.client.model.viewed
    # The server's rule keeps its model; of the clients' only the body travels, round 0 has no epoch.
    assert all(torch.equal(value, mlp().state_dict()[key]) for key, value in found.state.items())
    sent = list(found.answers[1][0])
    assert "1.weight" not in sent
    assert "0.weight" in sent


def test_row_in_the_same_module_as_its_value(install: Install) -> None:
    text = VALUES + "\nfrom fedsq_plugin.algorithms import Algorithm\n"
    text += 'row = Algorithm("Own", "nowhere", view="own-view")\n'
    install({"view": {"own-view": "own_both:view"}, "algorithms": {"Own": "own_both:row"}}, own_both=text)
    assert algorithm("Own").view == "own-view"


@pytest.mark.parametrize(
    ("group", "name"),
    [("algorithms", "FedSQ"), ("view", "plain"), ("objective", "none"), ("phases", "all"),
     ("exchange", "all"), ("server", "average")],
)  # fmt: skip
def test_name_that_is_taken(install: Install, group: str, name: str) -> None:
    row = ROW.replace('"Own"', '"FedSQ"')
    at = "own_row:row" if group == "algorithms" else f"own_values:{group}"
    install({group: {name: at}}, own_values=VALUES, own_row=row)
    expected = f"entry point fedsq_plugin.{group}: {name} of fedsq-own ({at}): the name is taken"
    assert refused().startswith(expected)


def test_taken_name_keeps_its_row(install: Install) -> None:
    install({"algorithms": {"FedSQ": "own_row:row"}}, own_row=ROW.replace('"Own"', '"FedSQ"'))
    refused()
    assert ALGORITHMS["FedSQ"].source == "arXiv 2604.02990"


def test_two_packages_with_one_name(install: Install) -> None:
    install({"algorithms": {"Own": "own_row:row"}}, own_row=ROW)
    install({"algorithms": {"Own": "other_row:row"}}, package="fedsq-other", other_row=ROW)
    assert "the name is taken" in refused()


@pytest.mark.parametrize(
    ("choice", "text", "said"),
    [
        ("view", "view = 3", "is int; a value of view is a function"),
        ("objective", "objective = 'proximal'", "is str; a value of objective is a function"),
        ("phases", "phases = lambda options, round: ()", "is function; a value of phases is a Phases"),
        ("exchange", "exchange = {1, 2}", "is set; a value of exchange is a frozenset"),
        ("server", "server = lambda *given: None", "is function; a value of server is a Server"),
    ],
)
def test_value_of_the_wrong_kind(install: Install, choice: str, text: str, said: str) -> None:
    install({choice: EVERY[choice]}, own_values=text)
    assert refused() == (
        f"entry point fedsq_plugin.{choice}: own-{choice} of fedsq-own (own_values:{choice}) {said}"
    )


@pytest.mark.parametrize(
    "text",
    [
        "row = {'view': 'plain'}",
        ROW.replace('"Own"', '"Another"'),
        "from fedsq_plugin.algorithms import Algorithm\nrow = Algorithm",
    ],
    ids=["no row", "another name", "the class"],
)
def test_row_of_the_wrong_kind(install: Install, text: str) -> None:
    install({"algorithms": {"Own": "own_row:row"}}, own_row=text)
    assert refused() == (
        "entry point fedsq_plugin.algorithms: Own of fedsq-own (own_row:row) must be an Algorithm called "
        "Own, without '+'"
    )


def test_row_whose_name_reads_as_a_composition(install: Install) -> None:
    install({"algorithms": {"A+B": "own_row:row"}}, own_row=ROW.replace('"Own"', '"A+B"'))
    assert "must be an Algorithm called A+B, without '+'" in refused()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_module_at_all", "No module named 'no_such_module_at_all'"),
        ("1 / 0", "division by zero"),
        ("def broken(:", "invalid syntax"),
        ("raise RuntimeError('first line\\nsecond line')", "first line"),
        ("", "has no attribute 'row'"),
    ],
    ids=["import", "error", "syntax", "two lines", "attribute"],
)
def test_package_that_cannot_be_loaded(install: Install, text: str, said: str) -> None:
    install({"algorithms": {"Own": "own_row:row"}}, own_row=text)
    message = refused()
    assert message.startswith(
        "entry point fedsq_plugin.algorithms: Own of fedsq-own (own_row:row) cannot be loaded: "
    )
    assert said in message


def test_row_with_an_unknown_value(install: Install) -> None:
    install({"algorithms": {"Own": "own_row:row"}}, own_row=ROW.replace('"dualcopy"', '"dualcpy"'))
    assert refused() == (
        "entry point fedsq_plugin.algorithms: Own of fedsq-own (own_row:row): Own: view is 'dualcpy'; did "
        "you mean 'dualcopy'?"
    )


def test_module_that_is_missing(install: Install) -> None:
    install({"server": {"own": "gone:server"}})
    assert "server: own of fedsq-own (gone:server) cannot be loaded: No module named 'gone'" in refused()


def test_error_comes_again(install: Install) -> None:
    install({**EVERY, "algorithms": {"Own": "own_row:row"}}, own_values=VALUES, own_row="1 / 0")
    assert refused() == refused()
    assert find("FedAvg") is None
    for look in (rows, lambda: known("FedAvg")):
        with pytest.raises(ConfigError, match="division by zero"):
            look()


def test_mended_package_loads_after_an_error(install: Install, tmp_path: Path) -> None:
    install({**EVERY, "algorithms": {"Own": "own_row:row"}}, own_values=VALUES, own_row="1 / 0")
    refused()
    (tmp_path / "own_row.py").write_text(OWN + "# of another size, for the cache of compiled modules\n")
    importlib.invalidate_caches()
    assert algorithm("Own").server == "own-server"


def test_packages_are_loaded_once(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install({"algorithms": {"Own": "own_row:row"}}, own_row=ROW)
    algorithm("Own")

    def again(**_: Any) -> Any:
        raise AssertionError("looked for entry points again")

    monkeypatch.setattr(thirdparty, "entry_points", again)
    assert algorithm("Own").name == "Own"


def test_without_packages_the_table_is_ours(install: Install) -> None:
    before = dict(ALGORITHMS)
    assert dict(rows()) == before


def test_callable_object_is_a_view(install: Install) -> None:
    text = "class View:\n    def __call__(self, model, options):\n        return model\nview = View()\n"
    install({"view": {"own": "own_values:view"}}, own_values=text)
    model = nn.Linear(2, 2)
    assert known("FedAvg")
    assert CHOICES["view"]["own"](model, AllOptions()) is model
