"""What the processes of a run, and a run that is resumed, must have in common: options of the recipe."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .config import OPTIONS, Config

MUST_AGREE = tuple(key for key, option in OPTIONS.items() if option.agree)
"""Options that server and silos must share."""

MAY_CHANGE = frozenset(key for key, option in OPTIONS.items() if option.may_change)
"""Options of which a resumed run may have other values."""


def kept_options(config: Config) -> dict[str, Any]:
    """The options that a resumed run must have as it had them."""
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in MAY_CHANGE}


SHOWN = 80
"""Characters of a value that a message or a line may have."""
_HASHED = "sha256:"


def shared_options(config: Config) -> dict[str, str]:
    """Each option that must agree, as JSON; by its hash where that is long, or nobody's business."""
    found, values = {}, config.model_dump(mode="json")
    for key in MUST_AGREE:
        value = json.dumps(values[key], sort_keys=True)
        # A third party's options may hold a path, or a token.
        hidden = key == "extra" or len(value) > SHOWN
        found[key] = _HASHED + hashlib.sha256(value.encode()).hexdigest()[:16] if hidden else value
    return found


UNTOLD = json.dumps("auto")
"""The task of a process that has no data to tell it from: it agrees with every other."""


def disagreement(ours: dict[str, str], theirs: Any) -> str | None:
    """The options in which two sides differ, with both values, in words."""
    if not isinstance(theirs, dict):
        return "it sent no options"
    different = [_difference(key, value, theirs.get(key)) for key, value in ours.items()]
    said = [line for line in different if line]
    return f"its recipe has {', '.join(said)}" if said else None


def _difference(key: str, ours: str, theirs: Any) -> str | None:
    if isinstance(theirs, str) and (theirs == ours or (key == "task" and UNTOLD in (ours, theirs))):
        return None
    if not isinstance(theirs, str):
        return f"no {key}"
    if _HASHED in ours + theirs:
        return f"another {key}"
    why = " (set, or told by its labels where fedsq_args.task is auto)" if key == "task" else ""
    return f"{key} {' '.join(theirs.split())[:SHOWN]} instead of {ours}{why}"
