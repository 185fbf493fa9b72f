"""Options that have no effect: what the declarations say of it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from fedsq_plugin.algorithms import algorithm
from fedsq_plugin.settings.config import OPTIONS, validated
from fedsq_plugin.settings.idle import OWN, Facts, compiled_for_cpu, unused

FACTS = {*Facts.__dataclass_fields__}
RECIPE = {
    **{"dataset": "digits", "model": "resnet18", "federated_optimizer": "FedSQ", "backend": "GRPC"},
    **{"client_num_in_total": 4, "client_num_per_round": 4, "comm_round": 10},
}


def facts(name: str = "FedSQ", **changes: Any) -> Facts:
    chosen = algorithm(name)
    known: dict[str, Any] = {"algorithm": chosen, "native": None, "ungated": None if chosen.gated else name}
    known |= {"gated_backbone": chosen.gated, "our_model": True, "centres": False, "data_of": ""}
    return Facts(**{**known, **changes})


def lines(about: Facts, **options: Any) -> list[str]:
    return unused(validated({**RECIPE, **options})[0], about)


@pytest.mark.parametrize("key", sorted(OPTIONS))
def test_an_idle_rule_reads_options_and_facts_alone(key: str) -> None:
    read = {name for rule in OPTIONS[key].idle for name in inspect.signature(rule).parameters}
    assert read <= OPTIONS.keys() | FACTS


def test_no_fact_has_the_name_of_an_option() -> None:
    assert not FACTS & OPTIONS.keys()


@pytest.mark.parametrize("key", sorted(OWN))
def test_an_algorithms_own_option_is_idle_under_fedavg(key: str) -> None:
    # 1 and True fit most of them; what does not fit is no valid option, and so has no line.
    for value in (1, 2, True, 0.5, ["a"], {"a": 1}, *_words(key)):
        valid = validated({**RECIPE, key: value})[0]
        if key in valid and valid[key] != OPTIONS[key].default:
            assert [line.split()[0] for line in unused(valid, facts("FedAvg"))] == [f"{OPTIONS[key].family}.{key}"]
            return
    pytest.fail(f"no value other than the default was found for {key}")


def _words(key: str) -> list[str]:
    words = str(OPTIONS[key].annotation).partition("Literal[")[2].partition("]")[0]
    return [word.strip().strip("'") for word in words.split(",") if word]


def test_a_host_that_runs_its_own_algorithm_is_named() -> None:
    native = facts(algorithm=None, native="Other's own FedNova", ungated="FedNova")
    assert lines(native, clip_norm=1, keep_gates=True, momentum=0.5, gate_pooling="own") == [
        "train_args.momentum has no effect: Other's own FedNova trains by plain SGD",
        "fedsq_args.clip_norm has no effect: Other's own FedNova runs the rounds",
        "fedsq_args.keep_gates has no effect: Other's own FedNova runs the rounds",
        "fedsq_args.gate_pooling has no effect: FedNova trains the plain model, without gates",
    ]


def test_an_algorithm_of_another_package_reads_extra() -> None:
    from dataclasses import replace

    from fedsq_plugin.algorithms import ExtraOptions

    theirs = replace(algorithm("FedAvg"), name="Theirs", options=ExtraOptions)
    assert lines(facts("FedAvg"), extra={"a": 1}) == ["fedsq_args.extra has no effect: FedAvg does not read it"]
    assert lines(facts("FedAvg", algorithm=theirs), extra={"a": 1}) == []


def test_algorithms_together_read_the_options_of_both() -> None:
    given = {"keep_gates": True, "fedmr_unit": "module"}
    assert lines(facts("FedSQ+FedMR"), **given) == []
    assert [line.split()[0] for line in lines(facts("FedSQ"), **given)] == ["fedsq_args.fedmr_unit"]


@pytest.mark.parametrize(("epochs", "idle"), [(None, True), (0, True), (3, False)])
def test_a_rule_may_ask_what_the_algorithm_does(epochs: int | None, idle: bool) -> None:
    assert bool(lines(facts(), finetune_part="head", finetune_epochs=epochs)) == idle
    assert lines(facts("FedBABU"), finetune_part="head") == []  # it ends with a fine-tuning of its own


def test_data_of_others() -> None:
    assert lines(facts(centres=True), dataset="flamby/x", image_size=8) == [
        "fedsq_args.image_size has no effect: the centres of flamby/x are the silos"
    ]
    assert lines(facts(data_of="Other's"), dataset="cifar10", image_size=8) == [
        "fedsq_args.image_size has no effect: cifar10 is Other's own data set"
    ]


def test_compiling_for_a_cpu_is_a_note() -> None:
    assert len(compiled_for_cpu({"compile": True})) == 1
    assert compiled_for_cpu({"compile": True, "using_gpu": True}) == compiled_for_cpu({}) == []
