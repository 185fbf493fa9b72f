"""Algorithms that another package brings, as an installed one would: a folder on the path."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsq_plugin.algorithms import algorithm, algorithms, find, known, registry
from fedsq_plugin.errors import ConfigError

from .task import Federation, mlp

Install = Callable[..., None]

OWN = """
from fedsq_plugin.algorithms import Algorithm
from fedsq_plugin.algorithms.fedopt import FEDADAM
from fedsq_plugin.algorithms.fedsq import FEDSQ
own = Algorithm("Own", "nowhere", view=FEDSQ.view, server=FEDADAM.server)
"""
CHOICES = """
from collections import OrderedDict
from dataclasses import replace
from fedsq_plugin.algorithms import Algorithm, Exchange, ExtraOptions, Objective, Phases, ServerRule, View
from fedsq_plugin.federation.local import Phase
from fedsq_plugin.federation.roles import Role

def view(model, options):
    model.viewed = True
    return model

def objective(options):
    return lambda parameters, start: options.extra["weight"] * sum((p ** 2).sum() for p in parameters)

def keep(server, mean, roles, options, seed):
    return replace(server, model=OrderedDict(server.model))

own = Algorithm(
    "Own",
    "nowhere",
    View("own-view", view),
    Objective("own-objective", objective),
    Phases("own-phases", lambda options, round: (Phase(round, frozenset(Role)),)),
    Exchange("own-exchange", frozenset({Role.BODY})),
    ServerRule("own-server", keep),
    options=ExtraOptions,
)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Lay a package's folders, as pip would, and forget what was loaded before."""
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.algorithms.cache_clear()
    modules = set(sys.modules)

    def lay(
        text: str | None = OWN, names: tuple[str, ...] = ("Own",), package: str = "fedsq-own", file: str = "own_file"
    ) -> None:
        if text is not None:
            (tmp_path / f"{file}.py").write_text(text)
        info = tmp_path / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        entries = [f"{name} = {file}:own" for name in names]
        (info / "entry_points.txt").write_text("\n".join(["[fedsq_plugin.algorithms]", *entries]) + "\n")
        importlib.invalidate_caches()

    yield lay
    registry.algorithms.cache_clear()
    for name in set(sys.modules) - modules:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def refused() -> str:
    with pytest.raises(ConfigError) as caught:
        algorithm("FedAvg")
    assert "\n" not in str(caught.value)
    return str(caught.value)


ENTRY = "entry point fedsq_plugin.algorithms: Own of fedsq-own (own_file:own)"


def test_algorithm_of_another_package(install: Install) -> None:
    install()
    assert (algorithm("Own").gated, algorithm("Own").server.name) == (True, "adam")
    assert "Own" in algorithms()


def test_it_composes_with_ours(install: Install) -> None:
    install()
    assert algorithm("Own+FedRep").phases.name == "head then body"
    assert known("Own+FedRep")


def test_its_name_is_proposed(install: Install) -> None:
    install()
    with pytest.raises(ConfigError, match=r"unknown algorithm 'Ownn'; did you mean 'Own'\?"):
        algorithm("Ownn")


def test_it_may_make_every_choice_by_itself(install: Install) -> None:
    install(CHOICES)
    found = algorithm("Own").described()
    assert {key: value for key, value in found.items() if key not in ("name", "source")} == {
        **{choice: f"own-{choice}" for choice in ("view", "objective", "phases", "exchange", "server")},
        "options": ["extra"],
    }


def test_algorithm_of_its_own_choices_runs(install: Install) -> None:
    install(CHOICES)
    own = algorithm("Own")
    found = Federation(own, options=own.settings(head="3", extra={"weight": 0.5})).repeat(2)
    assert found.client.model.viewed
    # Its server rule keeps the model; of the silos' only the body travels; round 0 has no epoch.
    assert all(torch.equal(value, mlp().state_dict()[key]) for key, value in found.state.items())
    assert [sorted(answer) for answer in found.answers[1].values()] == [["0.bias", "0.weight"]] * 3
    assert not torch.equal(found.answers[1][0]["0.weight"], found.state["0.weight"])


def test_options_of_its_own_arrive(install: Install) -> None:
    install(CHOICES)
    own = algorithm("Own")
    trained = []
    for weight in (0.0, 5.0):
        found = Federation(own, options=own.settings(head="3", extra={"weight": weight})).repeat(2)
        trained.append(float(found.answers[1][0]["0.weight"].square().sum()))
    assert trained[1] < trained[0]


def test_several_packages_are_found(install: Install) -> None:
    install()
    install(OWN.replace('"Own"', '"Another"'), ("Another",), "fedsq-another", "another_file")
    assert {"Own", "Another"} <= set(algorithms())


# What is wrong


def test_name_that_is_taken(install: Install) -> None:
    install(OWN.replace('"Own"', '"FedSQ"'), ("FedSQ",))
    entry = ENTRY.replace("Own", "FedSQ", 1)
    assert refused() == f"{entry}: the name is taken; give it another one"
    assert registry.builtin()["FedSQ"].source == "arXiv 2604.02990"


def test_two_packages_with_one_name(install: Install) -> None:
    install()
    install(package="fedsq-other", file="other_file")
    assert "the name is taken" in refused()


@pytest.mark.parametrize(
    "text",
    [
        "own = {'view': 'plain'}",
        OWN.replace('"Own"', '"Another"'),
        "from fedsq_plugin.algorithms import Algorithm\nown = Algorithm",
    ],
    ids=["a dict", "another name", "the class"],
)
def test_value_of_the_wrong_kind(install: Install, text: str) -> None:
    install(text)
    assert refused() == f"{ENTRY} must be an Algorithm called Own, without '+'"


def test_name_that_reads_as_a_composition(install: Install) -> None:
    install(OWN.replace('"Own"', '"A+B"'), ("A+B",))
    assert "must be an Algorithm called A+B, without '+'" in refused()


@pytest.mark.parametrize("choice", ["view", "objective", "phases", "exchange", "server"])
@pytest.mark.parametrize("value", ["'dualcopy'", "lambda *given: None", "{1, 2}"])
def test_choice_that_is_no_value_of_its_class(install: Install, choice: str, value: str) -> None:
    text = f"from fedsq_plugin.algorithms import Algorithm\nown = Algorithm('Own', 'nowhere', {choice}={value})"
    install(text)
    said = refused()
    assert said.startswith(f"{ENTRY} cannot be loaded: algorithm 'Own': {choice} is ")
    assert f"not a value of {type(registry.builtin()['FedAvg'].choices[choice]).__name__}" in said


def test_options_that_are_no_group(install: Install) -> None:
    install("from fedsq_plugin.algorithms import Algorithm\nown = Algorithm('Own', 'nowhere', options=('extra',))")
    assert refused().startswith(f"{ENTRY} cannot be loaded: algorithm 'Own': options is no subclass of Options")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_module_at_all", "No module named 'no_such_module_at_all'"),
        ("1 / 0", "division by zero"),
        ("def broken(:", "invalid syntax"),
        ("raise RuntimeError('first line\\nsecond line')", "first line second line"),
        ("", "has no attribute 'own'"),
        (None, "No module named 'own_file'"),
    ],
    ids=["import", "error", "syntax", "two lines", "attribute", "no module"],
)
def test_package_that_cannot_be_loaded(install: Install, text: str | None, said: str) -> None:
    install(text)
    message = refused()
    assert message.startswith(f"{ENTRY} cannot be loaded: ")
    assert said in message


def test_error_comes_again(install: Install) -> None:
    install("1 / 0")
    assert refused() == refused()
    assert find("FedAvg") is None
    look: Any
    for look in (algorithms, lambda: known("FedAvg")):
        with pytest.raises(ConfigError, match="division by zero"):
            look()


def test_mended_package_loads_after_an_error(install: Install, tmp_path: Path) -> None:
    install("1 / 0")
    refused()
    (tmp_path / "own_file.py").write_text(OWN + "# of another size, for the cache of compiled modules\n")
    importlib.invalidate_caches()
    assert algorithm("Own").server.name == "adam"


def test_packages_are_loaded_once(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    algorithm("Own")

    def again(**_: Any) -> Any:
        raise AssertionError("looked for entry points again")

    monkeypatch.setattr(registry, "entry_points", again)
    assert algorithm("Own").name == "Own"


def test_without_packages_the_algorithms_are_ours(install: Install) -> None:
    assert dict(algorithms()) == dict(registry.builtin())


def test_callable_object_makes_a_view(install: Install) -> None:
    install(
        "from fedsq_plugin.algorithms import Algorithm, View\n"
        "class Own:\n    def __call__(self, model, options):\n        return model\n"
        "own = Algorithm('Own', 'nowhere', view=View('own', Own()))\n"
    )
    assert Federation("Own").repeat(1).own_server.state.round == 1
