"""What the server and the silos send each other, and its form as one flat mapping of tensors.

What is sent beside the weights stands under reserved keys in the same mapping. So whatever carries weights carries it
too, and a message without such parts is a plain state.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UpdateError
from .state import State

RESERVED = "fedsq:"
"""What the keys begin with that are no weights. No module has such a name."""
_STRUCTURAL, _FINGERPRINT, _SUMS = f"{RESERVED}structural:", f"{RESERVED}fingerprint", f"{RESERVED}sums:"
_IDLE = f"{RESERVED}idle"


@dataclass(frozen=True)
class Announcement:
    """The structural copy of a round and those after it."""

    fingerprint: str | None
    """SHA-256 of the structural copy; None: it was dropped, and the model uses its own gates."""
    state: State | None = None
    """The structural copy; None: it equals the weights that come with the announcement."""


@dataclass(frozen=True)
class Assignment:
    """What a silo begins a round with."""

    state: State
    """The part of the model that travels; the whole model for a silo that has nothing yet."""
    structural: Announcement | None = None
    """None: the silo's structural copy stays as it is."""


@dataclass(frozen=True)
class Update:
    """What one silo adds to a round."""

    silo: int
    samples: float
    """Its weight in the mean: the number of its training samples."""
    state: Mapping[str, Tensor]
    """The part of the model that travels; empty in a round that trains nothing."""
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    """Sums over the silo's data, which the server adds up over the silos."""


def packed(assignment: Assignment) -> State:
    """An assignment as one mapping. The tensors are not copied."""
    message = OrderedDict(assignment.state)
    told = assignment.structural
    if told is not None:
        message[_FINGERPRINT] = torch.tensor(list((told.fingerprint or "").encode()), dtype=torch.uint8)
        message.update({f"{_STRUCTURAL}{key}": value for key, value in (told.state or {}).items()})
    return message


def unpacked(message: Mapping[str, Tensor]) -> Assignment:
    """The assignment that `packed` made into one mapping."""
    state = OrderedDict((k, v) for k, v in message.items() if not k.startswith(RESERVED))
    if _FINGERPRINT not in message:
        return Assignment(state)
    fingerprint = bytes(message[_FINGERPRINT].tolist()).decode() or None
    return Assignment(state, Announcement(fingerprint, _under(_STRUCTURAL, message) or None))


def with_sums(state: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> State:
    """An update's state and sums as one mapping."""
    return OrderedDict(state, **{f"{_SUMS}{name}": value for name, value in sums.items()})


def idle_answer() -> State:
    """What a silo sends that had no batch to train on: nothing of it belongs into the mean."""
    return OrderedDict({_IDLE: torch.ones((), dtype=torch.bool)})


def is_idle(message: Mapping[str, Tensor]) -> bool:
    """Whether a silo's answer says that it had no batch to train on."""
    return message.keys() == {_IDLE}


def update_of(silo: int, samples: float, message: Mapping[str, Tensor]) -> Update:
    """The update in what a silo sent. Raises UpdateError for a reserved key that no update has."""
    state = {k: v for k, v in message.items() if not k.startswith(RESERVED)}
    sums = _under(_SUMS, message)
    if len(state) + len(sums) != len(message):
        odd = next(k for k in message if k.startswith(RESERVED) and not k.startswith(_SUMS))
        raise UpdateError(f"the update of silo {silo} has the key {odd!r}, which only the server may send")
    return Update(silo, samples, state, sums)


def _under(prefix: str, message: Mapping[str, Tensor]) -> State:
    return OrderedDict((k[len(prefix) :], v) for k, v in message.items() if k.startswith(prefix))
