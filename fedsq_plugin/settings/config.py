"""The config of a run: all groups of options together, checked.

FedML flattens the families of a YAML into one object, so a key has one meaning wherever it stands; the
family is where it is documented. `fedsq_args` and `warm_start_args` are ours: a key there that no group
declares is an error. The other families are FedML's and may hold more than is declared.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import ValidationError, ValidationInfo, field_validator

from ..algorithms.registry import builtin_options
from ..data.options import DataOptions
from ..federation.algorithm import ExtraOptions, FederationOptions
from ..federation.labels import TaskOptions
from ..federation.options import options_of, said, wrong_values
from ..federation.training import LocalTraining
from ..wire.tls import TlsOptions
from .processes import ProcessOptions
from .rounds import CheckpointOptions, EvaluationOptions, ModelOptions, RoundOptions
from .rules import RULES
from .warm_start import Hardening, WarmStartOptions

FAMILIES = (
    *("common_args", "data_args", "model_args", "train_args", "validation_args", "device_args"),
    *("comm_args", "fedsq_args", "warm_start_args"),
)
"""All families in which options are documented, in the order of the reference."""
OURS = ("fedsq_args", "warm_start_args")
"""Families that this plugin adds to FedML's."""

Kind = Literal["missing", "value", "misfit", "unknown", "family", "misspelt", "two families", "repeated", "number"]


class Finding(NamedTuple):
    """One thing that is wrong with a recipe."""

    kind: Kind
    key: str
    """The option, or the family, or of several options the one to mend."""
    line: str

    @property
    def is_note(self) -> bool:
        """Whether a run may start all the same: a key that is not ours is perhaps meant as it is."""
        return self.kind == "misspelt"

    def __str__(self) -> str:
        return self.line


# The last group is documented first: pydantic collects fields from the last base class to the first.
class _Shared(
    TlsOptions,
    CheckpointOptions,
    ProcessOptions,
    ExtraOptions,
    Hardening,
    WarmStartOptions,
    EvaluationOptions,
    FederationOptions,
    TaskOptions,
    LocalTraining,
    RoundOptions,
    ModelOptions,
    DataOptions,
):
    """The options that are not an algorithm's own."""


class Config(builtin_options(), _Shared):  # type: ignore[misc]
    """The options of one run, checked."""

    @field_validator("*")
    @classmethod
    def _keep(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic gives back nothing of a model that has one wrong field.
        if info.context is not None:
            info.context[info.field_name] = value
        return value


OPTIONS = dict(sorted(options_of(Config).items(), key=lambda item: FAMILIES.index(item[1].family)))
"""All options by their keys, in the order of the reference."""


def family_of(key: str) -> str:
    """The family in which an option is documented."""
    return OPTIONS[key].family


def reference() -> str:
    """The options as a Markdown table, by family."""
    rows = ["| family | key | default | meaning |", "| --- | --- | --- | --- |"]
    for key, option in OPTIONS.items():
        default = "required" if option.required else _as_yaml(option.default)
        choices = ", ".join(_choices(option.annotation))
        meaning = f"{option.meaning} ({choices})" if choices else option.meaning
        rows.append(f"| `{option.family}` | `{key}` | {default} | {meaning} |")
    return "\n".join(rows)


def _choices(annotation: Any) -> list[str]:
    """The words that an option takes, where it takes only some."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in _choices(part)]


def _as_yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def parse(values: Mapping[str, Any], brings_silos: Collection[str] = ()) -> tuple[Config | None, list[Finding]]:
    """Check flat values: the config, or everything that is wrong.

    Args:
        brings_silos: data sets of the host that set the number of silos by themselves, whatever the recipe says.
    """
    valid, found = validated(values)
    found += misfits(valid, brings_silos)
    return (None if found else Config(**valid)), found


def validated(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """The options that are valid by themselves, defaults included, and what is wrong with the others."""
    given = {key: value for key, value in values.items() if key in OPTIONS}
    valid = {key: option.default for key, option in OPTIONS.items() if key not in given and not option.required}
    found = [
        Finding("missing", key, f"{option.family}.{key} is missing ({option.meaning})")
        for key, option in OPTIONS.items()
        if option.required and key not in given
    ]
    try:
        Config.model_validate(given, context=valid)
    except ValidationError as error:
        wrong = wrong_values(error, given)
        found += [Finding("value", key, f"{family_of(key)}.{line}") for key, line in wrong if key in given]
    order = list(OPTIONS)
    found.sort(key=lambda finding: order.index(finding.key))
    refused = {finding.key for finding in found}
    return {key: value for key, value in valid.items() if key not in refused}, found


def misfits(valid: Mapping[str, Any], brings_silos: Collection[str] = ()) -> list[Finding]:
    """Options that do not go together, among those that are valid by themselves."""
    return [
        Finding("misfit", next(iter(inspect.signature(rule).parameters)), line)
        for rule, line in said(RULES, {**valid, "brings_silos": brings_silos})
    ]
