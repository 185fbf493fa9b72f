"""Errors for users, and the names they suggest."""

from __future__ import annotations

import pytest

from fedsq_plugin.errors import ConfigError, FedSQError, GateError, UpdateError, WeightsError, nearest


@pytest.mark.parametrize("kind", [ConfigError, GateError, UpdateError, WeightsError])
def test_every_error_is_caught_as_one_kind_and_as_a_value_error(kind: type[Exception]) -> None:
    assert issubclass(kind, FedSQError)
    assert issubclass(kind, ValueError)


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
