"""The data sets that this package has, by the names of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import ConfigError, nearest
from .digits import read_digits
from .flamby.catalogue import CATALOGUE
from .flamby.catalogue import PREFIX as FLAMBY
from .image_folder import read_image_folder
from .options import DataOptions
from .silos import SilosData, Splits, divide

OURS: dict[str, Callable[[DataOptions], Splits]] = {"digits": read_digits, "image_folder": read_image_folder}
"""Labelled data sets, which we divide over the silos ourselves."""

NAMES = (*OURS, *CATALOGUE)
"""Every data set that `load` knows."""


def is_flamby(name: str) -> bool:
    """Whether a recipe's data set is FLamby's, or misspelt as one: FLamby's centres are the silos."""
    return name.startswith(FLAMBY)


def has(name: str) -> bool:
    """Whether `load` is the one to load this data set, or to say what is wrong with its name."""
    return name in OURS or is_flamby(name)


def load(options: DataOptions, silos: Sequence[int] | None = None, pooled: bool = True) -> SilosData:
    """The data of the recipe's `dataset`.

    Args:
        silos: those that this process serves; None: all. Centres of FLamby's are loaded for these alone, our
            own data sets always for all silos.
        pooled: whether FLamby's test data of all centres together are wanted.

    Raises:
        ConfigError: the name is unknown, the data cannot be had, or they do not give so many silos.
    """
    if is_flamby(options.dataset):
        from .flamby.centres import load_centres

        return load_centres(options, silos, pooled)
    if options.dataset not in OURS:
        raise ConfigError(f"data_args.dataset '{options.dataset}' is unknown{nearest(options.dataset, NAMES)}")
    return divide(OURS[options.dataset](options), options)
