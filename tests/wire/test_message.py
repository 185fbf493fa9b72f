"""Messages come back as they were, or are refused; nothing else happens."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import re
import time
import tracemalloc
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor, nn
from torchvision.models import resnet18

from fedsq_plugin.errors import ConfigError, UpdateError
from fedsq_plugin.federation.state import fingerprint, state_of
from fedsq_plugin.wire import message as wire
from fedsq_plugin.wire.message import decode, encode

LIMIT = 2**27
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex128, torch.complex64, torch.complex32, torch.bool, torch.int64, torch.int32, torch.int16),
    *(torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
]
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def same(one: Any, other: Any) -> bool:
    """Types, order, values, NaN and the sign of zero included; tensors bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        alike = (one.dtype, one.shape, other.device.type) == (other.dtype, other.shape, "cpu")
        return alike and raw(one) == raw(other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return all(map(same, one.items(), other.items())) and len(one) == len(other)
    if isinstance(one, float):
        return repr(one) == repr(other)
    return bool(one == other)


def raw(tensor: Tensor) -> bytes:
    dense = tensor.detach().cpu().resolve_conj().contiguous()
    dense = torch.view_as_real(dense) if dense.is_complex() else dense
    return dense.view(-1).view(torch.uint8).numpy().tobytes()


def back(value: Any) -> Any:
    return decode(encode(value), LIMIT)


def refused(data: Any, limit: int = LIMIT) -> str:
    with pytest.raises(UpdateError) as caught:
        decode(data, limit)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    return str(caught.value)


def unsendable(value: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        encode(value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def parts(message: bytes) -> tuple[bytes, bytes, bytes]:
    """Structure, header and data of a message."""
    _, _, structure, _ = wire._HEAD.unpack_from(message)
    middle = wire._HEAD.size + structure
    start = middle + 8
    end = start + int.from_bytes(message[middle:start], "little")
    return message[wire._HEAD.size : middle], message[start:end], message[end:]


def message(structure: bytes | str, header: bytes | str = "{}", data: bytes = b"") -> bytes:
    """A message with right lengths and whatever content."""
    structure = structure.encode() if isinstance(structure, str) else structure
    header = header.encode() if isinstance(header, str) else header
    tensors = len(header).to_bytes(8, "little") + header + data
    return wire._HEAD.pack(b"FEDSQ", 1, len(structure), len(tensors)) + structure + tensors


def one(dtype: str, shape: Any, data: bytes, structure: str = '{"tensor":0}', **other: Any) -> bytes:
    """A message of one tensor, described as told."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)], **other}
    return message(structure, json.dumps({"0": entry}), data)


# --- what may be sent comes back ---


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    content = draw(st.binary(min_size=16 * 27, max_size=16 * 27))
    count = math.prod(shape)
    width = torch.empty(0, dtype=dtype).element_size()
    if dtype is torch.bool:
        content = bytes(byte & 1 for byte in content)
    flat = torch.frombuffer(bytearray(content[: max(count * width, 16)]), dtype=torch.uint8).view(dtype)
    tensor = flat[:count].reshape(shape)
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


texts = st.text(st.characters(codec="utf-8"), max_size=8)
integers = st.integers(-(2**63), 2**64 - 1)
leaves = st.one_of(st.none(), st.booleans(), integers, st.floats(), texts, st.binary(max_size=40), tensors())
keys = st.one_of(texts, integers)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(values)
def test_values_come_back(value: Any) -> None:
    assert same(back(value), value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (3, 2)], ids=str)
def test_every_dtype_and_shape_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    # What follows the odd number of bytes must not mind where it lies.
    sent = [torch.ones(shape).to(dtype), b"odd", torch.ones(shape).to(dtype)]
    assert same(back(sent), sent)


def test_the_kind_of_mapping_and_its_order_come_back() -> None:
    sent = {"b": OrderedDict(z=1, a=2), 1: {}, "1": OrderedDict(), -5: {"dict": {"tensor": 0}}}
    assert same(back(sent), sent)


def test_a_model_comes_back() -> None:
    state = state_of(resnet18(num_classes=3))
    received = back({"model_params": state, "num_samples": 12})
    assert type(received["model_params"]) is OrderedDict
    assert fingerprint(received["model_params"]) == fingerprint(state)


def test_a_model_is_copied_once_on_its_way_out_and_twice_on_its_way_in() -> None:
    state = OrderedDict((str(i), torch.zeros(2**18)) for i in range(8))
    size = 8 * 2**20
    tracemalloc.start()
    try:
        data = encode(state)
        sent = tracemalloc.get_traced_memory()[1] / size
        tracemalloc.reset_peak()
        decode(data, LIMIT)
        received = tracemalloc.get_traced_memory()[1] / size
    finally:
        tracemalloc.stop()
    assert sent < 1.1 and received < 1 + 2.1  # `data` itself is counted


def test_views_conjugates_and_shared_storage_come_back_as_their_values() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    z = torch.complex(base, -base)
    parameter = nn.Parameter(base)
    sent = [base, base, base.t(), base[1:, ::2], base[0].expand(5, 4), z.conj(), z.conj().imag, parameter]
    sent += [torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    received = back(sent)
    for was, now in zip(sent, received, strict=True):
        assert torch.equal(was, now) and now.is_contiguous() and not now.requires_grad
        assert type(now) is Tensor
    received[0].zero_()
    assert torch.equal(received[1], base)


def test_received_tensors_are_independent_of_the_message() -> None:
    data = bytearray(encode([torch.zeros(3), b"abc"]))
    tensor, raw_bytes = decode(data, LIMIT)
    data[:] = b"\xff" * len(data)
    data.clear()
    assert torch.equal(tensor.add_(1), torch.ones(3)) and raw_bytes == b"abc"


def test_numpy_comes_back_as_python_and_tensors() -> None:
    sent = {
        np.str_("a"): [np.float32(0.5), np.float64(math.inf), np.int64(-3), np.uint64(2**63), np.bool_(True)],
        np.int64(4): (np.str_("x"), np.bytes_(b"y")),
        "arrays": [
            np.arange(4)[::-1],
            np.array(1.5, ">f4"),
            np.zeros((2, 0), bool),
            np.ones(2, np.complex64),
        ],
    }
    sent["arrays"][0].flags.writeable = False
    expected = {
        "a": [0.5, math.inf, -3, 2**63, True],
        4: ("x", b"y"),
        "arrays": [
            *(torch.tensor([3, 2, 1, 0]), torch.tensor(1.5), torch.zeros(2, 0, dtype=torch.bool)),
            torch.ones(2, dtype=torch.complex64),
        ],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(back(sent), expected)


def test_the_limits_themselves_can_be_sent() -> None:
    deep: Any = torch.zeros(1)
    for _ in range(wire.MAX_DEPTH):
        deep = {"a": deep}
    assert same(back(deep), deep)
    for many in ([math.nan] * 99_999, [[]] * 99_999, dict.fromkeys(range(49_999), '"[{,\\'), [b""] * 10_000):
        assert same(back(many), many)
    wide = [torch.zeros([1] * wire.MAX_AXES)] * wire.MAX_TENSORS
    assert len(back(wide)) == wire.MAX_TENSORS


def test_the_tensors_of_a_message_are_a_safetensors_file() -> None:
    sent = [torch.arange(3, dtype=torch.int16), torch.ones(2, 2), torch.tensor(True)]
    _, header, data = parts(encode(sent))
    assert len(header) % 8 == 0
    loaded = load(len(header).to_bytes(8, "little") + header + data)
    assert same([loaded[str(i)] for i in range(3)], sent)


# --- what may not be sent ---


class Custom:
    pass


@pytest.mark.parametrize(
    ("value", "fragments"),
    [
        ({"a": [1, {2: Custom()}]}, ["the value['a'][1][2] is a Custom", "cannot be sent"]),
        ({"a": {1, 2}}, ["the value['a'] is a set"]),
        (print, ["the value is a builtin_function_or_method"]),
        (1j, ["complex"]),
        (defaultdict(int), ["defaultdict"]),
        (torch.Size([1]), ["Size"]),
        (bytearray(b"x"), ["bytearray"]),
        ({(1, 2): 3}, ["has a tuple as a key", "str and int"]),
        ({True: 3}, ["bool as a key"]),
        ({"a": 2**64}, ["['a'] is an integer beyond 64 bits"]),
        ([-(2**63) - 1], ["[0] is an integer beyond 64 bits"]),
        ({10**5000: 1}, ["an integer beyond 64 bits"]),
        ("\ud800", ["UTF-8"]),
        ({"a\udfff": 1}, ["UTF-8"]),
        (torch.zeros(2, device="meta"), ["dense tensor"]),
        (torch.eye(2).to_sparse(), ["dense tensor"]),
        (nn.LazyLinear(2).state_dict(), ["['weight'] is not a dense tensor"]),
        (torch.zeros([1] * 33), ["33 axes"]),
        (torch.empty(0, 2**61), ["beyond any memory"]),
        (torch.zeros(2).to(torch.float8_e4m3fnuz), ["float8_e4m3fnuz", "convert"]),
        (np.array([object()]), ["dtype object"]),
        (np.zeros(2, "M8[s]"), ["dtype datetime64"]),
        (np.timedelta64(1, "ns"), ["timedelta64"]),
        (np.longdouble(1), ["longdouble"]),
        ([0] * 100_000, ["[99999]", "100000 elements"]),
        (dict.fromkeys(range(50_000)), ["100000 elements"]),
        ([b""] * 10_001, ["[10000]", "10000 tensors"]),
        ("x" * 2**24, ["exceeds 16777216 bytes"]),
    ],
    ids=lambda x: str(type(x).__name__),
)
def test_what_cannot_be_sent_is_named_with_its_place(value: Any, fragments: list[str]) -> None:
    told = unsendable(value)
    assert all(fragment in told for fragment in fragments), told


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_tensor_cannot_be_sent() -> None:
    assert "dense tensor" in unsendable([torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)])


def test_a_value_too_deep_or_within_itself_cannot_be_sent() -> None:
    deep: Any = 0
    for _ in range(wire.MAX_DEPTH + 1):
        deep = (deep,)
    assert "32 containers" in unsendable(deep)
    cycle: list[Any] = []
    cycle += [cycle] * 10
    assert "deeper" in unsendable(cycle)


# --- what arrives and is refused ---

GOOD = encode({"model": OrderedDict(w=torch.ones(2, 3), b=torch.zeros(3)), "round": 3})


def changed(at: int, to: bytes) -> bytes:
    return GOOD[:at] + to + GOOD[at + len(to) :]


ENVELOPES: dict[str, tuple[Any, str]] = {
    "empty": (b"", "does not begin"),
    "half a head": (GOOD[:10], "does not begin"),
    "magic": (changed(0, b"fedsq"), "does not begin"),
    "version": (changed(5, b"\x02"), "version 2"),
    "truncated": (GOOD[:-1], "truncated"),
    "trailing": (GOOD + b"\0", "trailing"),
    "structure length": (changed(6, b"\xff" * 4), "truncated"),
    "tensors length": (changed(10, b"\xff" * 8), "truncated"),
    "structure swallows all": (wire._HEAD.pack(b"FEDSQ", 1, 4, 0) + b"null", "header that does not fit"),
    "text": ("FEDSQ", "is bytes, not str"),
    "nothing": (None, "is bytes, not NoneType"),
}
STRUCTURES: dict[str, tuple[bytes | str, str]] = {
    "nothing": ("", "Expecting value"),
    "no JSON": ("{]", "structure"),
    "two values": ("1 2", "Extra data"),
    "invalid UTF-8": (b'"\xff"', "utf-8"),
    "UTF-16": ('"a"'.encode("utf-16"), "structure"),
    "byte order mark": ("\ufeff1", "BOM"),
    "lone surrogate": (r'"\ud800"', "UTF-8"),
    "lone surrogate as a key": (r'{"dict":["\udfff",1]}', "UTF-8"),
    "control character": ('"\n"', "control character"),
    "integer of 65 bits": ("18446744073709551616", "too large"),
    "integer of a million digits": ("9" * 10**6, "too large"),
    "float too large": ("1e999", "too large"),
    "float too long": ("0." + "1" * 10**6, "too long"),
    "NaN of JSON's extension": ("NaN", "none"),
    "Infinity of JSON's extension": ("[-Infinity]", "none"),
    "deep lists": ("[" * 33 + "]" * 33, "deeper than 32"),
    "deeper than the parser": ("[" * 10**5, "nested too deep"),
    "deep objects": ('{"tuple":[' * 33 + "]}" * 33, "nested too deep"),
    "deep but for a string": ('["' + "]" * 99 + '",' + "[" * 99, "nested too deep"),
    "deep but for an escaped quote": (r'["\"]]]]]", ' + "[" * 99, "nested too deep"),
    "closing brackets": ("]" * 10**6, "unbalanced"),
    "many elements": ("[" + "0," * 100_000 + "0]", "100000 elements"),
    "many empty lists": ("[" + "[]," * 400_000 + "[]]", "100000 elements"),
    "many strings": ("[" + '"",' * 400_000 + '""]', "100000 elements"),
    "many quotes": ('"' * 10**6, "100000 elements"),
    "many keys": ('{"dict":[' + ",".join(f"{i},0" for i in range(50_000)) + "]}", "100000 elements"),
    "long": ('"' + "x" * 2**24 + '"', "exceeds 16777216 bytes"),
    "unknown tag": ('{"__reduce__":["os.system","true"]}', "unknown object '__reduce__'"),
    "two tags": ('{"tuple":[],"dict":[]}', "2 keys"),
    "no tag": ("{}", "0 keys"),
    "tag twice": ('{"tuple":[],"tuple":[1]}', "twice"),
    "dict of an object": ('{"dict":{"a":1}}', "not a list"),
    "tuple of a number": ('{"tuple":1}', "not a list"),
    "odd dict": ('{"dict":["a"]}', "no value"),
    "key twice": ('{"dict":["a",1,"a",2]}', "'a' twice"),
    "integer key twice": ('{"OrderedDict":[1,1,1,2]}', "1 twice"),
    "float key": ('{"dict":[1.0,1]}', "key of type float"),
    "bool key": ('{"dict":[true,1]}', "key of type bool"),
    "null key": ('{"dict":[null,1]}', "key of type NoneType"),
    "list key": ('{"dict":[[],1]}', "key of type list"),
    "finite float as a tag": ('{"float":"1.5"}', "unknown object"),
    "float of a list": ('{"float":[]}', "unknown object"),
    "tensor not there": ('{"tensor":0}', "not there"),
    "tensor by name": ('{"tensor":"0"}', "not there"),
    "tensor by bool": ('{"tensor":false}', "not there"),
    "tensor by list": ('{"bytes":[0]}', "not there"),
    "hostile text": ('{"' + r"\n\u001b[2J" * 40 + '":1}', "unknown object"),
}
F = '{"tensor":0}'
ENTRY = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
TENSORS: dict[str, tuple[bytes, str]] = {
    "not referred to": (one("U8", [1], b"x", "null"), "1 tensors"),
    "referred to twice": (one("U8", [1], b"x", f"[{F},{F}]"), "or taken"),
    "foreign name": (message(F, f'{{"a":{ENTRY}}}', b"x"), "not named"),
    "name with a zero": (message(F, f'{{"00":{ENTRY}}}', b"x"), "not named"),
    "metadata": (message("null", '{"__metadata__":{"a":"b"}}'), "not named"),
    "name twice": (message(F, f'{{"0":{ENTRY},"0":{ENTRY}}}', b"x"), "twice"),
    "list as header": (message("null", "[]"), "not named"),
    "empty header": (message("null", ""), "Expecting value"),
    "header longer than the rest": (message("null")[:-10] + b"\x03" + b"\0" * 7 + b"{}", "does not fit"),
    "header beyond 64 bits": (message("null")[:-10] + b"\xff" * 8 + b"{}", "does not fit"),
    "invalid UTF-8": (message("null", b'{"\xff":0}'), "utf-8"),
    "deep header": (message("null", '{"0":' * 10**5), "nested too deep"),
    "long header": (message("null", "{}" + " " * 2**24), "exceeds"),
    "number too large": (message(F, '{"0":{"shape":[1e999]}}'), "too large"),
    "entry of a number": (message(F, '{"0":1}'), "exactly dtype"),
    "entry without offsets": (message(F, '{"0":{"dtype":"U8","shape":[1]}}', b"x"), "exactly dtype"),
    "entry with more": (one("U8", [1], b"x", more=1), "exactly dtype"),
    "dtype unknown": (one("F4", [2], b"x"), "unknown dtype 'F4'"),
    "dtype complex": (one("C64", [1], b"x" * 8), "unknown dtype"),
    "dtype of a list": (one([], [1], b"x"), "unknown dtype"),
    "dtype with a line": (one("U8\nERROR", [1], b"x"), r"U8\nERROR"),
    "shape negative": (one("U8", [-1, -1], b"x"), "lists of integers"),
    "shape of floats": (one("U8", [1.0], b"x"), "lists of integers"),
    "shape of bools": (one("U8", [True], b"x"), "lists of integers"),
    "shape of a number": (one("U8", 1, b"x"), "lists of integers"),
    "shape too large": (one("U8", [2], b"x"), "damaged"),
    "shape too small": (one("U8", [1], b"xy"), "damaged"),
    "shape overflows": (one("F32", [2**62, 2**62, 4], b"x"), "beyond any memory"),
    "shape overflows to the right size": (one("U8", [2**32, 2**32], b""), "beyond any memory"),
    "empty but for its strides": (one("F32", [0, 2**62, 2**62], b""), "beyond any memory"),
    "axes": (one("U8", [1] * 33, b"x"), "33 axes"),
    "five thousand axes": (one("U8", [1] * 5000, b"x"), "5000 axes"),
    "one offset": (one("U8", [1], b"x", data_offsets=[0]), "not two"),
    "offsets of text": (one("U8", [1], b"x", data_offsets="01"), "lists of integers"),
    "offsets reversed": (one("U8", [1], b"x", data_offsets=[1, 0]), "damaged"),
    "offsets beyond": (one("U8", [2], b"x", data_offsets=[0, 2]), "damaged"),
    "offsets near 64 bits": (one("U8", [1], b"x", data_offsets=[2**64 - 1, 2**64 - 1]), "damaged"),
    "a hole": (one("U8", [1], b"xy", data_offsets=[1, 2]), "damaged"),
    "overlap": (message(f'[{F},{{"tensor":1}}]', f'{{"0":{ENTRY},"1":{ENTRY}}}', b"x"), "damaged"),
    "trailing data": (message(F, f'{{"0":{ENTRY}}}', b"xy"), "damaged"),
    "data without a tensor": (message("null", "{}", b"x"), "damaged"),
    "truth value of 2": (one("BOOL", [1], b"\x02"), "neither 0 nor 1"),
    "bytes of floats": (one("F32", [1], b"abcd", '{"bytes":0}'), "bytes that are"),
    "bytes in two axes": (one("U8", [1, 1], b"x", '{"bytes":0}'), "bytes that are"),
    "complex of integers": (one("I8", [2], b"xy", '{"complex":0}'), "complex numbers of torch.int8"),
    "complex of bfloat16": (one("BF16", [2], b"xxyy", '{"complex":0}'), "complex numbers"),
    "complex of three": (one("F16", [3], b"xxyyzz", '{"complex":0}'), "complex numbers"),
    "complex of a scalar": (one("F16", [], b"xx", '{"complex":0}'), "complex numbers"),
    "too many": (
        message(json.dumps([{"tensor": i} for i in range(10_001)]), json.dumps(dict.fromkeys(range(10_001)))),
        "10000 tensors",
    ),
}
HOSTILE = ENVELOPES | {f"structure: {k}": (message(s), why) for k, (s, why) in STRUCTURES.items()}
HOSTILE |= {f"tensors: {k}": case for k, case in TENSORS.items()}


@pytest.mark.parametrize(("data", "why"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_messages_are_refused_at_once(data: Any, why: str) -> None:
    began = time.process_time()
    assert why in refused(data)
    assert time.process_time() - began < 2.0


def test_every_truncation_is_refused() -> None:
    for length in range(len(GOOD)):
        refused(GOOD[:length])


def test_the_limit_holds_for_the_whole_message() -> None:
    decode(GOOD, len(GOOD))
    assert f"limit of {len(GOOD) - 1}" in refused(GOOD, len(GOOD) - 1)


def test_lengths_beyond_the_message_allocate_nothing() -> None:
    hostile = [
        changed(6, b"\xff" * 12),
        one("F64", [2**40], b"12345678"),
        one("F64", [2**58, 0], b""),
        message("[" * 10**5),
    ]
    tracemalloc.start()
    try:
        for data in hostile[:2] + hostile[3:]:
            refused(data)
        assert decode(hostile[2], LIMIT).numel() == 0
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


def test_a_message_of_tiny_elements_allocates_within_the_limits() -> None:
    data = message("[" + "[]," * (5 * 10**6) + "[]]")
    tracemalloc.start()
    try:
        refused(data)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(data)
    finally:
        tracemalloc.stop()


def test_a_crafted_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "ran"

    class Attack:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {trace}",)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        attack = pickle.dumps({"model_params": Attack()}, protocol)
        refused(attack)
        refused(message(attack))
        refused(message("null", attack))
        assert back({"payload": attack}) == {"payload": attack}  # bytes are bytes
    assert not trace.exists()
    os.system(f"touch {trace}")  # the attack would have worked
    assert trace.exists()


# --- fuzz ---

CORPUS = [
    GOOD,
    encode(None),
    encode({"msg_type": 3, "sender": 1, "model_params": OrderedDict(w=torch.rand(4, 4), n=torch.tensor(7))}),
    encode([torch.tensor([True, False]), torch.ones(2, dtype=torch.complex64), b"bytes", torch.zeros(0, 3)]),
    encode({1: (1.5, -(2**63), math.nan, "é\u2028\U0001f600"), "nested": [[[{"a": [{}]}]]]}),
    encode({"half": torch.ones(3, dtype=torch.bfloat16), "array": np.arange(6, dtype=np.uint16)}),
    pickle.dumps({"model_params": {"w": [1.0] * 4}}),
]
TOKENS = [
    *rb"""[ ] { } , : " \ \u 0 -1 1e999 null true NaN [0,2] {"tensor":0} {"tensor":1}""".split(),
    *b'4294967296 9223372036854775808 18446744073709551615 "complex" "dict" "BOOL" "F64" "shape"'.split(),
    *(b"\xff", b"\xed\xa0\x80", b"[" * 70),
]


def mutated(piece: bytes, rng: random.Random) -> bytes:
    """A few edits: bits, bytes, tokens, cuts, repetitions."""
    content = bytearray(piece)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice((1, 1, 2, 8, 40)))
        match rng.randrange(6):
            case 0 if at < len(content):
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                content[at:end] = rng.randbytes(end - at)
            case 2:
                content[at:end] = b""
            case 3:
                content[at:at] = rng.choice(TOKENS)
            case 4:
                content[at:end] = rng.choice(TOKENS)
            case _:
                content[at:at] = content[at:end] * rng.choice((1, 2, 50))
    return bytes(content)


def grafted(piece: bytes, rng: random.Random) -> bytes:
    """JSON with one place taken by another of its places, or by something odd."""
    tree = [json.loads(piece)]
    places: list[tuple[Any, Any]] = [(tree, 0)]
    for holder, at in places:  # grows while it runs
        inner = holder[at]
        if isinstance(inner, (dict, list)):
            places += [(inner, key) for key in (inner if isinstance(inner, dict) else range(len(inner)))]
    holder, at = rng.choice(places)
    source, source_at = rng.choice(places)
    odd = [
        None,
        True,
        0,
        1,
        -1,
        2**64,
        1.5,
        math.nan,
        "",
        "0",
        "F32",
        "nan",
        [],
        {},
        [0, 2**63],
        {"tensor": 0},
    ]
    new = json.loads(json.dumps(rng.choice([source[source_at], rng.choice(odd)])))
    if isinstance(holder, dict) and rng.randrange(3) == 0:
        new, at = (
            holder.pop(at),
            rng.choice(["tuple", "dict", "bytes", "tensor", "complex", "float", "0", "9"]),
        )
    holder[at] = new
    return json.dumps(tree[0], ensure_ascii=False).encode()


def case(rng: random.Random) -> bytes:
    """Random or mutated; half of them with lengths made right again, to come past the first checks."""
    base = rng.choice(CORPUS)
    kind = rng.randrange(10)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return GOOD[:5] + rng.choice((b"\x01", b"")) + rng.randbytes(rng.randrange(200))
    if kind == 2:
        return message(rng.randbytes(rng.randrange(60)), rng.randbytes(rng.randrange(60)), rng.randbytes(9))
    if kind <= 4 or not base.startswith(b"FEDSQ"):
        return mutated(base, rng)
    pieces = list(parts(base))
    which = rng.randrange(3)
    change = grafted if which < 2 and rng.random() < 0.5 else mutated
    pieces[which] = change(pieces[which], rng)
    if kind == 9:  # of another message
        pieces[rng.randrange(3)] = parts(rng.choice(CORPUS[:-1]))[rng.randrange(3)]
    return message(*pieces)


def test_random_and_mutated_messages_are_decoded_or_refused() -> None:
    """FEDSQ_FUZZ is the number of cases, 2000 when unset."""
    rng = random.Random(0)
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    odd: list[tuple[bytes, str]] = []
    slowest = 0.0
    for _ in range(int(os.environ.get("FEDSQ_FUZZ", "2000"))):
        data = case(rng)
        began = time.process_time()
        try:
            value = decode(data, LIMIT)
            # What came through is of the allowed types, so that it can be sent on.
            outcome = "decoded" if same(decode(encode(value), LIMIT), value) else "decoded otherwise"
        except UpdateError as error:
            outcome = "refused"
            reasons[" ".join(re.findall(r"(?<!\S)[A-Za-z']{2,}(?!\S)", str(error))[:9])] += 1
            if "\n" in str(error):
                outcome = "refused in lines"
        except BaseException as error:  # a panic of the library is no Exception
            outcome = f"{type(error).__name__}: {error}"
        slowest = max(slowest, time.process_time() - began)
        counts[outcome] += 1
        if outcome not in ("decoded", "refused"):
            odd.append((data, outcome))
    print(f"fuzz: {dict(counts)}, slowest {slowest * 1e3:.1f} ms, {len(reasons)} kinds of refusal")
    assert not odd, odd[0]
    assert counts["decoded"] and counts["refused"] and slowest < 2.0
