"""torch.compile of both passes against the passes themselves. `aot_eager` traces and differentiates as the
default back end does, and then runs torch's own kernels, so that nothing has to be built."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsq_plugin import DualCopy
from fedsq_plugin.dualcopy import Compiled, GateCache
from fedsq_plugin.errors import ConfigError

BF16 = torch.bfloat16


class Everything(nn.Module):
    """One of each kind of gate, in place and not, the same module twice, a functional call and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace=True)
        self.pool, self.adaptive = nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(2)
        self.second, self.prelu = nn.Conv2d(8, 8, 3, padding=1), nn.PReLU(8)
        self.clip, self.head = nn.Hardtanh(-0.5, 0.5, inplace=True), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.first(x)))
        y = F.leaky_relu(self.second(x), 0.1)
        x = self.relu(x + self.prelu(y - 0.1))
        return self.head(self.clip(self.adaptive(x)).flatten(1))


def pair(structural_precision: Any = None) -> tuple[DualCopy, DualCopy]:
    """Two equal DualCopies in training mode, whose quantitative copies have moved."""
    torch.manual_seed(0)
    dual = DualCopy(Everything(), structural_precision=structural_precision)
    with torch.no_grad():
        for p in dual.parameters():
            p += 0.05 * torch.randn_like(p)
    return dual.train(), copy.deepcopy(dual).train()


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


def trained(dual: DualCopy, forward: Callable[[Tensor], Any], x: Tensor) -> dict[str, Tensor]:
    output = forward(x)
    output.float().square().sum().backward()
    gradients = {f"d {name}": p.grad for name, p in dual.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **gradients, **dict(dual.named_buffers())}


def test_both_passes_are_those_of_the_dualcopy() -> None:
    mine, other = pair()
    compiled = Compiled(mine, "aot_eager")
    for count in (6, 4, 5):  # the last batch of an epoch is smaller
        x = images(count)
        for a, b in zip(compiled.gates(x), other.gates(x), strict=True):
            assert (a.kind, a.region.dtype) == (b.kind, b.region.dtype)
            assert torch.equal(a.region, b.region)
        found, expected = trained(mine, compiled, x), trained(other, other, x)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, msg=lambda m, key=key: f"{key}: {m}")


def test_gates_do_not_depend_on_the_precision_around() -> None:
    mine, other = pair("fp32")
    compiled, x = Compiled(mine, "aot_eager"), images()
    with torch.autocast("cpu", BF16):
        gates, output = compiled.gates(x), compiled(x)
    assert all(torch.equal(a.region, b.region) for a, b in zip(gates, other.gates(x), strict=True))
    assert output.dtype == BF16


def test_model_keeps_its_keys_and_its_class() -> None:
    mine, other = pair()
    compiled = Compiled(mine, "aot_eager")
    compiled(images())
    assert list(mine.state_dict()) == list(other.state_dict())
    assert type(mine.quantitative) is Everything


def test_weights_that_are_loaded_afterwards_count() -> None:
    mine, _ = pair()
    compiled, x = Compiled(mine, "aot_eager"), images()
    compiled(x)
    with torch.no_grad():
        for value in mine.parameters():
            value.mul_(-1.5)
    mine.refresh()
    other = copy.deepcopy(mine)
    torch.testing.assert_close(compiled(x), other(x))


def test_unfrozen_gates_are_the_models_own() -> None:
    mine, other = pair()
    mine.unfreeze()
    x = images()
    torch.testing.assert_close(Compiled(mine, "aot_eager")(x), other.quantitative(x))


def test_plain_model() -> None:
    _, other = pair()
    plain, x = other.release().train(), images()
    expected = copy.deepcopy(plain)(x)
    torch.testing.assert_close(Compiled(plain, "aot_eager")(x), expected)


def test_kept_gates() -> None:
    mine, other = pair()
    cache, x = GateCache(mine, passes=Compiled(mine, "aot_eager")), images()
    cache(x)
    other(x)  # running statistics of both have seen two batches
    torch.testing.assert_close(cache(x), other(x))
    assert cache.hits == len(x)


def test_model_that_cannot_be_taken_whole_is_refused_in_one_line() -> None:
    class Branches(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum().item() > 0 else -x)

    dual = DualCopy(Branches(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(ConfigError, match=r"^torch.compile does not take this model as a whole: .*compile: false$"):
        Compiled(dual, "aot_eager")(torch.randn(3, 6))


def test_gated_call_that_is_passed_over_is_refused() -> None:
    class InPlace(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[0](x)
            F.leaky_relu_(x, 0.1)
            return super().forward(x)

    dual = DualCopy(InPlace(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)))
    with pytest.raises(ConfigError, match=r"^torch.compile sees 1 of the 2 gated calls .*compile: false$"):
        Compiled(dual, "aot_eager")(torch.randn(3, 6))


def test_back_end_that_fails_is_one_line() -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler\nand a trace")

    dual = DualCopy(nn.Sequential(nn.Linear(6, 4), nn.ReLU()))
    with pytest.raises(ConfigError, match=r"^torch.compile does not take .*no compiler.*compile: false$"):
        Compiled(dual, broken)(torch.randn(3, 6))  # type: ignore[arg-type]
