"""Which options are read while something runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedsq_plugin.settings.config import OPTIONS, Config


@contextmanager
def watch_reads(*kinds: Any) -> Iterator[set[str]]:
    """The options that are read as attributes of configs, and of objects of these classes, within the block."""
    read: set[str] = set()
    own = {kind: vars(kind).get("__getattribute__") for kind in (Config, *kinds)}

    def recording(original: Any) -> Any:
        def get(self: Any, name: str) -> Any:
            if name in OPTIONS:
                read.add(name)
            return original(self, name)

        return get

    for kind in own:
        kind.__getattribute__ = recording(kind.__getattribute__)
    try:
        yield read
    finally:
        for kind, original in own.items():
            if original is None:
                del kind.__getattribute__
            else:
                kind.__getattribute__ = original


def may_differ(read: set[str]) -> set[str]:
    """The options among these that silos need not agree on, and of which no declaration says why."""
    return {key for key in read if not OPTIONS[key].agree and not OPTIONS[key].differs}
