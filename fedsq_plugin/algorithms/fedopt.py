"""Server optimizers, FedAvgM, FedAdam and FedYogi: a step along Δ, the mean of the updates minus the server's model.

Only parameters take that step. Running statistics and counters are those of the mean, because a step along a variance
can make it negative.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..federation.algorithm import Algorithm, ServerRule
from ..federation.options import Options, option
from ..federation.roles import Role
from ..federation.server_state import ServerState
from ..federation.state import State


class ServerOptimizerOptions(Options):
    server_lr: float | None = option(
        None, "train_args", "server's learning rate; FedAvgM: 1, FedAdam and FedYogi: 0.01", gt=0
    )
    server_momentum: float = option(0.9, "train_args", "β of FedAvgM, β₁ of FedAdam and FedYogi", ge=0, lt=1)


class AdaptiveOptions(ServerOptimizerOptions):
    server_beta2: float = option(0.99, "fedsq_args", "β₂ of FedAdam and FedYogi", ge=0, lt=1)
    server_tau: float = option(1e-3, "fedsq_args", "τ of FedAdam and FedYogi", gt=0)


PARAMETERS = (Role.BODY, Role.HEAD, Role.NORM_PARAMETER, Role.HEAD_NORM_PARAMETER)


def momentum(
    server: ServerState, mean: Mapping[str, Tensor], roles: Mapping[str, Role], options: Any, seed: int
) -> ServerState:
    """FedAvgM: v ← β·v + Δ, w ← w + η·v; by default η = 1 (Hsu et al. 2019, arXiv 1909.06335)."""
    rate = 1.0 if options.server_lr is None else options.server_lr
    delta = _delta(server, mean, roles)
    before = server.memory.get("momentum") or _filled(delta, 0.0)
    moved = _each(lambda v, d: options.server_momentum * v + d, before, delta)
    return _stepped(server, mean, _each(lambda v: rate * v, moved), {"momentum": moved})


def adaptive(name: str, second: Callable[[Tensor, Tensor, float], Tensor]) -> ServerRule:
    """m ← β₁·m + (1−β₁)·Δ, v ← second(v, Δ², β₂), w ← w + η·m/(√v + τ); m starts at 0, v at τ²; by default η = 0.01
    (Reddi et al. 2021, arXiv 2003.00295, algorithm 2)."""

    def step(
        server: ServerState, mean: Mapping[str, Tensor], roles: Mapping[str, Role], options: Any, seed: int
    ) -> ServerState:
        rate = 0.01 if options.server_lr is None else options.server_lr
        beta, tau = options.server_momentum, options.server_tau
        delta = _delta(server, mean, roles)
        m = server.memory.get("first moment") or _filled(delta, 0.0)
        v = server.memory.get("second moment") or _filled(delta, tau**2)
        m = _each(lambda m, d: beta * m + (1 - beta) * d, m, delta)
        v = _each(lambda v, d: second(v, d.square(), options.server_beta2), v, delta)
        moves = _each(lambda m, v: rate * m / (v.sqrt() + tau), m, v)
        return _stepped(server, mean, moves, {"first moment": m, "second moment": v})

    return ServerRule(name, step)


ADAM = adaptive("adam", lambda v, square, beta: beta * v + (1 - beta) * square)
YOGI = adaptive("yogi", lambda v, square, beta: v - (1 - beta) * square * torch.sign(v - square))


def _delta(server: ServerState, mean: Mapping[str, Tensor], roles: Mapping[str, Role]) -> State:
    """The mean minus the model; 0 where the model is infinite or NaN, as a mask is that never moves."""
    found: State = OrderedDict()
    for key in (key for key in mean if roles[key] in PARAMETERS):
        before = server.model[key]
        found[key] = (mean[key] - before).masked_fill(~before.isfinite(), 0)
    return found


def _stepped(server: ServerState, mean: Mapping[str, Tensor], step: State, memory: Mapping[str, State]) -> ServerState:
    moved = {key: server.model[key] + value for key, value in step.items()}
    return replace(server, model=OrderedDict(server.model, **{**mean, **moved}), memory=memory)


def _each(rule: Callable[..., Tensor], *states: State) -> State:
    return OrderedDict((key, rule(*(state[key] for state in states))) for key in states[0])


def _filled(like: State, value: float) -> State:
    return OrderedDict((key, torch.full_like(tensor, value)) for key, tensor in like.items())


FEDAVGM = Algorithm(
    "FedAvgM",
    "Hsu et al. 2019, arXiv 1909.06335",
    server=ServerRule("momentum", momentum),
    options=ServerOptimizerOptions,
)
FEDADAM = Algorithm("FedAdam", "Reddi et al. 2021, arXiv 2003.00295", server=ADAM, options=AdaptiveOptions)
FEDYOGI = Algorithm("FedYogi", "Reddi et al. 2021, arXiv 2003.00295", server=YOGI, options=AdaptiveOptions)
