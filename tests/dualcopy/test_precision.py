"""What the structural copy computes in, whatever surrounds the call."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin import DualCopy
from fedsq_plugin.dualcopy import Gate, GateCache, GateKind
from fedsq_plugin.dualcopy.precision import compute_in, refuse_unsupported, to_device
from fedsq_plugin.errors import ConfigError, GateError

BF16, FP16 = torch.bfloat16, torch.float16
CPU = torch.device("cpu")


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5),
    ).eval()  # fmt: skip


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def equal(a: list[Gate], b: list[Gate]) -> bool:
    return all(x.kind == y.kind and torch.equal(x.region, y.region) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("around", [BF16, FP16])
def test_gates_do_not_depend_on_the_precision_around(around: torch.dtype) -> None:
    dual, x = DualCopy(network(), structural_precision="fp32"), images()
    with torch.autocast("cpu", around):
        found = dual.gates(x)
    assert equal(found, dual.gates(x))


def test_without_a_precision_of_their_own_gates_depend_on_it() -> None:
    # Otherwise the test above could not fail.
    dual, x = DualCopy(network()), images(256)
    with torch.autocast("cpu", BF16):
        found = dual.gates(x)
    assert not equal(found, dual.gates(x))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", BF16), ("fp16", FP16)])
def test_gates_are_those_of_the_plain_model_in_that_precision(precision: Any, dtype: torch.dtype) -> None:
    net, x = network(), images(256)
    dual, found = DualCopy(net, structural_precision=precision), []
    hooks = [layer.register_forward_pre_hook(lambda _, a: found.append(a[0] > 0)) for layer in (net[2], net[5])]
    with torch.autocast("cpu", dtype):
        net(x)
    for hook in hooks:
        hook.remove()
    gates = [gate.region.bool() for gate in dual.gates(x) if gate.kind is GateKind.TWO_REGIONS]
    assert all(torch.equal(a, b) for a, b in zip(gates, found, strict=True))


def test_gates_of_half_precision_inputs_are_those_of_the_same_values() -> None:
    dual, x = DualCopy(network(), structural_precision="fp32"), images().to(BF16)
    with torch.autocast("cpu", BF16):
        found = dual.gates(x)
    assert equal(found, dual.gates(x.float()))


def test_quantitative_copy_computes_as_the_surroundings_do() -> None:
    dual, x, seen = DualCopy(network(), structural_precision="fp32"), images(), []
    dual.quantitative[4].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    dual(x)
    seen.clear()  # the first forward is traced
    with torch.autocast("cpu", BF16):
        dual(x)
    assert seen == [BF16]


def test_weights_get_their_gradients_in_fp32() -> None:
    dual = DualCopy(network(), structural_precision="fp32").train()
    with torch.autocast("cpu", BF16):
        output = dual(images())
    output.float().square().sum().backward()
    assert {p.grad.dtype for p in dual.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in dual.parameters() if p.dim() > 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_survives_copies(precision: Any) -> None:
    dual = DualCopy(network(), structural_precision=precision)
    known = {"fp32": None, "bf16": BF16, "fp16": FP16}[precision]
    assert [copy.deepcopy(dual).gate_dtype, pickle.loads(pickle.dumps(dual)).gate_dtype] == [known, known]


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(GateError, match="structural_precision is 'half'; it must be one of fp32, bf16, fp16"):
        DualCopy(network(), structural_precision="half")  # type: ignore[arg-type]


def test_fp32_on_a_gpu_is_without_tf32_and_puts_the_setting_back() -> None:
    # The switches are there without a GPU.
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    with pytest.raises(ZeroDivisionError), compute_in("fp32", torch.device("cuda")):
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (False, False)
        raise ZeroDivisionError
    assert (cudnn.allow_tf32, matmul.allow_tf32) == before
    assert before[0]  # torch's default, which is why it has to be turned off


@pytest.mark.parametrize("option", ["fp32", "bf16", "fp16"])
def test_kept_gates_are_those_of_the_structural_precision(option: Any) -> None:
    dual, x = DualCopy(network(), structural_precision=option), images()
    cache = GateCache(dual)
    with torch.autocast("cpu", BF16):
        cache.gates(x)
    assert equal(cache.gates(x), dual.gates(x))
    assert cache.hits == len(x)


def test_kept_gates_of_another_precision_are_not_used() -> None:
    dual, x = DualCopy(network()), images(256)
    cache = GateCache(dual)
    with torch.autocast("cpu", BF16):
        cache.gates(x)
    assert equal(cache.gates(x), dual.gates(x))
    assert cache.hits == 0


def test_kept_gates_have_the_layout_of_new_ones() -> None:
    dual = DualCopy(network()).to(memory_format=torch.channels_last)
    cache, x = GateCache(dual), images()
    cache.gates(x)
    kept, new = cache.gates(x), dual.gates(x)
    assert equal(kept, new)
    assert [gate.region.stride() for gate in kept] == [gate.region.stride() for gate in new]
    assert any(not gate.region.is_contiguous() for gate in kept)


def test_channels_last_reaches_both_copies_and_every_activation() -> None:
    dual, x, last = DualCopy(network()), images(), torch.channels_last
    dual.to(memory_format=last)
    convolutions = [m for c in (dual.quantitative, dual.structural) for m in (c[0], c[4])]
    assert all(m.weight.is_contiguous(memory_format=last) for m in convolutions)
    assert dual.quantitative[4](dual.quantitative[:4](x)).is_contiguous(memory_format=last)
    plain = DualCopy(network())
    torch.testing.assert_close(dual(x), plain(x))


def test_copies_stay_on_one_device() -> None:
    dual = DualCopy(network()).to("meta")
    assert {p.device.type for c in (dual.quantitative, dual.structural) for p in c.parameters()} == {"meta"}


def test_supported_precisions_are_not_refused() -> None:
    refuse_unsupported("fp32", "cuda:7", "fedsq_args.precision")  # nothing to try
    refuse_unsupported("bf16", "cpu", "fedsq_args.precision")


def test_precision_that_a_device_lacks_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any, **__: Any) -> Any:
        raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'\nand a trace")

    monkeypatch.setattr(torch.nn.functional, "conv2d", lacking)
    with pytest.raises(ConfigError) as refused:
        refuse_unsupported("fp16", "cpu", "fedsq_args.precision")
    assert str(refused.value) == (
        "fedsq_args.precision is fp16, which cpu does not do: "
        "\"slow_conv2d_cpu\" not implemented for 'Half'; use bf16 or fp32"
    )


def test_a_gpu_that_would_emulate_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(ConfigError, match="which cuda:0 does not do: it has no bf16 arithmetic; use fp16 or fp32"):
        refuse_unsupported("bf16", "cuda:0", "fedsq_args.structural_precision")


def test_a_tensor_that_is_there_is_not_copied() -> None:
    x = images()
    assert to_device(x, "cpu") is x
    assert to_device(x, CPU) is x
