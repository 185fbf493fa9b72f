"""The six messages between the processes of a run, and how they become bytes. Nothing is pickled.

    client -> server  Online  its silos' sample counts, and the options that must agree
    server -> client  Task    train or evaluate one silo, from this state
    client -> server  Result  the state or the metrics of a task
    client -> server  Failed  why the client cannot go on
    server -> client  End     the run is over; with a reason where it failed
    server -> client  Alive   the server is there, and needs nothing just now

As bytes, little-endian, with nothing behind:

    magic, version (u8), bytes of the header (u32), bytes of the state (u64) | header | state

The header is JSON, and the state is a safetensors file, see `tensors`.

Every message can be written in one way only: `decode` writes again what it has read, and refuses bytes that differ. So
no key can occur twice, and no number or text can be written in two ways.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError
from torch import Tensor

from ..errors import ConfigError, UpdateError
from ..federation.state import State
from ..federation.updates import brief
from .tensors import MAX_TENSORS, as_json, pack, size_problem, unpack

MAX_SILOS = 10_000
"""Silos of one client process."""
MAX_TEXT = 2000
"""Characters of a text, such as the reason of an end."""
MAX_VALUES = 2**15
"""Values in the header."""

_MAGIC, _VERSION = b"FEDSQ", 3
_HEAD = struct.Struct("<5sBIQ")
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _checked_state(value: Any) -> State | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"a state maps names to tensors, and this is a {type(value).__name__}")
    for key, tensor in value.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"a state maps names to tensors, and {brief(key)} is a {type(tensor).__name__}")
    return OrderedDict(value) if type(value) is not OrderedDict else value


# JSON has no NaN and no infinity, which are the loss of a model that diverged: they are sent as words.
_Number = Annotated[
    float,
    BeforeValidator(lambda value: _NOT_FINITE.get(value, value) if isinstance(value, str) else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else str(value)),
]
_Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Text = Annotated[str, Field(max_length=MAX_TEXT)]
_Sent = Annotated[Any, PlainValidator(_checked_state), Field(exclude=True, repr=False)]


Kind = Literal["train", "silos", "tune"]
"""The kinds of a task: train a silo, test its model, or test it after a fine-tuning."""


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Message(_Form):
    sender: _Integer
    """Rank of the process that sends it; 0 is the server."""
    receiver: _Integer


class Online(_Message):
    type: Literal["online"] = "online"
    samples: Annotated[dict[_Integer, _Integer], Field(max_length=MAX_SILOS)]
    """Training samples by silo."""
    options: Annotated[dict[_Text, _Text], Field(max_length=1000)]
    process: _Text = ""
    """A name that another process of this rank does not have."""
    run: _Text = ""
    """The run that the process was started for, as its starter calls it (FedML's `--run_id`)."""
    returns: bool = False
    """Whether it took part in a run before, whose server is gone."""


class Task(_Message):
    type: Literal["task"] = "task"
    kind: Kind
    silo: _Integer
    round: _Integer
    """Counted from 0."""
    epochs: _Integer = 0
    """Epochs of fine-tuning before the test."""
    checkpoint: _Integer = 0
    """The oldest round from which the server may go on."""
    state: _Sent = None


class Result(_Message):
    """The answer to a task: `state` after training, `metrics` (loss, accuracy, samples) after a test."""

    type: Literal["result"] = "result"
    kind: Kind
    silo: _Integer
    round: _Integer
    samples: _Integer
    process: _Text = ""
    """As in `Online`."""
    structural: _Text | None = None
    """SHA-256 of the structural copy that the silo trained under; None: it has none."""
    metrics: tuple[_Number, _Number, _Integer] | None = None
    state: _Sent = None


class Failed(_Message):
    type: Literal["failed"] = "failed"
    reason: _Text
    process: _Text = ""
    """As in `Online`."""


class End(_Message):
    type: Literal["end"] = "end"
    reason: _Text | None = None
    process: _Text | None = None
    """The only process that must end; None: every process of the rank."""


class Alive(_Message):
    type: Literal["alive"] = "alive"


Message = Online | Task | Result | Failed | End | Alive


class _Header(_Form):
    message: Annotated[Message, Field(discriminator="type")]
    complex: Annotated[tuple[str, ...], Field(max_length=MAX_TENSORS)] = ()
    """Names of the tensors that are complex, in the order of the state."""


def encode(message: Message) -> bytes:
    """Turn a message into bytes. Tensors that share memory are copied, and so become independent.

    Raises:
        ConfigError: a tensor cannot be sent, or the message is larger than the limits of this module.
    """
    state = message.state if isinstance(message, (Task, Result)) else None
    if (state is not None) != _has_state(message):
        raise ConfigError("a task needs a state, and a result either a state or metrics")
    block, names = ([], ()) if state is None else pack(state)
    header = as_json(_Header(message=message, complex=names).model_dump())
    if wrong := size_problem(header, MAX_VALUES):
        raise ConfigError(f"a message of type {message.type} cannot be sent: its header has {wrong}")
    return b"".join([_HEAD.pack(_MAGIC, _VERSION, len(header), sum(map(len, block))), header, *block])


def decode(data: bytes | bytearray, limit_bytes: int) -> Message:
    """Turn what `encode` returned into the message again. Its tensors are on the CPU, writable, and own their memory.

    Args:
        limit_bytes: the greatest length of the whole message.

    Raises:
        UpdateError: `data` is not a whole message within the limits. No other error is raised, whatever `data` is.
    """
    if not isinstance(data, (bytes, bytearray)):
        raise UpdateError(f"a message is bytes, not {type(data).__name__}")
    if len(data) > limit_bytes:
        raise UpdateError(f"a message of {len(data)} bytes exceeds the limit of {limit_bytes}")
    if len(data) < _HEAD.size or not data.startswith(_MAGIC):
        raise UpdateError(f"not a FedSQ message: it does not begin with {_MAGIC.decode()} and its lengths")
    _, version, header_bytes, state_bytes = _HEAD.unpack_from(data)
    if version != _VERSION:
        raise UpdateError(f"a message of version {version}, where version {_VERSION} is spoken")
    announced = _HEAD.size + header_bytes + state_bytes
    if len(data) != announced:
        what = "is truncated" if len(data) < announced else "has trailing bytes"
        raise UpdateError(f"a message {what}: {len(data)} bytes instead of {announced}")
    split = _HEAD.size + header_bytes
    with memoryview(data) as view:
        header = _header(view[_HEAD.size : split])
        message = header.message
        if (state_bytes > 0) != _has_state(message):
            raise UpdateError(f"a message of type {message.type} has a state too many, or lacks it")
        state = unpack(view[split:], frozenset(header.complex)) if state_bytes else State()
    if tuple(key for key, value in state.items() if value.is_complex()) != header.complex:
        raise UpdateError("a message names complex tensors that it does not have")
    return message.model_copy(update={"state": state}) if state_bytes else message


def _has_state(message: Message) -> bool:
    return isinstance(message, Task) or (isinstance(message, Result) and message.metrics is None)


def _header(view: memoryview) -> _Header:
    if wrong := size_problem(view, MAX_VALUES):
        raise UpdateError(f"a message's header has {wrong}")
    raw = bytes(view)
    try:
        header = _Header.model_validate_json(raw)
        whole = as_json(header.model_dump()) == raw
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, (*first["loc"], first["msg"])))
        raise UpdateError(f"a message's header is wrong: {brief(place, 200)}") from None
    except (TypeError, ValueError) as error:
        raise UpdateError(f"a message's header is wrong: {brief(str(error), 200)}") from None
    if not whole:
        raise UpdateError("a message's header is not written in its one form")
    return header
