"""The rounds of a run over several processes: which task each client process has, and when the next stage begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

from ....federation.checkpoints import ServerCheckpoints
from ....federation.evaluate import Metrics, pooled
from ....federation.messages import packed
from ....federation.record import RoundRecord
from ....federation.round import Round, note, skip_empty
from ....federation.server import Server
from ....federation.state import State
from ....federation.updates import brief, changed_count, metrics_of, metrics_problem
from ....run.plan import Plan
from ....wire.message import Kind, Result, Task
from ..aggregation import TheirServer
from ..scoring import Scoring
from ..silo import draw_silos

Stage = Literal["start", "train", "silos", "tune", "end"]
Work = tuple[Kind, int, State]
"""What is asked of a silo, the silo, and the state that it is sent."""


def rank_of(silo: int, ranks: int) -> int:
    """The rank of the client process that serves a silo. It is the same in every round, so that what stays with a silo
    stays in one process."""
    return silo % ranks + 1


def silos_of(rank: int, silos: Iterable[int], ranks: int) -> list[int]:
    """Those of the silos that the client process of a rank serves, in their order."""
    return [silo for silo in silos if rank_of(silo, ranks) == rank]


class Rounds:
    """The rounds of a run. `on_round` is called after every round, `on_end` after the last one.

    Args:
        ranks: number of client processes.
        send: sends a task. It does not raise: it takes a process that cannot be reached for lost (`lose`).
        online: the ranks whose client processes are there, as they come and go.
    """

    def __init__(
        self,
        args: Any,
        plan: Plan,
        server: Server | TheirServer,
        scoring: Scoring,
        ranks: int,
        checkpoints: ServerCheckpoints,
        send: Callable[[Task], None],
        online: Collection[int],
        on_round: Callable[[RoundRecord], None],
        on_end: Callable[[], None],
    ) -> None:
        self._args, self._plan, self._server, self._scoring = args, plan, server, scoring
        self._ranks, self._checkpoints = ranks, checkpoints
        self._send, self._online, self._on_round, self._on_end = send, online, on_round, on_end
        self.samples: dict[int, int] = {}
        """Training samples of every silo that a client process announced."""
        self.stage: Stage = "start"
        self.number = checkpoints.round
        """Number of the round that is under way, counted from 0."""
        self.current: Round | None = None
        self.busy: dict[int, tuple[Kind, int]] = {}
        """The task of each rank that has one."""
        self.since = self._started = time.monotonic()
        """When the stage began."""
        self._waiting: dict[int, list[Work]] = {}
        self._tested: dict[int, Metrics] = {}
        self._notes: list[str] = []
        self._absent: set[int] = set()

    def note(self, line: str) -> None:
        """Tell the user, in the record of the round that is under way or of the next one."""
        if self.current is None:
            self._notes.append(line)
        else:
            note(self.current.record, f"round {self.current.record.round}: {line}")

    def start_next(self) -> None:
        """Begin the next round, or end the run."""
        if self.number < self._args.comm_round:
            self._begin()
            return
        self.stage = "end"
        self._on_end()

    def lose(self, rank: int) -> None:
        """A client process is lost, and with it its tasks."""
        self.busy.pop(rank, None)
        self._waiting.pop(rank, None)

    def was_asked(self, result: Result) -> bool:
        """Whether an answer is to the task that its sender has."""
        asked = self.busy.get(result.sender)
        return asked == (result.kind, result.silo) and result.round == self.number and self.current is not None

    def take(self, result: Result) -> None:
        """Take an answer that was asked for."""
        assert self.current is not None
        del self.busy[result.sender]
        if result.kind == "train":
            self.current.take(result.silo, result.state or State(), self._objection(result))
        elif reason := self._objection(result) or metrics_problem(result.metrics, self._plan.task.metric.lowest):
            self.note(f"the test of silo {result.silo} is refused: {reason}")
        else:
            self._tested[result.silo] = metrics_of(result.metrics)
        self._next_task(result.sender)
        self.advance()

    def advance(self) -> None:
        """Begin the next stage when nobody is waited for."""
        if self.busy or any(self._waiting.values()) or self.current is None:
            return
        record = self.current.record
        due = self._scoring.is_due(record.round)
        if self.stage == "train":
            if self.current.missing == self.current.silos:  # there is a quorum, but none of its silos was drawn
                note(record, f"round {record.round}: none of its silos answered, the model stays as it is")
                self.current.pass_over()
            else:
                self.current.close()
            record.seconds = time.monotonic() - self._started
            self._started = time.monotonic()
            if due:
                self._scoring.score(record)
            if due and self._plan.silo_evaluation:
                self._test("silos")
                return
        elif self.stage == "silos":
            record.silos, record.by_silo = self._pooled(), dict(sorted(self._tested.items()))
        elif self.stage == "tune":
            record.silos_tuned = self._pooled()
        if self.stage != "tune" and self._plan.finetune_epochs and record.round == self._args.comm_round:
            self._test("tune")
            return
        record.seconds_evaluation = time.monotonic() - self._started
        self._finish(record)

    def _begin(self) -> None:
        record, self._args.round_idx = RoundRecord(self.number + 1), self.number
        self._started = self.since = time.monotonic()
        for line in self._notes:
            note(record, line)
        self._notes = []
        wanted = draw_silos(self._plan, self._args, self.number)
        there = self._there(wanted)
        absent = set(wanted) - set(there)
        if absent - self._absent:
            silos = ", ".join(map(str, sorted(absent - self._absent)))
            note(record, f"from round {record.round} on, silo {silos} is not there")
        self._absent = (self._absent | absent) - set(there)
        silos_now = skip_empty(there, self.samples, record) if there else []
        self.current = Round(self._server, silos_now, self.samples, record, self._plan.fatal)
        self.stage = "train"
        self._give({silo: ("train", packed(sent)) for silo, sent in self.current.assignments.items()})

    def _there(self, silos: Iterable[int]) -> list[int]:
        return [silo for silo in silos if rank_of(silo, self._ranks) in self._online]

    def _give(self, tasks: Mapping[int, tuple[Kind, State]]) -> None:
        self._waiting = {}
        for silo, (kind, state) in tasks.items():
            self._waiting.setdefault(rank_of(silo, self._ranks), []).append((kind, silo, state))
        for rank in list(self._waiting):
            self._next_task(rank)
        if tasks:  # else at the next tick: many such rounds would be as many calls within calls
            self.advance()

    def _next_task(self, rank: int) -> None:
        if not self._waiting.get(rank) or rank in self.busy:
            return
        kind, silo, state = self._waiting[rank].pop(0)
        self.busy[rank] = (kind, silo)
        epochs = self._plan.finetune_epochs if kind == "tune" else 0
        self._send(
            Task(
                sender=0, receiver=rank, kind=kind, silo=silo, round=self.number, epochs=epochs,
                checkpoint=self._checkpoints.oldest, state=state,
            )
        )  # fmt: skip

    def _objection(self, result: Result) -> str | None:
        """Why an answer must be refused, whatever its values are."""
        if reason := changed_count(result.samples, self.samples[result.silo]):
            return reason
        ours, theirs = self._server.structural_fingerprint, brief(result.structural)
        if theirs == brief(ours):
            return None
        return f"it was made under the structural copy {theirs[:14]}…, the server has {brief(ours)[:14]}…"

    def _test(self, stage: Literal["silos", "tune"]) -> None:
        """Let every silo test its own model."""
        self.stage, self._tested, self.since = stage, {}, time.monotonic()
        silos = self._there(sorted(self.samples))
        shown = zip(silos, self._server.show(silos), strict=True)
        self._give({silo: (stage, packed(assignment)) for silo, assignment in shown})

    def _pooled(self) -> Metrics:
        """Pooled in the order of the silos, whatever the order in which they answered."""
        return pooled(metrics for _, metrics in sorted(self._tested.items()))

    def _finish(self, record: RoundRecord) -> None:
        self.current = None
        self._scoring.report(record)
        self._on_round(record)
        self._checkpoints.save(self._server.state, {})
        self.number += 1
        self.start_next()
