"""FedMR (Hu et al. 2024, arXiv 2305.10730): models are recombined instead of averaged."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from torch import Tensor

from ..federation.algorithm import Algorithm, ServerRule
from ..federation.mean import WeightedMean
from ..federation.options import Options, option
from ..federation.roles import Role
from ..federation.seeding import derive
from ..federation.server_state import ServerState
from ..federation.state import State


class FedMROptions(Options):
    fedmr_unit: Literal["key", "module"] = option(
        "key", "fedsq_args", "what FedMR permutes: each key (as published), or a module's keys together"
    )
    first_stage_bound: int = option(0, "fedsq_args", "rounds before FedMR recombines", ge=0)


def recombine(
    server: ServerState,
    trained: Mapping[int, Mapping[str, Tensor]],
    roles: Mapping[str, Role],
    options: FedMROptions,
    seed: int,
) -> ServerState:
    """The next slots: every key, or every module's keys together, is permuted over the slots.

    The global model is the unweighted mean of the models that were trained in this round. In the first
    `first_stage_bound` rounds every slot gets the global model. A slot that was not trained, because its silo failed,
    is recombined as it is. Silos take the slots in ascending order. The paper draws that order; after a uniform
    permutation of every key it makes no difference.

    Args:
        trained: by slot, the state that its client sent.
    """
    count = max(len(server.slots), server.clients, max(trained) + 1)
    slots = [OrderedDict(server.begins(n), **trained.get(n, {})) for n in range(count)]
    mean = WeightedMean()
    for number in trained:
        mean.add(slots[number], 1)
    model = mean.result()
    if server.round < options.first_stage_bound:
        return replace(server, model=model, slots=(model,) * count)
    generator = np.random.default_rng(derive("recombination", seed, server.round))
    sent = [key for key in server.model if key in next(iter(trained.values()))]
    return replace(server, model=model, slots=tuple(recombined(slots, sent, options.fedmr_unit, generator)))


def recombined(slots: Sequence[State], keys: Sequence[str], unit: str, generator: np.random.Generator) -> list[State]:
    """The slots with the entries of `keys` permuted among them; tensors are neither copied nor changed.

    `unit` "key" (as published) permutes each key by itself, so that a BatchNorm's statistics part from its
    weights; "module" keeps the keys of one module together.
    """
    result = [OrderedDict(slot) for slot in slots]
    orders: dict[str, list[int]] = {}
    for key in keys:
        group = key if unit == "key" else key.rpartition(".")[0]
        if group not in orders:
            orders[group] = generator.permutation(len(slots)).tolist()
        for slot, source in zip(result, orders[group], strict=True):
            slot[key] = slots[source][key]
    return result


FEDMR = Algorithm(
    "FedMR",
    "Hu et al. 2024, arXiv 2305.10730",
    server=ServerRule("recombine", recombine, separate=True),
    options=FedMROptions,
)
