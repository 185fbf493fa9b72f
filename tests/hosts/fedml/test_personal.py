"""Algorithms that leave a part with each silo, through FedML's `sp`, against a loop with a model per silo."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.seeding import derive
from fedsq_plugin.federation.state import State, fingerprint

from .conftest import (
    HEAD,
    MODULES,
    NORM,
    SECURITY,
    WHOLE,
    MakeArgs,
    args_for,
    changed,
    final,
    follow,
    network,
    prepare,
    silos,
    simulate,
    watch_rounds,
)

STAYS = {"FedBN": "1.", "FedRep": "4.", "FedBABU": "4."}

PHASES: dict[str, tuple[tuple[str, ...], ...]] = {
    "FedBN": (MODULES,),
    "FedRep": (("4",), ("0", "1")),
    "FedBABU": (("0", "1"),),
}

AWAY = [[0, 1], [0, 2], [0, 2], [1, 2]]
"""Silo 1 is away for two rounds, silo 2 comes late."""


def silos_with_own_tests() -> list[Any]:
    """conftest's silos, each with test data of its own, of different sizes."""
    data, generator = silos(), torch.Generator().manual_seed(9)
    points, labels = data[3].dataset.tensors
    for silo, size in enumerate((20, 33, 7)):
        chosen = torch.randperm(60, generator=generator)[:size]
        moved = points[chosen] + 0.5 * silo
        data[6] = {**data[6], silo: DataLoader(TensorDataset(moved, labels[chosen]), batch_size=8)}
    return data


def epoch(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], trained: Sequence[str]) -> None:
    """torch's own SGD on the modules that train; normalisation that does not keeps its statistics."""
    model.train()
    assert isinstance(model, nn.Sequential)
    if "1" not in trained:
        model[1].eval()
    parameters = [p for name, p in model.named_parameters() if name.partition(".")[0] in trained]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    for x, labels in batches:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()


def loop(name: str, data: Any, schedule: Sequence[Sequence[int]]) -> tuple[State, list[nn.Module]]:
    """A model per silo, and the sample-weighted mean of what travels, in float64."""
    models = [network() for _ in range(3)]
    stays = STAYS[name]
    shared = State((k, v.clone()) for k, v in models[0].state_dict().items() if not k.startswith(stays))
    for round, clients in enumerate(schedule):
        for client in clients:
            models[client].load_state_dict(shared, strict=False)
            torch.manual_seed(derive("local", 0, round, client))
            for trained in PHASES[name]:
                epoch(models[client], data[5][client], trained)
        total = sum(data[4][client] for client in clients)
        for key, value in shared.items():
            states = [(data[4][client], models[client].state_dict()[key].double()) for client in clients]
            mean = sum(samples * entry for samples, entry in states) / total
            shared[key] = (mean if value.is_floating_point() else mean.round()).to(value.dtype)
    for model in models:
        model.load_state_dict(shared, strict=False)
    return shared, models


def over_samples(models: Sequence[nn.Module], data: Any) -> tuple[float, float, int]:
    """Loss and accuracy over all samples of all silos, each with its own model."""
    losses, correct = [], []
    for model, test in zip(models, data[6].values(), strict=True):
        model.eval()
        with torch.no_grad():
            for x, labels in test:
                output = model(x)
                losses += nn.functional.cross_entropy(output, labels, reduction="none").tolist()
                correct += (output.argmax(1) == labels).tolist()
    return sum(losses) / len(losses), sum(correct) / len(correct), len(losses)


def kept(simulation: Any, client: int) -> State:
    """The part of the model that stayed with a silo."""
    tensors = simulation.model_trainer.client.states.tensors()
    prefix = f"{client}/"
    return State((k.removeprefix(prefix), v) for k, v in tensors.items() if k.startswith(prefix))


def personal(fedml: Any, make_args: MakeArgs, name: str, data: Any, **options: Any) -> Any:
    """A run of four rounds in which silos are away, with momentum."""
    args = args_for(make_args, name, comm_round=4, client_num_per_round=2, momentum=0.9, **options)
    runner = prepare(fedml, args, data)
    follow(runner.runner, AWAY)
    runner.run()
    return runner.runner


@pytest.mark.parametrize("name", STAYS)
def test_personal_models_equal_a_loop_with_a_model_per_silo(name: str, fedml: Any, make_args: MakeArgs) -> None:
    data = silos_with_own_tests()
    run = personal(fedml, make_args, name, data)
    shared, models = loop(name, data, AWAY)
    result, start = final(run), network().state_dict()
    for key in result:
        expected = start[key] if key.startswith(STAYS[name]) else shared[key]
        assert torch.equal(result[key], expected), key
    for client, model in enumerate(models):
        own = {k: v for k, v in model.state_dict().items() if k.startswith(STAYS[name])}
        assert fingerprint(kept(run, client)) == fingerprint(own)
    parts = {fingerprint(kept(run, client)) for client in range(3)}
    assert len(parts) == (1 if name == "FedBABU" else 3)  # FedBABU's head never trains


@pytest.mark.parametrize("name", STAYS)
def test_silos_are_tested_with_their_own_models_over_all_samples(name: str, fedml: Any, make_args: MakeArgs) -> None:
    data = silos_with_own_tests()
    run = personal(fedml, make_args, name, data)
    for round, record in enumerate(run.records):
        loss, accuracy, samples = over_samples(loop(name, data, AWAY[: round + 1])[1], data)
        assert record.silos.loss == pytest.approx(loss, rel=1e-5)
        assert (record.silos.accuracy, record.silos.samples) == (pytest.approx(accuracy), samples)


@pytest.mark.parametrize("name", STAYS)
@pytest.mark.parametrize("part", ["all", "head"])
def test_the_final_fine_tuning_ends_the_run_and_changes_nothing_else(
    part: str, name: str, fedml: Any, make_args: MakeArgs
) -> None:
    data = silos_with_own_tests()
    options = {"finetune_epochs": 2, "finetune_part": part}
    run = personal(fedml, make_args, name, data, **options)
    without = personal(fedml, make_args, name, data, finetune_epochs=0)
    assert [record.silos_tuned is None for record in run.records] == [True, True, True, False]
    assert all(record.silos_tuned is None for record in without.records)
    assert [record.silos for record in run.records] == [record.silos for record in without.records]
    assert fingerprint(final(run)) == fingerprint(final(without))
    for client in range(3):
        assert fingerprint(kept(run, client)) == fingerprint(kept(without, client))

    models = loop(name, data, AWAY)[1]
    for client, model in enumerate(models):
        torch.manual_seed(derive("finetune", 0, client))
        tune(model, data[5][client], MODULES if part == "all" else ("4",))
    loss, accuracy, samples = over_samples(models, data)
    tuned = run.records[-1].silos_tuned
    assert tuned.loss == pytest.approx(loss, rel=1e-5)
    assert (tuned.accuracy, tuned.samples) == (pytest.approx(accuracy), samples)
    assert tuned.loss < run.records[-1].silos.loss


def tune(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], trained: Sequence[str]) -> None:
    """Two epochs with one optimizer."""
    epoch(model, (batch for _ in range(2) for batch in batches), trained)


def test_the_fine_tuning_is_fedbabus_own_and_the_recipes_where_it_says_so(fedml: Any, make_args: MakeArgs) -> None:
    tuned = {}
    for epochs in (None, 5, 0):
        run = simulate(fedml, args_for(make_args, "FedBABU", comm_round=2, finetune_epochs=epochs))
        tuned[epochs] = run.records[-1].silos_tuned
    assert tuned[None] == tuned[5]
    assert tuned[0] is None
    assert simulate(fedml, args_for(make_args, "FedRep", comm_round=1)).records[-1].silos_tuned is None


def test_a_fine_tuning_of_an_unknown_head_is_refused_at_the_start(fedml: Any, make_args: MakeArgs) -> None:
    args = args_for(make_args, "FedAvg", head=None, finetune_epochs=1, finetune_part="head")
    with pytest.raises(ConfigError, match="head"):
        prepare(fedml, args)


def test_the_fine_tuning_is_the_same_for_every_algorithm(fedml: Any, make_args: MakeArgs) -> None:
    """No local epochs: every algorithm ends with the model that it began with."""
    tuned = []
    for name in ("FedAvg", "FedProx"):
        options = {"comm_round": 1, "epochs": 0, "finetune_epochs": 3, "fedprox_mu": 10.0}
        tuned.append(simulate(fedml, args_for(make_args, name, **options)).records[-1].silos_tuned)
    assert tuned[0] == tuned[1]


@pytest.mark.parametrize("name", [*STAYS, "FedSQ+FedBN", "FedSQ+FedMR"])
def test_testing_the_silos_changes_nothing(name: str, fedml: Any, make_args: MakeArgs) -> None:
    runs = []
    for options in (
        {"silo_evaluation": True, "finetune_epochs": 2},
        {"silo_evaluation": False, "finetune_epochs": 0, "frequency_of_the_test": 100},
    ):
        args = args_for(make_args, name, comm_round=4, client_num_per_round=2, **options)
        runs.append(simulate(fedml, args, silos_with_own_tests()))
    assert fingerprint(final(runs[0])) == fingerprint(final(runs[1]))
    for client in range(3):
        assert fingerprint(kept(runs[0], client)) == fingerprint(kept(runs[1], client))


@pytest.mark.parametrize("name", [*STAYS, "FedMR", "FedNCM"])
def test_a_silo_without_training_data_is_tested_all_the_same(name: str, fedml: Any, make_args: MakeArgs) -> None:
    options = {"silo_evaluation": True, "finetune_epochs": 1}
    run = simulate(fedml, args_for(make_args, name, **options), silos((16, 0, 40)))
    last = run.records[-1]
    assert last.notes == ["round 3: silo 1 has no samples and is skipped"]
    assert last.silos.samples == last.silos_tuned.samples == 3 * 60


@pytest.mark.parametrize(("name", "key"), [("FedRep", "0.weight"), ("FedMR", "0.weight"), ("FedNCM", "class sums")])
def test_an_update_that_is_not_finite_is_refused_by_name(name: str, key: str, fedml: Any, make_args: MakeArgs) -> None:
    data = silos()
    data[5][1].dataset.tensors[0][0, 0] = float("nan")
    run = simulate(fedml, args_for(make_args, name), data)
    assert run.records[0].notes[0].startswith(f"round 1: the update of silo 1 is refused: {key} has NaN")
    assert all(torch.isfinite(value).all() for value in final(run).values())


@pytest.mark.parametrize(
    ("name", "local"), [("FedBN", NORM), ("FedSQ+FedBN", NORM), ("FedRep", HEAD), ("FedBABU", HEAD)]
)
def test_the_local_part_is_what_is_not_sent(name: str, local: int, fedml: Any, make_args: MakeArgs) -> None:
    for per_round in (3, 2):
        run = simulate(fedml, args_for(make_args, name, client_num_per_round=per_round))
        for record in run.records:
            assert record.bytes_up == record.bytes_down == per_round * (WHOLE - local)


@pytest.mark.parametrize("name", STAYS)
def test_a_silo_keeps_its_part_while_it_is_away(name: str, fedml: Any, make_args: MakeArgs) -> None:
    args = args_for(make_args, name, comm_round=4, client_num_per_round=2)
    runner = prepare(fedml, args, silos_with_own_tests())
    follow(runner.runner, AWAY)
    found = watch_rounds(runner.runner, lambda run: fingerprint(kept(run, 1)))
    runner.run()
    assert found[0] == found[1] == found[2]
    assert (found[3] == found[0]) == (name == "FedBABU")


def test_silos_are_tested_where_the_recipe_asks_for_it(fedml: Any, make_args: MakeArgs) -> None:
    """One global model for all: the mean over silos is that of their test data put together."""
    data = silos_with_own_tests()
    run = simulate(fedml, args_for(make_args, "FedAvg", silo_evaluation=True), data)
    model = network()
    model.load_state_dict(final(run))
    loss, accuracy, samples = over_samples([model] * 3, data)
    assert run.records[-1].silos.loss == pytest.approx(loss, rel=1e-5)
    assert (run.records[-1].silos.accuracy, run.records[-1].silos.samples) == (pytest.approx(accuracy), samples)
    unasked = simulate(fedml, args_for(make_args, "FedBN", silo_evaluation=False), data)
    assert all(record.silos is None for record in unasked.records)


@pytest.mark.parametrize("security", ["norm clipping", "krum", "central privacy", "local privacy"])
@pytest.mark.parametrize("name", ["FedBN", "FedRep", "FedSQ+FedBN"])
def test_fedmls_security_works_on_what_travels(
    name: str, security: str, fedml: Any, make_args: MakeArgs, unsecured: Any
) -> None:
    """A regression: without counters among what travels, there was nothing to average them from."""
    sizes = (16, 16, 24, 24, 40)[: SECURITY[security].get("client_num_in_total", 3)]
    run = simulate(fedml, args_for(make_args, name, **SECURITY[security]), silos(sizes))
    state, start = final(run), network().state_dict()
    assert changed(state, start) == {"0", "4" if name.endswith("BN") else "1"}
    assert all(torch.isfinite(value).all() for value in state.values())
