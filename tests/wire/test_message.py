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
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load
from torch import Tensor, nn
from torchvision.models import resnet18

from fedsq_plugin.errors import ConfigError, UpdateError
from fedsq_plugin.federation.state import fingerprint, state_of
from fedsq_plugin.wire import message as wire
from fedsq_plugin.wire import tensors as block
from fedsq_plugin.wire.message import Alive, End, Failed, Message, Online, Result, Task, decode, encode

LIMIT = 2**27
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex128, torch.complex64, torch.complex32, torch.bool, torch.int64, torch.int32, torch.int16),
    *(torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
]
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def task(state: Any, **about: Any) -> Task:
    return Task(**{"sender": 0, "receiver": 1, "kind": "train", "silo": 2, "round": 3, "state": state, **about})


def result(**about: Any) -> Result:
    return Result(**{"sender": 1, "receiver": 0, "kind": "train", "silo": 2, "round": 3, "samples": 4, **about})


def same(one: Message, other: Message) -> bool:
    """Types, order and values, NaN and the sign of zero included; tensors bit for bit."""
    if type(one) is not type(other) or repr(one) != repr(other):  # a state is not in the repr
        return False
    states = [getattr(message, "state", None) for message in (one, other)]
    if None in states:
        return states == [None, None]
    return list(states[0]) == list(states[1]) and all(map(alike, states[0].values(), states[1].values()))


def alike(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape, other.device.type, raw(one)) == (other.dtype, other.shape, "cpu", raw(other))


def raw(tensor: Tensor) -> bytes:
    dense = tensor.detach().cpu().resolve_conj().contiguous()
    dense = torch.view_as_real(dense) if dense.is_complex() else dense
    return dense.view(-1).view(torch.uint8).numpy().tobytes()


def back(message: Message) -> Any:
    return decode(encode(message), LIMIT)


def state_back(state: Any) -> dict[str, Tensor]:
    received: dict[str, Tensor] = back(task(state)).state
    return received


def refused(data: Any, limit: int = LIMIT) -> str:
    with pytest.raises(UpdateError) as caught:
        decode(data, limit)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 260
    return str(caught.value)


def parts(message: bytes) -> tuple[bytes, bytes, bytes]:
    """Header, table of tensors and tensors of a message."""
    _, _, header, _ = wire._HEAD.unpack_from(message)
    middle = wire._HEAD.size + header
    start = middle + 8
    end = start + int.from_bytes(message[middle:start], "little")
    return message[wire._HEAD.size : middle], message[start:end], message[end:]


def message(header: bytes | str, table: bytes | str | None = None, data: bytes = b"") -> bytes:
    """A message with right lengths and whatever content; None: it has no state."""
    header = header.encode() if isinstance(header, str) else header
    table = table.encode() if isinstance(table, str) else table
    state = b"" if table is None else len(table).to_bytes(8, "little") + table + data
    return wire._HEAD.pack(b"FEDSQ", wire._VERSION, len(header), len(state)) + header + state


GOOD = encode(task(OrderedDict(w=torch.ones(2, 3), b=torch.zeros(3))))
TASK = parts(GOOD)[0].decode()
ALIVE = parts(encode(Alive(sender=0, receiver=1)))[0].decode()
TESTED = parts(encode(result(kind="silos", metrics=(0.5, 0.25, 60))))[0].decode()
HELLO = parts(encode(Online(sender=1, receiver=0, samples={0: 5}, options={"epochs": "1"}, process="p")))[0].decode()


def edited(header: str, was: str, now: str) -> bytes:
    assert header.count(was) == 1, (header, was)
    return message(header.replace(was, now))


def table(entries: dict[str, Any]) -> bytes:
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def entry(dtype: Any, shape: Any, start: Any, end: Any, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


def one(dtype: Any, shape: Any, data: bytes, header: str = TASK, **other: Any) -> bytes:
    """A message of one tensor, described as told."""
    return message(header, table({"w": {**entry(dtype, shape, 0, len(data)), **other}}), data)


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
integers = st.integers(-(2**63), 2**63 - 1)
states = st.dictionaries(texts, tensors(), max_size=4)
kinds = st.sampled_from(("train", "silos", "tune"))
ends = {"sender": integers, "receiver": integers}
work = {"kind": kinds, "silo": integers, "round": integers}
answer = {"samples": integers, "structural": st.none() | texts}
messages = st.one_of(
    st.builds(
        Online,
        **ends,
        samples=st.dictionaries(integers, integers, max_size=4),
        options=st.dictionaries(texts, texts, max_size=4),
        process=texts,
    ),
    st.builds(Task, **ends, **work, epochs=integers, checkpoint=integers, state=states),
    st.builds(Result, **ends, **work, **answer, state=states),
    st.builds(Result, **ends, **work, **answer, metrics=st.tuples(st.floats(), st.floats(), integers)),
    st.builds(Failed, **ends, reason=texts),
    st.builds(End, **ends, reason=st.none() | texts, process=st.none() | texts),
    st.builds(Alive, **ends),
)


@settings(max_examples=300)
@given(messages)
def test_messages_come_back(sent: Message) -> None:
    assert same(back(sent), sent)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (3, 2)], ids=str)
def test_every_dtype_and_shape_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    # What follows the odd number of bytes must not mind where it lies.
    sent = task(
        {"a": torch.ones(shape).to(dtype), "b": torch.ones(3, dtype=torch.uint8), "c": torch.ones(shape).to(dtype)}
    )
    assert same(back(sent), sent)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 0.1, -0.0, 5e-324, 1.7976931348623157e308, 1e22])
def test_the_metrics_of_a_model_that_diverged_come_back_bit_for_bit(loss: float) -> None:
    received = back(result(kind="silos", metrics=(loss, math.nan, 0))).metrics
    assert [number.hex() for number in received[:2]] == [loss.hex(), "nan"] and received[2] == 0


def test_the_order_of_a_state_comes_back() -> None:
    keys = ["b", "a", "10", "9", "", "é\u2028", "fedsq:x", '"[{,\\', "Z", *(f"t{i}" for i in range(20, 0, -1))]
    dtypes = (torch.float32, torch.int64, torch.uint8)
    sent = OrderedDict((key, torch.zeros(i % 3, dtype=dtypes[i % 3])) for i, key in enumerate(keys))
    assert list(state_back(sent)) == keys


def test_a_model_comes_back() -> None:
    state = state_of(resnet18(num_classes=3))
    received = state_back(state)
    assert type(received) is OrderedDict and fingerprint(received) == fingerprint(state)


def test_a_model_is_copied_once_on_its_way_out_and_once_on_its_way_in() -> None:
    state = OrderedDict((str(i), torch.zeros(2**18)) for i in range(8))
    size = 8 * 2**20
    tracemalloc.start()
    try:
        data = encode(task(state))
        sent = tracemalloc.get_traced_memory()[1] / size
        tracemalloc.reset_peak()
        received = decode(data, LIMIT)
        peak = tracemalloc.get_traced_memory()[1] / size
    finally:
        tracemalloc.stop()
    assert sent < 1.1 and peak < 1 + 1.1 and received is not None  # `data` itself is counted


def test_views_conjugates_and_shared_storage_come_back_as_their_values() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    z = torch.complex(base, -base)
    sent = [base, base, base.t(), base[1:, ::2], base[0].expand(5, 4), z.conj(), z.conj().imag, nn.Parameter(base)]
    sent += [torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    received = list(state_back({str(i): tensor for i, tensor in enumerate(sent)}).values())
    for was, now in zip(sent, received, strict=True):
        assert torch.equal(was, now) and now.is_contiguous() and not now.requires_grad
        assert type(now) is Tensor
    received[0].zero_()
    assert torch.equal(received[1], base)


def test_received_tensors_are_independent_of_the_message() -> None:
    data = bytearray(encode(task({"w": torch.zeros(3), "v": torch.zeros(3)})))
    received: Any = decode(data, LIMIT)
    data[:] = b"\xff" * len(data)
    data.clear()
    assert torch.equal(received.state["w"].add_(1), torch.ones(3))
    assert torch.equal(received.state["v"], torch.zeros(3))


def test_the_limits_themselves_can_be_sent() -> None:
    wide = torch.zeros([1] * block.MAX_AXES)
    assert len(state_back({"w": wide})) == 1
    assert len(state_back({f"{'x' * 100}{i}": torch.zeros(1, 1, 1, 1) for i in range(block.MAX_TENSORS)})) == 10_000
    hello = Online(
        sender=1,
        receiver=0,
        samples={10**6 + i: 10**9 for i in range(wire.MAX_SILOS)},
        options={"a": "é" * wire.MAX_TEXT},
    )
    assert same(back(hello), hello)


def test_a_state_is_a_safetensors_file() -> None:
    sent = {"w": torch.arange(3, dtype=torch.int16), "v": torch.ones(2, 2), "u": torch.tensor(True)}
    _, header, data = parts(encode(task(sent)))
    assert len(header) % 8 == 0
    loaded = load(len(header).to_bytes(8, "little") + header + data)
    assert all(torch.equal(loaded[key], sent[key]) for key in sent)


# --- what may not be sent ---


@pytest.mark.parametrize(
    ("state", "fragments"),
    [
        ({"w": torch.zeros(2, device="meta")}, ["tensor w is not a dense tensor"]),
        ({"w": torch.eye(2).to_sparse()}, ["tensor w is not a dense tensor"]),
        (nn.LazyLinear(2).state_dict(), ["tensor weight is not a dense tensor"]),
        ({"w": torch.zeros([1] * 33)}, ["tensor w has 33 axes"]),
        ({"w": torch.empty(0, 2**61)}, ["beyond any memory"]),
        ({"w": torch.zeros(2).to(torch.float8_e4m3fnuz)}, ["float8_e4m3fnuz", "convert"]),
        ({str(i): torch.zeros(0) for i in range(10_001)}, ["10001 tensors"]),
        ({"x" * 2**22: torch.zeros(1)}, ["more than 4194304"]),
        ({f"{i}{',' * 50}": torch.zeros(1) for i in range(6000)}, ["values, more than 262144"]),
        ({"\ud800": torch.zeros(1)}, ["UTF-8"]),
    ],
    ids=lambda x: str(type(x).__name__),
)  # fmt: skip
def test_a_tensor_that_cannot_be_sent_is_named(state: Any, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        encode(task(state))
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 260


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_tensor_cannot_be_sent() -> None:
    with pytest.raises(ConfigError, match="dense tensor"):
        encode(task({"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}))


@pytest.mark.parametrize(
    ("value", "said"),
    [(3, "an int"), ([1], "a list"), ({"w": 1}, "w is a int"), ({1: torch.ones(1)}, "1 is a Tensor")],
    ids=str,
)
def test_what_is_no_state_is_no_message(value: Any, said: str) -> None:
    """As the answer of a user's own trainer may be."""
    with pytest.raises(TypeError, match="a state maps names to tensors"):
        result(state=value)


@pytest.mark.parametrize("wrong", [task(None), result(), result(state={}, metrics=(0.5, 0.5, 1))])
def test_a_task_has_a_state_and_a_result_a_state_or_metrics(wrong: Message) -> None:
    with pytest.raises(ConfigError, match="either a state or metrics"):
        encode(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": "4"},
        {"samples": 4.0},
        {"samples": True},
        {"samples": 2**63},
        {"silo": None},
        {"structural": b"x"},
        {"structural": "x" * 2001},
        {"structural": "\ud800"},
        {"metrics": (0.1, 0.5)},
        {"metrics": ("0.1", 0.5, 1)},
        {"more": 1},
    ],
    ids=str,
)
def test_fields_are_checked_when_a_message_is_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        result(**wrong)


# --- what arrives and is refused ---


def changed(at: int, to: bytes) -> bytes:
    return GOOD[:at] + to + GOOD[at + len(to) :]


ENVELOPES: dict[str, tuple[Any, str]] = {
    "empty": (b"", "does not begin"),
    "half a head": (GOOD[:10], "does not begin"),
    "magic": (changed(0, b"fedsq"), "does not begin"),
    "version": (changed(5, b"\x01"), "version 1"),
    "truncated": (GOOD[:-1], "truncated"),
    "trailing": (GOOD + b"\0", "trailing"),
    "header length": (changed(6, b"\xff" * 4), "truncated"),
    "state length": (changed(10, b"\xff" * 8), "truncated"),
    "a task without a state": (message(TASK), "lacks"),
    "metrics and a state": (message(TESTED, "{}      "), "too many"),
    "a state too many": (message(ALIVE, "{}      "), "too many"),
    "a result of nothing": (edited(TESTED, "[0.5,0.25,60]", "null"), "lacks"),
    "text": ("FEDSQ", "is bytes, not str"),
    "nothing": (None, "is bytes, not NoneType"),
}
A = '"message":{'
HEADERS: dict[str, tuple[bytes, str]] = {
    "nothing": (message(""), "EOF"),
    "no JSON": (message("{]"), "Invalid JSON"),
    "null": (message("null"), "be an object"),
    "a list": (message("[]"), "be an object"),
    "an empty object": (message("{}"), "required"),
    "an empty message": (message('{"message":{},"complex":[]}'), "discriminator 'type'"),
    "two values": (message(ALIVE + "1"), "trailing characters"),
    "a space": (message(ALIVE + " "), "one form"),
    "invalid UTF-8": (
        message(ALIVE.replace("alive", "al\\xff").encode().replace(b"\\xff", b"\xff")),
        "invalid unicode",
    ),
    "UTF-16": (message(ALIVE.encode("utf-16")), "Invalid JSON"),
    "byte order mark": (message("\ufeff" + ALIVE), "Invalid JSON"),
    "lone surrogate": (edited(HELLO, '"p"', r'"\ud800"'), "Invalid JSON"),
    "lone surrogate as a key": (edited(HELLO, '"epochs"', r'"\udfff"'), "Invalid JSON"),
    "text written otherwise": (edited(HELLO, '"p"', r'"\u0070"'), "one form"),
    "control character": (edited(HELLO, '"p"', '"\n"'), "control character"),
    "integer of 64 bits": (edited(ALIVE, '"receiver":1', '"receiver":9223372036854775808'), "less than"),
    "integer of a million digits": (edited(ALIVE, '"receiver":1', f'"receiver":{"9" * 10**6}'), "out of range"),
    "integer written otherwise": (edited(ALIVE, '"receiver":1', '"receiver":-0'), "one form"),
    "float for an integer": (edited(ALIVE, '"receiver":1', '"receiver":1.0'), "valid integer"),
    "switch for an integer": (edited(ALIVE, '"receiver":1', '"receiver":true'), "valid integer"),
    "text for an integer": (edited(ALIVE, '"receiver":1', '"receiver":"1"'), "valid integer"),
    "no receiver": (edited(ALIVE, '"receiver":1,', ""), "required"),
    "no type": (edited(ALIVE, ',"type":"alive"', ""), "discriminator"),
    "no end that is null": (
        edited(parts(encode(End(sender=0, receiver=1)))[0].decode(), ',"process":null', ""),
        "one form",
    ),
    "unknown type": (edited(ALIVE, "alive", "__reduce__"), "does not match any of the expected tags"),
    "type of a list": (edited(ALIVE, '"alive"', '["alive"]'), "does not match any"),
    "more keys": (edited(ALIVE, A, A + '"more":1,'), "Extra inputs"),
    "more beside the message": (message(ALIVE[:-1] + ',"more":1}'), "Extra inputs"),
    "a key twice": (edited(ALIVE, A, A + '"receiver":2,'), "one form"),
    "a message twice": (message('{"message":1,' + ALIVE[1:]), "one form"),
    "other order": (message('{"complex":[],' + ALIVE[1:].replace(',"complex":[]', "")), "one form"),
    "a state in the header": (edited(TASK, A, A + '"state":{},'), "one form"),
    "a state of text in the header": (edited(TASK, A, A + '"state":{"w":"x"},'), "a state maps names to tensors"),
    "no state in the header": (edited(ALIVE, A, A + '"state":null,'), "Extra inputs"),
    "complex tensors without a state": (edited(ALIVE, "[]", '["w"]'), "complex tensors that it does not have"),
    "deep": (message("[" * 10**4), "recursion limit"),
    "deep objects": (message('{"message":' * 10**4), "recursion limit"),
    "closing brackets": (message("]" * 10**6), "Invalid JSON"),
    "many elements": (message("[" + "0," * 10**5 + "0]"), "more than 32768"),
    "many empty lists": (message("[" + "[]," * 10**5 + "[]]"), "more than 32768"),
    "many quotes": (message('"' * 10**6), "Invalid JSON"),
    "long": (message(edited(HELLO, '"p"', f'"{"x" * 2**22}"')[wire._HEAD.size :]), "bytes, more than 4194304"),
    "hostile text": (edited(ALIVE, A, A + '"' + r"\n\u001b[2J" * 40 + '":1,'), "?"),
    "samples: none": (edited(HELLO, '{"0":5}', "null"), "be an object"),
    "samples: a list": (edited(HELLO, '{"0":5}', "[5]"), "be an object"),
    "samples: a fraction": (edited(HELLO, '{"0":5}', '{"0":1.5}'), "valid integer"),
    "samples: a switch": (edited(HELLO, '{"0":5}', '{"0":true}'), "valid integer"),
    "samples: not a number": (edited(HELLO, '{"0":5}', '{"0":NaN}'), "valid integer"),
    "samples: a tensor": (edited(HELLO, '{"0":5}', '{"0":{"tensor":0}}'), "valid integer"),
    "samples: text as a silo": (edited(HELLO, '{"0":5}', '{"a":5}'), "valid integer"),
    "samples: a silo written otherwise": (edited(HELLO, '{"0":5}', '{" 0":5}'), "one form"),
    "samples: a silo twice": (edited(HELLO, '{"0":5}', '{"0":4,"0":5}'), "one form"),
    "samples: too many": (
        edited(HELLO, '{"0":5}', json.dumps(dict.fromkeys(map(str, range(10_001)), 1), separators=(",", ":"))),
        "at most 10000",
    ),
    "options: none": (edited(HELLO, '{"epochs":"1"}', "null"), "be an object"),
    "options: a number": (edited(HELLO, '{"epochs":"1"}', '{"epochs":1}'), "valid string"),
    "options: long": (edited(HELLO, '{"epochs":"1"}', f'{{"epochs":"{"x" * 2001}"}}'), "at most 2000"),
    "options: too many": (
        edited(HELLO, '{"epochs":"1"}', json.dumps(dict.fromkeys(map(str, range(1001)), ""), separators=(",", ":"))),
        "at most 1000",
    ),
    "process: a number": (edited(HELLO, '"p"', "1"), "valid string"),
    "kind: unknown": (edited(TESTED, '"silos"', '"sleep"'), "Input should be"),
    "kind: a list": (edited(TESTED, '"silos"', "[]"), "Input should be"),
    "silo: text": (edited(TESTED, '"silo":2', '"silo":"2"'), "valid integer"),
    "round: a tensor": (edited(TESTED, '"round":3', '"round":{"tensor":0}'), "valid integer"),
    "count: a fraction": (edited(TESTED, '"samples":4', '"samples":24.5'), "valid integer"),
    "count: none": (edited(TESTED, '"samples":4', '"samples":null'), "valid integer"),
    "structural: a tensor": (edited(TESTED, '"structural":null', '"structural":{"tensor":0}'), "valid string"),
    "metrics: two": (edited(TESTED, "[0.5,0.25,60]", "[0.5,0.25]"), "required"),
    "metrics: four": (edited(TESTED, "[0.5,0.25,60]", "[0.5,0.25,60,1]"), "at most 3"),
    "metrics: text": (edited(TESTED, "[0.5,0.25,60]", '["0.5",0.25,60]'), "valid number"),
    "metrics: another word": (edited(TESTED, "[0.5,0.25,60]", '["Infinity",0.25,60]'), "valid number"),
    "metrics: a list": (edited(TESTED, "[0.5,0.25,60]", "[[0.5],0.25,60]"), "valid number"),
    "metrics: a switch": (edited(TESTED, "[0.5,0.25,60]", "[true,0.25,60]"), "valid number"),
    "metrics: an object": (edited(TESTED, "[0.5,0.25,60]", '[0.5,{"tensor":0},60]'), "valid number"),
    "metrics: a fraction": (edited(TESTED, "[0.5,0.25,60]", "[0.5,0.25,0.5]"), "valid integer"),
    "metrics: NaN of JSON's extension": (edited(TESTED, "[0.5,0.25,60]", "[NaN,0.25,60]"), "one form"),
    "metrics: Infinity of JSON's extension": (edited(TESTED, "[0.5,0.25,60]", "[-Infinity,0.25,60]"), "one form"),
    "metrics: too large": (edited(TESTED, "[0.5,0.25,60]", "[1e999,0.25,60]"), "one form"),
    "metrics: too long": (edited(TESTED, "[0.5,0.25,60]", f"[0.5{'0' * 10**6},0.25,60]"), "one form"),
    "metrics: an integer": (edited(TESTED, "[0.5,0.25,60]", "[1,0.25,60]"), "one form"),
}
E1 = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
COMPLEX = TASK.replace('"complex":[]', '"complex":["w"]')
TENSORS: dict[str, tuple[bytes, str]] = {
    "empty": (message(TASK, ""), "Expecting value"),
    "no length": (wire._HEAD.pack(b"FEDSQ", wire._VERSION, len(TASK), 4) + TASK.encode() + b"\0" * 4, "does not fit"),
    "table longer than the rest": (message(TASK, "{}")[:-10] + b"\x03" + b"\0" * 7 + b"{}", "does not fit"),
    "table beyond 64 bits": (message(TASK, "{}")[:-10] + b"\xff" * 8 + b"{}", "does not fit"),
    "no JSON": (message(TASK, "{]"), "Expecting"),
    "list as a table": (message(TASK, "[]"), "no mapping"),
    "null as a table": (message(TASK, "null"), "no mapping"),
    "not padded": (message(TASK, "{}"), "one form"),
    "padded more": (message(TASK, "{}" + " " * 14), "one form"),
    "spaces": (message(TASK, '{"w": ' + E1 + "}" + " " * 2, b"x"), "one form"),
    "metadata": (message(TASK, '{"__metadata__":{"a":"b"}}'), "without 'dtype'"),
    "name twice": (message(TASK, f'{{"w":{E1},"w":{E1}}}', b"x"), "one form"),
    "dtype twice": (
        message(TASK, table({"w": entry("U8", [1], 0, 1)}).replace(b'{"dtype"', b'{"dtype":1,"dtype"'), b"x"),
        "one form",
    ),
    "name written otherwise": (message(TASK, '{"\\u0077":' + E1 + "}", b"x"), "one form"),
    "lone surrogate": (message(TASK, '{"\\ud800":' + E1 + "}", b"x"), "surrogates"),
    "invalid UTF-8": (message(TASK, b'{"\xff":0}'), "utf-8"),
    "UTF-16": (message(TASK, "{}".encode("utf-16")), "utf-8"),
    "byte order mark": (message(TASK, "\ufeff{}"), "BOM"),
    "deep": (message(TASK, '{"w":' * 10**5), "recursion"),
    "deep lists": (message(TASK, "[" * 10**5), "recursion"),
    "long": (message(TASK, "{}" + " " * 2**22), "more than 4194304"),
    "many values": (message(TASK, "[" + "0," * 10**6 + "0]"), "more than 262144"),
    "many empty lists": (message(TASK, "[" + "[]," * 400_000 + "[]]"), "more than 262144"),
    "number too large": (message(TASK, '{"w":{"dtype":"U8","shape":[1e999]}}'), "list of sizes"),
    "number of a million digits": (message(TASK, '{"w":{"dtype":"U8","shape":[' + "9" * 10**6 + "]}}"), "digits"),
    "entry of a number": (message(TASK, '{"w":1}'), "wrong"),
    "entry of text": (message(TASK, '{"w":"dtype"}'), "wrong"),
    "entry of a list": (message(TASK, '{"w":[0]}'), "wrong"),
    "entry without offsets": (message(TASK, '{"w":{"dtype":"U8","shape":[1]}}', b"x"), "one form"),
    "entry without a shape": (message(TASK, '{"w":{"dtype":"U8"}}', b"x"), "without 'shape'"),
    "entry with more": (one("U8", [1], b"x", more=1), "one form"),
    "dtype unknown": (one("F4", [2], b"x"), "unknown dtype F4"),
    "dtype complex": (one("C64", [1], b"x" * 8), "unknown dtype C64"),
    "dtype of a list": (one([], [1], b"x"), "unknown dtype"),
    "dtype with a line": (one("U8\nERROR", [1], b"x"), "unknown dtype U8 ERROR"),
    "shape negative": (one("U8", [-1, -1], b"x"), "list of sizes"),
    "shape of floats": (one("U8", [1.0], b"x"), "list of sizes"),
    "shape of switches": (one("U8", [True], b"x"), "list of sizes"),
    "shape of a number": (one("U8", 1, b"x"), "list of sizes"),
    "shape of an object": (one("U8", {"0": 1}, b"x"), "list of sizes"),
    "shape too large": (one("U8", [2], b"x"), "larger than the message"),
    "shape too small": (one("U8", [1], b"xy"), "one form"),
    "shape overflows": (one("F32", [2**62, 2**62, 4], b"x"), "beyond any memory"),
    "shape overflows to the right size": (one("U8", [2**32, 2**32], b""), "beyond any memory"),
    "empty but for its strides": (one("F32", [0, 2**62, 2**62], b""), "beyond any memory"),
    "axes": (one("U8", [1] * 33, b"x"), "33 axes"),
    "five thousand axes": (one("U8", [1] * 5000, b"x"), "5000 axes"),
    "one offset": (one("U8", [1], b"x", data_offsets=[0]), "one form"),
    "offsets of text": (one("U8", [1], b"x", data_offsets="01"), "one form"),
    "offsets of floats": (one("U8", [1], b"x", data_offsets=[0.0, 1.0]), "one form"),
    "offsets of switches": (one("U8", [1], b"x", data_offsets=[False, True]), "one form"),
    "offsets reversed": (one("U8", [1], b"x", data_offsets=[1, 0]), "one form"),
    "offsets beyond": (one("U8", [2], b"x", data_offsets=[0, 2]), "larger than the message"),
    "offsets near 64 bits": (one("U8", [1], b"x", data_offsets=[2**64 - 1, 2**64 - 1]), "one form"),
    "a hole": (one("U8", [1], b"xy", data_offsets=[1, 2]), "one form"),
    "overlap": (
        message(TASK, table({"w": entry("U8", [1], 0, 1), "v": entry("U8", [1], 0, 1)}), b"x"),
        "larger than the message",
    ),
    "overlap with enough bytes": (
        message(TASK, table({"w": entry("U8", [1], 0, 1), "v": entry("U8", [1], 0, 1)}), b"xy"),
        "one form",
    ),
    "another order": (
        message(TASK, table({"w": entry("U8", [1], 1, 2), "v": entry("U8", [1], 0, 1)}), b"xy"),
        "one form",
    ),
    "trailing data": (message(TASK, table({"w": entry("U8", [1], 0, 1)}), b"xy"), "one form"),
    "data without a tensor": (message(TASK, "{}      ", b"x"), "one form"),
    "truth value of 2": (one("BOOL", [1], b"\x02"), "neither 0 nor 1"),
    "truth value of 2 among others": (one("BOOL", [3], b"\x01\x02\x00"), "neither 0 nor 1"),
    "complex of integers": (one("I8", [2], b"xy", COMPLEX), "complex numbers of torch.int8"),
    "complex of bfloat16": (one("BF16", [2], b"xxyy", COMPLEX), "complex numbers"),
    "complex of three": (one("F16", [3], b"xxyyzz", COMPLEX), "complex numbers"),
    "complex of a scalar": (one("F16", [], b"xx", COMPLEX), "complex numbers"),
    "complex that is not there": (one("F16", [2], b"xxyy", COMPLEX.replace('["w"]', '["v"]')), "complex"),
    "complex twice": (one("F16", [2], b"xxyy", COMPLEX.replace('["w"]', '["w","w"]')), "complex"),
    "too many": (message(TASK, table({str(i): entry("U8", [0], 0, 0) for i in range(10_001)})), "10000 tensors"),
}  # fmt: skip
HOSTILE = ENVELOPES | {f"header: {k}": case for k, case in HEADERS.items()}
HOSTILE |= {f"tensors: {k}": case for k, case in TENSORS.items()}


@pytest.mark.parametrize(("data", "why"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_messages_are_refused_at_once(data: Any, why: str) -> None:
    began = time.process_time()
    assert why in refused(data)
    assert time.process_time() - began < 2.0


def test_every_truncation_is_refused() -> None:
    for length in range(len(GOOD)):
        refused(GOOD[:length])


def test_every_changed_bit_of_the_text_is_refused_or_another_message() -> None:
    """A bit of a number, a name or a tensor's value makes another message; every other one is noticed."""
    for at in range(len(GOOD) - 36):
        for bit in range(8):
            data = changed(at, bytes([GOOD[at] ^ 1 << bit]))
            try:
                found = decode(data, LIMIT)
            except UpdateError:
                continue
            assert encode(found) == data


def test_the_limit_holds_for_the_whole_message() -> None:
    decode(GOOD, len(GOOD))
    assert f"limit of {len(GOOD) - 1}" in refused(GOOD, len(GOOD) - 1)


def test_lengths_beyond_the_message_allocate_nothing() -> None:
    hostile = [changed(6, b"\xff" * 12), one("F64", [2**40], b"12345678"), message("[" * 10**5)]
    empty = one("F64", [2**58, 0], b"")
    tracemalloc.start()
    try:
        for data in hostile:
            refused(data)
        received: Any = decode(empty, LIMIT)
        assert received.state["w"].numel() == 0
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("tiny", ["[],", "{},", '"":0,', "0,"])
@pytest.mark.parametrize("place", ["header", "table"])
def test_a_message_of_tiny_elements_allocates_within_the_limits(tiny: str, place: str) -> None:
    """As many as are parsed, and far more; the header's parser is not Python's, and so is its memory."""
    for count in (15_000, 120_000, 5 * 10**6):
        text = "[" + tiny * count + "0]"
        data = message(text) if place == "header" else message(TASK, text)
        before = resident()
        refused(data)
        assert resident() - before < 2**25 + 4 * len(data)


def test_a_crafted_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "ran"

    class Attack:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {trace}",)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        attack = pickle.dumps({"model_params": Attack()}, protocol)
        refused(attack)
        refused(message(attack))
        refused(message(TASK, attack))
        sent = {"w": torch.frombuffer(bytearray(attack), dtype=torch.uint8)}
        assert raw(state_back(sent)["w"]) == attack  # bytes are bytes
    assert not trace.exists()
    os.system(f"touch {trace}")  # the attack would have worked
    assert trace.exists()


# --- fuzz ---

CORPUS = [
    GOOD,
    encode(Alive(sender=0, receiver=1)),
    encode(End(sender=0, receiver=2, reason="é\u2028\U0001f600", process=None)),
    encode(Failed(sender=2, receiver=0, reason='"\\[]{}')),
    encode(Online(sender=1, receiver=0, samples={0: 5, -3: 2**62}, options={"epochs": "1", "é": ""}, process="p")),
    encode(result(kind="tune", metrics=(math.nan, 0.25, 60))),
    encode(result(kind="silos", metrics=(1e-7, -math.inf, 0))),
    encode(result(structural="0" * 64, state=OrderedDict(w=torch.rand(4, 4), n=torch.tensor(7)))),
    encode(task({"b": torch.tensor([True, False]), "z": torch.ones(2, dtype=torch.complex64), "e": torch.zeros(0, 3)})),
    encode(task({"half": torch.ones(3, dtype=torch.bfloat16), "é": torch.ones(6, dtype=torch.uint16)})),
    pickle.dumps({"model_params": {"w": [1.0] * 4}}),
]
TOKENS = [
    *rb"""[ ] { } , : " \ \u 0 -1 1e999 null true NaN [0,2] {"type":"end"} "state":{},""".split(),
    *b'4294967296 9223372036854775808 18446744073709551615 "complex" "w" "BOOL" "F64" "shape"'.split(),
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


ODD = [None, True, 0, 1, -1, 2**64, 1.5, math.nan, "", "0", "F32", "nan", [], {}, [0, 2**63], {"w": 0}, "train", "end"]


def grafted(piece: bytes, rng: random.Random) -> bytes:
    """JSON with one place taken by another of its places, or by something odd; in the form that is written."""
    tree = [json.loads(piece)]
    places: list[tuple[Any, Any]] = [(tree, 0)]
    for holder, at in places:  # grows while it runs
        inner = holder[at]
        if isinstance(inner, (dict, list)):
            places += [(inner, key) for key in (inner if isinstance(inner, dict) else range(len(inner)))]
    holder, at = rng.choice(places)
    source, source_at = rng.choice(places)
    new = json.loads(json.dumps(rng.choice([source[source_at], rng.choice(ODD)])))
    if isinstance(holder, dict) and rng.randrange(3) == 0:
        new, at = holder.pop(at), rng.choice(["type", "state", "silo", "complex", "dtype", "shape", "0", "9"])
    holder[at] = new
    text = json.dumps(tree[0], ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8) if rng.randrange(2) else text


def case(rng: random.Random) -> bytes:
    """Random or mutated; half of them with lengths made right again, to come past the first checks."""
    base = rng.choice(CORPUS)
    kind = rng.randrange(10)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return GOOD[:5] + rng.choice((b"\x02", b"")) + rng.randbytes(rng.randrange(200))
    if kind == 2:
        return message(rng.randbytes(rng.randrange(60)), rng.randbytes(rng.randrange(60)), rng.randbytes(9))
    if kind <= 4 or not base.startswith(b"FEDSQ"):
        return mutated(base, rng)
    pieces = list(parts(base))
    has_state = len(base) > wire._HEAD.size + len(pieces[0])
    which = rng.randrange(3) if has_state else 0
    change = grafted if which < 2 and rng.random() < 0.5 else mutated
    pieces[which] = change(pieces[which], rng)
    if kind == 9:  # of another message
        pieces[rng.randrange(3)] = parts(rng.choice(CORPUS[:-1]))[rng.randrange(3)]
    return message(*pieces) if has_state else message(pieces[0])


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
            # What came through has one form, and can be sent on.
            outcome = "decoded" if encode(decode(data, LIMIT)) == data else "decoded otherwise"
        except UpdateError as error:
            outcome = "refused"
            reasons[" ".join(re.findall(r"(?<!\S)[A-Za-z']{2,}(?!\S)", str(error))[:9])] += 1
            if "\n" in str(error):
                outcome = "refused in lines"
        except BaseException as error:  # a panic of a library is no Exception
            outcome = f"{type(error).__name__}: {error}"
        slowest = max(slowest, time.process_time() - began)
        counts[outcome] += 1
        if outcome not in ("decoded", "refused"):
            odd.append((data, outcome))
    print(f"fuzz: {dict(counts)}, slowest {slowest * 1e3:.1f} ms, {len(reasons)} kinds of refusal")
    assert not odd, odd[0]
    assert counts["decoded"] and counts["refused"] and slowest < 2.0
