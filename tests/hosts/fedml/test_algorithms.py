"""Every algorithm through FedML's `sp`, against loops that know neither server nor client."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fedsq_plugin.algorithms import algorithms
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.state import State, fingerprint

from .conftest import (
    COUNTER,
    MODULES,
    PARAMETERS,
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
    watched,
)

# Every algorithm
NAMES = (*algorithms(), "FedSQ+FedMR", "FedSQ+FedAdam", "FedSQ+FrozenBN", "FedSQ+FedBN")


@pytest.mark.parametrize("per_round", [3, 2])
@pytest.mark.parametrize("name", NAMES)
def test_an_algorithm_learns_and_repeats_itself(name: str, per_round: int, fedml: Any, make_args: MakeArgs) -> None:
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


def test_algorithms_that_should_differ_do(fedml: Any, make_args: MakeArgs) -> None:
    """FedMR from its second round on, as all begin with the same model."""
    names = ("FedAvg", "FedProx", "FedSQ", "FedMR", "FedAvgM", "FedAdam", "FedYogi", "LP-FT", "FedNCM")
    names += ("FrozenBN", "FrozenEarly", "FedSQ+FedMR", "FedSQ+FedAdam", "FedSQ+FrozenBN")
    prints = {name: fingerprint(final(simulate(fedml, args_for(make_args, name)))) for name in names}
    assert len(set(prints.values())) == len(names)


@pytest.mark.parametrize("name", ["FedRep", "FedBABU", "LP-FT", "FedNCM"])
def test_an_unknown_head_is_one_line_where_the_algorithm_needs_it(name: str, fedml: Any, make_args: MakeArgs) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} .* set fedsq_args\.head to the module path.*$"):
        simulate(fedml, args_for(make_args, name, head=None))


@pytest.mark.parametrize("name", ["FedAvg", "FedRep", "FedNCM"])
def test_a_head_that_the_model_lacks_is_one_line(name: str, fedml: Any, make_args: MakeArgs) -> None:
    with pytest.raises(ConfigError, match=r"^fedsq_args.head 'fc' is no module of the model; known: 0, 1, 2, 3, 4$"):
        simulate(fedml, args_for(make_args, name, head="fc"))


# FedMR


def test_fedmr_sends_what_fedavg_sends(fedml: Any, make_args: MakeArgs) -> None:
    for record in simulate(fedml, args_for(make_args, "FedMR")).records:
        assert (record.bytes_up, record.bytes_down) == (3 * WHOLE, 3 * WHOLE)


@pytest.mark.parametrize("name", ["FedMR", "FedSQ+FedMR"])
@pytest.mark.parametrize("schedule", [[[0, 1, 2]] * 4, [[0, 1], [1, 2], [0, 2], [0, 1]]])
def test_a_silo_begins_with_its_slot(schedule: list[list[int]], name: str, fedml: Any, make_args: MakeArgs) -> None:
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
# The head first, or parts of the model frozen


def test_fedncms_first_round_gives_the_closed_form_head_over_all_data(fedml: Any, make_args: MakeArgs) -> None:
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
    assert [record.bytes_up for record in runner.runner.records] == [3 * 3 * 16 * 8, 3 * WHOLE, 3 * WHOLE]
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
def test_sums_of_another_shape_are_refused_by_name(rows_sent: int | None, fedml: Any, make_args: MakeArgs) -> None:
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
    states = [final(simulate(fedml, args_for(make_args, one, comm_round=1))) for one in ("FedNCM", name)]
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


# Optimizers at the server


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
        final(simulate(fedml, args_for(make_args, one, comm_round=1, **options), silos(sizes)))
        for one in ("FedAvg", name)
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
