"""FedML's form of a data set: a list of eight parts, known by their positions. Nothing else reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ...data.registry import is_flamby
from ...data.silos import SilosData
from ...errors import ConfigError

PLACES = ("global_test_size", "global_train", "global_test", "sizes", "train", "test", "outputs")
"""The parts after the first one, which is the number of all training samples."""


class EightTuple(list[Any]):
    """What FedML calls the 8-tuple; `silos` has what it has no place for."""

    silos: SilosData


def to_tuple(data: SilosData) -> EightTuple:
    """FedML's form of the data: its own loops and a user's script find what they expect."""
    found = EightTuple([sum(data.sizes.values()), *(getattr(data, place) for place in PLACES)])
    found.silos = data
    return found


def from_tuple(dataset: Iterable[Any], name: str) -> SilosData:
    """The data by name, from what `fedml.data.load` or a user's own function gave.

    A script may have replaced parts of the list: its parts count. What has no place there is as it was
    loaded; for a list of others the task is a classification.

    Args:
        name: the recipe's `dataset`.

    Raises:
        ConfigError: there are not eight parts, a part by silo is no mapping, or a script took apart what
            `fedml.data.load` gave for a data set of FLamby's, whose loss is then lost.
    """
    parts = list(dataset)
    if len(parts) != 8:
        raise ConfigError(f"the data set has {len(parts)} parts; FedML's have 8, as fedml.data.load gives them")
    places = dict(zip(PLACES, parts[1:], strict=True))
    if not isinstance(dataset, EightTuple) and is_flamby(name):
        raise ConfigError(
            f"the loss and the metric of {name} are lost: hand the data set to FedMLRunner as fedml.data.load gave it"
        )
    places["test"] = places["test"] or {}  # None, as some write it where no silo has test data
    for place in ("sizes", "train", "test"):
        if not isinstance(places[place], Mapping):
            raise ConfigError(
                f"the data set's part {PLACES.index(place) + 2} of 8, {place} by silo, is "
                f"{type(places[place]).__name__}: give a mapping of silos"
            )
    return replace(dataset.silos, **places) if isinstance(dataset, EightTuple) else SilosData(**places)
