"""The first forward in each mode: finds what cannot be gated, and how the calls of the two copies match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import FedSQError, GateError, in_one_line
from .copies import find_hook
from .frozen import MADE, Write
from .places import Place
from .plan import Plan, compare, make_plan
from .tracing import Traced, trace
from .validation import Finding, find_chosen, find_in_calls, refuse

MANY, AT_ONE_PLACE = 64, 4
"""No more decisions of one forward, and in one loop, are tried the other way."""
SEEDS = range(1, 9)
"""Starts of the random generators for a model that draws numbers from Python or numpy."""


class Inspection:
    """What the first forward in one mode finds.

    Raises:
        GateError: a call cannot be gated, or the copies can part.
    """

    def __init__(
        self,
        structural: nn.Module,
        quantitative: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        own_pooling: bool,
        accept: Sequence[str],
        grad: bool,
    ) -> None:
        self._given = (args, kwargs, own_pooling)
        self._structural, self._quantitative, self._grad = structural, quantitative, grad
        try:
            frozen, trained = self._trace_structural(), self._trace_quantitative()
        except FedSQError:
            raise
        except Exception as error:
            if (path := find_hook(quantitative)) is None:
                raise
            raise GateError(
                f"{path}: the structural copy runs without the user's hooks, and the model fails without them "
                f"({in_one_line(error)}): make the hook a method of the model, or put it into forward()"
            ) from error
        refuse(find_in_calls(frozen.calls + trained.calls, accept))
        self._frozen, self._trained = frozen, trained
        refuse(_find_made([*frozen.writes, *trained.writes]))
        draws = bool(frozen.draws or frozen.moved)
        refuse([*_find_unshared_draws(frozen, trained), *find_chosen([*frozen.chosen, *trained.chosen], draws)])
        self.plan: Plan = make_plan(frozen.gated, trained.gated)._replace(draws=draws, writes=frozen.writes)
        self._try_other_paths()

    def _trace_structural(self, **other: Any) -> Traced:
        return trace(self._structural, *self._given, **other)

    def _trace_quantitative(self, **other: Any) -> Traced:
        # With the structural weights: what differs is then due to the mode of the model alone.
        return trace(self._quantitative, *self._given, weights=self._structural, grad=self._grad, **other)

    def _try_other_paths(self) -> None:
        """Let the forward decide otherwise. Raise GateError if gates would not belong to their calls then."""
        frozen, trained = self._frozen.gated, self._trained.gated
        both = [*frozen, *trained]
        for other in self._repeat(self._trained, self._trace_quantitative):
            compare(self.plan, both, frozen, other.gated)
        for other in self._repeat(self._frozen, self._trace_structural):
            compare(self.plan, both, other.gated, trained)

    @staticmethod
    def _repeat(first: Traced, run: Any) -> Iterator[Traced]:
        """Yield the forward with each decision changed, and with other random numbers."""
        tried: Counter[Place] = Counter()
        for number, (place, others) in enumerate(first.decisions[:MANY]):
            tried[place] += 1
            if tried[place] > AT_ONE_PLACE:
                continue
            for other in range(others):
                try:
                    yield run(alter={number: other})
                except GateError:
                    raise
                except Exception:  # a value that cannot be, such as the index of a layer that is not there
                    continue
        for seed in SEEDS if first.moved else ():
            yield run(seed=seed)


def _find_made(writes: Sequence[Write]) -> list[Finding]:
    """Return the findings of layers and parameters that the forward makes."""
    made = dict.fromkeys(".".join(filter(None, (w.path, w.name))) for w in writes if w.registry == MADE)
    what = "is made in the forward, in each copy with other weights"
    return [Finding(path, what, ("run one batch through the model before it is wrapped",)) for path in made]


def _find_unshared_draws(frozen: Traced, trained: Traced) -> list[Finding]:
    """Return a finding if the structural copy draws random numbers, and the quantitative copy would draw others."""
    apart = [draw[1:] for draw in frozen.draws] != [draw[1:] for draw in trained.draws]
    if not (frozen.draws or frozen.moved):
        return []
    path = frozen.draws[0].path if frozen.draws else ""
    for draw in frozen.draws:
        if draw.own:
            what = "draws random numbers in evaluation mode from a generator of its own, which the copies do not share"
            return [Finding(draw.path, what, ("draw from torch's global generator",))]
    if not apart and frozen.moved == trained.moved:
        return []
    what = (
        "draws random numbers in evaluation mode too (as F.dropout without training= does), and others in training: "
        "the two copies would not draw the same"
    )
    return [Finding(path, what, ("pass training=self.training, or draw by one function in both modes",))]
