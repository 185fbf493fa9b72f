"""Hooks of the user fire once per forward, on the copy that is trained, and may not change it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import prune

from fedsq_plugin import DualCopy
from fedsq_plugin.errors import GateError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).train()


class Collects:
    """A hook that is an object, and cannot be copied."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, module: nn.Module, *given: Any) -> None:
        self.seen.append(given[-1])

    def __deepcopy__(self, memo: Any) -> Collects:
        raise AssertionError("a hook is not copied")


REGISTER: dict[str, Callable[[nn.Module, Any], Any]] = {
    "forward": lambda m, hook: m.register_forward_hook(hook),
    "pre": lambda m, hook: m.register_forward_pre_hook(hook),
    "pre with keywords": lambda m, hook: m.register_forward_pre_hook(hook, with_kwargs=True),
    "always": lambda m, hook: m.register_forward_hook(hook, always_call=True),
}


@pytest.mark.parametrize("when", ["before", "after", "late"])
@pytest.mark.parametrize("kind", REGISTER)
def test_a_hook_fires_once_per_forward(kind: str, when: str) -> None:
    model, hook = net(), Collects()
    if when == "before":
        REGISTER[kind](model[1], hook)
    dual = DualCopy(model)
    if when == "late":
        dual(X)
    if when != "before":
        REGISTER[kind](dual.get_submodule("1"), hook)
    for _ in range(3):
        dual(X)
    assert len(hook.seen) == 3


def test_a_backward_hook_fires_once_per_backward() -> None:
    model, grads = net(), []
    model[1].register_full_backward_hook(lambda module, inputs, outputs: grads.append(outputs))
    dual = DualCopy(model)
    for _ in range(2):
        dual(X).sum().backward()
    assert len(grads) == 2


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_a_hook_of_all_modules_fires_once_for_each(register: Callable[[Any], Any]) -> None:
    dual, hook = DualCopy(net()), Collects()
    handle = register(hook)
    try:
        dual(X)
        dual(X)
    finally:
        handle.remove()
    assert len(hook.seen) == 2 * (3 + 2)  # three layers, the Sequential, the DualCopy


CHANGES: dict[str, Callable[..., Any]] = {
    "forward": lambda module, args, output: 2 * output,
    "pre": lambda module, args: (args[0] + 1,),
    "pre with keywords": lambda module, args, kwargs: ((args[0] + 1,), kwargs),
    "always": lambda module, args, output: output.mul_(2) and None,
}


def doubles(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(2)


@pytest.mark.parametrize("when", ["before", "late"])
@pytest.mark.parametrize("kind", ["forward", "pre", "pre with keywords"])
def test_a_hook_that_changes_is_refused_by_name(kind: str, when: str) -> None:
    model = net()
    if when == "before":
        REGISTER[kind](model[1], CHANGES[kind])
    dual = DualCopy(model)
    if when == "late":
        dual(X)
        REGISTER[kind](model[1], CHANGES[kind])
    with pytest.raises(GateError, match=r"^1: the hook .* changes"):
        dual(X)


def test_a_hook_that_writes_is_refused_by_name() -> None:
    model = net()
    model[0].register_forward_hook(doubles)
    with pytest.raises(GateError, match=r"^0: the hook doubles changes"):
        DualCopy(model)(X)


def test_a_hook_that_returns_what_it_got_is_fine() -> None:
    model = net()
    expected = model(X)
    model[0].register_forward_hook(lambda module, args, output: output)
    assert torch.equal(DualCopy(model)(X), expected)


def test_hooks_are_the_users_own_after_a_forward() -> None:
    model, hook = net(), Collects()
    model[0].register_forward_hook(hook)
    DualCopy(model)(X)
    assert list(model[0]._forward_hooks.values()) == [hook]


def test_a_released_model_keeps_its_hooks() -> None:
    model, seen = net(), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    DualCopy(model).release()(X)
    assert len(seen) == 1


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    ],
)
def test_hooks_that_are_part_of_the_function_stay(make: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    make(model[0])
    model.eval()
    dual = DualCopy(model)
    assert torch.equal(dual(X), model(X))
    gate = dual.structural[0](X) > 0
    assert torch.equal(gate, model[0](X) > 0)
    with torch.no_grad():
        model[0].bias += 5
    torch.testing.assert_close(dual(X), model[2](model[0](X) * gate))


class Keeps(nn.Module):
    """Collects features by a hook of its own, and uses them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.features: dict[str, Tensor] = {}
        self.a.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.features["a"] = output

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        out: Tensor = self.b(torch.relu(h + self.features["a"]))
        return out


def test_a_method_of_the_model_is_part_of_the_function() -> None:
    model = Keeps()
    dual, expected = DualCopy(model), model(X)
    assert torch.equal(dual(X), expected)
    assert torch.equal(dual.features["a"], model.a(X))
    assert "a" not in dual.structural.features
    h = model.a(X)
    first, second = h > 0, h + F.relu(h) > 0
    with torch.no_grad():
        model.a.bias += 1
    h = model.a(X)
    torch.testing.assert_close(dual(X), model.b((h * first + h) * second))


def test_a_model_that_needs_a_hook_of_its_user_is_refused_by_name() -> None:
    model = Keeps()
    model.a._forward_hooks.clear()
    model.a.register_forward_hook(lambda module, args, output: model.features.update(a=output))
    with pytest.raises(GateError, match=r"^a: the structural copy runs without the user's hooks.*KeyError"):
        DualCopy(model)(X)
