"""A user's own trainer and aggregator, and subclasses of ours."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fedsq_plugin import DualCopy
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.state import State, fingerprint

from .conftest import (
    MODULES,
    PARAMETERS,
    MakeArgs,
    args_for,
    changed,
    final,
    follow,
    network,
    poisoned,
    prepare,
    silos,
    simulate,
    watch_rounds,
    watched,
)


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
def test_the_server_rule_needs_our_aggregator_alone(name: str, server: str, fedml: Any, make_args: MakeArgs) -> None:
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
def test_subclasses_of_ours_are_used_and_follow_the_algorithm(
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
    runner = prepare(*(fedml, args), model=model, server_aggregator=First(model, args, plan_of(config_of(args), model)))
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


# The whole life-cycle

NAMES = (
    *("set_id", "update_dataset", "set_model_params", "on_before_local_training", "train"),
    *("on_after_local_training", "get_model_params", "on_before_aggregation", "aggregate"),
    *("on_after_aggregation", "test_all", "test"),
)


class Life:
    """Notes every call of the life-cycle."""

    def __init__(self, base: type, calls: list[str]) -> None:
        self.calls = calls
        self.cls = type("Spy", (base,), {name: self.wrap(base, name) for name in NAMES if hasattr(base, name)})

    def wrap(self, base: type, name: str) -> Any:
        def call(self_: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return getattr(base, name)(self_, *args, **kwargs)

        return call


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
        follow(runner.runner, [order])
        weights = {}
        train = runner.runner.silos.train

        def spy(client: int, round_idx: int, state: State, train: Any = train, weights: Any = weights) -> State:
            weights[client] = train(client, round_idx, state)
            return weights[client]

        runner.runner.silos.train = spy
        runner.run()
        assert list(weights) == order
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
