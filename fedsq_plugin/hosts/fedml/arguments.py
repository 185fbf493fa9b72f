"""FedML's flat arguments, read as our options."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from ...settings.config import OPTIONS, Config, Finding, Kind, parse
from .names import SETS_CLIENT_NUMBER

FINDINGS = "fedsq_findings"
"""Attribute of FedML's args: what is wrong with the keys of its YAML files."""
FATAL: frozenset[Kind] = frozenset({"repeated", "number", "unknown", "family"})
"""Kinds of findings that end a run of ours; the others are FedML's business."""


class HostName(str):
    """The name that FedML finds in `federated_optimizer` while one of our algorithms runs. A script that
    sets another name there puts a plain text, which counts again."""


def algorithm_of(args: Any) -> str:
    """The algorithm that FedML's arguments ask for; after a run before, `federated_optimizer` has a HostName
    and the algorithm is in `fedsq_algorithm`."""
    name = args.federated_optimizer
    return str(args.fedsq_algorithm) if isinstance(name, HostName) else name


def config_of(args: Any) -> Config:
    """The checked options in FedML's arguments. Checked values are put back there: FedML's YAML reader takes
    `1e-3` for text, and here it is a number.

    Raises:
        ConfigError: with everything that is wrong, unknown keys in our families included.
    """
    findings: list[Finding] = getattr(args, FINDINGS, [])
    config, wrong = parse({**vars(args), "federated_optimizer": algorithm_of(args)}, SETS_CLIENT_NUMBER)
    found = [finding for finding in findings if finding.kind in FATAL]
    if config is None or found:
        raise ConfigError(" | ".join(dict.fromkeys(map(str, found + wrong))))
    for key in OPTIONS.keys() & vars(args).keys() - {"federated_optimizer"}:
        setattr(args, key, getattr(config, key))
    return config
