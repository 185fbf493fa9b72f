"""The reasons to refuse an update, one test each."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor

from fedsq_plugin.federation.messages import Update
from fedsq_plugin.federation.updates import brief, changed_count, counts_problem, metrics_of, metrics_problem, problem


def template() -> OrderedDict[str, Tensor]:
    return OrderedDict(weight=torch.zeros(2, 3), bias=torch.zeros(2), count=torch.tensor(4))


def reason(samples: float = 5, **changes: Tensor | None) -> str | None:
    state = {key: value for key, value in {**template(), **changes}.items() if value is not None}
    return problem(Update(0, samples, state), template())


def test_good_update_has_no_problem() -> None:
    assert reason() is None


def test_order_of_the_keys_is_no_problem() -> None:
    assert problem(Update(0, 1, dict(reversed(template().items()))), template()) is None


@pytest.mark.parametrize("samples", [0, -3, float("nan"), float("inf"), 10**18, 10**9 + 1])
def test_sample_count_that_is_no_weight(samples: float) -> None:
    assert reason(samples) == f"its sample count is {samples}"


def test_missing_key() -> None:
    assert reason(weight=None) == "it lacks weight"


def test_first_of_several_missing_keys_is_named() -> None:
    assert reason(weight=None, bias=None) == "it lacks bias"


def test_unknown_key() -> None:
    assert reason(extra=torch.zeros(1)) == "it has the unknown key extra"


def test_wrong_shape() -> None:
    assert reason(weight=torch.zeros(3, 2)) == "weight has shape (3, 2) instead of (2, 3)"


def test_shape_that_would_broadcast_is_wrong_too() -> None:
    assert reason(bias=torch.zeros(1)) == "bias has shape (1,) instead of (2,)"


def test_wrong_dtype() -> None:
    wrong = torch.zeros(2, dtype=torch.float64)
    assert reason(bias=wrong) == "bias is torch.float64 instead of torch.float32"


def test_counter_that_became_a_float() -> None:
    assert reason(count=torch.tensor(4.0)) == "count is torch.float32 instead of torch.int64"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_value_that_is_not_finite(bad: float) -> None:
    assert reason(bias=torch.tensor([0.0, bad])) == "bias has NaN or infinite values"


def test_complex_value_that_is_not_finite() -> None:
    template = {"a": torch.zeros(1, dtype=torch.complex64)}
    wrong = {"a": torch.tensor([complex(0, float("nan"))], dtype=torch.complex64)}
    assert problem(Update(0, 1, wrong), template) == "a has NaN or infinite values"


# What silos say of their data and of their tests


def test_counts_of_a_silo() -> None:
    assert counts_problem({0: 3, 2: 0}, [0, 2]) is None
    assert counts_problem({0: 3, 2: 0}, [0, 2], before={0: 3, 1: 5}) is None
    assert counts_problem({0: 3}, [0], before={0: 4}) == "silo 0 has 3 samples, and had 4 before"
    assert counts_problem({0: 10**9 + 1}, [0]) == "silo 0 has the sample count 1000000001"


def test_a_count_that_is_the_announced_one() -> None:
    assert changed_count(24, 24) is None
    assert changed_count(25, 24) == "its sample count is 25, and it announced 24"
    assert changed_count(24.0, 24) == "its sample count is 24.0, and it announced 24"


@pytest.mark.parametrize(
    "good", [(0.5, 0.25, 4), (float("inf"), 0.0, 1), (float("nan"), 1.0, 1), (float("nan"), float("nan"), 0)]
)
def test_metrics_that_can_be(good: tuple[float, float, int]) -> None:
    """A model that diverged has them, too."""
    assert metrics_problem(list(good)) is None
    assert str(tuple(metrics_of(list(good)))) == str(good)


def test_what_a_stranger_sent_is_said_briefly_and_in_one_line() -> None:
    assert brief("a\nb  c") == "a b c"
    assert brief("x" * 1000) == "x" * 80
    assert brief([1]) == "a list"
    assert brief(None) == "None"


# Sums beside the state


def sums_template() -> dict[str, Tensor]:
    return {"totals": torch.zeros(2, dtype=torch.float64), "counts": torch.zeros(2, dtype=torch.int64)}


def reason_of_sums(**changes: Tensor | None) -> str | None:
    sums = {key: value for key, value in {**sums_template(), **changes}.items() if value is not None}
    return problem(Update(0, 5, {}, sums), {}, sums_template())


def test_good_sums_are_no_problem() -> None:
    assert reason_of_sums() is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sum_that_is_not_finite(bad: float) -> None:
    wrong = torch.tensor([1.0, bad], dtype=torch.float64)
    assert reason_of_sums(totals=wrong) == "totals has NaN or infinite values"


def test_missing_sum() -> None:
    assert reason_of_sums(counts=None) == "it lacks counts"


def test_sum_that_nobody_asked_for() -> None:
    assert reason_of_sums(extra=torch.zeros(1)) == "it has the unknown key extra"


def test_sum_of_the_wrong_shape() -> None:
    wrong = torch.zeros(1, dtype=torch.float64)
    assert reason_of_sums(totals=wrong) == "totals has shape (1,) instead of (2,)"


def test_sum_of_the_wrong_dtype() -> None:
    assert reason_of_sums(totals=torch.zeros(2)) == "totals is torch.float32 instead of torch.float64"


def test_sums_in_a_round_that_asks_for_none() -> None:
    found = problem(Update(0, 5, template(), {"totals": torch.ones(1)}), template())
    assert found == "it has the unknown key totals"


def test_state_in_a_round_that_trains_nothing() -> None:
    update = Update(0, 5, {"bias": torch.zeros(2)}, sums_template())
    assert problem(update, {}, sums_template()) == "it has the unknown key bias"


def test_nothing_in_a_round_that_trains() -> None:
    update = Update(0, 5, {}, sums_template())
    assert problem(update, template(), sums_template()) == "it lacks bias"


# No less finite than what was sent

INF, NAN = float("inf"), float("nan")


def reason_of(sent: list[float], found: list[float], dtype: torch.dtype = torch.float32) -> str | None:
    expected, value = torch.tensor(sent, dtype=dtype), torch.tensor(found, dtype=dtype)
    return problem(Update(0, 5, {"mask": value}), {"mask": expected})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.complex64])
@pytest.mark.parametrize(
    ("sent", "found"), [([0, -INF], [0, -INF]), ([NAN, INF], [NAN, INF]), ([-INF, 0], [-INF, 7]), ([-INF, 0], [3, 0])]
)
def test_entry_that_was_sent_so_may_be_infinite(sent: list[float], found: list[float], dtype: torch.dtype) -> None:
    assert reason_of(sent, found, dtype) is None


@pytest.mark.parametrize(
    ("sent", "found"), [([0, -INF], [-INF, -INF]), ([-INF], [INF]), ([-INF], [NAN]), ([NAN], [INF]), ([0], [INF])]
)
def test_entry_that_is_less_finite_than_what_was_sent(sent: list[float], found: list[float]) -> None:
    assert reason_of(sent, found) == "mask has NaN or infinite values"
