"""ReLU-isation at the server: schedule by hand, the procedure on real digits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.dualcopy.smooth import GATES, LambdaActivation, target_lambda
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.evaluate import evaluate
from fedsq_plugin.federation.local import Phase, local_update
from fedsq_plugin.federation.roles import Role, roles
from fedsq_plugin.federation.state import fingerprint
from fedsq_plugin.federation.training import LocalTraining
from fedsq_plugin.run.reluise import Reluised, lambda_at, relu_ise
from fedsq_plugin.settings.config import validated
from fedsq_plugin.settings.warm_start import Hardening

# Schedule


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 1 + 80·(1/4, 2/4, 3/4, 1)
        ("linear", [21.0, 41.0, 61.0, 81.0]),
        # 81^(1/4, 2/4, 3/4, 1)
        ("geometric", [3.0, 9.0, 27.0, 81.0]),
        # 1 + 80·(1 − cos(πp))/2; cos(π/4) = 0.70710678
        ("cosine", [12.7157288, 41.0, 69.2842712, 81.0]),
    ],
)
def test_schedule_by_hand(schedule: Any, expected: list[float]) -> None:
    hardening = Hardening(relu_ise_schedule=schedule, relu_ise_harden_epochs=4)
    assert [lambda_at(hardening, epoch, 1.0, 81.0) for epoch in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "learned", "target"),
    # Where the formula at p = 1 rounds to another number: 2.2 + (target − 2.2), 1.1·(target/1.1)^1.
    [("linear", 2.2, 15.957691216057308), ("geometric", 1.1, 79.7780895574)],
)
def test_schedule_ends_at_the_target_exactly(schedule: Any, learned: float, target: float) -> None:
    hardening = Hardening(relu_ise_schedule=schedule, relu_ise_harden_epochs=3)
    assert lambda_at(hardening, 2, learned, target) == target


@pytest.mark.parametrize("schedule", ["linear", "geometric", "cosine"])
def test_one_hardening_epoch_is_at_the_target(schedule: Any) -> None:
    hardening = Hardening(relu_ise_schedule=schedule, relu_ise_harden_epochs=1)
    assert lambda_at(hardening, 0, 1.3, 50.0) == 50.0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tolerance", 0.0),
        ("tolerance", 0.8),  # √(2/π) = 0.798 is below: λ* would be under 1
        ("tolerance", math.nan),
        ("learn_epochs", -1),
        ("harden_epochs", 0),
        ("lr_factor", -1.0),
        ("lr_factor", math.inf),
        ("initial", 1.0),
        ("initial", math.nan),
        ("temperature", 0.0),
    ],
)
def test_option_out_of_range_is_refused(option: str, value: Any) -> None:
    key = f"relu_ise_{option}"
    with pytest.raises(ConfigError, match=rf"^{key} is {value}: input should be [^\n]+$"):
        Hardening(**{key: value})
    (finding,) = (found for found in validated({key: value})[1] if found.key == key)
    assert finding.line.startswith(f"warm_start_args.{key} is {value}: input should be ")


def test_unknown_schedule_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="'linear', 'geometric' or 'cosine'"):
        Hardening(relu_ise_schedule="geometrical")  # type: ignore[arg-type]


def test_every_target_is_above_one() -> None:
    assert all(target_lambda(kind, 0.79) > 1 for kind in GATES)


# Procedure on two points

TRAINING = LocalTraining(learning_rate=0.05)
TWO = [(torch.tensor([[1.0, -1.0], [-2.0, 0.5]]), torch.tensor([0, 1]))]


def small(*activations: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for act in activations for layer in (nn.Linear(2, 2), act)]
    return nn.Sequential(*layers, nn.Linear(2, 2))


def run(
    model: nn.Module,
    schedule: Hardening | None = None,
    batches: Iterable[tuple[Tensor, Tensor]] = TWO,
    training: LocalTraining = TRAINING,
    evaluate: Callable[[nn.Module], float] = lambda model: 0.0,
) -> Reluised:
    schedule = schedule or Hardening()
    return relu_ise(model, batches, training, schedule, seed=0, evaluate=evaluate)


class Watched(list[Any]):
    """The two points, noting a layer's weight whenever an epoch begins."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(TWO)
        self.seen: list[Tensor] = []
        self._layer = layer

    def __iter__(self) -> Iterator[Any]:
        self.seen.append(self._layer.weight.detach().clone())
        return super().__iter__()


def test_accuracies_are_what_evaluate_gave_in_order() -> None:
    values = iter([0.9, 0.8, 0.625])
    done = run(small(nn.GELU()), evaluate=lambda model: next(values))
    assert (done.original, done.hardened, done.relu) == (0.9, 0.8, 0.625)


def test_drop_is_what_the_replacement_cost() -> None:
    values = iter([0.9, 0.75, 0.5])
    assert run(small(nn.GELU()), evaluate=lambda model: next(values)).drop == 0.25


def test_evaluate_sees_smooth_then_hardened_then_relu() -> None:
    seen: list[str] = []

    def note(model: nn.Module) -> float:
        assert isinstance(model, nn.Sequential)
        seen.append(repr(model[1]))
        return 0.0

    run(small(nn.GELU()), evaluate=note)
    assert seen == ["GELU(approximate='none')", "LambdaActivation(gelu, lambda=79.7885)", "ReLU()"]


def test_history_has_the_start_and_every_epoch() -> None:
    done = run(small(nn.GELU()), Hardening(relu_ise_learn_epochs=3, relu_ise_harden_epochs=2))
    assert len(done.history) == 1 + 3 + 2


def test_history_starts_at_the_initial_lambda() -> None:
    done = run(small(nn.GELU(), nn.SiLU()), Hardening(relu_ise_initial=1.5))
    assert done.history[0] == pytest.approx({"1": 1.5, "3": 1.5})


def test_learned_lambda_is_that_after_the_learning_epochs() -> None:
    done = run(small(nn.GELU()), Hardening(relu_ise_learn_epochs=2))
    assert done.learned == done.history[2] and done.learned != done.history[1]


def test_lambda_is_learned_by_its_own_rate() -> None:
    # One step: Δs = −lr·factor·∂loss/∂s, so ten times the factor moves s ten times as far.
    start = 0.1 * math.log(math.expm1(1.0))  # s at λ = 2

    def moved(factor: float) -> float:
        done = run(
            small(nn.GELU()), Hardening(relu_ise_learn_epochs=1, relu_ise_initial=2.0, relu_ise_lr_factor=factor)
        )
        return 0.1 * math.log(math.expm1(done.learned["1"] - 1)) - start

    assert moved(10.0) == pytest.approx(10 * moved(1.0), rel=1e-3)


def test_factor_zero_keeps_lambda() -> None:
    done = run(small(nn.GELU()), Hardening(relu_ise_learn_epochs=2, relu_ise_lr_factor=0.0))
    assert done.learned == done.history[0]


def test_weight_decay_does_not_pull_lambda() -> None:
    # In one step: the gradient is the same, and a decay of s would come on top.
    def learned(decay: float) -> dict[str, float]:
        training = LocalTraining(learning_rate=0.05, weight_decay=decay)
        return run(small(nn.GELU()), Hardening(relu_ise_learn_epochs=1), training=training).learned

    assert learned(0.5) == learned(0.0)


def test_target_is_each_kinds_own() -> None:
    done = run(small(nn.GELU(), nn.SiLU(), nn.Hardswish()), Hardening(relu_ise_tolerance=0.05))
    expected = [target_lambda(kind, 0.05) for kind in ("gelu", "silu", "hardswish")]
    assert list(done.target.values()) == pytest.approx(expected)


def test_learned_lambda_above_the_target_is_kept() -> None:
    # ε = 0.5: λ* = 1.6, below the 3 it starts from.
    done = run(small(nn.GELU()), Hardening(relu_ise_tolerance=0.5, relu_ise_initial=3.0, relu_ise_lr_factor=0.0))
    assert [entry["1"] for entry in done.history] == pytest.approx([3.0] * 7)


def test_hardening_follows_the_schedule_from_the_learned_value() -> None:
    schedule = Hardening(relu_ise_learn_epochs=1, relu_ise_harden_epochs=3)
    done = run(small(nn.GELU()), schedule)
    learned, target = done.learned["1"], done.target["1"]
    # geometric: learned·(target/learned)^(1/3, 2/3, 1)
    expected = [learned * (target / learned) ** (k / 3) for k in (1, 2, 3)]
    assert [entry["1"] for entry in done.history[2:]] == pytest.approx(expected, rel=1e-6)


def test_weights_go_on_learning_while_lambda_is_fixed() -> None:
    model = small(nn.GELU())
    batches = Watched(model[0])
    run(model, Hardening(relu_ise_learn_epochs=0, relu_ise_harden_epochs=2), batches)
    assert not torch.equal(batches.seen[0], batches.seen[1]) and not torch.equal(batches.seen[1], model[0].weight)


def test_learning_rate_schedule_runs_over_the_epochs() -> None:
    # step: lr·1e-300^⌊epoch/1⌋, so only the first epoch moves anything.
    training = LocalTraining(learning_rate=0.05, lr_schedule="step", lr_decay=1e-300, lr_decay_rounds=1)
    done = run(small(nn.GELU()), Hardening(relu_ise_learn_epochs=2), training=training)
    assert done.history[0] != done.history[1] == done.history[2]


def test_hardening_epochs_count_on_from_the_learning_ones() -> None:
    # Rate 0 from the second epoch on: the weights stay where the first one left them.
    model = small(nn.GELU())
    batches = Watched(model[0])
    training = LocalTraining(learning_rate=0.05, lr_schedule="step", lr_decay=1e-300, lr_decay_rounds=1)
    run(model, Hardening(relu_ise_learn_epochs=1, relu_ise_harden_epochs=2), batches, training)
    assert torch.equal(batches.seen[1], model[0].weight)


def test_keys_are_the_original_ones() -> None:
    model = small(nn.GELU(), nn.SiLU())
    before = list(model.state_dict())
    run(model)
    assert list(model.state_dict()) == before


def test_no_lambda_activation_is_left() -> None:
    model = small(nn.GELU(), nn.SiLU())
    run(model)
    assert not any(isinstance(module, LambdaActivation) for module in model.modules())


def test_frozen_parameters_stay_frozen() -> None:
    model = small(nn.GELU())
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    run(model)
    assert torch.equal(model[0].weight, before) and not model[0].weight.requires_grad


def test_batches_that_can_be_read_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="no batch in epoch 1; batches must be there again"):
        run(small(nn.GELU()), batches=iter(TWO))


def test_divergence_is_an_error() -> None:
    training = LocalTraining(learning_rate=1e30)
    with pytest.raises(ConfigError, match="diverged: weights are not finite after epoch"):
        run(small(nn.GELU()), training=training)


def test_model_without_smooth_modules_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"holds no nn\.GELU"):
        run(small(nn.ReLU()))


# Real digits

SCHEDULE = Hardening(relu_ise_learn_epochs=2, relu_ise_harden_epochs=3)


@pytest.fixture(scope="module")
def digits() -> tuple[TensorDataset, list[tuple[Tensor, Tensor]]]:
    """1,200 images (1, 8, 8) to train on, the other 597 to test on."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    return TensorDataset(x[:1200], y[:1200]), [(x[1200:], y[1200:])]


@pytest.fixture(scope="module")
def trained(digits: tuple[TensorDataset, Any]) -> nn.Module:
    """A small GELU network that has learned the digits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    training = LocalTraining(client_optimizer="adam", learning_rate=0.003)
    everything = [Phase(6, frozenset(Role))]
    loader = DataLoader(digits[0], 64, shuffle=True)
    local_update(model, loader, training, everything, roles(model), round=0, seed=0)
    return model


@pytest.fixture
def reluised(trained: nn.Module, digits: tuple[TensorDataset, Any]) -> Callable[[int], tuple[nn.Module, Any]]:
    def do(seed: int) -> tuple[nn.Module, Any]:
        model = copy.deepcopy(trained)
        loader = DataLoader(digits[0], 64, shuffle=True)
        training = LocalTraining(client_optimizer="adam", learning_rate=0.001)
        done = relu_ise(
            model, loader, training, SCHEDULE, seed=seed, evaluate=lambda model: evaluate(model, digits[1]).accuracy
        )
        return model, done

    return do


Do = Callable[[int], tuple[nn.Module, Reluised]]


def test_digits_survive(reluised: Do) -> None:
    done = reluised(0)[1]
    assert done.original > 0.9
    assert done.hardened > done.original - 0.02
    assert abs(done.drop) <= 0.01


def test_reported_accuracy_is_the_relu_models(reluised: Do, digits: tuple[Any, Any]) -> None:
    model, done = reluised(0)
    assert evaluate(model, digits[1]).accuracy == done.relu


def test_dualcopy_takes_the_result(reluised: Do, digits: tuple[Any, Any]) -> None:
    model = reluised(0)[0].eval()
    x = digits[1][0][0]
    assert torch.equal(DualCopy(model)(x), model(x))


def test_same_seed_gives_the_same_model(reluised: Do) -> None:
    states = [fingerprint(reluised(0)[0].state_dict()) for _ in range(2)]
    assert states[0] == states[1]


def test_other_seed_gives_another_model(reluised: Do) -> None:
    states = [fingerprint(reluised(seed)[0].state_dict()) for seed in range(2)]
    assert states[0] != states[1]


def test_global_generator_is_left_alone(reluised: Do) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    reluised(0)
    assert torch.equal(torch.rand(1), expected)
