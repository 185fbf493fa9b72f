"""Gates go to the call that they belong to, or the first forward refuses the model."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsq_plugin import DualCopy, validate
from fedsq_plugin.errors import GateError

Body = Callable[["Parts", Tensor], Tensor]


class Parts(nn.Module):
    """Layers for a forward that is given from outside."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.router, self.head, self.act = nn.Linear(8, 2), nn.Linear(8, 3), nn.ReLU()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.flat = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self, x))
        return out

    def choose(self, h: Tensor) -> Tensor:
        return self.router(h).mean(0).argmax()


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def moved(dual: DualCopy, seed: int = 1) -> DualCopy:
    with torch.no_grad():
        for p in dual.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return dual


def by_direct_forward(m: Parts, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.experts[int(m.choose(h))].forward(h)


def by_if(m: Parts, x: Tensor) -> Tensor:
    h = m.a(x)
    return F.relu(m.b(h)) if m.router(h).sum() > 0 else F.relu(m.c(h))


def drop_by_python(m: Parts, x: Tensor) -> Tensor:
    h = m.a(x)
    for layer in m.flat:
        if not (m.training and random.random() < 0.3):
            h = h + F.relu(layer(h))
    return h


def drop_by_numpy(m: Parts, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    return h if m.training and np.random.rand() < 0.3 else F.relu(m.b(h))


def drop_by_torch(m: Parts, x: Tensor) -> Tensor:
    h = m.a(x)
    for layer in m.flat:
        if not (m.training and torch.rand(1).item() < 0.05):
            h = h + m.act(layer(h))
    return h


def exit_early(m: Parts, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    if not m.training and float(m.router(h).softmax(1).max()) > 0.6:
        return h
    return F.relu(m.b(h))


REFUSED: dict[str, Body] = {
    "expert by int": lambda m, x: m.experts[int(m.choose(m.a(x)))](m.a(x)),
    "expert by item, one activation for all": lambda m, x: m.act(m.flat[m.choose(m.a(x)).item()](m.a(x))),
    "expert by tolist": lambda m, x: F.relu(m.flat[m.choose(m.a(x)).tolist()](m.a(x))),
    "expert by numpy": lambda m, x: F.relu(m.flat[int(m.choose(m.a(x)).detach().numpy())](m.a(x))),
    "expert as an index": lambda m, x: F.relu([m.b, m.c][m.choose(m.a(x))](m.a(x))),
    "expert without a call of its module": by_direct_forward,
    "a part of a parameter": lambda m, x: F.relu(m.a(x) * m.router.weight[m.choose(m.a(x))]),
    "branch by a truth value": by_if,
    "layers dropped by torch": drop_by_torch,
    "layers dropped by Python": drop_by_python,
    "layers dropped by numpy": drop_by_numpy,
    "exit in evaluation": exit_early,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_path_that_copies_may_leave_is_refused_at_the_first_forward(kind: str) -> None:
    dual = DualCopy(Parts(REFUSED[kind])).train()
    with pytest.raises(GateError, match="does not follow the structural copy's path") as error:
        dual(X)
    assert "\n" not in str(error.value)


def test_the_refusal_names_the_module() -> None:
    with pytest.raises(GateError, match=r"experts\.\d\.1: "):
        DualCopy(Parts(REFUSED["expert by int"]))(X)


def nested(m: Parts, x: Tensor) -> Tensor:
    return F.relu(sum(m.router(m.a(x)).softmax(1)[:, k : k + 1] * F.relu(e(m.a(x))) for k, e in enumerate(m.flat)))


def fail() -> Tensor:
    raise RuntimeError("a number is too large")


FINE: dict[str, Body] = {
    "a test for broken numbers": lambda m, x: F.relu(m.a(x)) if not torch.isnan(m.a(x)).any() else x,
    "a bound that is tested": lambda m, x: F.relu(m.a(x)) if bool(m.a(x).abs().max() < 1e9) else fail(),
    "a scale that is read": lambda m, x: F.relu(m.a(x) / m.a.weight.norm().item()),
    "a number for a report": lambda m, x: (F.relu(m.a(x)), int(m.choose(m.a(x))))[0],
    "soft experts in a loop": nested,
    "a branch by the input": lambda m, x: F.relu(m.a(x)) if x.max() > 0 else F.relu(m.b(m.a(x))),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", FINE)
def test_a_harmless_decision_is_accepted(kind: str, training: bool) -> None:
    model = Parts(FINE[kind])
    dual, expected = DualCopy(model).train(training), model(X)
    for _ in range(12):  # Python does a call that is often made by another instruction
        assert torch.allclose(dual(X), expected)
    moved(dual)
    assert dual(X).shape == (5, 3)


def test_layers_left_out_leave_the_gates_of_the_others_right() -> None:
    def drop(m: Parts, x: Tensor) -> Tensor:
        h = m.a(x)
        for layer in m.layers:
            if not (m.training and torch.rand(()) < 0.5):
                h = h + layer(h)
        return h

    for seed in range(8):
        dual = DualCopy(Parts(drop)).train()
        frozen = dual.structural
        h, gates = frozen.a(X), []
        for layer in frozen.layers:
            gates.append(layer[0](h) > 0)
            h = h + layer(h)
        torch.manual_seed(seed)
        moved(dual)
        for _ in range(4):
            state = torch.get_rng_state()
            out = dual(X)
            torch.set_rng_state(state)
            h = dual.a(X)
            for layer, gate in zip(dual.layers, gates, strict=True):
                if not torch.rand(()) < 0.5:
                    h = h + layer[2](layer[0](h) * gate)
            torch.testing.assert_close(out, dual.head(h))


def test_an_auxiliary_head_beside_the_main_path_leaves_its_gates_right() -> None:
    """Both use F.relu in the same module; only in training does the head run, between the main path's two calls."""

    def body(m: Parts, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        m.extra = F.relu(m.b(h)) if m.training else None
        return F.relu(m.c(h))

    dual = DualCopy(Parts(body)).train()
    frozen = dual.structural
    first = frozen.a(X) > 0
    second = frozen.c(frozen.a(X) * first) > 0
    moved(dual)
    out = dual(X)
    torch.testing.assert_close(out, dual.head(dual.c(dual.a(X) * first) * second))
    torch.testing.assert_close(dual.extra, F.relu(dual.b(dual.a(X) * first)))


def written_twice(m: Parts, x: Tensor) -> Tensor:
    if m.training:
        return F.relu(F.dropout(m.a(x), 0.0))
    return F.relu(m.a(x))


def by_gradients(m: Parts, x: Tensor) -> Tensor:
    h = m.a(x)
    return F.relu(h) if h.requires_grad else torch.relu(h)


@pytest.mark.parametrize("body", [written_twice, by_gradients])
def test_one_call_that_stands_in_two_branches_has_its_gate(body: Body) -> None:
    dual = DualCopy(Parts(body)).train()
    gate = dual.structural.a(X) > 0
    moved(dual)
    torch.testing.assert_close(dual(X), dual.head(dual.a(X) * gate))


def test_a_counter_that_decides_is_refused_at_the_first_forward() -> None:
    class Warms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.register_buffer("steps", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.steps += 1
            h = F.relu(self.a(x))
            return F.relu(self.b(h)) if self.steps > 2 else h

    with pytest.raises(GateError, match="does not follow"):
        DualCopy(Warms()).train()(X)


def test_another_path_than_that_of_the_first_forward_is_refused_later() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.steps = nn.Linear(6, 6), nn.Linear(6, 6), 0

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return F.relu(self.a(x)) if self.steps < 3 else F.relu(self.b(x))

    dual = DualCopy(Counts())
    dual(X)
    dual(X)
    with pytest.raises(GateError, match="does not follow"):
        dual(X)


ROWS: dict[str, Body] = {
    "top-k rows": lambda m, x: F.relu(m.b(F.relu(m.a(x))[m.router(m.a(x))[:, 0].topk(2).indices])),
    "rows of an expert": lambda m, x: F.relu(m.experts[0](m.a(x)[m.router(m.a(x)).argmax(1) == 0])),
    "nonzero": lambda m, x: F.relu(m.a(x).index_select(0, (m.router(m.a(x))[:, 0] > -99).nonzero()[:, 0])),
    "gather": lambda m, x: F.relu(m.a(x).gather(1, m.a(x).argsort(1))),
    "take_along_dim": lambda m, x: F.relu(m.a(x).take_along_dim(m.a(x).argsort(0), 0)),
    "sorted values": lambda m, x: F.relu(m.b(m.a(x).sort(1).values)),
    "a learned order": lambda m, x: F.relu(m.a(x)[:, m.b.bias.argsort()]),
    "one-hot product": lambda m, x: F.relu(F.one_hot(m.a(x).argmax(0), 5).float() @ m.a(x)),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_that_the_model_chooses_are_refused(kind: str) -> None:
    with pytest.raises(GateError, match=r"the model itself: gets entries|product with a mask|experts"):
        DualCopy(Parts(ROWS[kind]))(X)
    assert validate(Parts(ROWS[kind]), X)


def test_rows_drawn_in_training_only_are_refused() -> None:
    dual = DualCopy(Parts(lambda m, x: F.relu(m.a(x)[torch.randperm(5)] if m.training else m.a(x))))
    dual.eval()(X)
    with pytest.raises(GateError, match="random"):
        dual.train()(X)


def test_rows_chosen_by_the_input_are_fine() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.fc = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.words(ids)[:, ids[0].argsort()]
            return F.relu(self.fc(h.masked_fill((ids == 0)[..., None], 0.0)))

    model, ids = Words().eval(), torch.tensor([[1, 2, 0], [3, 4, 5]])
    assert torch.equal(DualCopy(model)(ids), model(ids))


def test_rows_chosen_after_the_last_gate_are_fine() -> None:
    model = Parts(lambda m, x: F.relu(m.a(x)).topk(8, dim=1).values).eval()
    assert torch.equal(DualCopy(model)(X), model(X))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda dual: pickle.loads(pickle.dumps(dual))])
def test_a_duplicate_finds_its_own_calls(duplicate: Callable[[DualCopy], DualCopy]) -> None:
    dual = DualCopy(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))).train()
    dual(X)
    other = duplicate(dual)
    moved(dual)
    moved(other)
    torch.testing.assert_close(other(X), dual(X))


def test_a_module_that_comes_later_is_found() -> None:
    dual = DualCopy(nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.ReLU()), nn.Linear(8, 2)))
    expected = dual(X)
    for model in (dual.quantitative, dual.structural):
        model[1] = nn.Sequential(nn.ReLU())
    torch.testing.assert_close(dual(X), expected)
