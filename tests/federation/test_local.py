"""A silo's local update: what moves, what stays, and what it leaves as it was."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.augment import augment
from fedsq_plugin.federation.local import BatchError, Phase, Statistics, frozen_keys, local_update, trains
from fedsq_plugin.federation.roles import Role, roles
from fedsq_plugin.federation.seeding import isolated
from fedsq_plugin.federation.state import State, fingerprint, state_of
from fedsq_plugin.federation.task import cross_entropy
from fedsq_plugin.federation.training import LocalTraining

from .weight import ONE, Batches, Weight, half_square

ALL = frozenset(Role)


class Net(nn.Module):
    """A body, a norm, dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8, bias=False)  # the norm would undo a bias
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.relu(self.norm(self.body(x)))))


def net() -> Net:
    with isolated(0):
        return Net()


def shuffled(seed: int, samples: int = 24) -> DataLoader[tuple[Tensor, ...]]:
    with isolated(seed):
        data = TensorDataset(torch.randn(samples, 4), torch.randint(2, (samples,)))
    return DataLoader(data, batch_size=8, shuffle=True)


def updated(
    data: int = 0, seed: int = 0, phases: Sequence[Phase] = (Phase(2, ALL),), model: Net | None = None
) -> State:
    model = model or net()
    training = LocalTraining(learning_rate=0.1, momentum=0.9)
    local_update(model, shuffled(data), training, phases, roles(model, "head"), round=0, seed=seed)
    return state_of(model)


def moved(state: State) -> set[str]:
    start = net().state_dict()
    trained = dict(net().named_parameters())
    return {key for key in trained if not torch.equal(state[key], start[key])}


@pytest.mark.parametrize(
    ("trains", "expected"),
    [
        ({Role.HEAD}, {"head.weight", "head.bias"}),
        ({Role.BODY}, {"body.weight"}),
        ({Role.NORM_PARAMETER}, {"norm.weight", "norm.bias"}),
        ({Role.BODY, Role.NORM_PARAMETER}, {"body.weight", "norm.weight", "norm.bias"}),
    ],
    ids=["head", "body", "norm", "body and norm"],
)
def test_only_the_chosen_roles_move(trains: set[Role], expected: set[str]) -> None:
    assert moved(updated(phases=[Phase(2, frozenset(trains))])) == expected


def test_phases_follow_one_another() -> None:
    found = updated(phases=[Phase(1, frozenset({Role.HEAD})), Phase(1, frozenset({Role.BODY}))])
    assert moved(found) == {"head.weight", "head.bias", "body.weight"}


def test_frozen_parameter_stays_frozen_in_a_phase_of_its_role() -> None:
    model = net()
    model.body.weight.requires_grad_(False)
    assert "body.weight" not in moved(updated(model=model))


@pytest.mark.parametrize("fails", [False, True])
def test_requires_grad_is_put_back(fails: bool) -> None:
    model = net()
    model.body.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    phases = [Phase(1, frozenset({Role.HEAD}))]
    if fails:
        with pytest.raises(RuntimeError):
            local_update(
                model,
                [(torch.zeros(2, 99), torch.zeros(2))],
                LocalTraining(),
                phases,
                roles(model, "head"),
                round=0,
                seed=0,
            )
    else:
        updated(phases=phases, model=model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_model_is_left_without_gradients() -> None:
    model = net()
    cross_entropy(model(torch.randn(4, 4)), torch.zeros(4)).backward()
    updated(model=model)
    assert [p.grad for p in model.parameters()] == [None] * 5


def test_gradients_that_the_model_came_with_do_not_count() -> None:
    model = Weight()
    model.w.grad = torch.tensor(100.0, dtype=torch.float64)
    training = LocalTraining(learning_rate=0.5)
    local_update(model, ONE, training, [Phase(1, ALL)], roles(model), round=0, seed=0, loss=half_square)
    assert model.w.item() == 2.0


def test_model_is_trained_in_training_mode() -> None:
    model = net().eval()
    updated(model=model)
    # 24 samples by 8, twice.
    assert int(model.norm.num_batches_tracked) == 6


def test_client_order_changes_nothing() -> None:
    forward = {client: fingerprint(updated(client, seed=client)) for client in (1, 2, 3)}
    backward = {client: fingerprint(updated(client, seed=client)) for client in (3, 2, 1)}
    assert forward == backward


def test_global_generators_change_nothing() -> None:
    found = []
    for outside in (1, 2):
        random.seed(outside), np.random.seed(outside), torch.manual_seed(outside)
        found.append(fingerprint(updated()))
    assert found[0] == found[1]


def test_global_generators_are_left_alone() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = (random.random(), np.random.rand(), torch.rand(()).item())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    updated()
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_seed_matters() -> None:
    assert fingerprint(updated(seed=1)) != fingerprint(updated(seed=2))


def test_epochs_of_a_shuffled_loader_differ_in_order() -> None:
    orders: list[list[float]] = []
    model = net()
    loader = shuffled(0)
    model.register_forward_pre_hook(lambda _, args: orders.append(args[0][:, 0].tolist()))
    local_update(model, loader, LocalTraining(), [Phase(2, ALL)], roles(model), round=0, seed=0)
    first, second = (list(itertools.chain(*batches)) for batches in (orders[:3], orders[3:]))
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize(("batches", "epochs"), [([], 3), (ONE, 0)], ids=["no batch", "no epoch"])
def test_no_step_leaves_the_model_and_gives_a_nan_loss(batches: Batches, epochs: int) -> None:
    model = Weight()
    found = local_update(
        model, batches, LocalTraining(), [Phase(epochs, ALL)], roles(model), round=0, seed=0, loss=half_square
    )
    assert (found.steps, found.loss != found.loss, model.w.item()) == (0, True, 1.0)


def test_training_images_are_augmented() -> None:
    images = torch.arange(2.0 * 64).view(2, 1, 8, 8)
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    names = ("crop", "flip")
    local_update(
        model,
        [(images, torch.tensor([0, 1]))],
        LocalTraining(augmentation=names),
        [Phase(1, ALL)],
        roles(model),
        round=0,
        seed=5,
    )
    with isolated(5):
        expected = augment(images, names)
    assert torch.equal(seen[0], expected)


def test_model_that_returns_more_is_trained_on_its_prediction() -> None:
    class Twice(Weight):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"aux": -self.w * x, "out": self.w * x}

    model, training = Twice(), LocalTraining(learning_rate=0.5)
    local_update(model, ONE, training, [Phase(1, ALL)], roles(model), round=0, seed=0, loss=half_square)
    assert model.w.item() == 2.0


# Statistics of what is not trained


def statistics(state: State) -> list[float]:
    return [*state["norm.running_mean"].tolist(), int(state["norm.num_batches_tracked"])]


@pytest.mark.parametrize(
    ("roles_trained", "moves"),
    [
        ({Role.HEAD}, False),
        ({Role.BODY}, False),
        ({Role.BODY, Role.NORM_BUFFER}, False),
        ({Role.NORM_PARAMETER}, True),
        (set(ALL), True),
    ],
    ids=["head", "body", "body and buffers", "norm", "all"],
)
def test_statistics_move_with_their_layers_parameters(roles_trained: set[Role], moves: bool) -> None:
    found = statistics(updated(phases=[Phase(1, frozenset(roles_trained))]))
    assert (found != statistics(state_of(net()))) is moves


@pytest.mark.parametrize(("trained", "moves"), [(ALL, True), (ALL - {Role.NORM_BUFFER}, False)])
def test_statistics_of_a_layer_without_parameters_move_with_the_buffers(trained: frozenset[Role], moves: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2))
    local_update(model, shuffled(0), LocalTraining(), [Phase(1, trained)], roles(model), round=0, seed=0)
    assert (int(model[1].num_batches_tracked) > 0) is moves


def test_statistics_of_a_layer_that_the_model_came_with_frozen_stay() -> None:
    model = net()
    model.norm.requires_grad_(False)
    assert statistics(updated(model=model)) == statistics(state_of(net()))


def test_statistics_move_again_in_the_next_phase() -> None:
    # Three batches in the second phase alone.
    found = updated(phases=[Phase(1, frozenset({Role.HEAD})), Phase(1, ALL)])
    assert int(found["norm.num_batches_tracked"]) == 3


@pytest.mark.parametrize("path", ["norm", "n?rm", "nor*"])
def test_frozen_modules_statistics_stay(path: str) -> None:
    found = updated(phases=[Phase(1, ALL, (path,))])
    assert statistics(found) == statistics(state_of(net()))
    assert moved(found) == {"body.weight", "head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ((), set()),
        (("layer1",), {"layer1.0.weight", "layer1.bn.bias"}),
        (("layer1.0",), {"layer1.0.weight"}),
        (("layer1*",), {"layer1.0.weight", "layer1.bn.bias", "layer10.weight"}),
        (("layer?",), {"layer1.0.weight", "layer1.bn.bias"}),
        (("*.bn",), {"layer1.bn.bias"}),
        (("fc", "layer10"), {"fc.weight", "layer10.weight"}),
        (("c",), set()),
        (("LAYER1",), set()),
    ],
)
def test_keys_of_frozen_modules(patterns: tuple[str, ...], expected: set[str]) -> None:
    keys = ["layer1.0.weight", "layer1.bn.bias", "layer10.weight", "fc.weight"]
    assert frozen_keys(keys, patterns) == expected


def test_phase_without_parameters_names_what_it_wanted() -> None:
    model = Weight()
    with pytest.raises(ConfigError) as caught:
        local_update(model, ONE, LocalTraining(), [Phase(1, frozenset({Role.HEAD}))], roles(model), round=0, seed=0)
    assert str(caught.value) == "a phase that trains head finds no such parameter"


def test_phase_of_no_role_says_so() -> None:
    model = Weight()
    with pytest.raises(ConfigError, match="a phase that trains nothing finds"):
        local_update(model, ONE, LocalTraining(), [Phase(1, frozenset())], roles(model), round=0, seed=0)


# Sums instead of training


def counted(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: object) -> dict[str, Tensor]:
    return {"samples": torch.tensor(sum(len(x) for x, _ in batches))}


SUMS = Statistics(counted, lambda state, totals: state, lambda state: {})


def test_statistics_collect_sums_and_train_nothing() -> None:
    model = net()
    found = local_update(model, shuffled(0), LocalTraining(), [SUMS], roles(model), round=0, seed=0)
    assert (found.steps, found.loss != found.loss, found.sums) == (0, True, {"samples": torch.tensor(24)})
    assert fingerprint(state_of(model)) == fingerprint(state_of(net()))


def test_sums_beside_training() -> None:
    model = net()
    phases = [SUMS, Phase(1, ALL)]
    found = local_update(model, shuffled(0), LocalTraining(), phases, roles(model), round=0, seed=0)
    assert (found.steps, int(found.sums["samples"])) == (3, 24)


def test_sums_see_the_model_as_the_phase_before_left_it() -> None:
    model, seen = net(), []

    def look(model: nn.Module, batches: object, device: object) -> dict[str, Tensor]:
        seen.append(state_of(model))
        return {}

    parts = [Phase(1, ALL), Statistics(look, lambda state, totals: state, lambda state: {})]
    local_update(model, shuffled(0), LocalTraining(), parts, roles(model), round=0, seed=0)
    assert fingerprint(seen[0]) == fingerprint(state_of(model))


@pytest.mark.parametrize(
    ("parts", "expected"), [([], False), ([SUMS], False), ([Phase(0, ALL)], True), ([SUMS, Phase(1, ALL)], True)]
)
def test_whether_parts_train(parts: list[Phase | Statistics], expected: bool) -> None:
    assert trains(parts) is expected


def test_no_generator_is_left_changed_by_sums() -> None:
    def draw(model: nn.Module, batches: object, device: object) -> dict[str, Tensor]:
        return {"drawn": torch.rand(1)}

    found = []
    for outside in (1, 2):
        torch.manual_seed(outside)
        model = net()
        parts = [Statistics(draw, lambda state, totals: state, lambda state: {})]
        result = local_update(model, shuffled(0), LocalTraining(), parts, roles(model), round=0, seed=7)
        found.append(float(result.sums["drawn"]))
    assert found[0] == found[1]


# The model's forward


def test_own_forward_is_used_for_training() -> None:
    # The gradient of (2·w·x - 3)²/2 at w = 1 is 2·(2 - 3).
    model, training = Weight(), LocalTraining(learning_rate=0.5)
    local_update(
        model, ONE, training, [Phase(1, ALL)], roles(model),
        round=0, seed=0, loss=half_square, forward=lambda x: 2 * model(x),
    )  # fmt: skip
    assert model.w.item() == 2.0


def test_without_a_seed_the_draws_are_the_process_s() -> None:
    class Noisy(Weight):
        def forward(self, x: Tensor) -> Tensor:
            return self.w * x + torch.rand(1).double()

    def after(seed: int) -> float:
        model = Noisy()
        torch.manual_seed(seed)
        local_update(model, ONE, LocalTraining(), [Phase(1, ALL)], roles(model), round=0, seed=None, loss=half_square)
        return model.w.item()

    assert after(1) == after(1) != after(2)


def test_statistics_are_taken_from_the_data_where_batches_are_something_else() -> None:
    seen: list[Any] = []

    def collect(model: nn.Module, batches: Any, device: Any) -> dict[str, Tensor]:
        seen.append([inputs.item() for inputs, _ in batches])
        return {}

    model, part = Weight(), Statistics(collect, lambda state, sums: state, lambda state: {})
    for data in (None, [{"x": torch.tensor(value), "y": torch.tensor(0)} for value in (7.0, 8.0)]):
        local_update(model, ONE, LocalTraining(), [part], roles(model), round=0, seed=0, data=data)
    assert seen == [[ONE[0][0].item()], [7.0, 8.0]]


# What the model's own train() decides


class Keeps(Net):
    """Leaves some of its layers in evaluation mode."""

    def __init__(self, *kept: str) -> None:
        super().__init__()
        self.kept = kept

    def train(self, mode: bool = True) -> Keeps:
        super().train(mode)
        for path in self.kept:
            self.get_submodule(path).eval()
        return self


def keeps(*kept: str) -> Keeps:
    with isolated(0):
        return Keeps(*kept)


@pytest.mark.parametrize("kept", [("norm",), ("dropout",), ("norm", "dropout")])
def test_layers_that_the_model_keeps_in_evaluation_mode_stay_there(kept: tuple[str, ...]) -> None:
    found, naive = keeps(*kept), keeps(*kept)
    local_update(found, shuffled(0), LocalTraining(learning_rate=0.1), [Phase(2, ALL)], roles(found), round=0, seed=5)
    optimizer = torch.optim.SGD(naive.parameters(), 0.1)
    with isolated(5):
        naive.train()
        for _ in range(2):
            for x, labels in shuffled(0):
                optimizer.zero_grad()
                cross_entropy(naive(x), labels).backward()
                optimizer.step()
    assert fingerprint(state_of(found)) == fingerprint(state_of(naive))
    assert (int(found.norm.num_batches_tracked) == 0) is ("norm" in kept)


def test_kept_layer_stays_under_the_gates_of_a_dualcopy() -> None:
    model = DualCopy(keeps("norm"))
    local_update(model, shuffled(0), LocalTraining(), [Phase(1, ALL)], roles(model), round=0, seed=0)
    assert int(model.state_dict()["norm.num_batches_tracked"]) == 0


# A batch on which the model does not train


@pytest.mark.parametrize(
    ("model", "x", "said"),
    [
        (net(), torch.zeros(1, 4), r"a batch of the shape 1x4: Expected more than 1 value.*drop_last=True.*batch_size"),
        (net(), torch.zeros(3, 5), r"a batch of the shape 3x5: mat1 and mat2 shapes cannot be multiplied[^;]*$"),
        (
            nn.Sequential(nn.InstanceNorm2d(2, affine=True), nn.Flatten()),
            torch.zeros(2, 2, 1, 1),
            r"a batch of the shape 2x2x1x1: Expected more than 1 spatial element[^;]*$",
        ),
    ],
)
def test_batch_on_which_torch_cannot_train_is_one_line(model: nn.Module, x: Tensor, said: str) -> None:
    batches = [(x, torch.zeros(len(x)))]
    with pytest.raises(BatchError, match=said) as caught:
        local_update(model, batches, LocalTraining(), [Phase(1, ALL)], roles(model), round=0, seed=0)
    assert "\n" not in str(caught.value)
