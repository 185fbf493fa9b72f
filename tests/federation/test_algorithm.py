"""What an algorithm says of itself, and what two of them together are."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from torch import nn

from fedsq_plugin.algorithms import Algorithm, Exchange, Objective, Phases, ServerRule, View, algorithm
from fedsq_plugin.algorithms.fedopt import AdaptiveOptions, ServerOptimizerOptions
from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.algorithm import (
    ALL_PARTS,
    ALL_TRAVELS,
    AVERAGE,
    CHOICES,
    EVERYTHING,
    NOTHING,
    PLAIN,
    ExtraOptions,
    FederationOptions,
    compose,
    options_together,
    plain,
)
from fedsq_plugin.federation.local import Phase
from fedsq_plugin.federation.options import Options, option
from fedsq_plugin.federation.roles import Role
from fedsq_plugin.federation.training import LocalTraining
from fedsq_plugin.settings.config import Config
from tests.algorithms.task import AllOptions, mlp


class OwnOptions(Options):
    own_rate: float = option(0.5, "fedsq_args", "of this test alone", gt=0)


VIEW = View("own", lambda model, options: model)
OBJECTIVE = Objective("own", lambda options: None)
BODY_ALONE = Exchange("body alone", frozenset({Role.BODY}))


def test_choices_are_the_fields_between_source_and_options() -> None:
    assert ["name", "source", *CHOICES, "options"] == [field.name for field in fields(Algorithm)]


def test_default_of_every_choice_is_fedavgs() -> None:
    found = Algorithm("Own", "nowhere")
    assert found.choices == algorithm("FedAvg").choices
    assert list(found.choices.values()) == [PLAIN, NOTHING, ALL_PARTS, ALL_TRAVELS, AVERAGE]
    assert found.differences() == {}


def test_differences_are_the_choices_that_are_made() -> None:
    found = Algorithm("Own", "nowhere", view=VIEW, exchange=BODY_ALONE)
    assert found.differences() == {"view": VIEW, "exchange": BODY_ALONE}


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a\nb", "..\\x", "a:b"])
def test_name_that_could_name_no_file_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="a name has letters, digits"):
        Algorithm(name, "nowhere")


def test_any_combination_is_legal() -> None:
    sq, prox = algorithm("FedSQ"), algorithm("FedProx")
    found = Algorithm("FedSQ+Prox", "nowhere", view=sq.view, objective=prox.objective)
    assert (found.gated, found.objective) == (True, prox.objective)


def test_algorithm_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        algorithm("FedSQ").view = PLAIN  # type: ignore[misc]


def test_description_is_what_json_takes() -> None:
    assert algorithm("FedSQ+FedMR").described() == {
        "name": "FedSQ+FedMR",
        "source": "arXiv 2604.02990; Hu et al. 2024, arXiv 2305.10730",
        "view": "dualcopy",
        "objective": "none",
        "phases": "all",
        "exchange": "all",
        "server": "recombine",
        "options": [*algorithm("FedSQ").option_names, "fedmr_unit", "first_stage_bound"],
    }


@pytest.mark.parametrize(
    ("choices", "gated", "needs_head", "personal", "epochs"),
    [
        ({}, False, False, False, 0),
        ({"view": replace(VIEW, gated=True)}, True, False, False, 0),
        ({"exchange": BODY_ALONE}, False, True, True, 0),
        ({"exchange": Exchange("own", EVERYTHING - {Role.COUNTER})}, False, False, True, 0),
        ({"phases": replace(ALL_PARTS, needs_head=True, finetune_epochs=5)}, False, True, False, 5),
    ],
    ids=["none", "gated", "the head stays", "counters stay", "phases"],
)
def test_what_its_choices_make_it(
    choices: dict[str, Any], gated: bool, needs_head: bool, personal: bool, epochs: int
) -> None:
    found = Algorithm("Own", "nowhere", **choices)
    said = (found.gated, found.needs_head, found.personal, found.finetune_epochs)
    assert said == (gated, needs_head, personal, epochs)


# Options


def test_all_exchanges_every_role() -> None:
    assert ALL_TRAVELS.travels == EVERYTHING == frozenset(Role)


def test_all_trains_every_role_for_the_local_epochs() -> None:
    assert ALL_PARTS.parts(FederationOptions(epochs=3), 0) == (Phase(3, frozenset(Role)),)


@pytest.mark.parametrize("options", [FederationOptions, ExtraOptions])
def test_defaults_are_the_recipes(options: type[Options]) -> None:
    defaults = {key: field.default for key, field in options.model_fields.items()}
    assert defaults == {key: Config.model_fields[key].default for key in defaults}


def test_defaults_of_local_training_are_the_recipes() -> None:
    # `optimizer` is the recipe's client_optimizer and `rounds` its comm_round, which has no default.
    given = {key: value for key, value in vars(LocalTraining()).items() if key != "rounds"}
    own = {"optimizer": "client_optimizer"}
    assert given == {key: Config.model_fields[own.get(key, key)].default for key in given}


def test_settings_are_the_options_of_the_algorithm_and_those_that_all_have() -> None:
    found = Algorithm("Own", "nowhere", options=OwnOptions).settings(own_rate=2, head="fc")
    assert (found.own_rate, found.head, found.epochs, found.buffers) == (2, "fc", 1, "average")
    assert not hasattr(found, "fedprox_mu")


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="own_rate"):
        Algorithm("Own", "nowhere", options=OwnOptions).settings(own_rate=0)


def test_settings_of_a_group_that_extends_anothers_are_its_own() -> None:
    assert algorithm("FedAdam").option_names == (*("server_lr", "server_momentum"), *("server_beta2", "server_tau"))


def test_groups_together_have_each_option_once() -> None:
    found = options_together(ServerOptimizerOptions, OwnOptions, AdaptiveOptions, OwnOptions)
    expected = {*AdaptiveOptions.model_fields, "own_rate"}
    assert set(found.model_fields) == expected
    assert found(own_rate=2, server_tau=1).model_dump().keys() == expected


# Composition


def test_both_together_make_every_choice_that_one_makes() -> None:
    one = Algorithm("One", "here", view=VIEW, options=OwnOptions)
    other = Algorithm("Other", "there", exchange=BODY_ALONE, options=ExtraOptions)
    found = compose(one, other)
    assert (found.name, found.source) == ("One+Other", "here; there")
    assert found.differences() == {"view": VIEW, "exchange": BODY_ALONE}
    assert set(found.option_names) == {"own_rate", "extra"}


def test_shared_options_are_there_once() -> None:
    # Two algorithms of one server rule, one of which reads more of its options.
    rule = algorithm("FedAdam").server
    one = Algorithm("One", "x", server=rule, options=ServerOptimizerOptions)
    other = Algorithm("Other", "x", server=rule, view=VIEW, options=AdaptiveOptions)
    assert compose(one, other).option_names == tuple(AdaptiveOptions.model_fields)
    assert compose(one, other).server is rule


def test_choice_that_both_make_differently_is_an_error() -> None:
    one = Algorithm("One", "x", objective=OBJECTIVE)
    other = Algorithm("Other", "x", objective=Objective("another", lambda options: None))
    said = r"^One and Other do not go together: both choose objective \(own; another\)$"
    with pytest.raises(ConfigError, match=said):
        compose(one, other)


def test_algorithms_are_left_alone_by_composition() -> None:
    one, other = Algorithm("One", "x", view=VIEW), Algorithm("Other", "x", objective=OBJECTIVE)
    compose(one, other)
    assert (one.differences(), other.differences()) == ({"view": VIEW}, {"objective": OBJECTIVE})


# Models that an algorithm does not suit


def test_every_choice_may_refuse_a_model() -> None:
    def refuse(algorithm: Algorithm, model: nn.Module, options: Any) -> None:
        raise ConfigError(f"{algorithm.name} refuses this model")

    for choice, value in (
        ("view", View("own", lambda model, options: model, fits=refuse)),
        ("objective", Objective("own", lambda options: None, fits=refuse)),
        ("phases", Phases("own", lambda options, round: (), fits=refuse)),
        ("exchange", Exchange("own", EVERYTHING, fits=refuse)),
        ("server", ServerRule("own", lambda *given: given[0], fits=refuse)),
    ):
        with pytest.raises(ConfigError, match="Own refuses this model"):
            Algorithm("Own", "nowhere", **{choice: value}).refuse_misfit(mlp(), AllOptions())


def test_head_that_is_no_module_is_refused_whether_it_is_needed_or_not() -> None:
    with pytest.raises(ConfigError, match="head '9' is no module of the model"):
        algorithm("FedAvg").refuse_misfit(mlp(), AllOptions(head="9"))


def test_model_without_linear_layers_has_none_to_propose() -> None:
    with pytest.raises(ConfigError, match=r"\(linear layers: none\)"):
        algorithm("FedRep").refuse_misfit(nn.Sequential(nn.ReLU()), AllOptions())


# The plain view


def test_plain_is_the_model_itself() -> None:
    model = mlp()
    assert plain(model, AllOptions()) is model


def test_plain_refuses_a_dualcopy_and_says_what_to_use() -> None:
    with pytest.raises(ConfigError, match=r"the model is a DualCopy.*use the plain model"):
        plain(DualCopy(mlp()), AllOptions())
