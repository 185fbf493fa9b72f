"""FedML's form of a data set, and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from fedsq_plugin.data.registry import load
from fedsq_plugin.data.silos import SilosData
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.task import CLASSIFICATION, MeanOverBatches, Task
from fedsq_plugin.hosts.fedml.dataset import from_tuple, to_tuple
from tests.data.recipes import config

from .conftest import MakeArgs, silos


def test_a_users_list_is_read_by_fedmls_positions() -> None:
    dataset = silos()
    for given in (dataset, tuple(dataset)):
        data = from_tuple(given, "mine")
        assert [data.global_test_size, data.global_train, data.global_test] == dataset[1:4]
        assert [data.sizes, data.train, data.test, data.outputs] == dataset[4:]
        assert data.task is CLASSIFICATION
        assert (data.public, data.counts, data.classes) == (None, None, None)


def test_fedml_is_given_what_it_expects() -> None:
    dataset = silos()
    assert to_tuple(from_tuple(dataset, "mine")) == dataset


def test_what_has_no_place_in_the_list_comes_back() -> None:
    data = load(config(warm_start="public", warm_start_public=0.25))
    assert from_tuple(to_tuple(data), "digits") == data


def test_a_copy_of_the_list_still_has_it() -> None:
    task = Task(metric=MeanOverBatches("Dice", lambda targets, outputs: 0.5))
    found = from_tuple(copy.copy(to_tuple(SilosData({}, {}, {}, 1, task=task))), "flamby/fed_ixi")
    assert found.task == task


def test_a_part_that_a_script_replaced_counts() -> None:
    data = load(config())
    dataset, own = to_tuple(data), {0: "my loader"}
    dataset[5] = own
    assert from_tuple(dataset, "digits").train is own
    assert from_tuple(dataset, "digits").classes == data.classes


@pytest.mark.parametrize("parts", [7, 9])
def test_another_number_of_parts_is_an_error(parts: int) -> None:
    with pytest.raises(ConfigError, match=f"the data set has {parts} parts; FedML's have 8"):
        from_tuple(range(parts), "mine")


def test_a_data_set_of_flambys_that_a_script_took_apart_is_refused() -> None:
    with pytest.raises(ConfigError, match="the loss and the metric of flamby/fed_heart_disease are lost"):
        from_tuple(range(8), "flamby/fed_heart_disease")


def test_fedml_loads_our_data_sets_in_its_own_form(fedml: Any, make_args: MakeArgs) -> None:
    dataset, outputs = fedml.data.load(make_args(client_num_in_total=3))
    train_size, test_size, train, test, sizes, trains, tests, classes = dataset
    assert (train_size, test_size, outputs, classes) == (1348, 449, 10, 10)
    assert train_size == sum(sizes.values()) == len(train.dataset)
    assert (len(test.dataset), list(trains), list(tests)) == (449, [0, 1, 2], [0, 1, 2])
