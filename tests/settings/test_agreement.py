"""What the processes of a run must have in common."""

from __future__ import annotations

from typing import Any

from fedsq_plugin.settings.agreement import MUST_AGREE, disagreement, shared_options
from fedsq_plugin.settings.config import OPTIONS, Config


def options(**changes: Any) -> dict[str, str]:
    needed = {"dataset": "digits", "model": "gelunet", "federated_optimizer": "FedSQ"}
    needed |= {"client_num_in_total": 2, "client_num_per_round": 2, "comm_round": 1}
    return shared_options(Config(**{**needed, **changes}))


def test_every_option_that_must_agree_is_an_option() -> None:
    assert set(MUST_AGREE) <= OPTIONS.keys()
    assert options().keys() == set(MUST_AGREE)


def test_equal_recipes_agree() -> None:
    assert disagreement(options(threads=1), options(threads=2)) is None


def test_what_differs_is_named_with_both_values() -> None:
    found = disagreement(options(), options(learning_rate=0.03, frozen_modules=["layer1"]))
    assert (
        found == 'its recipe has learning_rate 0.03 instead of 0.01, frozen_modules ["layer1"] instead of []'
    )


def test_a_third_partys_options_are_compared_and_not_sent() -> None:
    ours, theirs = options(extra={"token": "secret"}), options(extra={"token": "other"})
    assert "secret" not in str(ours)
    assert disagreement(ours, theirs) == "its recipe has another extra"


def test_a_long_value_is_compared_by_its_hash() -> None:
    long = options(frozen_modules=[f"layer{n}" for n in range(50)])
    assert all(len(value) <= 80 for value in long.values())
    assert disagreement(options(), long) == "its recipe has another frozen_modules"


def test_what_is_missing_or_no_text_is_named() -> None:
    ours = options()
    assert disagreement(ours, None) == "it sent no options"
    assert disagreement(ours, {**ours, "epochs": 1}) == "its recipe has no epochs"
    assert disagreement(ours, {k: v for k, v in ours.items() if k != "model"}) == "its recipe has no model"


def test_a_strangers_value_is_said_in_one_short_line() -> None:
    found = disagreement(options(), {**options(), "epochs": "1\n" + "x" * 10_000})
    assert found is not None and len(found) < 200 and "\n" not in found
