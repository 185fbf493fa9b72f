"""What a forward computes in, and where: torch's autocast with fp32 meaning fp32, and transfers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import ConfigError, first_line

Precision = Literal["fp32", "bf16", "fp16"]

HALF: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What autocast computes in, by precision."""


@contextmanager
def exactly(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute in a precision whatever the surroundings compute in: fp32 outside any autocast and, on NVIDIA
    GPUs, without TF32, whose ten bits of mantissa torch takes for convolutions otherwise."""
    if precision != "fp32":
        with torch.autocast(device.type, HALF[precision]):
            yield
        return
    with torch.autocast(device.type, enabled=False):
        if device.type == "cuda":
            with _without_tf32():
                yield
        else:
            yield


@contextmanager
def _without_tf32() -> Iterator[None]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    places: list[tuple[Any, str, Any]] = [(cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]
    try:
        before = [getattr(place, name) for place, name, _ in places]
    except RuntimeError:  # the script speaks torch's newer language, which the older one cannot read
        parts: Any = (cudnn.conv, cudnn.rnn, matmul)  # type: ignore[attr-defined]
        places = [(part, "fp32_precision", "ieee") for part in parts]
        before = [getattr(place, name) for place, name, _ in places]
    for place, name, value in places:
        setattr(place, name, value)
    try:
        yield
    finally:
        for (place, name, _), value in zip(places, before, strict=True):
            setattr(place, name, value)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; to a GPU without waiting for the copy, whatever loader it comes from."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # does nothing where the loader has done so
    return tensor.to(device, non_blocking=True)


def widened(model: nn.Module, inputs: Any) -> Any:
    """A model's arguments as its fp32 weights take them: half-precision tensors as fp32."""
    weight = next(model.parameters(), None)
    if weight is None or weight.dtype != torch.float32:
        return inputs
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype in HALF.values() else t, inputs)


def refuse_unsupported(precision: Precision, device: torch.device | str, option: str) -> None:
    """Raise ConfigError where a device does not compute in a precision, found out by doing so.

    Args:
        option: what asks for it, as `fedsq_args.precision`.
    """
    if precision == "fp32":
        return
    device = torch.device(device)
    reason = None
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        reason = "it has no bf16 arithmetic"
    else:
        try:
            # Not a layer: its initial weights would be drawn from the process's generator.
            weight = torch.ones(1, 1, 3, 3, device=device, requires_grad=True)
            with torch.autocast(device.type, HALF[precision]):
                y = F.conv2d(torch.ones(1, 1, 4, 4, device=device), weight)
            torch.autograd.backward(y.float().sum())
        except RuntimeError as error:
            reason = first_line(error)
    if reason is not None:
        other = "fp16 or fp32" if precision == "bf16" else "bf16 or fp32"
        raise ConfigError(f"{option} is {precision}, which {device} does not do: {reason}; use {other}")
