"""What the names in a recipe say: whether its algorithm, its model and its data set are ours, and what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import models
from ..algorithms import find, known
from ..data.flamby.backbones import MODELS
from ..data.registry import OURS, is_flamby
from ..models.backbones import PREFIX
from ..settings.idle import Facts
from .host import host


def facts_of(valid: Mapping[str, Any], ours: bool | None = None) -> Facts:
    """The facts of a recipe.

    Args:
        valid: its options that are valid by themselves.
        ours: whether the plugin's algorithms run it, rather than the host's own; None: as the name of the algorithm
            tells.
    """
    model, dataset, name = (str(valid.get(key, "")) for key in ("model", "dataset", "federated_optimizer"))
    if ours is None:
        ours = known(name) or name not in host().algorithms
    algorithm = find(name) if ours else None
    gated = model.startswith(PREFIX) or (algorithm is not None and algorithm.gated)
    centres = is_flamby(dataset)
    return Facts(
        algorithm=algorithm,
        native=None if ours else f"{host().name}'s own {name}",
        native_reads=() if ours else host().algorithm_options.get(name, ()),
        ungated=name if not gated and (algorithm is not None or not ours) else None,
        gated_backbone=gated and model in (*models.names(), *MODELS),
        our_model=model in models.names(),
        centres=centres,
        data_of=f"{host().name}'s" if "dataset" in valid and not centres and dataset not in OURS else "",
        divided=dataset in host().datasets and dataset not in host().partitions,
    )
