"""FedML's flat arguments, read as our options."""

from __future__ import annotations

import copy
from typing import Any

from ...errors import ConfigError
from ...settings.config import OPTIONS, Config, Finding, Kind, parse
from .names import SETS_CLIENT_NUMBER

FINDINGS = "fedsq_findings"
"""Attribute of FedML's args: what is wrong with the keys of its YAML files."""
FATAL: frozenset[Kind] = frozenset({"repeated", "number", "unknown", "family"})
"""Kinds of findings that end a run of ours; the others are FedML's business."""


def known_to_fedml(args: Any) -> Any:
    """The arguments as FedML's own operators are to see them, which branch on `federated_optimizer` and know only
    their own names: a copy that says FedAvg, where an algorithm of ours runs (`fedsq_algorithm`). Elsewhere the real
    name stands."""
    name = getattr(args, "fedsq_algorithm", None)
    if name is None or name != args.federated_optimizer:
        return args
    shown = copy.copy(args)
    shown.federated_optimizer = "FedAvg"
    return shown


def config_of(args: Any) -> Config:
    """The checked options in FedML's arguments. Checked values are put back there: FedML's YAML reader takes
    `1e-3` for text, and here it is a number.

    Raises:
        ConfigError: with everything that is wrong, unknown keys in our families included.
    """
    findings: list[Finding] = getattr(args, FINDINGS, [])
    config, wrong = parse(vars(args), SETS_CLIENT_NUMBER)
    found = [finding for finding in findings if finding.kind in FATAL]
    if config is None or found:
        raise ConfigError(" | ".join(dict.fromkeys(map(str, found + wrong))))
    for key in OPTIONS.keys() & vars(args).keys():
        setattr(args, key, getattr(config, key))
    return config
