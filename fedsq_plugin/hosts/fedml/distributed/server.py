"""The server process: knows which client processes are there, hands them the tasks of the rounds, and never waits for
ever."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ....errors import RunError, worded
from ....federation import server as federation
from ....federation.checkpoints import ServerCheckpoints
from ....federation.record import RoundRecord
from ....federation.updates import brief, counts_problem
from ....run.plan import RECIPE, Plan
from ....settings.agreement import UNTOLD, disagreement, shared_options
from ....wire.message import Alive, End, Failed, Message, Online, Result, Task
from ..aggregation import TheirServer
from ..scoring import Scoring
from .attendance import Attendance, Lost
from .rounds import Rounds, silos_of
from .transport import MARGIN_S, SILENCE_S, TICK_S, run_id
from .watch import Watch

log = logging.getLogger(__name__)

FAREWELL_S = 5.0
"""Seconds that a client may take to be told of the end."""


class Server:
    """Rank 0 of a run with so many client processes, each of which has one task at a time. `on_round` is called after
    every round.

    Raises:
        RunError: from `run`, when client processes are missing and there is no quorum without them.
    """

    silo_parts: Mapping[str, Tensor] = {}
    """Nothing: what stays with a silo stays in its process."""

    def __init__(
        self,
        args: Any,
        transport: Any,
        plan: Plan,
        server: federation.Server | TheirServer,
        scoring: Scoring,
        ranks: int,
        checkpoints: ServerCheckpoints,
    ) -> None:
        self.args, self.plan, self.scoring, self.checkpoints = args, plan, scoring, checkpoints
        self.server, self.aggregator = server, scoring.aggregator
        self._transport, self._ranks = transport, ranks
        self._attendance = Attendance(ranks, plan.config.min_clients)
        self.on_round: Callable[[RoundRecord], None] = lambda record: None
        self.rounds = Rounds(
            args, plan, server, scoring, ranks, checkpoints, online=self._attendance.online,
            send=self._send_task, on_round=lambda record: self.on_round(record), on_end=self._end,
        )  # fmt: skip
        self._turned = self._greeted = time.monotonic()
        self._watch = Watch()
        self._told = UNTOLD
        """The task as the first client tells it, where this process has no data."""

    def run(self) -> None:
        self.aggregator.set_id(0)
        self.rounds.since = self._turned = time.monotonic()
        try:
            with worded(RECIPE):
                self._watch.start(TICK_S, self._overdue)
                self._transport.receive(self.receive, self._look)
        except BaseException as error:
            failure = self._watch.failure(error)
            if isinstance(error, SystemExit):  # it would end the run as if all were well
                failure = RunError(f"round {self.rounds.number + 1}: the aggregator called sys.exit({error.code!r})")
            self._end_all(str(failure) or type(failure).__name__)
            if failure is error:
                raise
            raise failure from error
        finally:
            self._watch.close()
            self._transport.stop()

    def _overdue(self) -> str | None:
        """The main thread may hang in a user's code, while the clients wait for it."""
        limit = self.plan.config.round_timeout_s + MARGIN_S
        if time.monotonic() - self._turned < limit:
            return None
        return (
            f"round {self.rounds.number + 1}: the server's own work, aggregation and evaluation, is not done "
            f"within {limit:g} s (fedsq_args.round_timeout_s and {MARGIN_S:g} s)"
        )

    def receive(self, message: Message) -> None:
        """Take a message."""
        if not isinstance(message, (Online, Result, Failed)):
            return
        if not 1 <= message.sender <= self._ranks:
            log.warning("a message of rank %d, which this run has not, was passed over", message.sender)
            return
        if isinstance(message, Online) and (reason := self._of_another_run(message)):
            self._dismiss(message, reason)
            return
        if not isinstance(message, Online) and not self._attendance.is_of(message.sender, brief(message.process)):
            log.warning("a message of a process that is not this run's rank %d was passed over", message.sender)
            return
        self._attendance.hear(message.sender)
        if isinstance(message, Online):
            self._come(message)
        elif isinstance(message, Result):
            self._take(message)
        else:
            self._fail(message)

    def _of_another_run(self, hello: Online) -> str | None:
        """Why a process is left over from another run."""
        ours, theirs = run_id(self.args), brief(hello.run)
        if theirs != ours:
            return f"its run_id is {theirs or 'missing'} instead of {ours}"
        if hello.returns and not self.plan.config.resume:
            return "it took part in a run whose server is gone, and this one is new; only resume: true takes it back"
        return None

    def _dismiss(self, hello: Online, reason: str) -> None:
        """End a process of another run. The rank's own one may be there, or come yet."""
        line = f"a process of another run called itself rank {hello.sender}: {reason}"
        self.rounds.note(line)
        self._farewell(hello.sender, line, brief(hello.process))

    def _come(self, hello: Online) -> None:
        rank, counts, rounds = hello.sender, hello.samples, self.rounds
        mine = silos_of(rank, range(self.args.client_num_in_total), self._ranks)
        process = brief(hello.process)
        ours = shared_options(self.plan.config)
        if ours["task"] == UNTOLD:
            ours["task"] = self._told
        reason = disagreement(ours, hello.options)
        reason = reason or counts_problem(counts, mine, rounds.samples)
        if reason is not None:
            self._refuse(rank, f"rank {rank} cannot take part: {reason}", process)
            return
        if self._attendance.is_there(rank, process):
            return  # sent again, because its arrival was not confirmed in time
        if rank in self._attendance.online and rounds.stage == "start":
            rounds.note(f"rank {rank} was started anew before the first round")
        elif rank in self._attendance.online:  # a process that came back knows nothing of what it was told
            self._lose(rank, "its process was started anew")
        if ours["task"] == UNTOLD:
            self._told = str(hello.options.get("task"))
        rounds.samples.update(counts)
        self._welcome(rank, process)
        self._start_or_go_on()

    def _refuse(self, rank: int, line: str, process: str) -> None:
        """Go on without a process that cannot take part, where there can still be a quorum."""
        log.error(line)
        if rank in self._attendance.online:  # whoever this is, the rank's own process is there, and stays
            self._farewell(rank, line, process)
            return
        self._attendance.refuse(rank)
        if self.rounds.stage == "start":
            self.rounds.note(line)
            self._attendance.require_quorum(line, more_may_come=True)
        self._farewell(rank, line)
        self._start_or_go_on()

    def _start_or_go_on(self) -> None:
        if self.rounds.stage != "start":
            self.rounds.advance()
        elif self._attendance.complete:
            self.rounds.start_next()

    def _welcome(self, rank: int, process: str | None = None) -> None:
        """A client process takes part from the next round on, and begins with the whole model."""
        self._attendance.come(rank, process)
        mine = silos_of(rank, sorted(self.rounds.samples), self._ranks)
        self.server.forget(mine)
        log.info("rank %d is there with silos %s", rank, mine)

    def _send_task(self, task: Task) -> None:
        self._turned = time.monotonic()
        try:
            self._transport.send_message(task)
        except RunError as error:
            self._lose(task.receiver, str(error), Lost.SILENT)

    def _take(self, result: Result) -> None:
        if self.rounds.was_asked(result):
            self.rounds.take(result)
            return
        which = f"an answer of rank {result.sender} for silo {result.silo}"
        self.rounds.note(f"{which} is refused: it was not asked for, or is late")
        if self._attendance.may_answer(result.sender):  # and is free now
            self._welcome(result.sender)

    def _fail(self, failure: Failed) -> None:
        if failure.sender in self._attendance.online:
            self._lose(failure.sender, brief(failure.reason, 500))
            self.rounds.advance()

    def _lose(self, rank: int, reason: str, how: Lost = Lost.FOR_GOOD) -> None:
        """Go on without a client process, where there is a quorum."""
        self._attendance.lose(rank, how)
        self.rounds.lose(rank)
        line = f"rank {rank} is lost: {reason}"
        self.rounds.note(line)
        self._attendance.require_quorum(line, more_may_come=self.rounds.stage == "start")

    def _look(self) -> None:
        """At every tick: who is silent, who is late."""
        now = self._turned = time.monotonic()
        if self._transport.shows_life:
            self._look_for_life()
        elif now - self._greeted > min(SILENCE_S, self.plan.config.round_timeout_s / 4):
            self._greeted = now
            self._greet()
        if now - self.rounds.since > self.plan.config.round_timeout_s and self.rounds.stage != "end":
            self._give_up_waiting()
        self.rounds.advance()

    def _greet(self) -> None:
        """Where the transport shows no life of this process, tell the clients that wait that it is there."""
        for rank in sorted(self._attendance.online - self.rounds.busy.keys()):
            try:
                self._transport.send_message(Alive(sender=0, receiver=rank), within=FAREWELL_S)
            except RunError as error:
                self._lose(rank, str(error))

    def _look_for_life(self) -> None:
        if self.rounds.stage == "end":
            return
        silent = self._attendance.silent(self._transport.seen)
        for rank in silent:
            how = Lost.LATE if rank in self.rounds.busy else Lost.SILENT
            self._lose(rank, f"it showed no life for {SILENCE_S:.0f} s", how)
        for rank in self._attendance.returned(self._transport.seen):
            self.rounds.note(f"rank {rank} shows life again")
            self._welcome(rank)
        if silent:
            self.rounds.advance()

    def _give_up_waiting(self) -> None:
        limit = f"{self.plan.config.round_timeout_s:g} s (fedsq_args.round_timeout_s)"
        self.rounds.since = time.monotonic()
        if self.rounds.stage == "start":
            line = f"rank {', '.join(map(str, self._attendance.absent))} did not come within {limit}"
            self.rounds.note(line)
            self._attendance.require_quorum(line, more_may_come=False)
            self.rounds.start_next()
            return
        for rank in sorted(self.rounds.busy):
            self._lose(rank, f"it did not answer within {limit}", Lost.LATE)
        self.rounds.advance()

    def _end(self) -> None:
        """The last round is over."""
        self._end_all(None)
        self._transport.stop()

    def _end_all(self, reason: str | None) -> None:
        """Tell every client process that the run is over, those that are lost too: they may be there and wait."""
        for rank in range(1, self._ranks + 1):
            if rank in self._attendance.heard:
                self._farewell(rank, reason)

    def _farewell(self, rank: int, reason: str | None, process: str | None = None) -> None:
        """Tell the processes of a rank, or one of them alone, that the run is over."""
        reason = None if reason is None else brief(reason, 1000)
        end = End(sender=0, receiver=rank, reason=reason, process=process)
        try:
            self._transport.send_message(end, within=FAREWELL_S, wait=False)
        except RunError:
            log.warning("rank %d could not be told of the end", rank)
