"""Phases: which part trains when, within a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..federation.local import Phase
from ..federation.roles import Role
from .options import Options


def everything(options: Options) -> Sequence[Phase]:
    """All parameters, for the round's local epochs."""
    return (Phase(options.epochs, frozenset(Role)),)


PHASES: dict[str, Callable[[Options], Sequence[Phase]]] = {"all": everything}
