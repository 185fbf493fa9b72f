"""The server process: gives silos their tasks, round after round, and never waits for ever."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

from fedml.core.distributed.fedml_comm_manager import FedMLCommManager
from torch import Tensor

from ....errors import RunError
from ....federation.checkpoints import ServerCheckpoints
from ....federation.evaluate import Metrics, pooled
from ....federation.messages import packed
from ....federation.record import RoundRecord
from ....federation.round import Round, note, skip_empty
from ....federation.state import State
from ....federation.updates import brief, changed_count, counts_problem, metrics_of, metrics_problem
from ....run.plan import Plan, in_recipe_terms
from ....settings.agreement import disagreement, shared_options
from ....wire.message import Alive, End, Failed, Kind, Message, Online, Result, Task
from ..scoring import Scoring
from ..sides import ServerSide
from ..silo import draw_silos
from .attendance import Attendance, Lost
from .protocol import MARGIN_S, SILENCE_S
from .transport import TICK_S
from .watch import Watch

log = logging.getLogger(__name__)

FAREWELL_S = 5.0
"""Seconds that a client may take to be told of the end."""

Stage = Literal["start", "train", "silos", "tune", "end"]
Tasks = dict[int, tuple[Kind, State]]
"""What each silo is asked for, and the state that it is sent."""


def rank_of(silo: int, ranks: int) -> int:
    """The client rank that serves a silo: the same in every round, so that what stays with a silo stays in
    one process."""
    return silo % ranks + 1


class Server(FedMLCommManager):  # type: ignore[misc]
    """Rank 0 of a run with so many client ranks, each of which has one task at a time. `on_round` is called
    after every round.

    Raises:
        RunError: from `run`, when clients are missing and there is no quorum without them.
    """

    def __init__(
        self,
        args: Any,
        transport: Any,
        plan: Plan,
        side: ServerSide,
        scoring: Scoring,
        ranks: int,
        checkpoints: ServerCheckpoints,
    ) -> None:
        self.plan, self.side, self.scoring = plan, side, scoring
        self.aggregator = side.aggregator
        self.on_round: Callable[[RoundRecord], None] = lambda record: None
        self._transport, self._ranks = transport, ranks
        self._attendance = Attendance(ranks, plan.config.min_clients)
        self._samples: dict[int, int] = {}
        self._turned = self._greeted = time.monotonic()
        self._watch = Watch()
        self._queue: dict[int, list[tuple[Kind, int, State]]] = {}
        self._busy: dict[int, tuple[Kind, int]] = {}
        self._stage: Stage = "start"
        self._round: Round | None = None
        self.checkpoints = checkpoints
        self._round_idx = self.checkpoints.round
        self._tested: dict[int, Metrics] = {}
        self._notes: list[str] = []
        self._absent: set[int] = set()
        self._since = self._started = time.monotonic()
        super().__init__(args, None, 0, ranks, args.backend)
        transport.on_tick = self._look

    def _init_manager(self) -> None:
        self.com_manager = self._transport
        self._transport.add_observer(self)

    @property
    def structural_fingerprint(self) -> str | None:
        """SHA-256 of the structural copy as it is now; None without one."""
        return self.side.server.structural_fingerprint

    @property
    def silo_parts(self) -> dict[str, Tensor]:
        """What stays with a silo stays in its process."""
        return {}

    def run(self) -> None:
        self.aggregator.set_id(0)
        self._since = self._turned = time.monotonic()
        try:
            with in_recipe_terms():
                self._watch.start(TICK_S, self._overdue)
                super().run()
        except BaseException as error:
            failure = self._watch.failure(error)
            if isinstance(error, SystemExit):  # it would end the run as if all were well
                failure = RunError(f"round {self._round_idx + 1}: the aggregator called sys.exit({error.code!r})")
            self._end_all(str(failure) or type(failure).__name__)
            if failure is error:
                raise
            raise failure from error
        finally:
            self._watch.close()
            self._transport.stop_receive_message()

    def _overdue(self) -> str | None:
        """The main thread may hang in a user's code, and the clients wait for it."""
        limit = self.plan.config.round_timeout_s + MARGIN_S
        if time.monotonic() - self._turned < limit:
            return None
        return (
            f"round {self._round_idx + 1}: the server's own work, aggregation and evaluation, is not done "
            f"within {limit:g} s (fedsq_args.round_timeout_s and {MARGIN_S:g} s)"
        )

    def register_message_receive_handlers(self) -> None:
        self.register_message_receive_handler("online", self._came)
        self.register_message_receive_handler("result", self._answered)
        self.register_message_receive_handler("failed", self._failed)

    def receive_message(self, msg_type: str, msg_params: Message) -> None:
        """FedML's own reports any KeyError of a handler as a wrong rank."""
        handler, sender = self.message_handler_dict.get(msg_type), msg_params.sender
        if handler is None:
            return
        if not 1 <= sender <= self._ranks:
            log.warning("a message of rank %d, which this run has not, was passed over", sender)
            return
        self._attendance.hear(sender)
        handler(msg_params)

    def _came(self, hello: Online) -> None:
        rank, counts = hello.sender, hello.samples
        mine = [silo for silo in range(self.args.client_num_in_total) if rank_of(silo, self._ranks) == rank]
        process = brief(hello.process)
        reason = disagreement(shared_options(self.plan.config), hello.options)
        reason = reason or counts_problem(counts, mine, self._samples)
        if reason is not None:
            self._refuse(rank, f"rank {rank} cannot take part: {reason}", process)
            return
        if self._attendance.is_there(rank, process):
            return  # sent again, because its arrival was not confirmed in time
        if rank in self._attendance.online and self._stage == "start":
            self._note(f"rank {rank} was started anew before the first round")
        elif rank in self._attendance.online:  # a process that came back knows nothing of what it was told
            self._lose(rank, "its process was started anew")
        self._samples.update(counts)
        self._welcome(rank, process)
        self._start_or_go_on()

    def _refuse(self, rank: int, line: str, process: str) -> None:
        """Go on without a process that cannot take part, where there can be a quorum yet."""
        log.error(line)
        if rank in self._attendance.online:  # whoever this is, the rank's own process is there, and stays
            self._farewell(rank, line, process)
            return
        self._attendance.refuse(rank)
        if self._stage == "start":
            self._note(line)
            self._attendance.require_quorum(line, more_may_come=True)
        self._farewell(rank, line)
        self._start_or_go_on()

    def _start_or_go_on(self) -> None:
        if self._stage != "start":
            self._advance()
        elif self._attendance.complete:
            self._next_round()

    def _welcome(self, rank: int, process: str | None = None) -> None:
        """A rank takes part from the next round on, and begins with the whole model."""
        self._attendance.come(rank, process)
        mine = [silo for silo in sorted(self._samples) if rank_of(silo, self._ranks) == rank]
        self.side.server.forget(mine)
        log.info("rank %d is there with silos %s", rank, mine)

    def _begin_round(self) -> None:
        record, self.args.round_idx = RoundRecord(self._round_idx + 1), self._round_idx
        self._started = self._since = time.monotonic()
        for line in self._notes:
            note(record, line)
        self._notes = []
        wanted = draw_silos(self.plan, self.args, self._round_idx)
        there = self._there(wanted)
        absent = set(wanted) - set(there)
        if absent - self._absent:
            silos = ", ".join(map(str, sorted(absent - self._absent)))
            note(record, f"from round {record.round} on, silo {silos} is not there")
        self._absent = (self._absent | absent) - set(there)
        taking_part = skip_empty(there, self._samples, record) if there else []
        self._round = Round(self.side.server, taking_part, self._samples, record, self.plan.fatal)
        self._stage = "train"
        sent = self._round.assignments
        self._give({silo: ("train", packed(sent[silo])) for silo in taking_part})

    def _there(self, silos: Iterable[int]) -> list[int]:
        return [silo for silo in silos if rank_of(silo, self._ranks) in self._attendance.online]

    def _give(self, tasks: Tasks) -> None:
        self._queue = {}
        for silo, (kind, payload) in tasks.items():
            self._queue.setdefault(rank_of(silo, self._ranks), []).append((kind, silo, payload))
        for rank in list(self._queue):
            self._next_task(rank)
        if tasks:  # else at the next tick: many such rounds would be as many calls within calls
            self._advance()

    def _next_task(self, rank: int) -> None:
        if not self._queue.get(rank) or rank in self._busy:
            return
        kind, silo, payload = self._queue[rank].pop(0)
        self._busy[rank] = (kind, silo)
        epochs = self.plan.finetune_epochs if kind == "tune" else 0
        task = Task(
            sender=0, receiver=rank, kind=kind, silo=silo, round=self._round_idx, epochs=epochs,
            checkpoint=self.checkpoints.oldest, state=payload,
        )  # fmt: skip
        self._turned = time.monotonic()
        try:
            self.send_message(task)
        except RunError as error:
            self._lose(rank, str(error), Lost.SILENT)

    def _answered(self, result: Result) -> None:
        rank, silo, kind = result.sender, result.silo, result.kind
        asked, told = self._busy.get(rank), (kind, silo, result.round)
        if self._round is None or asked is None or told != (*asked, self._round_idx):
            which = f"an answer of rank {rank} for silo {silo}"
            self._note(f"{which} is refused: it was not asked for, or is late")
            if self._attendance.may_answer(rank):  # and is free now
                self._welcome(rank)
            return
        del self._busy[rank]
        if kind == "train":
            self._round.take(silo, result.state or State(), self._objection(result))
        elif reason := self._objection(result) or metrics_problem(result.metrics):
            self._note(f"the test of silo {silo} is refused: {reason}")
        else:
            self._tested[silo] = metrics_of(result.metrics)
        self._next_task(rank)
        self._advance()

    def _objection(self, result: Result) -> str | None:
        """Why an answer must be refused, whatever its values are."""
        if reason := changed_count(result.samples, self._samples[result.silo]):
            return reason
        ours, theirs = self.side.server.structural_fingerprint, brief(result.structural)
        if theirs == brief(ours):
            return None
        return f"it was made under the structural copy {theirs[:14]}…, the server has {brief(ours)[:14]}…"

    def _advance(self) -> None:
        """On to the next stage when nobody is waited for."""
        if self._busy or any(self._queue.values()) or self._round is None:
            return
        record = self._round.record
        due = self.scoring.is_due(record.round)
        if self._stage == "train":
            if self._round.missing == self._round.silos:  # with a quorum; the others were not drawn
                note(record, f"round {record.round}: none of its silos answered, the model stays as it is")
                self._round.pass_over()
            else:
                self._round.close()
            record.seconds = time.monotonic() - self._started
            self._started = time.monotonic()
            if due:
                self.scoring.score(record)
            if due and self.plan.silo_evaluation:
                self._test("silos")
                return
        elif self._stage == "silos":
            record.silos, record.by_silo = self._pooled(), dict(sorted(self._tested.items()))
        elif self._stage == "tune":
            record.silos_tuned = self._pooled()
        if self._stage != "tune" and self.plan.finetune_epochs and record.round == self.args.comm_round:
            self._test("tune")
            return
        record.seconds_evaluation = time.monotonic() - self._started
        self._finish_round(record)

    def _test(self, stage: Literal["silos", "tune"]) -> None:
        """Let every silo test its own model."""
        self._stage, self._tested, self._since = stage, {}, time.monotonic()
        silos = self._there(sorted(self._samples))
        shown = zip(silos, self.side.server.show(silos), strict=True)
        self._give({silo: (stage, packed(assignment)) for silo, assignment in shown})

    def _pooled(self) -> Metrics:
        """In the order of the silos, whatever the order in which they answered."""
        return pooled(metrics for _, metrics in sorted(self._tested.items()))

    def _finish_round(self, record: RoundRecord) -> None:
        self._round = None
        self.scoring.report(record)
        self.on_round(record)
        self.side.save(self.checkpoints)
        self._round_idx += 1
        self._next_round()

    def _next_round(self) -> None:
        if self._round_idx < self.args.comm_round:
            self._begin_round()
            return
        self._stage = "end"
        self._end_all(None)
        self._transport.stop_receive_message()

    def _failed(self, failure: Failed) -> None:
        if failure.sender in self._attendance.online:
            self._lose(failure.sender, brief(failure.reason, 500))
            self._advance()

    def _lose(self, rank: int, reason: str, how: Lost = Lost.FOR_GOOD) -> None:
        """Go on without a rank, where there is a quorum."""
        self._attendance.lose(rank, how)
        self._busy.pop(rank, None)
        self._queue.pop(rank, None)
        line = f"rank {rank} is lost: {reason}"
        self._note(line)
        self._attendance.require_quorum(line, more_may_come=self._stage == "start")

    def _note(self, line: str) -> None:
        if self._round is None:
            self._notes.append(line)
        else:
            note(self._round.record, f"round {self._round.record.round}: {line}")

    def _look(self) -> None:
        """At every tick: who is silent, who is late."""
        now = self._turned = time.monotonic()
        if self._transport.shows_life:
            self._look_for_life()
        elif now - self._greeted > min(SILENCE_S, self.plan.config.round_timeout_s / 4):
            self._greeted = now
            self._greet()
        if now - self._since > self.plan.config.round_timeout_s and self._stage != "end":
            self._late()
        self._advance()

    def _greet(self) -> None:
        """Where nothing shows that this process is there, those that wait are told."""
        for rank in sorted(self._attendance.online - self._busy.keys()):
            try:
                self._transport.send_message(Alive(sender=0, receiver=rank), within=FAREWELL_S)
            except RunError as error:
                self._lose(rank, str(error))

    def _look_for_life(self) -> None:
        if self._stage == "end":
            return
        silent = self._attendance.silent(self._transport.seen)
        for rank in silent:
            how = Lost.LATE if rank in self._busy else Lost.SILENT
            self._lose(rank, f"it showed no life for {SILENCE_S:.0f} s", how)
        for rank in self._attendance.returned(self._transport.seen):
            self._note(f"rank {rank} shows life again")
            self._welcome(rank)
        if silent:
            self._advance()

    def _late(self) -> None:
        limit = f"{self.plan.config.round_timeout_s:g} s (fedsq_args.round_timeout_s)"
        self._since = time.monotonic()
        if self._stage == "start":
            line = f"rank {', '.join(map(str, self._attendance.absent))} did not come within {limit}"
            self._note(line)
            self._attendance.require_quorum(line, more_may_come=False)
            self._next_round()
            return
        for rank in sorted(self._busy):
            self._lose(rank, f"it did not answer within {limit}", Lost.LATE)
        self._advance()

    def _end_all(self, reason: str | None) -> None:
        """Also to ranks that are lost: they may be there and wait."""
        for rank in range(1, self._ranks + 1):
            if rank in self._attendance.heard:
                self._farewell(rank, reason)

    def _farewell(self, rank: int, reason: str | None, process: str | None = None) -> None:
        """The end, for any process of a rank, or for one alone."""
        reason = None if reason is None else brief(reason, 1000)
        end = End(sender=0, receiver=rank, reason=reason, process=process)
        try:
            self._transport.send_message(end, within=FAREWELL_S, wait=False)
        except RunError:
            log.warning("rank %d could not be told of the end", rank)
