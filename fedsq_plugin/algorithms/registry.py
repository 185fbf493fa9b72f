"""All algorithms by their published names: those of this package, and those of others by entry point.

A new algorithm of ours is a new module here, with an `Algorithm` in it. Another package names its own in the entry
point group `fedsq_plugin.algorithms`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from ..errors import ConfigError, nearest
from ..federation.algorithm import Algorithm, compose, options_together
from ..federation.options import Options

GROUP = "fedsq_plugin.algorithms"


@functools.cache
def builtin() -> Mapping[str, Algorithm]:
    """The algorithms of this package."""
    found: dict[str, Algorithm] = {}
    for module in sorted(info.name for info in iter_modules([str(Path(__file__).parent)])):
        values = vars(import_module(f"{__package__}.{module}")).values()
        found |= {value.name: value for value in values if isinstance(value, Algorithm)}
    return found


def builtin_options() -> type[Options]:
    """The options of all algorithms of this package, as one group."""
    return options_together(*(algorithm.options for algorithm in builtin().values()))


@functools.cache
def algorithms() -> Mapping[str, Algorithm]:
    """All algorithms that have a name; `algorithm` composes more of them.

    Raises:
        ConfigError: an installed package's entry point cannot be loaded, is no Algorithm, or takes a name that is
            taken.
    """
    found = dict(builtin())
    for entry in entry_points(group=GROUP):
        value = _loaded(entry)
        if not isinstance(value, Algorithm) or value.name != entry.name or "+" in value.name:
            raise ConfigError(f"{_named(entry)} must be an Algorithm called {entry.name}, without '+'")
        if entry.name in found:
            raise ConfigError(f"{_named(entry)}: the name is taken; give it another one")
        found[entry.name] = value
    return found


def algorithm(name: str) -> Algorithm:
    """The algorithm of that name, or several joined by `+`, each with the choices in which it is not FedAvg.

    Raises:
        ConfigError: an unknown name, with the nearest; or two algorithms that make the same choice in different ways.

    >>> both = algorithm("FedSQ+FedMR")
    >>> both.gated, both.server.name
    (True, 'recombine')
    """
    names, table = name.split("+"), algorithms()
    for one in names:
        if one not in table:
            whole = f" in '{name}'" if len(names) > 1 else ""
            raise ConfigError(f"unknown algorithm '{one}'{whole}{nearest(one, table)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"algorithm '{name}' names an algorithm twice")
    return functools.reduce(compose, (table[one] for one in names))


def known(name: str) -> bool:
    """Whether every name that `+` joins is an algorithm's; they may still not go together."""
    return all(one in algorithms() for one in name.split("+"))


def find(name: str) -> Algorithm | None:
    """`algorithm`, or None instead of an error."""
    try:
        return algorithm(name)
    except ConfigError:
        return None


def _loaded(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:  # whatever another package's code raises
        raise ConfigError(f"{_named(entry)} cannot be loaded: {' '.join(str(error).split())}") from error


def _named(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist else "a package"
    return f"entry point {entry.group}: {entry.name} of {package} ({entry.value})"
