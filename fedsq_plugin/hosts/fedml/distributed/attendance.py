"""Which client processes are there, which are lost and may come back, and whether they are enough."""

from __future__ import annotations

import time
from collections.abc import Mapping
from enum import Enum

from ....errors import RunError
from .transport import SILENCE_S


class Lost(Enum):
    """How a rank that is lost may come back."""

    FOR_GOOD = "only a new process brings it back"
    LATE = "it has a task, and may answer yet"
    SILENT = "it has no task, or did not get it, and may show life again"


class Attendance:
    """The attendance of the client processes, ranks 1 to `ranks`.

    Args:
        ranks: the number of client processes of the run.
        least: how many of them must be there; None: all.
    """

    def __init__(self, ranks: int, least: int | None) -> None:
        self.ranks, self._least = ranks, least or ranks
        self.online: set[int] = set()
        self.heard: dict[int, float] = {}
        """When a rank last sent something."""
        self._processes: dict[int, str] = {}
        self._refused: set[int] = set()
        """Ranks that came and cannot take part."""
        self._lost: dict[int, tuple[Lost, float]] = {}

    @property
    def complete(self) -> bool:
        """Whether the start need not wait for anybody else."""
        return len(self.online | self._refused) == self.ranks

    @property
    def absent(self) -> list[int]:
        return sorted(set(range(1, self.ranks + 1)) - self.online)

    def hear(self, rank: int) -> None:
        self.heard[rank] = time.monotonic()

    def is_there(self, rank: int, process: str) -> bool:
        return rank in self.online and self._processes[rank] == process

    def is_of(self, rank: int, process: str) -> bool:
        """Whether this is the process that came last as a rank, be it there or lost."""
        return self._processes.get(rank) == process

    def come(self, rank: int, process: str | None = None) -> None:
        """A process is there, or is there again after it was lost."""
        if process is not None:
            self._processes[rank] = process
        self._refused.discard(rank)
        self._lost.pop(rank, None)
        self.online.add(rank)

    def refuse(self, rank: int) -> None:
        self._refused.add(rank)

    def lose(self, rank: int, how: Lost) -> None:
        self.online.discard(rank)
        self._lost[rank] = how, time.monotonic()

    def may_answer(self, rank: int) -> bool:
        return rank in self._lost and self._lost[rank][0] is Lost.LATE

    def silent(self, seen: Mapping[int, float]) -> list[int]:
        """The ranks that are there and gave no sign of life for too long. `seen`: when each gave one last."""
        limit = time.monotonic() - SILENCE_S
        return [rank for rank in sorted(self.online) if max(self.heard[rank], seen.get(rank, 0.0)) < limit]

    def returned(self, seen: Mapping[int, float]) -> list[int]:
        """The ranks that were lost because they were silent, and gave a sign of life since."""
        lost = [(rank, when) for rank, (how, when) in self._lost.items() if how is Lost.SILENT]
        return [rank for rank, when in lost if seen.get(rank, 0.0) > when]

    def require_quorum(self, line: str, more_may_come: bool) -> None:
        """Raise RunError where too few are there, those that may still come counted in."""
        there = len(self.online)
        if more_may_come:
            there += self.ranks - len(self.heard.keys() | self.online)
        if there < self._least:
            raise RunError(
                f"{line}; {there} of {self.ranks} client processes are left, {self._least} are needed "
                "(fedsq_args.min_clients)"
            )
