"""Keys of a state that name one tensor, or tensors that overlap in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .state import tensors_of


def tied_keys(model: nn.Module) -> dict[str, str]:
    """By key of the model's state: the first key whose tensor it shares, for every key that is not the first.

    Parameters come before buffers: a buffer that is a view of a parameter has the parameter's role. A view counts
    where its memory overlaps that of the other tensor; layers of one flat memory without overlap are not tied.
    """
    state = tensors_of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    order = [*(key for key in state if key in parameters), *(key for key in state if key not in parameters)]
    by_memory: dict[int, list[str]] = {}
    for key in order:
        if _in_memory(state[key]):
            by_memory.setdefault(state[key].untyped_storage().data_ptr(), []).append(key)
    tied: dict[str, str] = {}
    for keys in by_memory.values():
        for number, key in enumerate(keys):
            first = next((other for other in keys[:number] if _overlap(state[other], state[key])), None)
            if first is not None:
                tied[key] = tied.get(first, first)
    return tied


def _in_memory(value: Tensor) -> bool:
    plain = not (is_lazy(value) or value.is_meta or value.is_quantized or value.is_nested)
    return plain and value.layout is torch.strided and value.numel() > 0


def _overlap(one: Tensor, other: Tensor) -> bool:
    (start, end), (begin, stop) = _span(one), _span(other)
    return start < stop and begin < end


def _span(value: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and behind the last one."""
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    start = value.data_ptr()
    return start, start + (last + 1) * value.element_size()
