"""Who runs a user's script, FedML's own loop or ours, and what FedML's would ignore. Nothing here imports FedML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...algorithms import algorithm, algorithms, known
from ...data.registry import is_flamby
from ...errors import ConfigError, nearest
from ...run.facts import facts_of
from ...settings.config import validated
from ...settings.idle import unused
from .names import NATIVE_SP, backend_of, refused_backend

OWN_ROWS = "fedsq_own_rows"
"""Attribute of FedML's args: our algorithms, also for the names that FedML has itself. In a recipe it is
`fedsq_args.own_algorithms`."""

ASKED = "fedsq_asked"
"""Attribute of FedML's args: whether its YAML files have a family of ours, perhaps misspelt."""


def is_ours(args: Any, custom: bool) -> bool:
    """Whether our algorithms run this, rather than FedML itself.

    FedML's own algorithms stay FedML's, unless our algorithms are asked for, or TLS, which FedML has not, or a
    trainer or aggregator is passed that FedML's `sp` would ignore (FedML issue 565).

    Raises:
        ConfigError: nobody knows the algorithm, or it cannot run as asked.
    """
    values = vars(args)
    name, native = args.federated_optimizer, _has_native(values)
    instead = f"use one of {', '.join(algorithms())}"
    if native and not known(name):
        if is_flamby(args.dataset):
            raise ConfigError(
                f"FedML's own {name} trains on cross-entropy, which is not the loss of {args.dataset}; {instead}"
            )
        if _has_tls(values):
            raise ConfigError(f"FedML's own {name} has no TLS (fedsq_args.tls_cert); {instead}")
        if _wants_ours(values):
            raise ConfigError(
                f"train_args.federated_optimizer '{name}' is FedML's alone, and fedsq_args.own_algorithms is true; "
                f"set it to false, or {instead}"
            )
    if is_native(values) and not (custom and is_sp(values)):
        return False
    if "+" in name:
        algorithm(name)  # says which part is wrong
    if not known(name):
        if native:
            raise ConfigError(
                f"FedML's own {name} ignores client_trainer and server_aggregator in sp; pass none, or {instead}"
            )
        names = {*algorithms(), *NATIVE_SP}
        raise ConfigError(f"train_args.federated_optimizer '{name}' is unknown{nearest(name, names)}")
    if reason := refused_backend(values):
        raise ConfigError(f"{name}: {reason}")
    return True


def is_sp(values: Mapping[str, Any]) -> bool:
    return backend_of(values) == ("simulation", "sp")


def is_native(values: Mapping[str, Any]) -> bool:
    """Whether FedML's own algorithm runs, unless a trainer or aggregator is passed."""
    ours = _wants_ours(values) or _has_tls(values) or is_flamby(str(values.get("dataset")))
    return _has_native(values) and not ours


def asks_for_ours(values: Mapping[str, Any]) -> bool:
    """Whether a recipe for FedML's own algorithm uses what only the plugin can give."""
    return bool(values.get(ASKED)) or values.get("warm_start", "none") not in ("none", None)


def ignored(values: Mapping[str, Any]) -> list[str]:
    """One line per option that FedML's own loop ignores, or takes for another, where it is what a user's own script
    runs; nothing where ours run.

    Args:
        values: the options of a recipe, flat.
    """
    if "federated_optimizer" not in values or not is_native(values):
        return []
    name, valid = str(values["federated_optimizer"]), validated(values)[0]
    lines = unused(valid, facts_of(valid, ours=False))
    optimizer = values.get("client_optimizer", "sgd")
    if optimizer not in ("sgd", "adam"):  # FedML compares the word as it stands
        lines.append(f"train_args.client_optimizer is {optimizer}, and FedML's own {name} trains by Adam (amsgrad)")
    return lines


def _has_native(values: Mapping[str, Any]) -> bool:
    """Whether FedML has an algorithm of this name with this backend."""
    name = values["federated_optimizer"]
    return name in NATIVE_SP if is_sp(values) else not known(name) or name in ("FedAvg", "FedProx")


def _wants_ours(values: Mapping[str, Any]) -> bool:
    given = {"own_algorithms": values.get("own_algorithms", False)}
    return bool(values.get(OWN_ROWS) or validated(given)[0].get("own_algorithms"))


def _has_tls(values: Mapping[str, Any]) -> bool:
    """Whether this process is to talk under TLS, which FedML's own loops cannot."""
    return bool(values.get("tls_cert")) and not is_sp(values)
