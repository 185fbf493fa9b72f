"""The errors that are meant for a user: one line each, ending a command with status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Self


class Word(NamedTuple):
    """A part of an error's line that depends on the host, such as the name of an option. `name` is a key of a
    vocabulary, `value` is put into the words that stand there."""

    name: str
    value: str = ""


Part = str | Word
Vocabulary = Mapping[str, str]
"""A host's words by their names; `{}` stands for the value."""

PYTHON: Vocabulary = {
    "gate_accept": "accept={}",
    "relu_ise": " (or turn the backbone into a ReLU one first)",
    "weights": "give 'imagenet' or a file",
    "path of weights": "give its path as weights",
    "small_images": "small_images: {}",
    "in_channels": "in_channels: {}",
    "no head": "the model has no head '{}'",
    "head": "head",
    "frozen_modules": "frozen_modules",
    "batch": "batch",
    "output": "output",
    "task": "task",
    "ignore_index": "ignore_index",
}
"""For somebody who calls the package's functions."""


def in_words(parts: Iterable[Part], vocabulary: Vocabulary = PYTHON) -> str:
    """The line of an error in the words of a host."""
    return "".join(part if isinstance(part, str) else vocabulary[part.name].format(part.value) for part in parts)


class FedSQError(Exception):
    """Something the user can mend. Its message is one line: what, where, what would be right.

    The line is given in parts. `str` gives it in the words of Python's arguments; `worded` gives it in a host's.
    """

    def __init__(self, *parts: Part) -> None:
        super().__init__(in_words(parts))
        self.parts = parts

    def after(self, beginning: str) -> Self:
        """This error, with a beginning that says where."""
        return self._with((beginning, *self.parts))

    def worded(self, vocabulary: Vocabulary) -> Self:
        """This error, with the words of a host for good."""
        return self._with((in_words(self.parts, vocabulary),))

    def _with(self, parts: tuple[Part, ...]) -> Self:
        self.parts, self.args = parts, (in_words(parts),)
        return self


@contextmanager
def worded(vocabulary: Vocabulary) -> Iterator[None]:
    """Give the errors of the block the words of a host."""
    try:
        yield
    except FedSQError as error:
        error.worded(vocabulary)
        raise


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
