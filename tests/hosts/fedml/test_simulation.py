"""FedML's `sp`, for real: the life-cycle, the traps of FedML's own loop, and refusals."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
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

from .conftest import SECURITY, MakeArgs, final, network, silos, simulate


def test_fedsq_trains_and_keeps_its_structural_copy(fedml: Any, make_args: MakeArgs) -> None:
    model = network()
    start = fingerprint(model.state_dict())
    run = simulate(fedml, make_args(comm_round=5), model=model)
    assert isinstance(run.aggregator.model, DualCopy)
    assert fingerprint(run.aggregator.model.structural.state_dict()) == start
    assert fingerprint(run.model_trainer.model.structural.state_dict()) == start
    assert run.structural_fingerprint == start
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
        for name, options in {
            "plain": {},
            "decay": {"weight_decay": 0.1},
            "momentum": {"momentum": 0.9},
        }.items()
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
        simulation._client_sampling = lambda *_, order=order: order
        train = simulation.silos.train

        def spy(
            client: int, round_idx: int, weights: State, train: Any = train, updates: Any = updates
        ) -> State:
            state: State = train(client, round_idx, weights)
            updates[client] = fingerprint(state)
            return state

        simulation.silos.train = spy
        runner.run()
        seen.append(updates)
    assert seen[0] == seen[1]


def test_partial_participation_reaches_every_silo_and_follows_its_own_seed(
    fedml: Any, make_args: MakeArgs
) -> None:
    args = make_args(client_num_per_round=1, comm_round=12, frequency_of_the_test=100)
    runner = fedml.FedMLRunner(args, torch.device("cpu"), silos(), network())
    drawn = [runner.runner._client_sampling(r, 3, 1)[0] for r in range(12)]
    args.sampling_seed = 5
    other = fedml.FedMLRunner(make_args(client_num_per_round=1, sampling_seed=5), "cpu", silos(), network())
    assert set(drawn) == {0, 1, 2}
    assert drawn != [other.runner._client_sampling(r, 3, 1)[0] for r in range(12)]


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


def poisoned(client: int) -> list[Any]:
    data = silos()
    data[5][client].dataset.tensors[0][0, 0] = float("nan")
    return data


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


class Life:
    """Notes every call of the life-cycle."""

    def __init__(self, base: type, calls: list[str]) -> None:
        self.calls = calls
        self.cls = type(
            "Spy", (base,), {name: self.wrap(base, name) for name in NAMES if hasattr(base, name)}
        )

    def wrap(self, base: type, name: str) -> Any:
        def call(self_: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return getattr(base, name)(self_, *args, **kwargs)

        return call


NAMES = (
    *("set_id", "update_dataset", "set_model_params", "on_before_local_training", "train"),
    *("on_after_local_training", "get_model_params", "on_before_aggregation", "aggregate"),
    *("on_after_aggregation", "test_all", "test"),
)


def test_a_users_own_trainer_and_aggregator_live_the_whole_life(fedml: Any, make_args: MakeArgs) -> None:
    """FedML's own `sp` ignores both."""
    from fedml.ml.aggregator.default_aggregator import DefaultServerAggregator
    from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS

    args = make_args(comm_round=1, client_num_in_total=1, client_num_per_round=1)
    client: list[str] = []
    server: list[str] = []
    trainer = Life(ModelTrainerCLS, client).cls(network(), args)
    aggregator = Life(DefaultServerAggregator, server).cls(network(), args)
    run = simulate(fedml, args, silos((16,)), client_trainer=trainer, server_aggregator=aggregator)
    assert client == [
        *("set_id", "update_dataset", "set_model_params", "on_before_local_training", "train"),
        *("on_after_local_training", "get_model_params"),
        "set_model_params",  # the global model, at the end
    ]
    assert server == [
        *("set_id", "get_model_params", "on_before_aggregation", "aggregate", "on_after_aggregation"),
        *("set_model_params", "test_all", "test", "get_model_params"),
    ]
    assert isinstance(trainer.model, DualCopy)
    assert run.records[0].metrics is not None


def test_a_users_trainer_runs_under_fedmls_own_name_too(fedml: Any, make_args: MakeArgs) -> None:
    from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS

    args = make_args(federated_optimizer="FedAvg", comm_round=1)
    calls: list[str] = []
    trainer = Life(ModelTrainerCLS, calls).cls(network(), args)
    simulate(fedml, args, client_trainer=trainer)
    assert calls.count("train") == 3


def test_a_trainer_that_fedml_would_ignore_is_an_error(fedml: Any, make_args: MakeArgs) -> None:
    args = make_args(federated_optimizer="FedNova")
    with pytest.raises(ConfigError, match="FedNova ignores client_trainer"):
        fedml.FedMLRunner(args, "cpu", silos(), network(), client_trainer=object())


def test_user_hooks_see_all_updates_together(fedml: Any, make_args: MakeArgs) -> None:
    from fedsq_plugin.hosts.fedml.adapters import FedSQAggregator
    from fedsq_plugin.hosts.fedml.arguments import config_of
    from fedsq_plugin.run.plan import plan_of

    seen: list[int] = []

    class Mine(FedSQAggregator):
        def on_before_aggregation(self, raw: Any) -> Any:
            seen.append(len(raw))
            return super().on_before_aggregation(raw)

    args = make_args(comm_round=1)
    mine = Mine(network(), args, plan_of(config_of(args), network()))
    simulate(fedml, args, server_aggregator=mine)
    assert seen == [3]


def test_streaming_and_collected_aggregation_agree_bit_for_bit(
    fedml: Any, make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsq_plugin.hosts.fedml.adapters import FedSQAggregator

    streamed = fingerprint(final(simulate(fedml, make_args())))
    monkeypatch.setattr(FedSQAggregator, "streams", property(lambda self: False))
    assert fingerprint(final(simulate(fedml, make_args()))) == streamed


@pytest.mark.parametrize("name", SECURITY)
def test_fedmls_security_is_in_force_with_batch_normalisation(
    name: str, fedml: Any, make_args: MakeArgs, unsecured: Any
) -> None:
    sizes = (16, 16, 24, 24, 40)[: SECURITY[name].get("client_num_in_total", 3)]
    np.random.seed(0)
    plain = simulate(
        fedml,
        make_args(comm_round=1, **{k: v for k, v in SECURITY[name].items() if "client" in k}),
        silos(sizes),
    )
    secured = simulate(fedml, make_args(comm_round=1, **SECURITY[name]), silos(sizes))
    state = final(secured)
    assert fingerprint(state) != fingerprint(final(plain))
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())
    assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in network().state_dict().items()}
    assert (state["1.running_var"] >= 0).all()
    assert int(state["1.num_batches_tracked"]) == int(final(plain)["1.num_batches_tracked"])


def test_norm_clipping_bounds_the_update(fedml: Any, make_args: MakeArgs, unsecured: Any) -> None:
    before = network().state_dict()
    run = simulate(fedml, make_args(comm_round=1, **SECURITY["norm clipping"]))
    trained = [k for k, v in network().named_parameters()]
    moved = torch.cat([(final(run)[k] - before[k]).flatten() for k in trained]).norm()
    assert 0 < float(moved) <= 0.1 + 1e-6


BYZANTINE = {"enable_attack": True, "attack_type": "byzantine"}
DEFENDED, PRIVATE = {"enable_defense": True}, {"enable_dp": True, "epsilon": 0.9, "delta": 0.1}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({**DEFENDED, "defense_type": "weak_dp", "stddev": 1.0}, "weak_dp: FedML 0.9.6 knows it and never"),
        ({**PRIVATE, "dp_solution_type": "nbafl", "C": 1.0}, "nbafl: FedML 0.9.6 knows it and never"),
        ({**DEFENDED, "defense_type": "krun"}, "defense_type is 'krun'.*krum"),
        ({**DEFENDED}, "enable_defense is true, and defense_type is 'None'"),
        ({**BYZANTINE, "attack_type": "byzantin"}, "attack_type is 'byzantin'.*byzantine"),
        ({**BYZANTINE}, "FedMLAttacker cannot start: the option byzantine_client_num is missing"),
        ({**DEFENDED, "defense_type": "krum"}, "FedMLDefender cannot start: .*byzantine_client_num is miss"),
        (
            {**PRIVATE, "dp_solution_type": "cdp", "mechanism_type": "gaussian", "sensitivity": 1.0}
            | {"epsilon": 2.0},
            "FedMLDifferentialPrivacy cannot start: Epsilon cannot be greater than 1",
        ),
        (
            {**PRIVATE, "dp_solution_type": "cdp", "enable_rdp_accountant": True},
            "FedML 0.9.6's accountant",
        ),
    ],
)
def test_security_options_that_would_do_nothing_or_end_in_a_trace(
    options: dict[str, Any], line: str, fedml: Any, make_args: MakeArgs, unsecured: Any
) -> None:
    with pytest.raises(ConfigError, match=line):
        simulate(fedml, make_args(comm_round=1, **options))


def test_a_defence_that_fails_by_itself_is_an_error_of_the_round(
    fedml: Any, make_args: MakeArgs, unsecured: Any
) -> None:
    """FedML's coordinate-wise median miscounts where a model has BatchNorm."""
    args = make_args(comm_round=1, enable_defense=True, defense_type="wise_median")
    with pytest.raises(UpdateError, match="round 1: aggregating 3 updates failed: RuntimeError: shape"):
        simulate(fedml, args)


def test_an_update_that_a_defence_gives_no_weight_is_left_out() -> None:
    from fedsq_plugin.hosts.fedml.adapters import _mean

    states = [{"a": torch.tensor([value])} for value in (1.0, 100.0)]
    assert _mean(None, [(0.5, states[0]), (0.0, states[1])])["a"].tolist() == [1.0]


@pytest.mark.parametrize("sizes", [(16, 16, 16), (16, 24, 24)])
def test_what_fedmls_rfa_makes_of_silos_of_one_size_is_said(
    sizes: tuple[int, ...],
    fedml: Any,
    make_args: MakeArgs,
    unsecured: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It keeps one weight per count, so that the last silos have none, whatever they send."""
    results = []
    for seed in (0, 1):  # of the last silo's data alone
        data = silos(sizes)
        data[5][2] = silos(sizes, seed=seed)[5][2]
        results.append(final(simulate(fedml, make_args(comm_round=1, **SECURITY["rfa"]), data)))
    floats = [key for key, value in results[0].items() if value.is_floating_point()]
    assert all(torch.equal(results[0][key], results[1][key]) for key in floats)
    assert "defense_type rfa: FedML 0.9.6's own weighs silos by the set of their sample" in caplog.text


def test_privacy_of_one_run_does_not_reach_the_next(fedml: Any, make_args: MakeArgs, unsecured: Any) -> None:
    first = fingerprint(final(simulate(fedml, make_args(comm_round=1))))
    simulate(fedml, make_args(comm_round=1, **SECURITY["central privacy"]))
    assert fingerprint(final(simulate(fedml, make_args(comm_round=1)))) == first


def test_wandb_is_used_only_when_asked_for(
    fedml: Any, make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    # 80 samples, once each; in the two rounds after the first they are known.
    assert [(c.hits, c.misses) for c in kept] == [(160, 80)]


def test_a_nan_update_is_refused_for_a_users_aggregator_too(fedml: Any, make_args: MakeArgs) -> None:
    from fedml.ml.aggregator.default_aggregator import DefaultServerAggregator

    args = make_args(comm_round=1)
    run = simulate(fedml, args, poisoned(1), server_aggregator=DefaultServerAggregator(network(), args))
    assert "silo 1 is refused" in run.records[0].notes[0]
    assert all(torch.isfinite(v).all() for v in final(run).values())


def test_a_users_trainer_does_not_depend_on_the_order_of_clients(fedml: Any, make_args: MakeArgs) -> None:
    from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS

    seen = []
    for order in ([0, 1, 2], [2, 0, 1]):
        args = make_args(comm_round=1)
        trainer = ModelTrainerCLS(network(), args)
        runner = fedml.FedMLRunner(args, torch.device("cpu"), silos(), network(), client_trainer=trainer)
        runner.runner._client_sampling = lambda *_, order=order: order
        weights = {}
        train = runner.runner.silos.train

        def spy(
            client: int, round_idx: int, state: State, train: Any = train, weights: Any = weights
        ) -> State:
            weights[client] = train(client, round_idx, state)
            return weights[client]

        runner.runner.silos.train = spy
        runner.run()
        seen.append({client: fingerprint(state) for client, state in weights.items()})
    assert seen[0] == seen[1]


def test_a_users_aggregator_measures_by_its_own_test(fedml: Any, make_args: MakeArgs) -> None:
    """A regression: cross-entropy over classes would end in an error."""
    from fedml.ml.aggregator.default_aggregator import DefaultServerAggregator
    from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS

    class Trainer(ModelTrainerCLS):
        def train(self, train_data: Any, device: Any, args: Any) -> None:
            optimizer = torch.optim.SGD(self.model.parameters(), 0.01)
            for x, _ in train_data:
                optimizer.zero_grad()
                (self.model(x) - x[:, :3]).square().mean().backward()
                optimizer.step()

    class Aggregator(DefaultServerAggregator):
        def test(self, test_data: Any, device: Any, args: Any) -> Any:
            self.model.eval()
            with torch.no_grad():
                losses = [float((self.model(x) - x[:, :3]).square().mean()) for x, _ in test_data]
            return 0.25, sum(losses), None, None

    args = make_args(comm_round=1)
    parts = {"client_trainer": Trainer(network(), args), "server_aggregator": Aggregator(network(), args)}
    record = simulate(fedml, args, **parts).records[0]
    assert record.metrics.accuracy == 0.25
    assert record.released is None


def test_a_defence_with_too_few_updates_left_is_an_error_of_the_round(
    fedml: Any, make_args: MakeArgs, unsecured: Any
) -> None:
    data = silos((16, 16, 24, 24, 40))
    data[5][1].dataset.tensors[0][0, 0] = float("nan")
    with pytest.raises(UpdateError, match="round 1: aggregating 4 updates failed: byzantine_client_num"):
        simulate(fedml, make_args(comm_round=1, **SECURITY["krum"]), data)


def test_no_update_left_names_the_reasons(fedml: Any, make_args: MakeArgs) -> None:
    data = silos((16,))
    data[5][0].dataset.tensors[0][0, 0] = float("nan")
    args = make_args(comm_round=1, client_num_in_total=1, client_num_per_round=1)
    with pytest.raises(UpdateError, match="no update is left to aggregate: round 1: the update of silo 0"):
        simulate(fedml, args, data)


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
