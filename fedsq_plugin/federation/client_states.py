"""What stays with a silo between rounds: the part of its model that does not travel."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from ..errors import WeightsError
from .roles import Role
from .state import State, no_less_finite, tensors_of

log = logging.getLogger(__name__)


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
        """Keep a silo's local part as the model has it now. A part with NaN or infinite values, which it did not begin
        with, is not kept, because the silo could never train on from it."""
        local, before = self._local(model), self._states.get(silo, self._initial)
        if all(no_less_finite(value, before[key]) for key, value in local.items()):
            if local:
                self._states[silo] = local
            return
        # Not a warning: as a rule the update is refused for the same reason, and that is said.
        log.info("silo %d: what stays with it has NaN or infinite values, and is left as it was", silo)

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
        state = tensors_of(model)
        return OrderedDict((key, state[key].detach().to("cpu", copy=True)) for key in self._keys)
