"""A user's own trainer and aggregator: what they read in FedML's arguments, and what the server says of their work."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedsq_plugin.federation.state import fingerprint
from fedsq_plugin.federation.task import R2, SquaredError, Task
from fedsq_plugin.hosts.fedml.adapters import FedSQAggregator, FedSQTrainer
from fedsq_plugin.hosts.fedml.arguments import config_of
from fedsq_plugin.run.plan import plan_of

from . import naive
from .conftest import MakeArgs, final, network, silos, simulate
from .naive import KINDS, assert_same, net

HOOKS = ("on_before_local_training", "train", "on_after_local_training", "test")
SIDE = ("on_before_aggregation", "aggregate", "on_after_aggregation", "test_all", "test")


def listening(base: type, hooks: tuple[str, ...], seen: dict[str, set[str]]) -> Any:
    """A class derived from one of FedML's, whose hooks write down which algorithm they read."""

    def hook(name: str) -> Any:
        def listen(self: Any, *given: Any) -> Any:
            seen.setdefault(name, set()).add(self.args.federated_optimizer)
            return getattr(base, name)(self, *given)

        return listen

    def init(self: Any, model: Any, args: Any) -> None:
        seen.setdefault("__init__", set()).add(args.federated_optimizer)
        base.__init__(self, model, args)  # type: ignore[misc]

    return type("Listening", (base,), {**{name: hook(name) for name in hooks}, "__init__": init})


@pytest.mark.parametrize("name", ["FedSQ", "FedAvg"])
def test_user_code_reads_the_algorithm_of_the_recipe_and_fedml_aggregates(
    name: str, fedml: Any, make_args: MakeArgs
) -> None:
    """FedML's own operator, which its aggregator calls, knows no FedSQ."""
    from fedml.ml.aggregator.default_aggregator import DefaultServerAggregator
    from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS

    args = make_args(federated_optimizer=name)
    for _ in range(2):  # the second run makes its parts when the first one is over
        seen: dict[str, set[str]] = {}
        model = network()
        trainer = listening(ModelTrainerCLS, HOOKS, seen)(model, args)
        aggregator = listening(DefaultServerAggregator, SIDE, seen)(model, args)
        run = simulate(fedml, args, silos(), model, client_trainer=trainer, server_aggregator=aggregator)
        assert set(HOOKS[:3]) | set(SIDE) | {"__init__"} <= seen.keys()
        assert set.union(*seen.values()) == {name}
        assert args.federated_optimizer == name
        alone = network()
        ours = simulate(fedml, args, silos(), alone, client_trainer=ModelTrainerCLS(alone, args))
        for key, value in final(ours).items():
            if value.is_floating_point():  # FedML's mean of counters is a fraction
                torch.testing.assert_close(final(run)[key], value, rtol=1e-5, atol=1e-6)


def test_fedmls_operator_sees_the_real_name_where_fedml_runs(fedml: Any, make_args: MakeArgs) -> None:
    """FedML sums what it calls FedAvg_seq."""
    from fedml.core import FedMLAggOperator

    args = make_args()
    simulate(fedml, args)
    one = [(1, {"w": torch.ones(1)}), (3, {"w": torch.ones(1)})]
    assert float(FedMLAggOperator.agg(args, list(one))["w"]) == 1
    args.federated_optimizer = "FedAvg_seq"
    one = [(1, {"w": torch.ones(1)}), (3, {"w": torch.ones(1)})]
    assert float(FedMLAggOperator.agg(args, list(one))["w"]) == 2


def own_loss(model: nn.Module, loss: Any) -> Any:
    from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS

    class Trainer(ModelTrainerCLS):  # type: ignore[misc]
        def train(self, train_data: Any, device: Any, args: Any) -> None:
            optimizer = torch.optim.SGD(self.model.train().parameters(), args.learning_rate)
            for x, y in train_data:
                optimizer.zero_grad()
                loss(self.model(x), y).backward()
                optimizer.step()

    return Trainer(model, None)


def eight(target: Any, outputs: int) -> list[Any]:
    """FedML's 8-tuple of points and what `target` makes of them."""
    generator = torch.Generator().manual_seed(3)

    def batches(samples: int) -> DataLoader[Any]:
        points = torch.randn(samples, 6, generator=generator)
        return DataLoader(TensorDataset(points, target(points)), batch_size=8)

    train, test = {silo: batches(size) for silo, size in enumerate((16, 24, 40))}, batches(24)
    sizes = {silo: len(loader.dataset) for silo, loader in train.items()}  # type: ignore[arg-type]
    return [80, 24, train[0], test, sizes, train, dict.fromkeys(train, test), outputs]


def of_outputs(count: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, count))


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs.reshape(targets.shape), targets.float())


def three(points: Tensor) -> Tensor:
    return points[:, :3].argmax(1)


UNTOLD = {
    "real targets": (lambda x: x.sum(1), 1, 1, mse, r"outputs \(8, 1\) and labels \(8,\)|no class numbers"),
    "targets of several values": (lambda x: x[:, :3], 3, 3, mse, r"outputs \(8, 3\) and labels \(8, 3\)"),
    "whole numbers by one output": (lambda x: three(x), 1, 3, mse, "label 2 is beyond the model's 1 outputs"),
    "an autoencoder beside labels": (
        three, 6, 3, lambda outputs, labels: outputs.square().mean(), "6 outputs, and the data set 3 classes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(UNTOLD))
@pytest.mark.parametrize("algorithm", ["FedAvg", "FedSQ"])
def test_the_server_has_no_figures_of_a_task_that_it_cannot_tell(
    algorithm: str, name: str, fedml: Any, make_args: MakeArgs
) -> None:
    target, outputs, classes, loss, reason = UNTOLD[name]
    model = of_outputs(outputs)
    before = fingerprint(model.state_dict())
    runner = fedml.FedMLRunner(
        make_args(federated_optimizer=algorithm), torch.device("cpu"), eight(target, classes), model,
        client_trainer=own_loss(model, loss),
    )  # fmt: skip
    records: list[Any] = []
    runner.runner.on_round = records.append
    runner.run()
    assert [record.metrics for record in records] == [None, None]
    assert fingerprint(final(runner.runner)) != before
    (note,) = [note for note in runner.notes if "figures" in note]
    assert re.search(reason, note), note
    assert note.endswith("pass a server_aggregator with a test of your own")


def test_a_classification_by_a_trainer_of_ones_own_keeps_its_accuracy(fedml: Any, make_args: MakeArgs) -> None:
    model, data = of_outputs(3), eight(three, 3)
    run = simulate(
        fedml, make_args(federated_optimizer="FedAvg", comm_round=3), data, model,
        client_trainer=own_loss(model, nn.functional.cross_entropy),
    )  # fmt: skip
    points, labels = data[3].dataset.tensors
    right = float((run.aggregator.model.eval()(points).argmax(1) == labels).double().mean())
    assert run.records[-1].metrics.accuracy == pytest.approx(right)


def test_a_trainer_derived_from_ours_with_a_loss_of_its_own_is_told_apart(fedml: Any, make_args: MakeArgs) -> None:
    class Derived(FedSQTrainer):
        def train(self, train_data: Any, device: Any, args: Any) -> None:
            own_loss(self.model, mse).train(train_data, device, args)

    args, model = make_args(federated_optimizer="FedAvg"), of_outputs(1)
    trainer = Derived(model, args, plan_of(config_of(args), model))
    run = simulate(fedml, args, eight(lambda x: x.sum(1), 1), model, client_trainer=trainer)
    assert run.records[-1].metrics is None


def test_the_true_error_stands_where_the_user_passes_an_aggregator(fedml: Any, make_args: MakeArgs) -> None:
    from fedml.ml.aggregator.default_aggregator import DefaultServerAggregator

    class Aggregator(DefaultServerAggregator):  # type: ignore[misc]
        def test(self, test_data: Any, device: Any, args: Any) -> Any:
            (points, targets) = test_data.dataset.tensors
            return math.nan, mse(self.model.eval()(points), targets).item(), None, None

    args, model, data = make_args(federated_optimizer="FedAvg"), of_outputs(1), eight(lambda x: x.sum(1), 1)
    parts = {"client_trainer": own_loss(model, mse), "server_aggregator": Aggregator(model, args)}
    run = simulate(fedml, args, data, model, **parts)
    points, targets = data[3].dataset.tensors
    loss, accuracy, _ = run.records[-1].metrics
    assert loss == pytest.approx(mse(run.aggregator.model.eval()(points), targets).item())
    assert math.isnan(accuracy)


def test_batches_that_only_the_users_trainer_reads_have_no_figures(fedml: Any, make_args: MakeArgs) -> None:
    def three_parts(batch: Any) -> Any:
        points, labels = torch.utils.data.default_collate(batch)
        return points, labels, torch.ones(len(points))

    data, model = eight(three, 3), of_outputs(3)
    for loader in {id(one): one for one in (*data[5].values(), data[3])}.values():
        loader.collate_fn = three_parts

    trainer = own_loss(model, nn.functional.cross_entropy)
    trainer.train = lambda *_: None
    runner = fedml.FedMLRunner(
        make_args(federated_optimizer="FedAvg"), torch.device("cpu"), data, model, client_trainer=trainer
    )
    runner.run()
    assert any("the server reports no figures" in note and "a batch is" in note for note in runner.notes)


def ignoring(points: Tensor) -> Tensor:
    return torch.where(points[:, 5] > 0, three(points), 255)


def known_cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels, ignore_index=255)


@pytest.mark.parametrize("which", ["client_trainer", "server_aggregator"])
@pytest.mark.parametrize("kind", ["several labels", "real values", "probabilities"])
def test_parts_derived_from_ours_follow_the_task_that_the_labels_tell(
    kind: str, which: str, fedml: Any, make_args: MakeArgs
) -> None:
    """They are made before anything has seen the data."""
    known = KINDS[kind]
    args, model = make_args(federated_optimizer="FedAvg", own_algorithms=True), net(known.outputs)
    base: type[Any] = {"client_trainer": FedSQTrainer, "server_aggregator": FedSQAggregator}[which]
    part = type("Derived", (base,), {})(model, args, plan_of(config_of(args), model))
    sets = naive.points(known.label)
    run = simulate(fedml, args, naive.eight(sets, known.outputs), model, **{which: part})
    assert_same(final(run), naive.of_sets(net(known.outputs), sets, known.over))
    x, y = sets[1].tensors
    with torch.no_grad():
        right = known.figures(run.aggregator.model.eval()(x), y)
    assert run.records[-1].metrics[:2] == pytest.approx(right, rel=1e-5)


def test_a_task_of_the_plan_that_a_trainer_of_ours_was_made_with_is_that_of_the_run(
    fedml: Any, make_args: MakeArgs
) -> None:
    """Zero and one beside one output, of which the labels tell no task."""
    args, model = make_args(federated_optimizer="FedAvg", own_algorithms=True), net(1)
    kind = KINDS["real values"]._replace(label=lambda x: (x[:, 0] > 0).float())
    sets, plan = naive.points(kind.label), plan_of(config_of(args), model, Task(SquaredError(), R2()))
    run = simulate(fedml, args, naive.eight(sets, 1), model, client_trainer=FedSQTrainer(model, args, plan))
    assert_same(final(run), naive.of_sets(net(1), sets, kind.over))
    x, y = sets[1].tensors
    with torch.no_grad():
        assert run.records[-1].metrics[:2] == pytest.approx(kind.figures(run.aggregator.model.eval()(x), y), rel=1e-5)


def test_ignored_labels_count_nowhere_where_ones_own_trainer_trains(fedml: Any, make_args: MakeArgs) -> None:
    model, data = of_outputs(3), eight(ignoring, 3)
    args = make_args(federated_optimizer="FedAvg", ignore_index=255)
    run = simulate(fedml, args, data, model, client_trainer=own_loss(model, known_cross_entropy))
    points, labels = data[3].dataset.tensors
    outputs, known = run.aggregator.model.eval()(points).detach(), labels != 255
    right = float((outputs.argmax(1) == labels)[known].double().mean())
    expected = (float(known_cross_entropy(outputs, labels)), right, int(known.sum()))
    assert run.records[-1].metrics == pytest.approx(expected)


def test_minus_a_hundred_is_a_label_where_another_one_is_ignored(fedml: Any, make_args: MakeArgs) -> None:
    model, data = of_outputs(3), eight(lambda x: torch.where(x[:, 5] > 0, three(x), -100), 3)
    args = make_args(federated_optimizer="FedAvg", ignore_index=255)
    run = simulate(fedml, args, data, model, client_trainer=own_loss(model, nn.functional.cross_entropy))
    assert run.records[-1].metrics is None
