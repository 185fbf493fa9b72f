"""One client's training in one round, against steps worked out by hand."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedsq_plugin.algorithms.fedprox import proximal
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.augment import augment
from fedsq_plugin.federation.local import LocalResult, Phase, Statistics, frozen_keys, local_update, trains
from fedsq_plugin.federation.roles import Role, roles
from fedsq_plugin.federation.seeding import isolated
from fedsq_plugin.federation.state import State, fingerprint, state_of
from fedsq_plugin.federation.task import cross_entropy
from fedsq_plugin.federation.training import LocalTraining, OptimizerTraining
from tests.algorithms.task import AllOptions

ALL = frozenset(Role)
Batches = Sequence[tuple[Tensor, Tensor]]


class Weight(nn.Module):
    """One parameter w, 1 at the start; the output is w·x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).mean() / 2


# With x = 1 and target 3 the loss is (w - 3)²/2 and its gradient w - 3.
ONE: Batches = [(torch.ones(1, dtype=torch.float64), torch.full((1,), 3.0, dtype=torch.float64))]


def weight_after(training: LocalTraining, *epochs: int, round: int = 0, mu: float | None = None) -> float:
    """w after one phase per entry of `epochs`, of one step per epoch."""
    model = Weight()
    phases = [Phase(count, ALL) for count in epochs]
    objective = None if mu is None else proximal(AllOptions(fedprox_mu=mu))
    local_update(model, ONE, training, phases, roles(model), round=round, seed=0, objective=objective, loss=half_square)
    return model.w.item()


def test_plain_sgd_step() -> None:
    # 1 - 0.5·(1 - 3)
    assert weight_after(LocalTraining(learning_rate=0.5), 1) == 2.0


def test_weight_decay_is_added_to_the_gradient() -> None:
    # g = (1 - 3) + 0.1·1 = -1.9; w = 1 + 0.5·1.9
    assert weight_after(LocalTraining(learning_rate=0.5, weight_decay=0.1), 1) == pytest.approx(1.95)


def test_momentum_and_weight_decay_over_two_steps() -> None:
    # Step 1: g = -2 + 0.1 = -1.9, v = -1.9, w = 1 + 0.95 = 1.95.
    # Step 2: g = -1.05 + 0.195 = -0.855, v = 0.9·(-1.9) - 0.855 = -2.565, w = 1.95 + 1.2825.
    training = LocalTraining(learning_rate=0.5, momentum=0.9, weight_decay=0.1)
    assert weight_after(training, 2) == pytest.approx(3.2325, rel=1e-12)


def test_nesterov_momentum_over_two_steps() -> None:
    # Step 1: g = v = -2, d = -2 + 0.9·(-2) = -3.8, w = 1 + 1.9 = 2.9.
    # Step 2: g = -0.1, v = 0.9·(-2) - 0.1 = -1.9, d = -0.1 + 0.9·(-1.9) = -1.81, w = 2.9 + 0.905.
    training = LocalTraining(learning_rate=0.5, momentum=0.9, nesterov=True)
    assert weight_after(training, 2) == pytest.approx(3.805, rel=1e-12)


def test_every_phase_has_a_fresh_optimizer() -> None:
    # Step 1: w = 1 + 0.5·2 = 2. Step 2 without the momentum of step 1: 2 + 0.5·1; with it, 3.4.
    assert weight_after(LocalTraining(learning_rate=0.5, momentum=0.9), 1, 1) == 2.5


def test_every_round_has_a_fresh_optimizer() -> None:
    model, training = Weight(), LocalTraining(learning_rate=0.5, momentum=0.9)
    for round in range(2):
        phases = [Phase(1, ALL)]
        local_update(model, ONE, training, phases, roles(model), round=round, seed=0, loss=half_square)
    assert model.w.item() == 2.5


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_and_adamw_follow_a_plain_torch_loop(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    expected = copy.deepcopy(model)
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0])) for _ in range(3)]
    training = LocalTraining(client_optimizer=name, learning_rate=0.05, weight_decay=0.1)  # type: ignore[arg-type]
    local_update(model, batches, training, [Phase(2, ALL)], roles(model), round=0, seed=0)
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    optimizer = cls(expected.parameters(), lr=0.05, weight_decay=0.1)
    for x, labels in batches * 2:
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(x), labels).backward()
        optimizer.step()
    assert fingerprint(state_of(model)) == fingerprint(state_of(expected))


def test_adam_and_adamw_decay_differently() -> None:
    # Adam's first step is lr·sign(g): 1 + 0.1 with or without decay. AdamW shrinks w by lr·decay first:
    # 1·(1 - 0.1·0.5) + 0.1.
    kwargs = {"learning_rate": 0.1, "weight_decay": 0.5}
    found = [weight_after(LocalTraining(client_optimizer=name, **kwargs), 1) for name in ("adam", "adamw")]  # type: ignore[arg-type]
    assert found == pytest.approx([1.1, 1.05], rel=1e-6)


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        (LocalTraining(learning_rate=0.2), [0.2, 0.2, 0.2, 0.2]),
        # 0.2·(1 + cos(πr/4))/2 for r = 0 … 3; cos(π/4) = 0.70710678
        (
            LocalTraining(learning_rate=0.2, lr_schedule="cosine", comm_round=4),
            [0.2, 0.170710678, 0.1, 0.029289322],
        ),
        (
            LocalTraining(learning_rate=0.8, lr_schedule="step", lr_decay=0.5, lr_decay_rounds=2),
            [0.8, 0.8, 0.4, 0.4],
        ),
    ],
    ids=["constant", "cosine", "step"],
)
def test_schedule_over_rounds(training: LocalTraining, expected: list[float]) -> None:
    assert [training.rate(round) for round in range(4)] == pytest.approx(expected, rel=1e-7)


def test_step_is_taken_at_the_rounds_rate() -> None:
    # Round 2 of 4: rate 0.5·(1 + cos(π/2))/2 = 0.25, so 1 + 0.25·2.
    training = LocalTraining(learning_rate=0.5, lr_schedule="cosine", comm_round=4)
    assert weight_after(training, 1, round=2) == pytest.approx(1.5, rel=1e-12)


def gradient_step(clip_norm: float | None) -> list[float]:
    """A step of rate 1 from w = 0 against the gradient (3, 4), whose norm is 5."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    batches = [(torch.tensor([[3.0, 4.0]]), torch.zeros(1))]
    training = LocalTraining(learning_rate=1.0, clip_norm=clip_norm)
    local_update(
        model,
        batches,
        training,
        [Phase(1, ALL)],
        roles(model),
        round=0,
        seed=0,
        loss=lambda output, _: output.sum(),
    )
    return list(model.weight[0].tolist())


def test_gradient_above_the_bound_is_scaled_to_it() -> None:
    # (3, 4)·1/5; torch adds 1e-6 to the norm.
    assert gradient_step(1.0) == pytest.approx([-0.6, -0.8], rel=1e-6)


@pytest.mark.parametrize("bound", [10.0, None])
def test_gradient_below_the_bound_is_left_alone(bound: float | None) -> None:
    assert gradient_step(bound) == [-3.0, -4.0]


class Two(nn.Module):
    """Two parameters, 0 at the start; the output's gradient is 3 and 4 for them, whatever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.a + 4 * self.b + x


def two_after(*phases: Phase) -> list[float]:
    model, batches = Two(), [(torch.zeros(1), torch.zeros(1))]
    training, known = LocalTraining(learning_rate=1.0, clip_norm=1.0), {"a": Role.BODY, "b": Role.HEAD}
    local_update(model, batches, training, phases, known, round=0, seed=0, loss=lambda output, _: output.sum())
    return [model.a.item(), model.b.item()]


def test_bound_holds_for_the_norm_over_all_trained_parameters() -> None:
    # (3, 4)·1/5
    assert two_after(Phase(1, ALL)) == pytest.approx([-0.6, -0.8], rel=1e-6)


def test_bound_does_not_count_what_an_earlier_phase_trained() -> None:
    # Each alone is clipped to 1; counting the head's gradient of the first phase, a would be -0.6.
    phases = [Phase(1, frozenset({role})) for role in (Role.HEAD, Role.BODY)]
    assert two_after(*phases) == pytest.approx([-1.0, -1.0], rel=1e-6)


def test_proximal_term_over_two_steps() -> None:
    # μ = 0.5, from w_global = 1. Step 1: g = (1 - 3) + 0.5·0 = -2, w = 2.
    # Step 2: g = (2 - 3) + 0.5·(2 - 1) = -0.5, w = 2.25.
    assert weight_after(LocalTraining(learning_rate=0.5), 2, mu=0.5) == 2.25


def test_proximal_term_of_a_second_phase_holds_to_the_start_of_the_round() -> None:
    # The same two steps in two phases: held to the second phase's own start, w would be 2.5.
    assert weight_after(LocalTraining(learning_rate=0.5), 1, 1, mu=0.5) == 2.25


def test_without_mu_the_proximal_term_changes_nothing() -> None:
    training = LocalTraining(learning_rate=0.5)
    assert weight_after(training, 2, mu=0.0) == weight_after(training, 2)


def test_loss_is_the_mean_over_steps_without_the_proximal_term() -> None:
    # Before the steps above: (1 - 3)²/2 = 2 and (2 - 3)²/2 = 0.5.
    model, training = Weight(), LocalTraining(learning_rate=0.5)
    found = local_update(
        model, ONE, training, [Phase(2, ALL)], roles(model),
        round=0, seed=0, objective=proximal(AllOptions(fedprox_mu=0.5)), loss=half_square,
    )  # fmt: skip
    assert found == LocalResult(steps=2, loss=1.25, sums={})


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
        model,
        batches,
        LocalTraining(),
        [Phase(epochs, ALL)],
        roles(model),
        round=0,
        seed=0,
        loss=half_square,
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
    ("parts", "expected"),
    [([], False), ([SUMS], False), ([Phase(0, ALL)], True), ([SUMS, Phase(1, ALL)], True)],
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


# Factors of the learning rate


def factored(factor: float, optimizer: str = "sgd", decay: float = 0.0, **kwargs: float) -> list[float]:
    """Two weights at 1 whose gradient is 1, the second with a factor, after a step of rate 0.1."""
    model = nn.ParameterDict({"a": nn.Parameter(torch.ones(())), "b": nn.Parameter(torch.ones(()))})
    net = Both(model)
    training = LocalTraining(client_optimizer=optimizer, learning_rate=0.1, weight_decay=decay, **kwargs)  # type: ignore[arg-type]
    local_update(
        net, [(torch.zeros(1), torch.zeros(1))], training, [Phase(1, ALL)], roles(net),
        round=0, seed=0, loss=lambda output, _: output.sum(), factors={"weights.b": factor},
    )  # fmt: skip
    return [model["a"].item(), model["b"].item()]


class Both(nn.Module):
    def __init__(self, weights: nn.ParameterDict) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        return self.weights["a"] + self.weights["b"] + x


def test_factor_of_the_learning_rate() -> None:
    # 1 - 0.1·1 and 1 - 0.1·5·1
    assert factored(5.0) == pytest.approx([0.9, 0.5])


def test_factor_one_changes_nothing() -> None:
    assert factored(1.0, decay=0.5) == pytest.approx([0.85, 0.85])


def test_factor_comes_without_weight_decay() -> None:
    # 1 - 0.1·(1 + 0.5·1) and 1 - 0.1·5·1
    assert factored(5.0, decay=0.5) == pytest.approx([0.85, 0.5])


def test_factor_of_adams_step() -> None:
    # Adam's first step is the rate, whatever the gradient.
    assert factored(3.0, "adam") == pytest.approx([0.9, 0.7], rel=1e-5)


# The model's forward


def test_own_forward_is_used_for_training() -> None:
    # The gradient of (2·w·x - 3)²/2 at w = 1 is 2·(2 - 3).
    model, training = Weight(), LocalTraining(learning_rate=0.5)
    local_update(
        model, ONE, training, [Phase(1, ALL)], roles(model),
        round=0, seed=0, loss=half_square, forward=lambda x: 2 * model(x),
    )  # fmt: skip
    assert model.w.item() == 2.0


# Precision


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def _points(batches: int = 3) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 6, generator=generator), torch.randint(3, (5,), generator=generator)) for _ in range(batches)
    ]


def _trained(model: nn.Module, **options: Any) -> Any:
    training = LocalTraining(learning_rate=0.1, **options)
    phase = Phase(1, frozenset(Role))
    return local_update(model, _points(), training, [phase], roles(model), round=0, seed=0)


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize(("precision", "dtype", "scale"), [("bf16", torch.bfloat16, 1), ("fp16", torch.float16, 1024)])
def test_half_precision_follows_a_plain_torch_loop(
    precision: Any, dtype: torch.dtype, scale: int, clip_norm: float | None
) -> None:
    model, plain = _network(), _network()
    result = _trained(model, precision=precision, clip_norm=clip_norm)
    for x, labels in _points():
        plain.zero_grad()
        with torch.autocast("cpu", dtype):
            output = plain(x)
        (scale * torch.nn.functional.cross_entropy(output.float(), labels)).backward()
        for p in plain.parameters():
            p.grad /= scale
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
        with torch.no_grad():
            for p in plain.parameters():
                p -= 0.1 * p.grad
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert (result.steps, result.lost) == (3, 0)


def test_precisions_differ() -> None:
    # Otherwise the test above could not fail.
    models = {precision: _network() for precision in ("fp32", "bf16", "fp16")}
    for precision, model in models.items():
        _trained(model, precision=precision)
    weights = [next(model.parameters()) for model in models.values()]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_step_that_overflows_in_fp16_is_lost_and_counted() -> None:
    # 1024·1e4 is beyond fp16's 65504; at the scale 512·1e4, 256·1e4 too: all three steps are lost.
    model = _network()
    before = [p.detach().clone() for p in model.parameters()]
    training = LocalTraining(learning_rate=0.1, precision="fp16")

    def steep(output: Tensor, labels: Tensor) -> Tensor:
        return 1e4 * output.sum()

    phase = Phase(1, frozenset(Role))
    result = local_update(model, _points(), training, [phase], roles(model), round=0, seed=0, loss=steep)
    assert (result.steps, result.lost) == (3, 3)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_the_scale_of_one_update_is_not_the_next_ones() -> None:
    first, second = _network(), _network()
    _trained(first, precision="fp16")
    _trained(_network(), precision="fp16")
    _trained(second, precision="fp16")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def two_rounds(training: LocalTraining, keep: bool) -> float:
    model, kept = Weight(), {}
    for round in range(2):
        local_update(
            model, ONE, training, [Phase(1, ALL)], roles(model), round=round, seed=0, loss=half_square,
            optimizers=kept if keep else None,
        )  # fmt: skip
    return model.w.item()


def test_an_optimizer_that_is_kept_goes_on_with_its_momentum() -> None:
    # Step 1: v = -2, w = 1 + 0.5·2 = 2. Step 2: g = -1; v = 0.5·(-2) - 1 = -2, w = 3; anew: w = 2.5.
    training = LocalTraining(learning_rate=0.5, momentum=0.5)
    assert two_rounds(training, keep=True) == 3.0
    assert two_rounds(training, keep=False) == 2.5


def test_optimizers_are_kept_apart_by_what_they_train() -> None:
    model, kept = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), {}
    phases = [Phase(1, frozenset({Role.HEAD})), Phase(1, frozenset({Role.BODY}))]
    batches = [(torch.ones(2, 1), torch.ones(2, 1))]
    for round in range(2):
        local_update(
            model, batches, LocalTraining(), phases, roles(model, "1"), round=round, seed=0,
            loss=half_square, optimizers=kept,
        )  # fmt: skip
    assert list(kept) == [("1.weight", "1.bias"), ("0.weight", "0.bias")]


def test_an_optimizer_class_is_called_with_the_rate_and_its_own_defaults() -> None:
    # Adagrad's first step is the rate times the sign of the gradient, whatever its size.
    assert weight_after(OptimizerTraining(optimizer=torch.optim.Adagrad, learning_rate=0.25), 1) == pytest.approx(1.25)
    decayed = weight_after(OptimizerTraining(optimizer=torch.optim.AdamW, learning_rate=0.1, weight_decay=0.5), 1)
    assert decayed == pytest.approx(1 - 0.1 * 0.01 + 0.1)  # AdamW's own decay, 0.01


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
        seen.append(batches)
        return {}

    model, part = Weight(), Statistics(collect, lambda state, sums: state, lambda state: {})
    for data in (None, ["all"]):
        local_update(model, ONE, LocalTraining(), [part], roles(model), round=0, seed=0, data=data)
    assert seen == [ONE, ["all"]]


def test_every_step_is_reported_with_its_loss() -> None:
    model, losses = Weight(), []
    local_update(
        model, ONE, LocalTraining(learning_rate=0.5), [Phase(2, ALL)], roles(model), round=0, seed=0,
        loss=half_square, on_step=lambda loss: losses.append(loss.item()),
    )  # fmt: skip
    assert losses == [2.0, 0.5]  # (1 - 3)²/2, then (2 - 3)²/2
