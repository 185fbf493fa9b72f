"""Errors for users, and the names they suggest."""

from __future__ import annotations

import pytest

from fedsq_plugin.errors import (
    PYTHON,
    ConfigError,
    FedSQError,
    GateError,
    UpdateError,
    WeightsError,
    Word,
    nearest,
    worded,
)
from fedsq_plugin.run.plan import RECIPE


@pytest.mark.parametrize("kind", [ConfigError, GateError, UpdateError, WeightsError])
def test_every_error_is_caught_as_one_kind_and_as_a_value_error(kind: type[Exception]) -> None:
    assert issubclass(kind, FedSQError)
    assert issubclass(kind, ValueError)


def test_an_error_is_worded_for_its_host() -> None:
    error = WeightsError("no such part: ", Word("no head", "{fc}"), "; set ", Word("head")).after("file x: ")
    assert str(error) == "file x: no such part: the model has no head '{fc}'; set head"
    with pytest.raises(WeightsError) as caught, worded(RECIPE):
        raise error
    line = "file x: no such part: fedsq_args.head: the model has no module '{fc}'; set fedsq_args.head"
    assert str(caught.value) == line
    with pytest.raises(WeightsError) as again, worded(PYTHON):
        raise caught.value
    assert str(again.value) == line


def test_a_recipe_has_a_word_for_everything() -> None:
    assert RECIPE.keys() == PYTHON.keys()


def test_nearest_name_is_suggested() -> None:
    assert nearest("momentm", ["momentum", "model"]) == "; did you mean 'momentum'?"


def test_case_does_not_matter() -> None:
    assert nearest("fedsq", ["FedSQ", "FedAvg"]) == "; did you mean 'FedSQ'?"


def test_only_the_nearest_of_several_is_suggested() -> None:
    assert nearest("resnet", ["resnet18", "resnet101"]) == "; did you mean 'resnet18'?"


def test_name_like_no_other_lists_the_known_ones_in_order() -> None:
    assert nearest("xyz", ["beta", "alpha"]) == "; known: alpha, beta"


def test_nothing_known_adds_nothing() -> None:
    assert nearest("xyz", []) == ""


def test_known_names_may_be_given_once() -> None:
    assert nearest("alpa", iter(["alpha", "beta"])) == "; did you mean 'alpha'?"
