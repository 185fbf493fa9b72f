"""Values as bytes and back, in place of pickle: JSON for the structure, safetensors for the numbers.

    magic, version (u8), bytes of the structure (u32), bytes of the tensors (u64) | structure | tensors

Little-endian, and nothing behind. In the structure, what JSON has no word for is an object with one key:
`{"dict": [key, value, ...]}`, the same with `OrderedDict`, `{"tuple": [...]}`, `{"float": "nan"}`, and
`{"tensor": i}`, `{"complex": i}` (its last axis is real and imaginary part), `{"bytes": i}`: the i-th tensor.

Sizes are checked before what they would allocate is allocated: what `decode` makes of a hostile message stays
within a small multiple of the message's own size or of the limits below, whichever is less.
"""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, UpdateError

MAX_DEPTH = 32
"""Containers within containers."""
MAX_ELEMENTS = 100_000
"""Values and keys, containers included; a tensor is one, whatever its size."""
MAX_TENSORS = 10_000
"""Tensors, arrays and bytes."""
MAX_JSON = 2**24
"""Bytes of the structure, and of the tensors' names and shapes; bytes and tensors themselves do not count."""
MAX_AXES = 32
"""Of a tensor; numpy has no more either."""

_MAGIC, _VERSION = b"FEDSQ", 1
_HEAD = struct.Struct("<5sBIQ")
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
_INTEGERS = range(-(2**63), 2**64)
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_ENTRY = {"dtype", "shape", "data_offsets"}
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def encode(value: Any) -> bytes:
    """The message that `decode` makes `value` of again.

    Allowed: dict and OrderedDict with str or int keys, list, tuple, str, bytes, bool, int of 64 bits, float,
    None, dense tensors, numpy scalars (sent as Python's) and arrays (sent as tensors). Tensors are sent as
    independent contiguous copies, whatever they shared; neither device nor requires_grad travels.

    Raises:
        ConfigError: for anything else, with its place within `value`, and beyond the limits of this module.
    """
    writer = _Writer()
    structure = _json(writer.put(value))
    header = _json(writer.entries)
    header += b" " * (-len(header) % 8)
    if max(len(structure), len(header)) > MAX_JSON:
        raise ConfigError(f"a message's text exceeds {MAX_JSON} bytes; send long data as bytes or a tensor")
    head = _HEAD.pack(_MAGIC, _VERSION, len(structure), 8 + len(header) + writer.nbytes)
    # The library's `save` copies everything twice more on its way, and takes four times as long.
    return b"".join([head, structure, len(header).to_bytes(8, "little"), header, *writer.buffers])


def decode(data: bytes | bytearray, limit_bytes: int) -> Any:
    """The value that `encode` made `data` of. Tensors are on the CPU, writable, and own their memory.

    `limit_bytes` is the most that the whole message may measure.

    Raises:
        UpdateError: when `data` is anything but a whole message within the limits. No other error, whatever
            `data` is.
    """
    if not isinstance(data, (bytes, bytearray)):
        raise UpdateError(f"a message is bytes, not {type(data).__name__}")
    if len(data) > limit_bytes:
        raise UpdateError(f"a message of {len(data)} bytes exceeds the limit of {limit_bytes}")
    if len(data) < _HEAD.size or not data.startswith(_MAGIC):
        raise UpdateError(f"not a FedSQ message: it does not begin with {_MAGIC.decode()} and its lengths")
    _, version, structure_bytes, tensors_bytes = _HEAD.unpack_from(data)
    if version != _VERSION:
        raise UpdateError(f"a message of version {version}, where version {_VERSION} is spoken")
    announced = _HEAD.size + structure_bytes + tensors_bytes
    if len(data) != announced:
        what = "is truncated" if len(data) < announced else "has trailing bytes"
        raise UpdateError(f"a message {what}: {len(data)} bytes instead of {announced}")
    with memoryview(data) as view:
        split = _HEAD.size + structure_bytes
        tree = _parsed(view[_HEAD.size : split], "structure", 2 * MAX_DEPTH + 1)
        reader = _Reader(_tensors(view[split:]))
    value = reader.take(tree)
    if reader.tensors:
        raise UpdateError(f"a message has {len(reader.tensors)} tensors that its structure does not refer to")
    return value


class _Writer:
    """Turns a value into JSON's types, and gathers its tensors as a safetensors file has them."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}
        self.buffers: list[bytes | memoryview] = []
        self.nbytes = 0
        self._elements = 0

    def put(self, value: Any, path: tuple[Any, ...] = ()) -> Any:
        self._count(path)
        value = _unwrapped(value)
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is int or kind is str:
            return self._plain(value, path)
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if kind in (list, tuple, dict, OrderedDict):
            return self._container(value, path)
        if kind is bytes:
            return {"bytes": self._add("U8", [len(value)], value, path)}
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if kind is np.ndarray:
            return self._array(value, path)
        allowed = "numbers, text, bytes, plain containers and tensors can"
        raise ConfigError(f"{_place(path)} is a {kind.__qualname__}, which cannot be sent; {allowed}")

    def _count(self, path: tuple[Any, ...]) -> None:
        self._elements += 1
        if self._elements > MAX_ELEMENTS:
            raise ConfigError(f"{_place(path)} is beyond the {MAX_ELEMENTS} elements that a message may have")

    def _plain(self, value: int | str, path: tuple[Any, ...]) -> int | str:
        if isinstance(value, str):
            if not _is_text(value):
                raise ConfigError(f"{_place(path)} is text that UTF-8 cannot express; send it as bytes")
        elif value not in _INTEGERS:
            raise ConfigError(f"{_place(path)} is an integer beyond 64 bits; send it as text")
        return value

    def _container(self, value: Any, path: tuple[Any, ...]) -> Any:
        if len(path) >= MAX_DEPTH:
            raise ConfigError(f"{_place(path)} lies deeper than {MAX_DEPTH} containers")
        if isinstance(value, (list, tuple)):
            items = [self.put(item, (*path, i)) for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        flat: list[Any] = []
        for key, item in value.items():
            name = _unwrapped(key)
            if type(name) not in (str, int):
                raise ConfigError(
                    f"{_place(path)} has a {type(key).__name__} as a key; str and int can be sent"
                )
            self._count(path)
            flat += (self._plain(name, (*path, name)), self.put(item, (*path, name)))
        return {type(value).__name__: flat}

    def _array(self, value: np.ndarray[Any, Any], path: tuple[Any, ...]) -> Any:
        # torch takes neither negative strides nor a foreign byte order, and warns of read-only memory.
        native = np.require(value, value.dtype.newbyteorder("="), ["C", "W"])
        try:
            tensor = torch.from_numpy(native)
        except TypeError:
            raise ConfigError(f"{_place(path)} has dtype {value.dtype}, which no tensor has") from None
        return self._tensor(tensor, path)

    def _tensor(self, value: Tensor, path: tuple[Any, ...]) -> Any:
        hollow = value.is_meta or torch.nn.parameter.is_lazy(value)
        if hollow or value.layout is not torch.strided or value.is_quantized or value.is_nested:
            raise ConfigError(f"{_place(path)} is not a dense tensor with values; only those can be sent")
        dense, tag = value.detach().to("cpu").resolve_conj().resolve_neg().contiguous(), "tensor"
        if dense.is_complex():
            dense, tag = torch.view_as_real(dense), "complex"
        if dense.dtype not in _CODES:
            raise ConfigError(f"{_place(path)} is of {value.dtype}, which cannot be sent; convert it")
        if wrong := _shape_problem(dense.shape):
            raise ConfigError(f"{_place(path)} is a tensor with {wrong}")
        # As bytes: numpy has no bfloat16.
        raw = dense.view(-1).view(torch.uint8).numpy().data
        return {tag: self._add(_CODES[dense.dtype], [*dense.shape], raw, path)}

    def _add(self, code: str, shape: list[int], raw: bytes | memoryview, path: tuple[Any, ...]) -> int:
        index, start = len(self.buffers), self.nbytes
        if index >= MAX_TENSORS:
            raise ConfigError(f"{_place(path)} is beyond the {MAX_TENSORS} tensors of a message; stack them")
        self.nbytes += len(raw)
        self.entries[str(index)] = {"dtype": code, "shape": shape, "data_offsets": [start, self.nbytes]}
        self.buffers.append(raw)
        return index


class _Reader:
    """Turns what JSON gave into a value; each tensor is taken once."""

    def __init__(self, tensors: dict[int, Tensor]) -> None:
        self.tensors = tensors
        self._elements = 0

    def take(self, node: Any, depth: int = 0) -> Any:
        self._count()
        if isinstance(node, str):
            return _checked_text(node)
        if isinstance(node, list):
            return [self.take(item, depth + 1) for item in self._items(node, depth)]
        if not isinstance(node, dict):
            return node
        if len(node) != 1:
            raise UpdateError(f"a message's structure has an object of {len(node)} keys instead of one")
        ((tag, body),) = node.items()
        if tag in ("dict", "OrderedDict"):
            return self._mapping({} if tag == "dict" else OrderedDict(), self._items(body, depth), depth)
        if tag == "tuple":
            return tuple([self.take(item, depth + 1) for item in self._items(body, depth)])
        if tag == "float" and isinstance(body, str) and body in _NOT_FINITE:
            return _NOT_FINITE[body]
        if tag in ("tensor", "complex", "bytes"):
            return self._tensor(tag, body)
        raise UpdateError(f"a message's structure has the unknown object {_brief(tag)}")

    def _count(self) -> None:
        self._elements += 1
        if self._elements > MAX_ELEMENTS:
            raise UpdateError(f"a message has more than {MAX_ELEMENTS} elements")

    def _items(self, body: Any, depth: int) -> list[Any]:
        if not isinstance(body, list):
            raise UpdateError("a message's structure has a container that is not a list")
        if depth >= MAX_DEPTH:
            raise UpdateError(f"a message is nested deeper than {MAX_DEPTH} containers")
        return body

    def _mapping(self, into: dict[Any, Any], flat: list[Any], depth: int) -> dict[Any, Any]:
        if len(flat) % 2:
            raise UpdateError("a message has a mapping with a key that has no value")
        for key, item in zip(flat[::2], flat[1::2], strict=True):
            self._count()
            if isinstance(key, str):
                _checked_text(key)
            elif type(key) is not int:
                raise UpdateError(f"a message has a key of type {type(key).__name__}, not str or int")
            if key in into:
                raise UpdateError(f"a message has the key {_brief(key)} twice in one mapping")
            into[key] = self.take(item, depth + 1)
        return into

    def _tensor(self, tag: str, index: Any) -> Tensor | bytes:
        if type(index) is not int or index not in self.tensors:
            raise UpdateError(f"a message refers to tensor {_brief(index)}, which is not there or taken")
        tensor = self.tensors.pop(index)
        if tag == "tensor":
            return tensor
        if tag == "bytes":
            if tensor.dtype != torch.uint8 or tensor.dim() != 1:
                raise UpdateError(f"a message has bytes that are a {tensor.dim()}-dimensional {tensor.dtype}")
            return tensor.numpy().tobytes()
        if tensor.dtype not in _COMPLEX_PARTS or tensor.dim() == 0 or tensor.shape[-1] != 2:
            raise UpdateError(f"a message has complex numbers of {tensor.dtype}, {tuple(tensor.shape)}")
        return torch.view_as_complex(tensor)


def _tensors(view: memoryview) -> dict[int, Tensor]:
    """The tensors of a safetensors file, whose names are numbers from 0 on."""
    from safetensors import SafetensorError, deserialize

    # The library alone is too lenient: of two entries of one name it takes the last, it calls any shape a
    # shape, and it reports foreign text as it came. So its header passes here first.
    header_bytes = int.from_bytes(view[:8], "little")
    if len(view) < 8 or header_bytes > len(view) - 8:
        raise UpdateError("a message's tensors have a header that does not fit")
    header = _parsed(view[8 : 8 + header_bytes], "tensor header", 3)
    if not isinstance(header, dict) or header.keys() != {str(i) for i in range(len(header))}:
        raise UpdateError("a message's tensors are not named 0, 1, 2, and so on")
    if len(header) > MAX_TENSORS:
        raise UpdateError(f"a message has more than {MAX_TENSORS} tensors")
    for name, entry in header.items():
        if wrong := _entry_problem(entry):
            raise UpdateError(f"tensor {name} of a message has {wrong}")
    try:
        parts = deserialize(bytes(view))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise UpdateError(f"a message's tensors are damaged: {_brief(str(error))}") from None
    return {int(name): _built(name, _DTYPES[it["dtype"]], it["shape"], it["data"]) for name, it in parts}


def _entry_problem(entry: Any) -> str | None:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        return "an entry without exactly dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        return f"the unknown dtype {_brief(dtype)}"
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            return "a shape or offsets that are not lists of integers"
    return _shape_problem(shape) if len(offsets) == 2 else "offsets that are not two"


def _shape_problem(shape: Sequence[int]) -> str | None:
    if len(shape) > MAX_AXES:
        return f"{len(shape)} axes, more than {MAX_AXES}"
    # An empty tensor may claim any size beside its 0, and strides are 64-bit numbers.
    if math.prod(max(size, 1) for size in shape) >= 2**59:
        return "a shape beyond any memory"
    return None


def _built(name: str, dtype: torch.dtype, shape: list[int], data: bytearray) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    if dtype is torch.bool:
        raw = torch.frombuffer(data, dtype=torch.uint8)
        if bool((raw > 1).any()):  # what torch computes with such a truth value is undefined
            raise UpdateError(f"tensor {name} of a message has truth values that are neither 0 nor 1")
        return raw.view(torch.bool).reshape(shape)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _parsed(view: memoryview, what: str, depth: int) -> Any:
    """Strict JSON: UTF-8, no key twice, 64-bit numbers, finite; at most `depth` brackets within brackets."""
    if len(view) > MAX_JSON:
        raise UpdateError(f"a message's {what} exceeds {MAX_JSON} bytes")
    try:
        raw = bytes(view)
        _check_brackets(raw, depth)
        return json.loads(
            raw.decode(),
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
            object_pairs_hook=_unique,
        )
    except ValueError as error:
        raise UpdateError(f"a message's {what} is not what it should be: {_brief(str(error))}") from None


def _check_brackets(raw: bytes, depth: int) -> None:
    """Before the parser may recurse, or make an object of every three bytes.

    Where `raw` is no JSON, the parser comes to no later place than the one up to which this reads it rightly.
    """
    # An element takes at most four quotes and three of `{`, `[` and `,`; a tensor's entry in the header, of
    # which there are fewer, ten and 6 + MAX_AXES.
    most = 4 * MAX_ELEMENTS
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if bare.count(b'"') <= most:
        outside = b"".join(bare.split(b'"')[::2])
        if sum(map(outside.count, (b"{", b"[", b","))) <= most:
            level = 0
            for byte in outside.translate(None, _NOT_BRACKETS):
                level += 1 if byte in b"{[" else -1
                if not 0 <= level <= depth:
                    raise ValueError("brackets nested too deep, or unbalanced")
            return
    raise ValueError(f"more than {MAX_ELEMENTS} elements")


def _integer(text: str) -> int:
    # Length first: to read a long integer takes quadratic time.
    if len(text) > 20 or int(text) not in _INTEGERS:
        raise ValueError("a number too large for 64 bits")
    return int(text)


def _finite(text: str) -> float:
    if len(text) > 32 or not math.isfinite(float(text)):
        raise ValueError("a number too large or too long for a float, or none")
    return float(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key twice in one object")
    return mapping


def _unwrapped(value: Any) -> Any:
    """A numpy scalar as Python's; anything else, and what Python has no type for, as it is."""
    if isinstance(value, np.generic) and (value.dtype.kind in "biuSU" or isinstance(value, np.floating)):
        return value.item()
    return value


def _is_text(text: str) -> bool:
    """Whether UTF-8 has it: a lone surrogate would break whoever prints or stores it."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked_text(text: str) -> str:
    if not _is_text(text):
        raise UpdateError("a message has text that UTF-8 cannot express")
    return text


def _json(tree: Any) -> bytes:
    return json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _brief(what: Any) -> str:
    """For a message of one line, whatever a stranger wrote."""
    # Python refuses to print integers of thousands of digits.
    printed = isinstance(what, str) or (isinstance(what, int) and -(2**63) <= what < 2**64)
    text = ascii(what) if printed else f"of type {type(what).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _place(path: tuple[Any, ...]) -> str:
    return "the value" + "".join(f"[{_brief(key)}]" for key in path)
