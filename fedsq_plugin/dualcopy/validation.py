"""Finds what cannot be gated in a model, says where it is and what to use instead."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import GateError, Part, Word, in_words
from .activations import UNGATEABLE_MODULES, suggest_instead
from .below import CHOSEN, DRAWN
from .tracing import Call, trace


class TwoCopies(nn.Module):
    """Base class of DualCopy. Modules that DualCopy imports use it to recognise a DualCopy."""


class Finding(NamedTuple):
    """One reason why a model cannot be gated."""

    path: str
    """Path of the activation module, or of the module that makes a functional call."""
    what: str
    ways_out: tuple[Part, ...]
    """What would be right. Each host has its own words for some parts."""
    kind: str = ""
    """Name of the activation, as in `path:activation`; empty if the reason is not an activation."""

    @property
    def remedy(self) -> str:
        """What would be right."""
        return in_words(self.ways_out)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (f"{self.path or 'the model itself'}: {self.what}; ", *self.ways_out)

    def __str__(self) -> str:
        return in_words(self.parts)


_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")


def _is_accepted(path: str, what: str, accept: Iterable[str]) -> bool:
    names = (path, f"{path}:{what}")
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in accept)


def find_in_modules(model: nn.Module, accept: Iterable[str] = ()) -> list[Finding]:
    """Return the findings that need no forward: modules that cannot be gated or cannot be inspected."""
    findings = []
    accept = list(accept)
    for path, module in model.named_modules():
        if isinstance(module, TwoCopies):
            findings.append(Finding(path, "is a DualCopy already", ("pass its .quantitative",)))
        elif isinstance(module, torch.jit.ScriptModule):
            what = "is a TorchScript module, whose activations cannot be seen"
            findings.append(Finding(path, what, ("pass the Python module it was made from",)))
        elif lazy := [name for name, p in module._parameters.items() if is_lazy(p)]:
            where = f"{path}.{lazy[0]}" if path else lazy[0]
            what = "is a lazy parameter, which has no values yet"
            findings.append(Finding(where, what, ("run one batch through the model first",)))
        elif type(module).__module__.startswith(_QUANTISED):
            what = f"is quantised ({type(module).__module__}.{type(module).__name__}), and has no weights to train"
            findings.append(Finding(path, what, ("train the plain model, and quantise it afterwards",)))
        else:
            for cls, name in UNGATEABLE_MODULES.items():
                if isinstance(module, cls):
                    if not _is_accepted(path, name, accept):
                        findings.append(_make_finding(path, type(module).__name__, name))
                    break
    return findings


_HIDDEN = {
    "sigmoid": "hidden sigmoid",
    "tanh": "hidden tanh",
    "swish": "hidden swish (an activation times its own input)",
    "mask": "a product with a mask of the model's own values",
    "where": "a choice by a mask of the model's own values (where, masked_fill, an assignment)",
    "max": "a maximum over a dimension",
    "min": "a minimum over a dimension",
    "abs": "an absolute value",
}
"""Text for activations that are ungateable only in some places."""


def _make_finding(path: str, shown: str, name: str, below: bool = False) -> Finding:
    accept = Word("gate_accept", f"[{path or f':{name}'!r}]")
    what = f"{shown} has no fixed linear gate"
    if below:
        what = (
            f"{shown} is an activation without a gate: none of torch's functions for activations computes it, but a "
            "scripted function, torch.ops, a torch.autograd.Function or arithmetic"
        )
    return Finding(path, what, (*suggest_instead(name), ", or accept it ungated by name: ", accept), name)


def find_in_calls(calls: Sequence[Call], accept: Iterable[str] = ()) -> list[Finding]:
    """Return the findings of a traced forward: functional activations, or no gate at all."""
    accept = list(accept)
    found = [
        _make_finding(call.path, _HIDDEN.get(call.what, call.what), call.what, call.below)
        for call in dict.fromkeys(calls)
        if not call.gated and not _is_accepted(call.path, call.what, accept)
    ]
    if not any(call.gated and not call.own for call in calls):
        found.append(
            Finding(
                "",
                "has no gate: no ReLU-like activation or max-pooling is called",
                ("FedSQ would be FedAvg; use a backbone with ReLU activations (an MLP for a linear model)",),
            )
        )
    return found


def find_chosen(chosen: Sequence[tuple[str, int]], shared: bool) -> list[Finding]:
    """Return the findings of gated calls whose rows are chosen by the model.

    Args:
        shared: both copies draw the same random numbers.
    """
    reasons = {CHOSEN: "its own values (a router, top-k, sorting)"}
    if not shared:
        reasons[DRAWN] = "random numbers of training mode"
    return [
        Finding(
            path,
            f"gets entries that the model chooses by {reasons[flag]}: the two copies would choose others",
            ("leave the choice out, or choose after the last gated call",),
        )
        for path, flag in dict.fromkeys(chosen)
        if flag in reasons
    ]


def validate(
    model: nn.Module, example: Any = None, accept: Iterable[str] = (), pooling: str = "structural"
) -> list[Finding]:
    """List the reasons why `model` cannot be gated. The list is empty if it can.

    Args:
        model: any torch model.
        example: an input batch (a tensor, a tuple of positional or a dict of keyword arguments). It is needed
            to find functional calls; without it only modules are checked.
        accept: module paths (or glob patterns; `path:activation` for functional calls) of activations
            that may stay ungated.
        pooling: "structural", or "own" if max-pooling is not gated.
    """
    accept = list(accept)
    findings = find_in_modules(model, accept)
    if example is None or any(not f.kind for f in findings):
        return findings
    args, kwargs = (), {}  # type: tuple[Any, ...], dict[str, Any]
    if isinstance(example, Mapping):
        kwargs = dict(example)
    else:
        args = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    known = {f.path for f in findings}
    # In evaluation mode batch normalisation also accepts a single example.
    traced = trace(model, args, kwargs, pooling == "own", evaluation=True)
    chosen = find_chosen(traced.chosen, shared=bool(traced.draws or traced.moved))
    for finding in [*find_in_calls(traced.calls, accept), *chosen]:
        if finding.path not in known or not finding.path:
            findings.append(finding)
    return findings


def refuse(findings: Sequence[Finding]) -> None:
    """Raise GateError if there are findings. Its line has one finding of each kind, with the number of others."""
    if findings:
        kinds: dict[str, list[Finding]] = {}
        for finding in findings:
            kinds.setdefault(finding.what, []).append(finding)
        shown: list[Part] = []
        for first, *others in kinds.values():
            shown += [" | " if shown else "cannot gate this model: ", *first.parts]
            if others:
                all_of_them = Word("gate_accept", f"[{f'*:{first.kind}'!r}]")
                named = (", all of them: ", all_of_them) if first.kind else ()
                shown += [f" (and {len(others)} more like it", *named, ")"]
        raise GateError(*shown)
