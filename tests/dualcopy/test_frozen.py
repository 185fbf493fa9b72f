"""The structural copy stays as it is, whatever the model's forward writes; random draws are the same in both copies."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsq_plugin import DualCopy
from fedsq_plugin.dualcopy import Compiled, GateCache
from fedsq_plugin.errors import ConfigError, GateError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) + 2


class Meter:
    def __init__(self) -> None:
        self.total, self.seen = 0.0, torch.zeros(6)

    def update(self, x: Tensor) -> None:
        self.total += float(x.detach().sum())
        self.seen += x.detach().mean(0)


class Writes(nn.Module):
    """Its forward writes into it before it computes."""

    def __init__(self, write: Callable[[Writes, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("late", torch.zeros(6))
        self.plain, self.steps, self.scale = torch.zeros(6), 0, 1.0
        self.history: list[Tensor] = []
        self.cache: dict[str, Any] = {"inner": []}
        self.meter = Meter()
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self, x)
        shift = self.mean + self.plain + self.meter.seen + (sum(self.history) if self.history else 0)
        shift = shift + len(self.cache["inner"]) + self.meter.total + self.steps
        out: Tensor = self.b(F.relu(self.a(x - shift)))
        return out


def rebind(m: Writes, x: Tensor) -> None:
    m.mean = 0.9 * m.mean + 0.1 * x.detach().mean(0)


def count(m: Writes, x: Tensor) -> None:
    m.steps += 1


def rebind_attribute(m: Writes, x: Tensor) -> None:
    m.plain = m.plain + 0.1 * x.detach().mean(0)


WRITES: dict[str, Callable[[Writes, Tensor], Any]] = {
    "a buffer, rebound": rebind,
    "a buffer, in place": lambda m, x: m.mean.mul_(0.9).add_(0.1 * x.detach().mean(0)),
    "a buffer, through data": lambda m, x: m.mean.data.add_(0.1 * x.detach().mean(0)),
    "an attribute, rebound": rebind_attribute,
    "an attribute, in place": lambda m, x: m.plain.add_(0.1 * x.detach().mean(0)),
    "a counter": count,
    "a list": lambda m, x: m.history.append(x.detach().mean(0)),
    "a list in a mapping": lambda m, x: m.cache["inner"].append(1),
    "an object": lambda m, x: m.meter.update(x),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", WRITES)
def test_the_gates_of_an_input_do_not_depend_on_what_was_seen(kind: str, training: bool) -> None:
    dual = DualCopy(Writes(WRITES[kind])).train(training)
    before = dual.gates(X)[0].region
    hand = copy.deepcopy(dual.structural)
    for _ in range(4):
        dual(X + 1)
    assert torch.equal(dual.gates(X)[0].region, before)
    # The first forward of a model as it was made, by hand.
    WRITES[kind](hand, X)
    plain = DualCopy(hand)
    plain.write = lambda m, x: None
    assert torch.equal(plain.gates(X)[0].region, before)


@pytest.mark.parametrize("kind", WRITES)
def test_the_quantitative_copy_writes_as_the_plain_model(kind: str) -> None:
    model = Writes(WRITES[kind])
    dual = DualCopy(copy.deepcopy(model))
    for _ in range(3):
        model(X)
        dual(X)
    for name in ("mean", "plain", "steps", "cache"):
        torch.testing.assert_close(getattr(dual, name), getattr(model, name))
    assert len(dual.history) == len(model.history)
    assert dual.meter.total == model.meter.total


def test_a_first_write_that_comes_later_is_refused_by_name() -> None:
    def late(m: Writes, x: Tensor) -> None:
        if x.max() > 50:
            m.late.add_(1)

    dual = DualCopy(Writes(late))
    dual(X)
    with pytest.raises(GateError, match=r"^late: .*writes into this buffer"):
        dual(X + 100)


def test_a_new_attribute_is_not_kept_in_the_structural_copy() -> None:
    def remember(m: Writes, x: Tensor) -> None:
        m.features = x

    dual = DualCopy(Writes(remember))
    dual(X)
    assert "features" not in vars(dual.structural)
    assert torch.equal(dual.features, X)


# Randomness that does not follow the mode


class Draws(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor], dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.drop = nn.Linear(6, 32), nn.Linear(32, 3), nn.Dropout(dropout)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(self.draw(x))
        if self.training and self.drop.p:
            h = self.drop(h)
        out: Tensor = self.b(F.relu(h))
        return out


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "noise": lambda x: x + torch.randn_like(x),
    "a random row order": lambda x: x[torch.randperm(len(x))],
    "Python": lambda x: x * random.random() - 1,
    "numpy": lambda x: x + torch.from_numpy(np.random.randn(6)).float(),
}


def seeded(model: nn.Module) -> Any:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    return model(X)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", DRAWS)
def test_both_copies_draw_the_same(kind: str, training: bool) -> None:
    model = Draws(DRAWS[kind]).train(training)
    dual = DualCopy(copy.deepcopy(model))
    assert torch.equal(seeded(dual), seeded(model))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(seeded(dual), seeded(model))
    assert torch.equal(torch.get_rng_state(), after[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == after[1:]
    gate_input = seeded_draw(DRAWS[kind])
    gate = model.a(gate_input) > 0
    with torch.no_grad():
        dual.a.bias += 1
    seeded(dual)
    torch.testing.assert_close(seeded(dual), dual.b(dual.a(gate_input) * gate))


def seeded_draw(draw: Callable[[Tensor], Tensor]) -> Tensor:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    return draw(X)


def test_draws_that_do_not_correspond_are_refused() -> None:
    dual = DualCopy(Draws(DRAWS["dropout"], dropout=0.5))
    dual.eval()(X)
    with pytest.raises(GateError, match="the model itself: draws random numbers in evaluation mode too"):
        dual.train()(X)


def test_gates_of_such_a_model_are_not_kept() -> None:
    model = Draws(DRAWS["dropout"]).eval()
    cache = GateCache(DualCopy(copy.deepcopy(model)))
    for _ in range(2):
        assert torch.equal(seeded(lambda x: cache(x)), seeded(model))  # type: ignore[arg-type]
    assert (cache.hits, cache.misses) == (0, 0)


def test_given_gates_and_the_compiler_are_refused_for_such_a_model() -> None:
    dual = DualCopy(Draws(DRAWS["noise"]).eval())
    with pytest.raises(GateError, match="random"):
        dual.gated(dual.gates(X), X)
    with pytest.raises(ConfigError, match="random"):
        Compiled(dual, backend="eager")(X)


def test_a_generator_of_the_models_own_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.generator = nn.Linear(6, 3), torch.Generator().manual_seed(0)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.a(x) + torch.randn(3, generator=self.generator))

    with pytest.raises(GateError, match=r"the model itself: draws random numbers .* generator of its own"):
        DualCopy(Own())(X)


class Grows(nn.Module):
    """Makes a layer, or a parameter, in its first forward."""

    def __init__(self, layer: bool) -> None:
        super().__init__()
        self.a, self.layer = nn.Linear(6, 8), layer

    def forward(self, x: Tensor) -> Tensor:
        if self.layer and not hasattr(self, "late"):
            self.late = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        if not self.layer and not hasattr(self, "late"):
            self.late = nn.Parameter(torch.randn(8))
        h = F.relu(self.a(x))
        return self.late(h) if self.layer else h * self.late


@pytest.mark.parametrize("layer", [False, True])
def test_layers_that_are_made_in_the_forward_are_refused_by_name(layer: bool) -> None:
    model = Grows(layer)
    with pytest.raises(GateError, match=r"late: is made in the forward.*one batch"):
        DualCopy(model)(X)
    model(X)
    assert torch.equal(DualCopy(model)(X), model(X))


class Sparse(nn.Module):
    """Has a sparse tensor beside its weights, and may write into it."""

    graph: Tensor

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.a, self.writes = nn.Linear(6, 3), writes
        self.register_buffer("graph", torch.eye(6).to_sparse(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.graph.mul_(2)
        return F.relu(self.a(torch.sparse.mm(self.graph, x.t()).t()))


@pytest.mark.parametrize("writes", [False, True])
def test_a_sparse_tensor_beside_the_weights_stays_as_it_was(writes: bool) -> None:
    dual = DualCopy(Sparse(writes)).eval()
    for _ in range(2):
        dual(X)
    assert torch.equal(dual.structural.get_buffer("graph").to_dense(), torch.eye(6))
