"""The server process: gives silos their tasks, round after round, and never waits for ever."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

from fedml.core.distributed.communication.message import Message
from fedml.core.distributed.fedml_comm_manager import FedMLCommManager
from torch import Tensor

from ....agreement import disagreement, shared_options
from ....errors import RunError
from ....federation.evaluate import Metrics, pooled
from ....federation.record import RoundRecord
from ....federation.state import State
from ..adapters import FedSQAggregator
from ..checkpoints import ServerCheckpoints
from ..plan import Plan, in_recipe_terms
from ..round import Round, drawn, note, with_data
from ..scoring import Scoring, structural_fingerprint
from .protocol import END, FAILED, ONLINE, RESULT, SILENCE_S, TASK, message

log = logging.getLogger(__name__)

FAREWELL_S = 5.0
"""Seconds that a client may take to be told of the end."""

Stage = Literal["start", "train", "silos", "tune", "end"]


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
        aggregator: Any,
        scoring: Scoring,
        ranks: int,
        checkpoints: ServerCheckpoints | None = None,
    ) -> None:
        self.plan, self.aggregator, self.scoring = plan, aggregator, scoring
        self.on_round: Callable[[RoundRecord], None] = lambda record: None
        self._transport, self._ranks = transport, ranks
        self._samples: dict[int, int] = {}
        self._online: set[int] = set()
        self._heard: dict[int, float] = {}
        self._slow: set[int] = set()
        """Ranks that are lost because they were late, and may answer yet."""
        self._queue: dict[int, list[tuple[str, int, Any]]] = {}
        self._busy: dict[int, tuple[str, int]] = {}
        self._stage: Stage = "start"
        self._round: Round | None = None
        self.checkpoints = checkpoints or ServerCheckpoints(plan)
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
        """Of the structural copy as it is now; None without one."""
        return structural_fingerprint(self.aggregator.model)

    @property
    def silo_parts(self) -> dict[str, Tensor]:
        """What stays with a silo stays in its process."""
        return {}

    def run(self) -> None:
        self.aggregator.set_id(0)
        self._since = time.monotonic()
        try:
            with in_recipe_terms():
                super().run()
        except BaseException as error:
            self._end_all(str(error) or type(error).__name__)
            raise
        finally:
            self._transport.stop_receive_message()

    def register_message_receive_handlers(self) -> None:
        for kind, handler in ((ONLINE, self._came), (RESULT, self._answered), (FAILED, self._failed)):
            self.register_message_receive_handler(kind, handler)

    def receive_message(self, msg_type: str, msg_params: Message) -> None:
        """FedML's own reports any KeyError of a handler as a wrong rank."""
        handler, sender = self.message_handler_dict.get(msg_type), msg_params.get_sender_id()
        if handler is None:
            return
        if not 1 <= sender <= self._ranks:
            log.warning("a message of rank %s, which this run has not, was passed over", sender)
            return
        self._heard[sender] = time.monotonic()
        handler(msg_params)

    def _came(self, hello: Message) -> None:
        rank, counts = hello.get_sender_id(), hello.get("samples")
        reason = disagreement(shared_options(self.plan.config), hello.get("options"))
        if reason is None and not _are_counts(counts):
            reason = "it sent no sample counts"
        if reason is not None:
            line = f"rank {rank} cannot take part: {reason}"
            log.error(line)
            if self._stage == "start":
                raise RunError(line)
            self._farewell(rank, line)
            return
        if rank in self._online:  # a process that came back knows nothing of what it was told
            self._lose(rank, "its process was started anew")
        self._samples.update({silo: n for silo, n in counts.items() if rank_of(silo, self._ranks) == rank})
        self._welcome(rank)
        if self._stage == "start":
            if len(self._online) == self._ranks:
                self._next_round()
        else:
            self._advance()

    def _welcome(self, rank: int) -> None:
        """A rank takes part from the next round on, and begins with the whole model."""
        self._online.add(rank)
        mine = [silo for silo in sorted(self._samples) if rank_of(silo, self._ranks) == rank]
        if isinstance(self.aggregator, FedSQAggregator):
            self.aggregator.coordinator.forget(mine)
        log.info("rank %d is there with silos %s", rank, mine)

    def _begin_round(self) -> None:
        record, self.args.round_idx = RoundRecord(self._round_idx + 1), self._round_idx
        self._started = self._since = time.monotonic()
        for line in self._notes:
            note(record, line)
        self._notes = []
        wanted = drawn(self.plan, self.args, self._round_idx)
        there = [silo for silo in wanted if rank_of(silo, self._ranks) in self._online]
        absent = set(wanted) - set(there)
        if absent - self._absent:
            silos = ", ".join(map(str, sorted(absent - self._absent)))
            note(record, f"from round {record.round} on, silo {silos} is not there")
        self._absent = (self._absent | absent) - set(there)
        taking_part = with_data(there, self._samples, record)
        self._round = Round(self.aggregator, self.plan, taking_part, self._samples, record)
        self._stage = "train"
        self._give({silo: ("train", self._round.messages[silo]) for silo in taking_part})

    def _give(self, tasks: dict[int, tuple[str, Any]]) -> None:
        self._queue = {}
        for silo, (kind, payload) in tasks.items():
            self._queue.setdefault(rank_of(silo, self._ranks), []).append((kind, silo, payload))
        for rank in list(self._queue):
            self._next_task(rank)
        self._advance()

    def _next_task(self, rank: int) -> None:
        if not self._queue.get(rank) or rank in self._busy:
            return
        kind, silo, payload = self._queue[rank].pop(0)
        self._busy[rank] = (kind, silo)
        epochs = self.plan.finetune_epochs if kind == "tune" else 0
        about = {"round": self._round_idx, "epochs": epochs, "checkpoint": self.checkpoints.round}
        task = message(TASK, 0, rank, task=kind, silo=silo, payload=payload, **about)
        try:
            self.send_message(task)
        except RunError as error:
            self._lose(rank, str(error))

    def _answered(self, result: Message) -> None:
        rank, silo, kind = result.get_sender_id(), result.get("silo"), result.get("task")
        asked = self._busy.get(rank)
        if self._round is None or asked != (kind, silo) or result.get("round") != self._round_idx:
            self._note(
                f"an answer of rank {rank} for silo {silo} is refused: it was not asked for, or is late"
            )
            if rank in self._slow:  # and is free now
                self._slow.discard(rank)
                self._welcome(rank)
            return
        del self._busy[rank]
        if kind == "train":
            self._round.take(silo, _state(result.get("payload")))
        else:
            self._tested[silo] = _metrics(result.get("payload"))
        self._next_task(rank)
        self._advance()

    def _advance(self) -> None:
        """On to the next stage when nobody is waited for."""
        if self._busy or any(self._queue.values()) or self._round is None:
            return
        record = self._round.record
        due = self.scoring.is_due(record.round)
        if self._stage == "train":
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

    def _test(self, stage: Stage) -> None:
        """Let every silo test its own model."""
        self._stage, self._tested, self._since = stage, {}, time.monotonic()
        payload = self.scoring.global_message()
        there = [silo for silo in sorted(self._samples) if rank_of(silo, self._ranks) in self._online]
        self._give(dict.fromkeys(there, (stage, payload)))

    def _pooled(self) -> Metrics:
        """In the order of the silos, whatever the order in which they answered."""
        return pooled(metrics for _, metrics in sorted(self._tested.items()))

    def _finish_round(self, record: RoundRecord) -> None:
        self._round = None
        self.scoring.report(record)
        self.on_round(record)
        if isinstance(self.aggregator, FedSQAggregator):
            self.checkpoints.after(self.aggregator.coordinator.state)
        self._round_idx += 1
        self._next_round()

    def _next_round(self) -> None:
        if self._round_idx < self.args.comm_round:
            self._begin_round()
            return
        self._stage = "end"
        self._end_all(None)
        self._transport.stop_receive_message()

    def _failed(self, failure: Message) -> None:
        if failure.get_sender_id() in self._online:
            self._lose(failure.get_sender_id(), str(failure.get("reason"))[:500])
            self._advance()

    def _lose(self, rank: int, reason: str) -> None:
        """Go on without a rank, where there is a quorum."""
        self._online.discard(rank)
        self._busy.pop(rank, None)
        self._queue.pop(rank, None)
        line = f"rank {rank} is lost: {reason}"
        self._note(line)
        self._need_quorum(line)

    def _note(self, line: str) -> None:
        if self._round is None:
            self._notes.append(line)
        else:
            note(self._round.record, f"round {self._round.record.round}: {line}")

    def _need_quorum(self, line: str) -> None:
        least, there = self.plan.config.min_clients or self._ranks, len(self._online)
        if there < least:
            raise RunError(
                f"{line}; {there} of {self._ranks} client processes are left, {least} are needed "
                "(fedsq_args.min_clients)"
            )

    def _look(self) -> None:
        """At every tick: who is silent, who is late."""
        now = time.monotonic()
        silent = [
            rank
            for rank in sorted(self._online)
            if now - max(self._heard[rank], self._transport.seen.get(rank, 0.0)) > SILENCE_S
        ]
        if silent and self._transport.shows_life and self._stage != "end":
            for rank in silent:
                self._lose(rank, f"it showed no life for {SILENCE_S:.0f} s")
            self._advance()
        if now - self._since > self.plan.config.round_timeout_s and self._stage != "end":
            self._late()

    def _late(self) -> None:
        limit = f"{self.plan.config.round_timeout_s:g} s (fedsq_args.round_timeout_s)"
        self._since = time.monotonic()
        if self._stage == "start":
            absent = sorted(set(range(1, self._ranks + 1)) - self._online)
            line = f"rank {', '.join(map(str, absent))} did not come within {limit}"
            self._note(line)
            self._need_quorum(line)
            self._next_round()
            return
        for rank in sorted(self._busy):
            self._slow.add(rank)
            self._lose(rank, f"it did not answer within {limit}")
        self._advance()

    def _end_all(self, reason: str | None) -> None:
        """Also to ranks that are lost: they may be there and wait."""
        for rank in range(1, self._ranks + 1):
            if rank in self._heard:
                self._farewell(rank, reason)

    def _farewell(self, rank: int, reason: str | None) -> None:
        try:
            self._transport.send_message(message(END, 0, rank, reason=reason), within=FAREWELL_S, wait=False)
        except RunError:
            log.warning("rank %d could not be told of the end", rank)


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(silo, int) and isinstance(count, int) and count >= 0 for silo, count in value.items()
    )


def _state(value: Any) -> State:
    """What is no state is an empty one, which the round refuses by name."""
    if isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items()
    ):
        return OrderedDict(value)
    return OrderedDict()


def _metrics(value: Any) -> Metrics:
    if isinstance(value, list) and len(value) == 3 and all(isinstance(part, (int, float)) for part in value):
        return Metrics(float(value[0]), float(value[1]), int(value[2]))
    return Metrics(float("nan"), float("nan"), 0)
