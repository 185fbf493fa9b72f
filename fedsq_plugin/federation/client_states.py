"""What stays with a silo between rounds: the part of its model that does not travel."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from ..errors import WeightsError
from .roles import Role, check_finite
from .state import State


class ClientStates:
    """The local parts of the silos of this process.

    A silo that has not trained yet has what the model held when this object was made: the warm start, which all silos
    share.
    """

    def __init__(self, model: nn.Module, roles: Mapping[str, Role], travelling: Collection[Role]) -> None:
        self._keys = [key for key, role in roles.items() if role not in travelling]
        self._initial = self._local(model)
        self._states: dict[int, State] = {}

    def begin(self, model: nn.Module) -> None:
        """Give silos that have not trained yet what the model holds now: the server's first broadcast."""
        self._initial = self._local(model)

    def load(self, silo: int, model: nn.Module) -> None:
        """Put a silo's local part into the model."""
        if self._keys:
            model.load_state_dict(self._states.get(silo, self._initial), strict=False)

    def keep(self, silo: int, model: nn.Module) -> None:
        """Keep a silo's local part as the model has it now. A part with NaN or infinite values is not kept, because
        the silo could never train on from it."""
        local = self._local(model)
        if local and all(check_finite(v) for v in local.values() if v.is_floating_point()):
            self._states[silo] = local

    @property
    def kept(self) -> bool:
        """Whether anything stays with a silo at all."""
        return bool(self._keys)

    def of(self, silo: int) -> State:
        """The local part of a silo; empty where it has not trained yet."""
        return self._states.get(silo, OrderedDict())

    def tensors(self) -> dict[str, Tensor]:
        """The local parts of all silos that have trained, as `<silo>/<key>`."""
        return {f"{silo}/{k}": v for silo, state in self._states.items() for k, v in state.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave. Raises WeightsError for parts of another model or another exchange."""
        states: dict[int, State] = {}
        for name, value in tensors.items():
            silo, _, key = name.partition("/")
            if not silo.isdecimal():
                raise WeightsError(f"client states: {name!r} is not <silo>/<key>")
            states.setdefault(int(silo), OrderedDict())[key] = value
        for number, state in states.items():
            if list(state) != self._keys:
                raise WeightsError(f"client states: silo {number} has other keys than those that stay here")
        self._states = states

    def _local(self, model: nn.Module) -> State:
        state = model.state_dict()
        return OrderedDict((key, state[key].detach().to("cpu", copy=True)) for key in self._keys)
