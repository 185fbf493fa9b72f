"""Every row of the table through FedML's `sp`, against loops that know neither coordinator nor worker."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedsq_plugin.algorithms import algorithms
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.seeding import derive
from fedsq_plugin.federation.state import State, fingerprint

from .conftest import (
    HEAD,
    NORM,
    SECURITY,
    WHOLE,
    MakeArgs,
    args_for,
    final,
    follow,
    network,
    prepare,
    silos,
    simulate,
    watch_rounds,
    watched,
)

COUNTER = "1.num_batches_tracked"
PARAMETERS = [name for name, _ in network().named_parameters()]


def changed(one: State, other: State) -> set[str]:
    """The modules whose entries differ."""
    return {key.partition(".")[0] for key in one if not torch.equal(one[key], other[key])}


# Every row.

NAMES = (*algorithms(), "FedSQ+FedMR", "FedSQ+FedAdam", "FedSQ+FrozenBN", "FedSQ+FedBN")


@pytest.mark.parametrize("per_round", [3, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_learns_and_repeats_itself(name: str, per_round: int, fedml: Any, make_args: MakeArgs) -> None:
    runs = []
    for _ in range(2):
        args = args_for(make_args, name, client_num_per_round=per_round, epochs=2)
        runner = prepare(fedml, args)
        before = runner.runner.scoring.evaluate()[0]
        runner.run()
        runs.append(runner.runner)
    records = runs[0].records
    after = records[-1].silos or records[-1].metrics
    assert after.loss < 0.9 * before.loss
    assert after.accuracy > before.accuracy + 0.1
    for mine, again in zip(records, runs[1].records, strict=True):
        timed = {"seconds": 0.0, "seconds_evaluation": 0.0}
        assert {**vars(mine), **timed} == {**vars(again), **timed}
    assert fingerprint(final(runs[0])) == fingerprint(final(runs[1]))
    types = {key: value.dtype for key, value in network().state_dict().items()}
    assert {key: value.dtype for key, value in final(runs[0]).items()} == types


def test_rows_that_should_differ_do(fedml: Any, make_args: MakeArgs) -> None:
    """FedMR from its second round on, as all begin with the same model."""
    names = ("FedAvg", "FedProx", "FedSQ", "FedMR", "FedAvgM", "FedAdam", "FedYogi", "LP-FT", "FedNCM")
    names += ("FrozenBN", "FrozenEarly", "FedSQ+FedMR", "FedSQ+FedAdam", "FedSQ+FrozenBN")
    prints = {name: fingerprint(final(simulate(fedml, args_for(make_args, name)))) for name in names}
    assert len(set(prints.values())) == len(names)


@pytest.mark.parametrize("name", ["FedRep", "FedBABU", "LP-FT", "FedNCM"])
def test_an_unknown_head_is_one_line_where_the_row_needs_it(
    name: str, fedml: Any, make_args: MakeArgs
) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} .* set fedsq_args\.head to the module path.*$"):
        simulate(fedml, args_for(make_args, name, head=None))


@pytest.mark.parametrize("name", ["FedAvg", "FedRep", "FedNCM"])
def test_a_head_that_the_model_lacks_is_one_line(name: str, fedml: Any, make_args: MakeArgs) -> None:
    with pytest.raises(ConfigError, match=r"^head 'fc' is no module of the model; known: 0, 1, 2, 3, 4$"):
        simulate(fedml, args_for(make_args, name, head="fc"))


# FedMR.


def test_fedmr_sends_what_fedavg_sends(fedml: Any, make_args: MakeArgs) -> None:
    for record in simulate(fedml, args_for(make_args, "FedMR")).records:
        assert (record.bytes_up, record.bytes_down) == (3 * WHOLE, 3 * WHOLE)


@pytest.mark.parametrize("name", ["FedMR", "FedSQ+FedMR"])
@pytest.mark.parametrize("schedule", [[[0, 1, 2]] * 4, [[0, 1], [1, 2], [0, 2], [0, 1]]])
def test_a_silo_begins_with_its_slot(
    schedule: list[list[int]], name: str, fedml: Any, make_args: MakeArgs
) -> None:
    """The i-th silo of a round has slot i, whoever trained it before; and the slots are what the round
    before sent, each key permuted by itself."""
    args = args_for(make_args, name, comm_round=4, client_num_per_round=len(schedule[0]))
    runner = prepare(fedml, args)
    follow(runner.runner, schedule)
    seen = watched(runner.runner)
    slots = watch_rounds(runner.runner, lambda run: run.aggregator.server.state.slots)
    runner.run()
    by_round = [[began for began in seen if began.round == r] for r in range(4)]
    assert [[began.client for began in round] for round in by_round] == schedule
    assert {fingerprint(began.received) for began in by_round[0]} == {fingerprint(network().state_dict())}
    moved = 0
    for before, now, held in zip(by_round, by_round[1:], slots, strict=False):
        assert [fingerprint(began.received) for began in now] == [fingerprint(slot) for slot in held]
        for key in now[0].received:
            sent = [fingerprint({key: began.sent[key]}) for began in before]
            received = [fingerprint({key: began.received[key]}) for began in now]
            assert sorted(sent) == sorted(received)
            moved += sent != received
        assert len({fingerprint(began.received) for began in now}) == len(now)
    assert moved > 3


def test_fedmrs_global_model_is_the_unweighted_mean(fedml: Any, make_args: MakeArgs) -> None:
    """Counters: 2, 3, 5 batches, by round; slots have them permuted, and their mean rounds to an integer."""
    runner = prepare(fedml, args_for(make_args, "FedMR"))
    seen = watched(runner.runner)
    found = watch_rounds(runner.runner, lambda run: (final(run), run.aggregator.server.state.slots))
    runner.run()
    for number, (model, held) in enumerate(found):
        sent = [began.sent for began in seen if began.round == number]
        for key in [*PARAMETERS, "1.running_mean", "1.running_var"]:
            expected = torch.stack([state[key].double() for state in sent]).mean(0)
            torch.testing.assert_close(model[key], expected.float(), rtol=1e-6, atol=1e-7)
        counts = [int(state[COUNTER]) for state in sent]
        assert int(model[COUNTER]) == round(sum(counts) / 3)
        assert all(slot[COUNTER].dtype is torch.int64 for slot in held)
        assert sorted(int(slot[COUNTER]) for slot in held) == sorted(counts)


def test_fedmrs_first_stage_gives_every_silo_the_mean(fedml: Any, make_args: MakeArgs) -> None:
    runner = prepare(fedml, args_for(make_args, "FedMR", first_stage_bound=1))
    seen = watched(runner.runner)
    models = watch_rounds(runner.runner, final)
    runner.run()
    second, third = ([fingerprint(b.received) for b in seen if b.round == r] for r in (1, 2))
    assert second == [fingerprint(models[0])] * 3
    assert len(set(third)) == 3


def test_fedmrs_unit_module_keeps_a_module_together(fedml: Any, make_args: MakeArgs) -> None:
    runner = prepare(fedml, args_for(make_args, "FedMR", fedmr_unit="module", comm_round=5))
    seen = watched(runner.runner)
    runner.run()

    def module(state: State, path: str) -> str:
        return fingerprint({key: value for key, value in state.items() if key.startswith(path)})

    parted = 0
    for round in range(4):
        sent = [began.sent for began in seen if began.round == round]
        for began in (began for began in seen if began.round == round + 1):
            sources = [
                next(n for n, state in enumerate(sent) if module(state, path) == module(began.received, path))
                for path in ("0.", "1.", "4.")
            ]
            parted += len(set(sources)) > 1
    assert parted


@pytest.mark.parametrize("security", ["krum", "norm clipping", "central privacy", "byzantine attack"])
@pytest.mark.parametrize("name", ["FedMR", "FedSQ+FedMR", "FedNCM"])
def test_what_sends_no_single_average_refuses_fedmls_security(
    name: str, security: str, fedml: Any, make_args: MakeArgs, unsecured: Any
) -> None:
    with pytest.raises(ConfigError, match=rf"^{name.replace('+', '.')} does not send .*turn off enable_.*$"):
        simulate(fedml, args_for(make_args, name, **SECURITY[security]))


def test_a_refused_update_leaves_its_slot_on_both_ways_of_gathering(
    fedml: Any, make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsq_plugin.hosts.fedml.adapters import FedSQAggregator

    prints = []
    for streams in (True, False):
        data = silos()
        data[5][1].dataset.tensors[0][0, 0] = float("nan")
        monkeypatch.setattr(FedSQAggregator, "streams", property(lambda self, streams=streams: streams))
        prints.append(fingerprint(final(simulate(fedml, args_for(make_args, "FedMR"), data))))
    assert prints[0] == prints[1]


# Personal models: what does not travel stays with its silo.

MODULES = ("0", "1", "4")
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
def test_personal_models_equal_a_loop_with_a_model_per_silo(
    name: str, fedml: Any, make_args: MakeArgs
) -> None:
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
def test_silos_are_tested_with_their_own_models_over_all_samples(
    name: str, fedml: Any, make_args: MakeArgs
) -> None:
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


def test_the_fine_tuning_is_fedbabus_own_and_the_recipes_where_it_says_so(
    fedml: Any, make_args: MakeArgs
) -> None:
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


def test_the_fine_tuning_is_the_same_for_every_row(fedml: Any, make_args: MakeArgs) -> None:
    """No local epochs: every row ends with the model that it began with."""
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
def test_a_silo_without_training_data_is_tested_all_the_same(
    name: str, fedml: Any, make_args: MakeArgs
) -> None:
    options = {"silo_evaluation": True, "finetune_epochs": 1}
    run = simulate(fedml, args_for(make_args, name, **options), silos((16, 0, 40)))
    last = run.records[-1]
    assert last.notes == ["round 3: silo 1 has no samples and is skipped"]
    assert last.silos.samples == last.silos_tuned.samples == 3 * 60


@pytest.mark.parametrize(
    ("name", "key"), [("FedRep", "0.weight"), ("FedMR", "0.weight"), ("FedNCM", "class sums")]
)
def test_an_update_that_is_not_finite_is_refused_by_name(
    name: str, key: str, fedml: Any, make_args: MakeArgs
) -> None:
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
    assert (run.records[-1].silos.accuracy, run.records[-1].silos.samples) == (
        pytest.approx(accuracy),
        samples,
    )
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


# The head first, or parts of the model frozen.


def test_fedncms_first_round_gives_the_closed_form_head_over_all_data(
    fedml: Any, make_args: MakeArgs
) -> None:
    data = silos()
    runner = prepare(fedml, args_for(make_args, "FedNCM"), data)
    models = watch_rounds(runner.runner, final)
    runner.run()
    start = network().eval()
    points = torch.cat([loader.dataset.tensors[0] for loader in data[5].values()])
    labels = torch.cat([loader.dataset.tensors[1] for loader in data[5].values()])
    with torch.no_grad():
        features = start[:4](points).double()
    means = torch.stack([features[labels == label].mean(0) for label in range(3)])
    torch.testing.assert_close(models[0]["4.weight"], (means / means.norm(dim=1, keepdim=True)).float())
    assert torch.equal(models[0]["4.bias"], torch.zeros(3))
    assert changed(models[0], start.state_dict()) == {"4"}
    assert changed(models[1], models[0]) == {"0", "1", "4"}
    # In the first round 3 x 16 sums go up, in eight bytes each; down goes the model.
    assert [record.bytes_up for record in runner.runner.records] == [
        3 * 3 * 16 * 8,
        3 * WHOLE,
        3 * WHOLE,
    ]
    assert [record.bytes_down for record in runner.runner.records] == [3 * WHOLE] * 3


def test_fedncms_head_does_not_depend_on_the_partition(fedml: Any, make_args: MakeArgs) -> None:
    whole, parts = silos((80,)), silos((80,))
    points, labels = whole[5][0].dataset.tensors
    order = labels.argsort(stable=True)  # every silo has one class, about
    parts[5] = {
        silo: DataLoader(TensorDataset(points[chosen], labels[chosen]), batch_size=8)
        for silo, chosen in enumerate((order[:20], order[20:50], order[50:]))
    }
    parts[4], parts[6] = {0: 20, 1: 30, 2: 30}, dict.fromkeys(range(3), whole[3])
    heads = []
    for data, count in ((whole, 1), (parts, 3)):
        options = {"client_num_in_total": count, "client_num_per_round": count, "comm_round": 1}
        heads.append(final(simulate(fedml, args_for(make_args, "FedNCM", **options), data))["4.weight"])
    torch.testing.assert_close(heads[0], heads[1])


def test_fedncm_counts_the_silos_that_take_part(fedml: Any, make_args: MakeArgs) -> None:
    run = simulate(fedml, args_for(make_args, "FedNCM", client_num_per_round=2))
    assert [record.bytes_up for record in run.records] == [2 * 3 * 16 * 8, 2 * WHOLE, 2 * WHOLE]


@pytest.mark.parametrize("rows_sent", [None, 1, 2])
def test_sums_of_another_shape_are_refused_by_name(
    rows_sent: int | None, fedml: Any, make_args: MakeArgs
) -> None:
    """Missing ones, and ones that broadcast, would count for nothing or for every class."""
    runner = prepare(fedml, args_for(make_args, "FedNCM"))
    trainer = runner.runner.model_trainer
    give = trainer.get_model_params

    def damaged() -> State:
        sent: State = give()
        if trainer.id != 1 or runner.runner.args.round_idx:
            return sent
        return State((key, value[:rows_sent]) for key, value in sent.items() if rows_sent)

    trainer.get_model_params = damaged
    runner.run()
    (note,) = runner.runner.records[0].notes
    assert note.startswith("round 1: the update of silo 1 is refused: ")


@pytest.mark.parametrize("name", ["FedNCM+FedAdam", "FedNCM+FedMR", "FedSQ+FedNCM"])
def test_fedncms_head_goes_with_other_choices(name: str, fedml: Any, make_args: MakeArgs) -> None:
    states = [final(simulate(fedml, args_for(make_args, row, comm_round=1))) for row in ("FedNCM", name)]
    assert fingerprint(states[0]) == fingerprint(states[1])
    assert changed(final(simulate(fedml, args_for(make_args, name, comm_round=2))), states[1]) == {*MODULES}


def test_lp_ft_leaves_the_body_alone_while_it_probes(fedml: Any, make_args: MakeArgs) -> None:
    for probing in (1, 2):
        runner = prepare(fedml, args_for(make_args, "LP-FT", probe_rounds=probing))
        models = watch_rounds(runner.runner, final)
        runner.run()
        start = network().state_dict()
        for round, model in enumerate(models):
            assert changed(model, start) == ({"4"} if round < probing else {*MODULES})


@pytest.mark.parametrize("per_round", [3, 2])
@pytest.mark.parametrize(
    ("name", "moves"),
    [
        ("FrozenBN", {"0", "4"}),
        ("FrozenEarly", {"4"}),
        ("FedSQ+FrozenBN", {"0", "4"}),
        ("FrozenBN+FedAdam", {"0", "4"}),
        ("FrozenBN+FedMR", {"0", "4"}),
    ],
)
def test_what_is_frozen_is_bit_equal_at_the_end(
    name: str, moves: set[str], per_round: int, fedml: Any, make_args: MakeArgs
) -> None:
    options = {"client_num_per_round": per_round, "momentum": 0.9, "weight_decay": 0.01}
    run = simulate(fedml, args_for(make_args, name, **options))
    assert changed(final(run), network().state_dict()) == moves


def test_frozen_modules_that_the_model_lacks_are_an_error(fedml: Any, make_args: MakeArgs) -> None:
    with pytest.raises(ConfigError, match="layer9"):
        simulate(fedml, args_for(make_args, "FrozenEarly", frozen_modules=["layer9"]))


def test_early_modules_of_another_model_must_be_named(fedml: Any, make_args: MakeArgs) -> None:
    """The recipe's resnet18 is not what the script trains; FrozenEarly would be FedAvg."""
    with pytest.raises(ConfigError, match="frozen_modules"):
        simulate(fedml, args_for(make_args, "FrozenEarly", frozen_modules=[]))


# Optimizers at the server.


def stepped(name: str, delta: Tensor) -> Tensor:
    """The first step by hand, from memories of 0 and τ²: β₁ .9, β₂ .99, τ 1e-3, η 1 or 0.01.

    FedAvgM: v = Δ. FedAdam: m = .1·Δ, v = .99·τ² + .01·Δ². FedYogi: v = τ² − .01·Δ²·sign(τ² − Δ²).
    """
    tau = 1e-3
    square = delta.square()
    if name == "FedAvgM":
        return delta
    if name == "FedAdam":
        second = 0.99 * tau**2 + 0.01 * square
    else:
        second = tau**2 - 0.01 * square * torch.sign(tau**2 - square)
    return 0.01 * 0.1 * delta / (second.sqrt() + tau)


@pytest.mark.parametrize("security", [None, "krum", "norm clipping", "trimmed mean"])
@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam", "FedYogi"])
def test_the_server_steps_along_the_defended_mean(
    name: str, security: str | None, fedml: Any, make_args: MakeArgs, unsecured: Any
) -> None:
    options = SECURITY[security] if security else {}
    sizes = (16, 16, 24, 24, 40)[: options.get("client_num_in_total", 3)]
    mean, result = (
        final(simulate(fedml, args_for(make_args, row, comm_round=1, **options), silos(sizes)))
        for row in ("FedAvg", name)
    )
    start = network().state_dict()
    for key, value in result.items():
        if key in PARAMETERS:
            expected = start[key] + stepped(name, mean[key] - start[key])
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
        else:  # statistics and counters are the mean's
            assert torch.equal(value, mean[key])
            assert value.dtype is start[key].dtype


@pytest.mark.parametrize("security", [None, "krum", "norm clipping"])
@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam", "FedYogi", "FedSQ+FedAdam"])
def test_variances_and_counters_stay_what_they_are(
    name: str, security: str | None, fedml: Any, make_args: MakeArgs, unsecured: Any
) -> None:
    """A step of size 1 along a variance would make it negative."""
    options = SECURITY[security] if security else {}
    sizes = (16, 16, 24, 24, 40)[: options.get("client_num_in_total", 3)]
    args = args_for(make_args, name, comm_round=6, server_lr=1.0, **options)
    runner = prepare(fedml, args, silos(sizes))
    states = watch_rounds(runner.runner, final)
    runner.run()
    for state in states:
        assert (state["1.running_var"] >= 0).all()
        assert state[COUNTER].dtype is torch.int64
    # 2, 2, 3 batches of 16, 16, 24 samples: (2*16 + 2*16 + 3*24) / 56 = 2.4; then 4, 4, 5: 4.4.
    if security is None:
        assert [int(state[COUNTER]) for state in states[:2]] == [2, 4]


def test_the_servers_memory_lasts_over_rounds(fedml: Any, make_args: MakeArgs) -> None:
    """FedAvgM's second step by hand: v = .9·Δ₁ + Δ₂."""
    runner = prepare(fedml, args_for(make_args, "FedAvgM", comm_round=2))
    seen, data = watched(runner.runner), silos()
    models = watch_rounds(runner.runner, final)
    runner.run()
    start = network().state_dict()
    for key in PARAMETERS:
        velocity, weights = torch.zeros_like(start[key]), start[key]
        for round, model in enumerate(models):
            sent = [(data[4][b.client], b.sent[key].double()) for b in seen if b.round == round]
            mean = sum(samples * value for samples, value in sent) / 80
            velocity = 0.9 * velocity + (mean.float() - weights)
            weights = weights + velocity
            torch.testing.assert_close(model[key], weights, rtol=1e-5, atol=1e-6)


# A user's own parts.


def foreign(args: Any) -> dict[str, Any]:
    from fedml.ml.aggregator.default_aggregator import DefaultServerAggregator
    from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS

    return {
        "client_trainer": ModelTrainerCLS(network(), args),
        "server_aggregator": DefaultServerAggregator(network(), args),
    }


@pytest.mark.parametrize("part", ["client_trainer", "server_aggregator"])
@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("FedBN", {}, "FedBN has exchange 'without norm layers'"),
        ("FedRep", {}, "FedRep has phases 'head then body'"),
        ("LP-FT", {}, "LP-FT has phases 'head first'"),
        ("FedNCM", {}, "FedNCM has phases 'class means first'"),
        ("FrozenBN", {}, "FrozenBN has phases 'without norm layers'"),
        ("FedSQ", {"structural_copy": "refresh"}, "FedSQ has structural_copy 'refresh'"),
        ("FedAvg", {"silo_evaluation": True}, "silo_evaluation and finetune_epochs need"),
        ("FedSQ", {"finetune_epochs": 1}, "silo_evaluation and finetune_epochs need"),
    ],
)
def test_a_part_that_would_replace_a_choice_is_refused(
    name: str, options: dict[str, Any], said: str, part: str, fedml: Any, make_args: MakeArgs
) -> None:
    args = args_for(make_args, name, **options)
    with pytest.raises(ConfigError, match=rf"^{said}.*{part}.*$"):
        simulate(fedml, args, **{part: foreign(args)[part]})


@pytest.mark.parametrize(("name", "server"), [("FedMR", "recombine"), ("FedAdam", "adam")])
def test_the_server_of_a_row_needs_our_aggregator_alone(
    name: str, server: str, fedml: Any, make_args: MakeArgs
) -> None:
    args = args_for(make_args, name)
    with pytest.raises(ConfigError, match=rf"^{name} has server '{server}'.*server_aggregator"):
        simulate(fedml, args, server_aggregator=foreign(args)["server_aggregator"])
    args = args_for(make_args, name)
    run = simulate(fedml, args, client_trainer=foreign(args)["client_trainer"])
    state = run.aggregator.server.state
    assert state.round == 3
    assert bool(state.slots) == (name == "FedMR") and bool(state.memory) == (name == "FedAdam")


def test_a_trainer_that_would_leave_the_objective_out_is_refused(fedml: Any, make_args: MakeArgs) -> None:
    args = args_for(make_args, "FedProx")
    with pytest.raises(ConfigError, match="objective"):
        simulate(fedml, args, client_trainer=foreign(args)["client_trainer"])


def mine(which: str, args: Any, model: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """Subclasses of ours as a main.py makes them, from the model that FedMLRunner gets as well; and the
    calls that reach them."""
    from fedsq_plugin.hosts.fedml.adapters import FedSQAggregator, FedSQTrainer
    from fedsq_plugin.hosts.fedml.arguments import config_of
    from fedsq_plugin.run.plan import plan_of

    calls: list[str] = []

    class Trainer(FedSQTrainer):
        def train(self, train_data: Any, device: Any, args: Any) -> None:
            calls.append("train")
            super().train(train_data, device, args)

    class Aggregator(FedSQAggregator):
        def aggregate(self, raw_client_model_or_grad_list: Any) -> State:
            calls.append("aggregate")
            return super().aggregate(raw_client_model_or_grad_list)

    plan = plan_of(config_of(args), model)
    made = {"client_trainer": Trainer, "server_aggregator": Aggregator}[which]
    return {which: made(model, args, plan)}, calls


SUBCLASSED: list[Any] = [
    ("client_trainer", "FedAvg", {}),
    ("client_trainer", "FedBN", {}),
    ("client_trainer", "FedRep", {}),
    ("client_trainer", "FedMR", {}),
    ("client_trainer", "FedNCM", {}),
    ("server_aggregator", "FedSQ", {}),
    ("server_aggregator", "FedBN", {}),
    ("server_aggregator", "FedMR", {}),
    ("server_aggregator", "FedNCM", {}),
    ("server_aggregator", "FedAdam", {}),
    ("client_trainer", "FedSQ", {}),
    ("client_trainer", "FedSQ+FedBN", {}),
    ("client_trainer", "FedSQ", {"structural_copy": "refresh"}),
    ("server_aggregator", "FedSQ", {"structural_copy": "refresh"}),
]


@pytest.mark.parametrize(("which", "name", "options"), SUBCLASSED)
def test_subclasses_of_ours_are_used_and_follow_the_row(
    which: str, name: str, options: dict[str, Any], fedml: Any, make_args: MakeArgs
) -> None:
    expected = fingerprint(final(simulate(fedml, args_for(make_args, name, **options))))
    args, model = args_for(make_args, name, **options), network()
    parts, calls = mine(which, args, model)
    run = simulate(fedml, args, model=model, **parts)
    assert calls == (["train"] * 9 if which == "client_trainer" else ["aggregate"] * 3)
    assert fingerprint(final(run)) == expected


def test_a_subclass_may_aggregate_by_itself(fedml: Any, make_args: MakeArgs) -> None:
    """The rounds go on: the probe ends after the first one."""
    from fedsq_plugin.hosts.fedml.adapters import FedSQAggregator
    from fedsq_plugin.hosts.fedml.arguments import config_of
    from fedsq_plugin.run.plan import plan_of

    class First(FedSQAggregator):
        def aggregate(self, raw_client_model_or_grad_list: Any) -> State:
            state: State = raw_client_model_or_grad_list[0][1]
            return state

    args, model = args_for(make_args, "LP-FT"), network()
    runner = prepare(
        *(fedml, args), model=model, server_aggregator=First(model, args, plan_of(config_of(args), model))
    )
    seen = watched(runner.runner)
    models = watch_rounds(runner.runner, final)
    runner.run()
    for round, state in enumerate(models):
        first = next(began.sent for began in seen if began.round == round)
        assert fingerprint(state) == fingerprint(first)
        assert changed(state, network().state_dict()) == ({*MODULES} if round else {"4"})


@pytest.mark.parametrize("which", ["client_trainer", "server_aggregator"])
def test_subclasses_of_ours_begin_with_the_warm_start(
    which: str, fedml: Any, make_args: MakeArgs, tmp_path: Any
) -> None:
    path = tmp_path / "warm.pt"
    torch.save(network(seed=7).state_dict(), path)
    options = {"warm_start": "file", "warm_start_file": str(path), "epochs": 0, "comm_round": 1}
    args, model = args_for(make_args, "FedAvg", **options), network()
    run = simulate(fedml, args, model=model, **mine(which, args, model)[0])
    warm = network(seed=7).state_dict()
    assert all(torch.equal(final(run)[key], warm[key]) for key in PARAMETERS)


def test_the_models_of_a_script_are_left_apart(fedml: Any, make_args: MakeArgs) -> None:
    """The trainer's model ends as the global one where silos have parts of their own, too."""
    for name in ("FedBN", "FedRep", "FedBABU"):
        model = network()
        before = copy.deepcopy(model.state_dict())
        run = simulate(fedml, args_for(make_args, name, finetune_epochs=1), model=model)
        assert fingerprint(model.state_dict()) == fingerprint(final(run)) != fingerprint(before)
