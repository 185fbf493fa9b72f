"""All that the server remembers between rounds, in a form that can be saved."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..dualcopy import DualCopy
from ..errors import WeightsError
from .state import State, with_extras


@dataclass(frozen=True)
class ServerState:
    """The server between two rounds. Its tensors are shared between states and never written into."""

    model: State
    """The global model, whole: what is evaluated and released."""
    slots: tuple[State, ...] = ()
    """Whole models that the silos of a round begin with, in their order; empty: all begin with `model`."""
    memory: Mapping[str, State] = field(default_factory=dict)
    """What the server's rule keeps, by name: moments of an optimizer."""
    structural: State | None = None
    """The structural copy; None where there is none."""
    structural_version: int = 0
    """Counts the changes of the structural copy."""
    told: Mapping[int, int] = field(default_factory=dict)
    """By silo: the version of the structural copy that it was told last. Absent: 0, the first one. -1: it has nothing,
    and must be sent the whole model."""
    clients: int = 0
    """Number of silos of the round that began last, whether they answered or not."""
    round: int = 0
    """Rounds that are finished."""

    def begins(self, position: int) -> State:
        """The model that the client at this position in the round's order begins with."""
        return self.slots[position % len(self.slots)] if self.slots else self.model

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, under one flat name each."""
        parts: dict[str, Mapping[str, Tensor]] = {"model": self.model, "structural": self.structural or {}}
        parts |= {f"slot {number}": slot for number, slot in enumerate(self.slots)}
        parts |= {f"memory {name}": state for name, state in self.memory.items()}
        return {f"{part}/{key}": value for part, state in parts.items() for key, value in state.items()}

    def about(self) -> dict[str, Any]:
        """Everything that is no tensor, as JSON has it."""
        return {
            "round": self.round,
            "clients": self.clients,
            "structural_version": self.structural_version,
            "told": {str(client): version for client, version in self.told.items()},
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> ServerState:
        """The state whose `tensors()` and `about()` these are. Raises WeightsError for others."""
        parts: dict[str, State] = {}
        for name, value in tensors.items():
            part, _, key = name.partition("/")
            parts.setdefault(part, OrderedDict())[key] = value
        try:
            model = parts.pop("model")
            structural = parts.pop("structural", None)
            slots = [parts.pop(f"slot {n}") for n in range(sum(part.startswith("slot ") for part in parts))]
            if foreign := [part for part in parts if not part.startswith("memory ")]:
                raise KeyError(foreign[0])
            memory = {part.removeprefix("memory "): state for part, state in parts.items()}
            told = {int(client): int(version) for client, version in about["told"].items()}
            version, clients, finished = (int(about[name]) for name in ("structural_version", "clients", "round"))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise WeightsError(f"this is no server state: {error!r} is missing or wrong") from None
        return cls(model, tuple(slots), memory, structural, version, told, clients, finished)


def load_state(model: nn.Module, state: ServerState) -> None:
    """Put the global model into a module, and let a DualCopy's gates be those of the server's structural copy."""
    model.load_state_dict(with_extras(model, state.model))
    load_structural(model, state)


def load_structural(model: nn.Module, state: ServerState) -> None:
    """Let a DualCopy's gates be those of the server's structural copy, or its own where it was dropped."""
    if not isinstance(model, DualCopy):
        return
    if state.structural is None:
        model.unfreeze()
    else:
        model.refresh(with_extras(model.structural, state.structural))
