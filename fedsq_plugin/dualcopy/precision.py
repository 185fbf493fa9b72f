"""Precision of a forward (autocast, or exact fp32), and copies between devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import ConfigError, first_line

Precision = Literal["fp32", "bf16", "fp16"]

HALF: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision -> dtype that autocast computes in."""


@contextmanager
def compute_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute in the given precision, also inside a surrounding autocast.

    With fp32, autocast is off. On NVIDIA GPUs TF32 is off too: by default torch uses it for convolutions, and
    it has only ten bits of mantissa.
    """
    if precision != "fp32":
        with torch.autocast(device.type, HALF[precision]):
            yield
        return
    with torch.autocast(device.type, enabled=False), _disable_tf32() if device.type == "cuda" else nullcontext():
        yield


@contextmanager
def _disable_tf32() -> Iterator[None]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    places: list[tuple[Any, str, Any]] = [(cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]
    try:
        before = [getattr(place, name) for place, name, _ in places]
    except RuntimeError:  # the program set torch's newer options, and then the older ones cannot be read
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
    """Copy a tensor to a device. A copy to a GPU runs in the background, also for memory that is not pinned."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # no effect if the loader has pinned it
    return tensor.to(device, non_blocking=True)


def widen(model: nn.Module, inputs: Any) -> Any:
    """Cast half-precision tensors in a model's arguments to fp32, if its weights are fp32."""
    weight = next(model.parameters(), None)
    if weight is None or weight.dtype != torch.float32:
        return inputs
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype in HALF.values() else t, inputs)


def refuse_unsupported(precision: Precision, device: torch.device | str, option: str) -> None:
    """Raise ConfigError if a device cannot compute in a precision. A small forward and backward tests it.

    Args:
        option: name of the setting for the message, such as `fedsq_args.precision`.
    """
    if precision == "fp32":
        return
    device = torch.device(device)
    reason = None
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        reason = "it has no bf16 arithmetic"
    else:
        try:
            # Not an nn.Conv2d: its initial weights would change the state of the global random generator.
            weight = torch.ones(1, 1, 3, 3, device=device, requires_grad=True)
            with torch.autocast(device.type, HALF[precision]):
                y = F.conv2d(torch.ones(1, 1, 4, 4, device=device), weight)
            torch.autograd.backward(y.float().sum())
        except RuntimeError as error:
            reason = first_line(error)
    if reason is not None:
        other = "fp16 or fp32" if precision == "bf16" else "bf16 or fp32"
        raise ConfigError(f"{option} is {precision}, which {device} does not do: {reason}; use {other}")
