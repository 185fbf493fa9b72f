"""How an option of a recipe is declared: once, in a group of options beside the code that reads it.

`settings.config.Config` is made of all groups, so a config can be handed to whatever reads one of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ..errors import ConfigError

Rule = Callable[..., str | None]
"""Reads what its parameters name, options above all, and returns a sentence, or None."""


Group = TypeVar("Group", bound="Options")


class Options(BaseModel):
    """A group of options; a subclass declares each as a field by `option`.

    Raises:
        ConfigError: a value is wrong, or missing.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, arbitrary_types_allowed=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(" | ".join(line for _, line in wrong_values(error, values))) from None

    # Otherwise pydantic's own `model_validate` goes through `__init__`, too, without its context.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def only(self, group: type[Group]) -> Group:
        """The options of one group alone, of which this is a part."""
        return group(**{key: getattr(self, key) for key in group.model_fields})

    @field_validator("*", mode="before")
    @classmethod
    def _switch_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Otherwise pydantic takes `clip_norm: true` for a bound of 1.0.
        wanted = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {wanted, *get_args(wanted)} & {int, float}:
            raise PydanticCustomError("number", "Input should be a number, not a switch")
        return value


def option(
    default: Any,
    family: str,
    meaning: str,
    *,
    required: bool = False,
    agree: bool = False,
    differs: str = "",
    may_change: bool = False,
    idle: Rule | tuple[Rule, ...] = (),
    **constraints: Any,
) -> Any:
    """A field of `Options`.

    Args:
        default: `...` where there is none: then the recipe must give it.
        family: the family of the recipe in which it is documented.
        meaning: for the reference.
        required: the recipe must give it; the default is for code that makes the group by itself.
        agree: server and silos must have the same value, because a silo's training reads it.
        differs: why silos may have different values of it although a silo's training reads it.
        may_change: a resumed run may have another value than the run had before.
        idle: rules that say why it has no effect, asked in order. Parameters of a rule name other options, or
            facts about the run (`settings.idle.Facts`). A rule is passed over where an option that it reads is
            not valid.
        constraints: pydantic's, as ge=0.
    """
    rules = idle if isinstance(idle, tuple) else (idle,)
    required = required or default is ...
    about: Any = Option(family, meaning, required, agree, differs, may_change, rules, None if required else default)
    return Field(default, description=meaning, json_schema_extra={_KEY: about}, **constraints)


_KEY = "option"


@dataclass(frozen=True)
class Option:
    """What was declared of an option; see `option`."""

    family: str
    meaning: str
    required: bool
    agree: bool
    differs: str
    may_change: bool
    idle: tuple[Rule, ...]
    default: Any
    """None where the recipe must give it."""
    annotation: Any = None


def options_of(group: type[Options]) -> dict[str, Option]:
    """The options of a group by their keys; fields that are no options are left out."""
    found: dict[str, Option] = {}
    for key, field in group.model_fields.items():
        extra: Any = field.json_schema_extra or {}
        if _KEY in extra:
            found[key] = replace(extra[_KEY], annotation=field.annotation)
    return found


def wrong_values(error: ValidationError, given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of every option that pydantic refuses among those that are `given`: its key, and a line that says why."""
    lines = []
    for found in error.errors():
        key, message = str(found["loc"][0]), str(found["msg"]).replace("valid tuple", "list")
        message = message.partition(", unable to parse")[0]
        why = f"{given[key]!r}: {message[0].lower()}{message[1:]}" if key in given else "missing"
        lines.append((key, f"{key} is {why}"))
    return lines


def said(rules: Iterable[Rule], values: Mapping[str, Any]) -> list[tuple[Rule, str]]:
    """The rules that say something about these values, each with what it says. A rule is passed over where a
    value that it reads is missing and its parameter has no default."""
    found = []
    for rule in rules:
        wanted = inspect.signature(rule).parameters
        if all(key in values or p.default is not p.empty for key, p in wanted.items()):
            line = rule(**{key: values[key] for key in wanted if key in values})
            found += [(rule, line)] if line else []
    return found


def runs_rounds(native: str | None) -> str | None:
    """An idle rule for what the plugin's own rounds alone read."""
    return f"{native} runs the rounds" if native else None
