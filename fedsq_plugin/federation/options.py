"""How an option is declared: once, in a group of options beside the code that reads it.

`settings.config.Config` is made of all groups, so a config can be handed to whatever reads one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """A group of options; a subclass declares each as a field by `option`."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, arbitrary_types_allowed=True)


def option(
    default: Any,
    family: str,
    meaning: str,
    *,
    agree: bool = False,
    may_change: bool = False,
    idle: Callable[..., str | None] | None = None,
    **constraints: Any,
) -> Any:
    """A field of `Options`.

    Args:
        default: `...` where the recipe must give it.
        family: of the recipe, in which it is documented.
        meaning: for the reference.
        agree: server and silos must have the same value, because a silo's training reads it.
        may_change: a resumed run may have another value than the run had before.
        idle: why it has no effect beside other options, in words; None where it has. Its parameters name the
            options that it reads; it is not asked where one of them is not valid.
        constraints: pydantic's, as ge=0.
    """
    about: Any = {"family": family, "agree": agree, "may_change": may_change, "idle": idle}
    return Field(default, description=meaning, json_schema_extra=about, **constraints)
