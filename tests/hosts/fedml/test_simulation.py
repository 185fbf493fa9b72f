"""FedML's `sp`, for real: the life-cycle, the traps of FedML's own loop, and refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fedsq_plugin import DualCopy
from fedsq_plugin.errors import ConfigError, UpdateError
from fedsq_plugin.federation.local import Phase, local_update
from fedsq_plugin.federation.mean import WeightedMean
from fedsq_plugin.federation.roles import Role, roles
from fedsq_plugin.federation.seeding import derive
from fedsq_plugin.federation.state import State, fingerprint
from fedsq_plugin.federation.training import LocalTraining

from .conftest import MakeArgs, final, follow, network, poisoned, prepare, silos, simulate


def test_fedsq_trains_and_keeps_its_structural_copy(fedml: Any, make_args: MakeArgs) -> None:
    model = network()
    start = fingerprint(model.state_dict())
    run = simulate(fedml, make_args(comm_round=5), model=model)
    assert isinstance(run.aggregator.model, DualCopy)
    assert fingerprint(run.aggregator.model.structural.state_dict()) == start
    assert fingerprint(run.model_trainer.model.structural.state_dict()) == start
    assert run.server.structural_fingerprint == start
    assert run.records[-1].metrics.accuracy > 0.8
    assert [record.round for record in run.records] == [1, 2, 3, 4, 5]


def test_a_round_is_the_weighted_mean_of_independent_local_updates(fedml: Any, make_args: MakeArgs) -> None:
    """Fails with FedML's live state dict: there, client k+1 starts from client k's result."""
    args = make_args(federated_optimizer="FedAvg", fedsq_own_rows=True, comm_round=1, momentum=0.9)
    data, mean = silos(), WeightedMean()
    run = simulate(fedml, args, data)
    for client in range(3):
        model = network()
        local_update(
            model,
            data[5][client],
            LocalTraining(learning_rate=0.05, momentum=0.9),
            (Phase(1, frozenset(Role)),),
            roles(model),
            round=0,
            seed=derive("local", 0, 0, client),
        )
        mean.add(model.state_dict(), data[4][client])
    assert fingerprint(final(run)) == fingerprint(mean.result())


def test_payload_of_fedsq_is_fedavgs(fedml: Any, make_args: MakeArgs) -> None:
    # 6*16+16 + 16*4 (BatchNorm) + 16*3+3 = 227 floats and one int64: 916 bytes, three silos.
    for name in ("FedAvg", "FedSQ"):
        run = simulate(fedml, make_args(federated_optimizer=name, fedsq_own_rows=True, comm_round=1))
        assert (run.records[0].bytes_up, run.records[0].bytes_down) == (3 * 916, 3 * 916)


def test_counters_stay_integers_through_rounds(fedml: Any, make_args: MakeArgs) -> None:
    """FedML's average turns them into floats. Two rounds; 2, 3 and 5 batches of 16, 24, 40 samples:
    (2*16 + 3*24 + 5*40) / 80 = 3.8, rounded to 4; then 6, 7, 9: 7.8, rounded to 8."""
    counter = final(simulate(fedml, make_args()))["1.num_batches_tracked"]
    assert counter.dtype is torch.int64
    assert int(counter) == 8


def test_weight_decay_and_momentum_act(fedml: Any, make_args: MakeArgs) -> None:
    """FedML's SGD ignores both."""
    results = {
        name: fingerprint(final(simulate(fedml, make_args(comm_round=1, **options))))
        for name, options in {"plain": {}, "decay": {"weight_decay": 0.1}, "momentum": {"momentum": 0.9}}.items()
    }
    assert len(set(results.values())) == 3


def test_a_learning_rate_in_scientific_notation_is_a_number(fedml: Any, make_args: MakeArgs) -> None:
    args = make_args(learning_rate="1e-2", comm_round=1)
    simulate(fedml, args)
    assert args.learning_rate == 0.01


def test_the_same_seed_gives_the_same_run(fedml: Any, make_args: MakeArgs) -> None:
    runs = [simulate(fedml, make_args(random_seed=seed)) for seed in (3, 3, 4)]
    prints = [fingerprint(final(run)) for run in runs]
    assert prints[0] == prints[1] != prints[2]


def test_the_order_of_clients_changes_nothing_in_their_updates(fedml: Any, make_args: MakeArgs) -> None:
    seen: list[dict[int, str]] = []
    for order in ([0, 1, 2], [2, 0, 1]):
        args = make_args(comm_round=1)
        runner = fedml.FedMLRunner(args, torch.device("cpu"), silos(), network())
        simulation, updates = runner.runner, {}
        follow(simulation, [order])
        train = simulation.silos.train

        def spy(client: int, round_idx: int, weights: State, train: Any = train, updates: Any = updates) -> State:
            state: State = train(client, round_idx, weights)
            updates[client] = fingerprint(state)
            return state

        simulation.silos.train = spy
        runner.run()
        assert list(updates) == order
        seen.append(updates)
    assert seen[0] == seen[1]


def test_partial_participation_reaches_every_silo_and_follows_its_own_seed(fedml: Any, make_args: MakeArgs) -> None:
    args = make_args(client_num_per_round=1, comm_round=12, frequency_of_the_test=100)
    runner = fedml.FedMLRunner(args, torch.device("cpu"), silos(), network())
    drawn = [runner.runner.draw(round)[0] for round in range(12)]
    other = fedml.FedMLRunner(make_args(client_num_per_round=1, sampling_seed=5), "cpu", silos(), network())
    assert set(drawn) == {0, 1, 2}
    assert drawn != [other.runner.draw(round)[0] for round in range(12)]


def test_evaluation_follows_the_frequency(fedml: Any, make_args: MakeArgs) -> None:
    run = simulate(fedml, make_args(comm_round=4, frequency_of_the_test=3))
    # FedML evaluates rounds 0, 3, … and the last one (counted from 0).
    assert [record.metrics is not None for record in run.records] == [True, False, False, True]


def test_an_empty_silo_is_skipped_and_said_so(fedml: Any, make_args: MakeArgs) -> None:
    run = simulate(fedml, make_args(comm_round=1), silos((16, 0, 40)))
    assert run.records[0].notes == ["round 1: silo 1 has no samples and is skipped"]


def test_a_round_without_any_sample_is_an_error(fedml: Any, make_args: MakeArgs) -> None:
    with pytest.raises(UpdateError, match="none of the silos"):
        simulate(fedml, make_args(comm_round=1), silos((0, 0, 0)))


def test_a_nan_update_is_refused_by_name_and_the_round_goes_on(fedml: Any, make_args: MakeArgs) -> None:
    run = simulate(fedml, make_args(comm_round=1), poisoned(1))
    (note,) = run.records[0].notes
    assert note.startswith("round 1: the update of silo 1 is refused: 0.weight has NaN")
    assert all(torch.isfinite(v).all() for v in final(run).values())


def test_a_nan_update_ends_the_run_where_the_option_says_so(fedml: Any, make_args: MakeArgs) -> None:
    with pytest.raises(UpdateError, match="silo 1 is refused"):
        simulate(fedml, make_args(comm_round=1, nonfinite="fail"), poisoned(1))


def test_updates_are_aggregated_one_by_one_where_nothing_needs_them_together(
    fedml: Any, make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    alive: list[Any] = []
    most = 0
    add = WeightedMean.add

    def spy(self: WeightedMean, state: Any, weight: float) -> None:
        nonlocal most
        add(self, state, weight)
        alive.append(weakref.ref(state["0.weight"]))
        most = max(most, sum(ref() is not None for ref in alive))

    monkeypatch.setattr(WeightedMean, "add", spy)
    simulate(fedml, make_args(comm_round=1))
    assert most == 1


def test_buffers_are_kept_where_the_option_says_so(fedml: Any, make_args: MakeArgs) -> None:
    state = final(simulate(fedml, make_args(buffers="keep")))
    assert torch.equal(state["1.running_mean"], torch.zeros(16))
    assert int(state["1.num_batches_tracked"]) == 0


def test_wandb_is_used_only_when_asked_for(fedml: Any, make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    logged: list[Any] = []
    monkeypatch.setattr(wandb, "log", logged.append)
    simulate(fedml, make_args(comm_round=1))
    assert logged == []
    args = make_args(comm_round=1)
    args.enable_wandb = True
    simulate(fedml, args)
    assert logged[0]["round"] == 0
    assert 0 <= logged[0]["Test/Acc"] <= 1


def test_the_users_model_object_is_the_quantitative_copy(fedml: Any, make_args: MakeArgs) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    run = simulate(fedml, make_args(comm_round=1), model=model)
    assert run.model_trainer.model.quantitative is model
    assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    assert fingerprint(model.state_dict()) == fingerprint(final(run))  # what a script saves afterwards


def test_keeping_gates_changes_the_work_and_not_the_result(
    fedml: Any, make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsq_plugin.federation import client

    kept: list[Any] = []
    cache = client.GateCache
    monkeypatch.setattr(client, "GateCache", lambda dual, **how: kept.append(cache(dual, **how)) or kept[-1])
    results = [final(simulate(fedml, make_args(comm_round=3, keep_gates=k))) for k in (False, True)]
    torch.testing.assert_close(results[1], results[0])
    # 80 samples, once each; in the two rounds after the first they are known. Another cache is that of the dry run.
    assert (kept[-1].hits, kept[-1].misses) == (160, 80)


def test_no_update_left_names_the_reasons(fedml: Any, make_args: MakeArgs) -> None:
    data = silos((16,))
    data[5][0].dataset.tensors[0][0, 0] = float("nan")
    args = make_args(comm_round=1, client_num_in_total=1, client_num_per_round=1)
    with pytest.raises(UpdateError, match="no update is left to aggregate: round 1: the update of silo 0"):
        simulate(fedml, args, data)


def test_inputs_that_are_not_finite_are_said_before_the_first_round(
    fedml: Any, make_args: MakeArgs, caplog: pytest.LogCaptureFixture
) -> None:
    data = silos()
    data[5][0].dataset.tensors[0][:, 0] = float("nan")
    prepare(fedml, make_args(comm_round=1), data)
    assert "silo 0: the inputs of a batch have NaN or infinite values, and so has the loss" in caplog.text


def test_a_silo_without_a_loader_is_named_before_the_first_round(fedml: Any, make_args: MakeArgs) -> None:
    data = silos()
    data[5][1] = None
    with pytest.raises(ConfigError, match="silo 1 has 24 samples, and no loader of its training data"):
        prepare(fedml, make_args(comm_round=1), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "stackoverflow_lr"}, "is no classification task"),
        ({"enable_contribution": True}, "enable_contribution"),
    ],
)
def test_what_cannot_work_says_so_at_the_start(
    options: dict[str, Any], message: str, fedml: Any, make_args: MakeArgs
) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(fedml, make_args(**options))
