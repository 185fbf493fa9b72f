"""What the processes of a run must have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsq_plugin.algorithms import algorithms
from fedsq_plugin.data.registry import load
from fedsq_plugin.run.plan import build_view, create_model, plan_of
from fedsq_plugin.settings.agreement import MUST_AGREE, disagreement, shared_options
from fedsq_plugin.settings.config import OPTIONS, Config
from tests.algorithms.task import Federation, State, mlp

from .watch import may_differ, watch_reads

NEEDED = {
    **{"dataset": "digits", "model": "resnet18", "federated_optimizer": "FedSQ"},
    **{"client_num_in_total": 3, "client_num_per_round": 2, "comm_round": 2},
}


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
    assert found == 'its recipe has learning_rate 0.03 instead of 0.01, frozen_modules ["layer1"] instead of []'


def test_a_task_that_is_not_told_agrees_with_every_other() -> None:
    real, several = options(task="regression"), options(task="multi_label")
    assert disagreement(options(), real) is None and disagreement(real, options()) is None
    assert disagreement(real, several) == (
        'its recipe has task "multi_label" instead of "regression" (set, or told by its labels where fedsq_args.task '
        "is auto)"
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


# What a silo reads


class Observed(Federation):
    """A federation that keeps which options its silos read."""

    read: frozenset[str] = frozenset()

    def answer(self, *arguments: Any) -> State:
        with watch_reads() as read:
            answer = super().answer(*arguments)
        self.read = self.read | read
        return answer

    def personalise(self) -> None:
        with watch_reads() as read:
            self.own(0, epochs=1)
        self.read = self.read | read


def read_in_training(name: str, **options: Any) -> set[str]:
    """The options that a silo reads from the plan to the end of two rounds and a fine-tuning."""
    own = {"federated_optimizer": name, "model": "of a script", "head": "3", "frozen_modules": ("0",)}
    config, model = Config(**{**NEEDED, **own, **options}), mlp()
    with watch_reads() as prepared:
        plan = plan_of(config, model)
        build_view(model, plan)
        run = Observed(name, model, plan.options, training=plan.training, seed=config.random_seed)
    run.repeat(2)
    run.personalise()
    return prepared | run.read


@pytest.mark.parametrize("name", [*algorithms(), "FedSQ+FedRep", "FedSQ+FedBN"])
@pytest.mark.parametrize(
    "options",
    [
        {"lr_schedule": "step", "clip_norm": 1.0, "nesterov": True, "momentum": 0.5},
        {"client_optimizer": "adam", "lr_schedule": "cosine", "structural_copy": "unfreeze"},
    ],
    ids=["sgd", "adam"],
)
def test_silos_must_agree_on_what_their_training_reads(name: str, options: dict[str, Any]) -> None:
    read = read_in_training(name, **options)
    assert {"learning_rate", "epochs", "random_seed"} <= read
    assert may_differ(read) == set()


def test_what_an_algorithm_reads_is_seen() -> None:
    assert "fedprox_mu" in read_in_training("FedProx")
    assert "fedprox_mu" not in read_in_training("FedAvg")
    assert {"gate_pooling", "structural_precision"} <= read_in_training("FedSQ")


@pytest.mark.parametrize("dataset", ["digits", "image_folder"])
@pytest.mark.parametrize("warm_start", ["none", "public"])
def test_silos_must_agree_on_what_their_data_and_models_read(dataset: str, warm_start: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number in range(24):
            path = tmp_path / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(path)
    options = {"dataset": dataset, "data_cache_dir": str(tmp_path), "warm_start": warm_start, "small_images": True}
    config = Config(**{**NEEDED, **options, "partition_method": "homo"})
    with watch_reads() as read:
        data = load(config)
        model = create_model(config, data.outputs)
        build_view(model, plan_of(config, model))
    assert {"partition_method", "data_seed", "model_seed", "head"} <= read
    assert may_differ(read) == set()


def test_options_that_may_differ_are_not_those_that_must_agree() -> None:
    assert not [key for key, option in OPTIONS.items() if option.agree and option.differs]
