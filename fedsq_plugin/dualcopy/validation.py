"""What cannot be gated in a model, where, and what to use instead."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import GateError, Part, Word, in_words
from .activations import UNGATEABLE_MODULES, way_out
from .tracing import Call, TwoCopies, trace


class Finding(NamedTuple):
    """One reason why a model cannot be gated as it is."""

    path: str
    """Module path; of the module that makes the call, where the activation is a functional one."""
    what: str
    ways_out: tuple[Part, ...]
    """What would be right, in parts that every host words."""
    kind: str = ""
    """The activation's name, as in `path:activation`; none where it is about something else."""

    @property
    def remedy(self) -> str:
        """What would be right."""
        return in_words(self.ways_out)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (f"{self.path or 'the model itself'}: {self.what}; ", *self.ways_out)

    def __str__(self) -> str:
        return in_words(self.parts)


def _accepted(path: str, what: str, accept: Iterable[str]) -> bool:
    names = (path, f"{path}:{what}")
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in accept)


def static_findings(model: nn.Module, accept: Iterable[str] = ()) -> list[Finding]:
    """Findings that need no input: activation modules that cannot be gated, and opaque modules."""
    findings = []
    accept = list(accept)
    for path, module in model.named_modules():
        if isinstance(module, TwoCopies):
            findings.append(Finding(path, "is a DualCopy already", ("pass its .quantitative",)))
        elif isinstance(module, torch.jit.ScriptModule):
            what = "is a TorchScript module, whose activations cannot be seen"
            findings.append(Finding(path, what, ("pass the Python module it was made from",)))
        else:
            for cls, name in UNGATEABLE_MODULES.items():
                if isinstance(module, cls):
                    if not _accepted(path, name, accept):
                        findings.append(_ungateable(path, type(module).__name__, name))
                    break
    return findings


_HIDDEN = {
    "sigmoid": "hidden sigmoid",
    "tanh": "hidden tanh",
    "swish": "hidden swish (an activation times its own input)",
}
"""How findings show activations that only their use makes ungateable."""


def _ungateable(path: str, shown: str, name: str) -> Finding:
    what = f"{shown} has no fixed linear gate"
    spelled = path or f":{name}"
    accept = Word("gate_accept", f"[{spelled!r}]")
    return Finding(path, what, (*way_out(name), ", or accept it ungated by name: ", accept), name)


def call_findings(calls: Sequence[Call], accept: Iterable[str] = ()) -> list[Finding]:
    """Findings that a traced forward shows: functional activations, or no gate at all."""
    accept = list(accept)
    found = [
        _ungateable(call.path, _HIDDEN.get(call.what, call.what), call.what)
        for call in dict.fromkeys(calls)
        if not call.gated and not _accepted(call.path, call.what, accept)
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


def validate(
    model: nn.Module, example: Any = None, accept: Iterable[str] = (), pooling: str = "structural"
) -> list[Finding]:
    """List what keeps `model` from being gated; empty when all is well.

    Args:
        model: any torch model.
        example: an input batch (a tensor, a tuple of positional or a dict of keyword arguments). Without
            it only what the module tree shows is found: functional calls need a forward.
        accept: module paths (or glob patterns; `path:activation` for functional calls) of activations
            that may stay ungated.
        pooling: "structural", or "own" where max-pooling is not gated.
    """
    accept = list(accept)
    findings = static_findings(model, accept)
    if example is None or any("is a" in f.what for f in findings):
        return findings
    args, kwargs = (), {}  # type: tuple[Any, ...], dict[str, Any]
    if isinstance(example, Mapping):
        kwargs = dict(example)
    else:
        args = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    known = {f.path for f in findings}
    # In evaluation mode, where batch normalisation takes a single example too.
    calls = trace(model, args, kwargs, pooling == "own", evaluation=True)
    for finding in call_findings(calls, accept):
        if finding.path not in known or not finding.path:
            findings.append(finding)
    return findings


def refuse(findings: Sequence[Finding]) -> None:
    """Raise GateError with the findings in one line, one of each kind, if there are any."""
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
