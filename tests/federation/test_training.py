"""The steps of a local update, optimizer, rate, bound, term and precision, against numbers worked out by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin.algorithms.fedprox import proximal
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.local import LocalResult, Phase, local_update
from fedsq_plugin.federation.roles import Role, roles
from fedsq_plugin.federation.state import fingerprint, state_of
from fedsq_plugin.federation.training import LocalTraining, OptimizerTraining
from tests.algorithms.task import AllOptions

from .weight import ONE, Batches, Weight, half_square

ALL = frozenset(Role)


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
        (LocalTraining(learning_rate=0.2, lr_schedule="cosine", comm_round=4), [0.2, 0.170710678, 0.1, 0.029289322]),
        (LocalTraining(learning_rate=0.8, lr_schedule="step", lr_decay=0.5, lr_decay_rounds=2), [0.8, 0.8, 0.4, 0.4]),
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
        model, batches, training, [Phase(1, ALL)], roles(model), round=0, seed=0, loss=lambda output, _: output.sum()
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


def test_every_step_is_reported_with_its_loss() -> None:
    model, losses = Weight(), []
    local_update(
        model, ONE, LocalTraining(learning_rate=0.5), [Phase(2, ALL)], roles(model), round=0, seed=0,
        loss=half_square, on_step=lambda loss: losses.append(loss.item()),
    )  # fmt: skip
    assert losses == [2.0, 0.5]  # (1 - 3)²/2, then (2 - 3)²/2


def test_wrong_options_are_one_line_that_names_each() -> None:
    with pytest.raises(ConfigError) as caught:
        OptimizerTraining(learning_rate=-1, momentum="x")  # type: ignore[arg-type, call-arg]
    assert str(caught.value) == (
        "learning_rate is -1: input should be greater than 0 | momentum is 'x': input should be a valid number"
        " | optimizer is missing"
    )
