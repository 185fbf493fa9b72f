"""A state as bytes and back: a safetensors file that keeps the order of the state's keys.

The library's own `save` sorts the keys, and copies every tensor twice more; its `load` accepts a name twice.

safetensors does not know every complex type: a complex tensor is written as real and imaginary part in a last
axis of 2, and who reads it must know its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UpdateError
from ..federation.state import State
from ..federation.updates import brief

MAX_TENSORS = 10_000
MAX_AXES = 32
MAX_JSON = 2**22
"""Bytes of a JSON text of a message."""
MAX_VALUES = 2**18
"""Values in the table of tensors: about 25 for each of them."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_COMPLEX_PARTS = (torch.float64, torch.float32, torch.float16)


def pack(state: Mapping[str, Tensor]) -> tuple[list[Any], tuple[str, ...]]:
    """A safetensors file in parts that are to be joined, and the names of the complex tensors in it.

    Raises:
        ConfigError: a tensor cannot be sent, or there are too many.
    """
    entries: dict[str, Any] = {}
    buffers: list[memoryview] = []
    complex_names: list[str] = []
    start = 0
    for key, value in state.items():
        dense = _dense(key, value)
        if dense.is_complex():
            complex_names.append(key)
            dense = torch.view_as_real(dense)
        if dense.dtype not in _CODES:
            raise ConfigError(f"tensor {brief(key)} is of {value.dtype}, which cannot be sent; convert it")
        # As bytes: numpy has no bfloat16.
        buffers.append(dense.view(-1).view(torch.uint8).numpy().data)
        end = start + len(buffers[-1])
        entries[key] = _entry(_CODES[dense.dtype], [*dense.shape], start, end)
        start = end
    try:
        table = _table(entries)
    except UnicodeEncodeError:
        raise ConfigError("a tensor has a name that UTF-8 cannot express") from None
    wrong = f"{len(state)} tensors, more than {MAX_TENSORS}" if len(state) > MAX_TENSORS else None
    if wrong := wrong or size_problem(table, MAX_VALUES):
        raise ConfigError(f"a state cannot be sent: its table has {wrong}")
    return [len(table).to_bytes(8, "little"), table, *buffers], tuple(complex_names)


def unpack(view: memoryview, complex_names: Collection[str]) -> State:
    """The state that `pack` made `view` of.

    Raises:
        UpdateError: `view` is anything else.
    """
    length = int.from_bytes(view[:8], "little")
    table, data = view[8 : 8 + length], view[8 + length :]
    if len(view) < 8 or len(table) != length:
        raise UpdateError("a message's table of tensors does not fit into it")
    if wrong := size_problem(table, MAX_VALUES):
        raise UpdateError(f"a message's table of tensors has {wrong}")
    state, entries, start = State(), {}, 0
    try:
        found = json.loads(bytes(table).decode())
        if not isinstance(found, dict) or len(found) > MAX_TENSORS:
            raise ValueError(f"no mapping, or more than {MAX_TENSORS} tensors")
        for key, entry in found.items():
            code, shape = entry["dtype"], entry["shape"]
            end = start + _nbytes(code, shape)
            if end > len(data):
                raise ValueError("a tensor that is larger than the message")
            state[key] = _tensor(_DTYPES[code], shape, data[start:end], key in complex_names)
            entries[key] = _entry(code, shape, start, end)
            start = end
        # This compares the offsets, too: every tensor begins where the one before it ends.
        if _table(entries) != table or start != len(data):
            raise ValueError("it does not describe the bytes behind it, or not in its one form")
    except KeyError as error:
        raise UpdateError(f"a message's table of tensors has an entry without {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UpdateError(f"a message's table of tensors is wrong: {brief(str(error), 200)}") from None
    return state


def size_problem(text: bytes | memoryview, most: int) -> str | None:
    """Why a JSON text is too large, judged before a parser makes objects of it."""
    if len(text) > MAX_JSON:
        return f"{len(text)} bytes, more than {MAX_JSON}"
    values = sum(map(bytes(text).count, (b"{", b"[", b",")))
    return f"{values} values, more than {most}" if values > most else None


def as_json(tree: Any) -> bytes:
    return json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _entry(code: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": code, "shape": shape, "data_offsets": [start, end]}


def _table(entries: Mapping[str, Any]) -> bytes:
    text = as_json(entries)
    return text + b" " * (-len(text) % 8)


def _dense(key: str, value: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous."""
    hollow = value.is_meta or torch.nn.parameter.is_lazy(value)
    if hollow or value.layout is not torch.strided or value.is_quantized or value.is_nested:
        raise ConfigError(f"tensor {brief(key)} is not a dense tensor with values; it cannot be sent")
    if wrong := _shape_problem(value.shape):
        raise ConfigError(f"tensor {brief(key)} has {wrong}; it cannot be sent")
    return value.detach().to("cpu").resolve_conj().resolve_neg().contiguous()


def _nbytes(code: Any, shape: Any) -> int:
    if not isinstance(code, str) or code not in _DTYPES:
        raise ValueError(f"the unknown dtype {brief(code)}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("a shape that is no list of sizes")
    if wrong := _shape_problem(shape):
        raise ValueError(wrong)
    return math.prod(shape) * _DTYPES[code].itemsize


def _tensor(dtype: torch.dtype, shape: list[int], raw: memoryview, is_complex: bool) -> Tensor:
    if dtype is torch.bool and bytes(raw).strip(b"\0\1"):  # what torch computes with such values is undefined
        raise ValueError("truth values that are neither 0 nor 1")
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if len(raw) else torch.empty(0, dtype=dtype)
    tensor = flat.view(shape)
    if not is_complex:
        return tensor
    if dtype not in _COMPLEX_PARTS or not shape or shape[-1] != 2:
        raise ValueError(f"complex numbers of {dtype} in the shape {shape}")
    return torch.view_as_complex(tensor)


def _shape_problem(shape: Sequence[int]) -> str | None:
    if len(shape) > MAX_AXES:
        return f"{len(shape)} axes, more than {MAX_AXES}"
    # An empty tensor may claim any size beside its 0, and strides are 64-bit numbers.
    if math.prod(max(size, 1) for size in shape) >= 2**59:
        return "a shape beyond any memory"
    return None
