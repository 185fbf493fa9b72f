"""Options of a recipe that would silently do nothing, or not what is meant."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..algorithms.registry import builtin_options
from ..federation.algorithm import Algorithm, ExtraOptions
from ..federation.options import options_of, said
from .config import OPTIONS

OWN = {**options_of(builtin_options()), **options_of(ExtraOptions)}
"""The options that only some algorithms read."""


@dataclass(frozen=True)
class Facts:
    """What is known of a recipe beside its options. The parameters of idle rules may name them."""

    algorithm: Algorithm | None
    """The algorithm of ours that runs; None: the host's own runs, or the name is unknown."""
    native: str | None
    """The host's own algorithm that runs instead, as "FedML's own FedNova"."""
    ungated: str | None
    """The name of the algorithm where neither the algorithm nor the model has gates; None: there are gates, or it is
    unknown."""
    gated_backbone: bool
    """Whether gates are frozen in a model whose initial weights are the plugin's own."""
    our_model: bool
    """Whether the model is one of ours."""
    centres: bool
    """Whether the data set comes divided over centres, which are the silos."""
    data_of: str
    """The host whose own data set it is, as "FedML's"; empty where the data set is ours or unknown."""
    native_reads: Collection[str] = ()
    """What the host's own algorithm reads although others of the host's ignore it."""
    divided: bool = False
    """Whether it is one of the host's that comes divided over silos, whatever the recipe says."""


def unused(valid: Mapping[str, Any], facts: Facts) -> list[str]:
    """A line for every option that is not at its default and has no effect beside the others.

    Args:
        valid: options that are valid by themselves. A wrong one is taken for one that has an effect.
    """
    values = {**vars(facts), **valid}
    lines = []
    for key, option in OPTIONS.items():
        if key not in valid or valid[key] == option.default or key in facts.native_reads:
            continue
        reasons = [line for _, line in said(option.idle, values)]
        if facts.algorithm is not None and key in OWN and key not in facts.algorithm.option_names:
            reasons.append(f"{facts.algorithm.name} does not read it")
        if reasons:
            lines.append(f"{option.family}.{key} has no effect: {reasons[0]}")
    return lines


def untrained_gates(valid: Mapping[str, Any], facts: Facts) -> list[str]:
    """A line where the gates of one of our models are frozen before anything was learned."""
    if facts.gated_backbone and valid.get("warm_start", "none") == "none":
        return ["warm_start is none: the gates of random weights are frozen; FedSQ is meant for pretrained ones"]
    return []


def compiled_for_cpu(valid: Mapping[str, Any]) -> list[str]:
    """A line where torch.compile is asked for and costs time."""
    if not valid.get("compile") or valid.get("using_gpu"):
        return []
    return ["compile is true and using_gpu false: on a CPU, compiled steps were slower than plain ones"]
