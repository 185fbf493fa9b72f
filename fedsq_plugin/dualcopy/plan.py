"""Which gate each call of the quantitative copy uses: the gate of the same call in the structural copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..errors import GateError
from .activations import GateKind
from .frozen import Write
from .places import Site

Key = tuple[str, Site, GateKind]
"""A place in the model where a gated function is called: module, place in its code, kind of the gate."""
Occurrence = tuple[Key, int]
"""One call there: a loop, or a shared module, calls several times."""

WAY_OUT = (
    "a model whose path depends on its weights, on random numbers or on what it has seen cannot be gated; "
    "make the path fixed (LayerDrop and stochastic depth off), or accept what is ungated by name"
)


def describe_parting(path: str, what: str) -> str:
    """Say that the two copies do not make the same gated calls in the module at `path`."""
    where = path or "the model itself"
    return f"{where}: the quantitative copy does not follow the structural copy's path: {what}; {WAY_OUT}"


class GatedCall(NamedTuple):
    """A gated call of an inspected forward."""

    key: Key
    fed: frozenset[str]
    """Names of the parameters that were used since the gated call before it."""
    last: frozenset[str]
    """Names of the parameters that the last function with parameters used before it."""
    shape: tuple[int, ...]
    """Shape of the input, without the dimensions that pooling works on."""
    own: bool
    """The call is a part of something that the user accepts ungated: each copy uses its own gate here."""
    number: int = 0
    """Number of the call in the trace."""


class Plan(NamedTuple):
    """How the calls of the two copies belong together in one mode of the quantitative copy."""

    order: tuple[int | None, ...]
    """Index of the structural gate for each call of the inspected forward. For calls whose place is unknown."""
    own: frozenset[Occurrence]
    """Calls of the quantitative copy that use their own gates: auxiliary heads, and what is accepted."""
    passed: frozenset[Occurrence]
    """Calls that only the structural copy makes because it is in evaluation mode."""
    renamed: dict[Key, Key]
    """Place in the quantitative copy -> place of the same call in the structural copy, where they differ."""
    draws: bool = False
    """The structural copy draws random numbers: both copies must draw the same."""
    writes: tuple[Write, ...] = ()
    """What the forward of the structural copy writes into it: it is taken back."""


def count_calls(keys: Iterable[Key]) -> list[Occurrence]:
    """Number the calls at each place."""
    counts: Counter[Key] = Counter()
    found = []
    for key in keys:
        found.append((key, counts[key]))
        counts[key] += 1
    return found


def make_plan(structural: Sequence[GatedCall], quantitative: Sequence[GatedCall]) -> Plan:
    """Match the calls of two forwards whose weights are equal; they differ by the mode of the model alone.

    Raises:
        GateError: a place is called in both modes, but not equally often.
    """
    counts = [Counter(call.key for call in calls) for calls in (structural, quantitative)]
    for key in counts[0] & counts[1]:
        if counts[0][key] != counts[1][key]:
            raise GateError(
                describe_parting(key[0], f"{counts[1][key]} calls in training for {counts[0][key]} in evaluation")
            )
    alone = [
        [call for call in calls if call.key not in other]
        for calls, other in zip((structural, quantitative), (counts[1], counts[0]), strict=True)
    ]
    renamed = _pair(*alone)
    theirs = count_calls(call.key for call in structural)
    index = {occurrence: position for position, occurrence in enumerate(theirs)}
    mine = count_calls(renamed.get(call.key, call.key) for call in quantitative)
    own = {at for at, call in zip(mine, quantitative, strict=True) if call.own or at not in index}
    passed = set(theirs) - set(mine) | {at for at in theirs if at in own}
    order = tuple(None if at in own else index[at] for at in mine)
    return Plan(order, frozenset(own), frozenset(passed), renamed)


def _pair(structural: Sequence[GatedCall], quantitative: Sequence[GatedCall]) -> dict[Key, Key]:
    """Pair calls that a model writes twice, as in `relu(f(x)) if self.training else relu(f(x))`."""
    renamed: dict[Key, Key] = {}
    for call in quantitative:
        for other in structural:
            alike = (call.key[0], call.key[2], call.fed) == (other.key[0], other.key[2], other.fed)
            if alike and other.key not in renamed.values():
                renamed.setdefault(call.key, other.key)
    return renamed


class Ledger:
    """Counts the calls of one forward of the quantitative copy, and finds the structural call for each."""

    def __init__(self, plan: Plan, structural: Iterable[Key]) -> None:
        self._plan = plan
        self._calls: Counter[Key] = Counter()
        self._index = {at: position for position, at in enumerate(count_calls(structural))}
        self._all = Counter((at[0][0], at[0][2]) for at in self._index)
        self._passed = Counter((at[0][0], at[0][2]) for at in self._index if at in plan.passed)
        self._made: Counter[tuple[str, GateKind]] = Counter()

    def find(self, key: Key) -> int | None:
        """Return the index of the structural call for the next call at `key`; None: it uses its own gate.

        Raises:
            GateError: the structural copy did not make this call.
        """
        key = self._plan.renamed.get(key, key)
        at = (key, self._calls[key])
        self._calls[key] += 1
        position = self._index.get(at)
        if at in self._plan.own:
            if position is not None and at not in self._plan.passed:
                raise GateError(describe_parting(key[0], f"only some inputs have a gate here ({key[2].value})"))
            return None
        if position is None:
            raise GateError(describe_parting(key[0], f"it makes a gated call ({key[2].value}) that the other did not"))
        self._made[key[0], key[2]] += 1
        return position

    def finish(self) -> None:
        """Raise GateError if a module made some, but not all, of its calls: then it is unknown which were left out."""
        for (path, kind), count in self._made.items():
            every = self._all[path, kind]
            # A module that is left out as a whole in the inspected forward may be called as a whole later.
            expected = every - self._passed[path, kind] or every
            if count != expected:
                raise GateError(describe_parting(path, f"{count} gated calls ({kind.value}) instead of {expected}"))


def compare(
    plan: Plan, inspected: Sequence[GatedCall], structural: Sequence[GatedCall], quantitative: Sequence[GatedCall]
) -> None:
    """Raise GateError if the gates of one forward would not belong to the calls of another.

    Args:
        inspected: the calls of the forwards from which `plan` was made, of both copies.
        structural: calls of a forward of the structural copy, and
        quantitative: of the quantitative copy; each on a path that its copy could take.
    """
    ledger = Ledger(plan, (call.key for call in structural))
    for call in quantitative:
        ledger.find(call.key)
    ledger.finish()
    known: dict[Key, list[GatedCall]] = {}
    for call in inspected:
        known.setdefault(plan.renamed.get(call.key, call.key), []).append(call)
    for calls in (structural, quantitative):
        made = {plan.renamed.get(call.key, call.key) for call in calls}
        # A call after a layer that was left out follows other layers, but it has its own gate still.
        skips = len(made) < len(known)
        for call in calls:
            alike = known.get(plan.renamed.get(call.key, call.key), [])
            _check_alike(call, alike, skips)


def _check_alike(call: GatedCall, alike: Sequence[GatedCall], skips: bool) -> None:
    """Raise GateError if a call is not one of the inspected calls at its place."""
    if not any(call.shape == other.shape for other in alike):
        raise GateError(describe_parting(call.key[0], f"the same gated call has input of shape {call.shape} there"))
    if not any((call.last == other.last) if skips else (call.fed == other.fed) for other in alike):
        uses = ", ".join(sorted(call.last if skips else call.fed)) or "no layer"
        raise GateError(describe_parting(call.key[0], f"the same gated call follows other layers there ({uses})"))


def as_key(place: tuple[str, Any], kind: GateKind) -> Key:
    return (place[0], place[1], kind)
