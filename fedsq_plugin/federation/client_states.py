"""What stays with a client between rounds: the part of its model that does not travel."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from ..errors import WeightsError
from .roles import Role, check_finite
from .state import State


class ClientStates:
    """The local parts of the clients of this process, by client.

    A client that has not trained yet has what the model held when this was made: the warm start, which
    every client shares.
    """

    def __init__(self, model: nn.Module, roles: Mapping[str, Role], travelling: Collection[Role]) -> None:
        self._keys = [key for key, role in roles.items() if role not in travelling]
        self._initial = self._local(model)
        self._states: dict[int, State] = {}

    def begin(self, model: nn.Module) -> None:
        """Give clients that have not trained yet what the model holds now: the server's first broadcast."""
        self._initial = self._local(model)

    def load(self, client: int, model: nn.Module) -> None:
        """Put the client's local part into the model."""
        if self._keys:
            model.load_state_dict(self._states.get(client, self._initial), strict=False)

    def keep(self, client: int, model: nn.Module) -> None:
        """Take the client's local part out of the model. One with NaN or infinite values is not kept: the
        client would never come back from it."""
        local = self._local(model)
        if local and all(check_finite(v) for v in local.values() if v.is_floating_point()):
            self._states[client] = local

    @property
    def kept(self) -> bool:
        """Whether anything stays with a client at all."""
        return bool(self._keys)

    def of(self, client: int) -> State:
        """The local part of a client; empty where it has not trained yet."""
        return self._states.get(client, OrderedDict())

    def tensors(self) -> dict[str, Tensor]:
        """The local parts of all clients that have trained, as `<client>/<key>`."""
        return {f"{client}/{k}": v for client, state in self._states.items() for k, v in state.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave. Raises WeightsError for what is not of this model and exchange."""
        states: dict[int, State] = {}
        for name, value in tensors.items():
            client, _, key = name.partition("/")
            if not client.isdecimal():
                raise WeightsError(f"client states: {name!r} is not <client>/<key>")
            states.setdefault(int(client), OrderedDict())[key] = value
        for client_id, state in states.items():
            if list(state) != self._keys:
                raise WeightsError(
                    f"client states: client {client_id} has other keys than those that stay here"
                )
        self._states = states

    def _local(self, model: nn.Module) -> State:
        state = model.state_dict()
        return OrderedDict((key, state[key].detach().to("cpu", copy=True)) for key in self._keys)
