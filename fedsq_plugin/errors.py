"""The errors that are meant for a user: one line each, ending a command with status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager


class FedSQError(Exception):
    """Something the user can mend. Its message is one line: what, where, what would be right."""


class GateError(FedSQError, ValueError):
    """A model cannot be gated, or gates do not fit the model that is asked to use them."""


class ConfigError(FedSQError, ValueError):
    """A recipe, an option or a command line is wrong."""


class UpdateError(FedSQError, ValueError):
    """A client's update cannot be aggregated."""


class WeightsError(FedSQError, ValueError):
    """A weights file does not fit the model, or cannot be read."""


class RunError(FedSQError, RuntimeError):
    """A run ended by an error that no check foresaw; the trace is in its log file."""


class EndedByServer(RunError):
    """A client process ended because the server told it to. `reason` is the server's own."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the server ended the run: {reason}")
        self.reason = reason


def first_line(error: BaseException) -> str:
    """What somebody else's error says, where there is one line for it."""
    return str(error).strip().partition("\n")[0]


def in_one_line(error: BaseException) -> str:
    """Somebody else's error in one line: its class and what it says."""
    return f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def in_terms(terms: Mapping[str, str]) -> Iterator[None]:
    """Let errors that advise arguments of Python functions advise a host's own options: `terms` has what
    stands for what in their lines."""
    try:
        yield
    except (GateError, ConfigError, WeightsError) as error:
        line = str(error)
        for python, own in terms.items():
            line = line.replace(python, own)
        if line == str(error):
            raise
        raise type(error)(line) from None


LISTED = 40
"""More names than these are no help in one line."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or the list of known names.

    The comparison ignores case, so that `fedsq` finds `FedSQ`.
    """
    names = sorted(known)
    folded = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{folded[close[0]]}'?"
    shown = names if len(names) <= LISTED else [*names[:LISTED], f"and {len(names) - LISTED} more"]
    return f"; known: {', '.join(shown)}" if names else ""
