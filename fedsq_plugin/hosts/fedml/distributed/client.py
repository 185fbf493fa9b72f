"""A client process: trains and tests its silos, one task at a time, as the server asks."""

from __future__ import annotations

import logging
import secrets
import time
from typing import Any

from ....errors import EndedByServer, RunError, in_one_line, worded
from ....federation.updates import brief
from ....run.plan import RECIPE
from ....settings.agreement import shared_options
from ....wire.message import End, Failed, Message, Online, Result, Task
from ..silo import Silos
from .transport import MARGIN_S, SEND_S, SILENCE_S, run_id
from .watch import Watch

log = logging.getLogger(__name__)

ALIVE_S = 2.0
"""Seconds from one sign of life to the next."""


class Client:
    """One rank above 0. `silos` knows the data and the model of the silos `mine`, which this process serves.

    Raises:
        RunError: from `run`, when the server ended the run with a reason, or is gone.
    """

    def __init__(self, transport: Any, silos: Silos, mine: list[int]) -> None:
        self._transport, self._silos, self._mine = transport, silos, mine
        self.rank = transport.rank
        self._last: tuple[Any, ...] = ()
        self._failure: str | None = None
        self._heard = self._reached = time.monotonic()
        self._return_s = silos.plan.config.server_return_s
        self._patience = silos.plan.config.round_timeout_s + 2 * MARGIN_S
        self._watch = Watch()
        self._server: bytes | None = None
        self._server_is_new = False
        self._process = secrets.token_hex(8)

    def run(self) -> None:
        try:
            with worded(RECIPE):
                self._announce()
                self._transport.receive(self._take, self._look)
        except (KeyboardInterrupt, RunError) as error:
            raise self._last_word() or self._watch.failure(error) from None
        finally:
            self._watch.close()
            self._transport.stop()

    def _take(self, message: Message) -> None:
        if message.sender != 0:
            log.warning("a message of rank %d, which is not the server, was passed over", message.sender)
            return
        if isinstance(message, Task):
            self._work(message)
        elif isinstance(message, End):
            self._end(message)
        self._heard = time.monotonic()

    def _look(self) -> None:
        """At every tick: over MPI, a server that is stopped is known by its silence alone; over GRPC, one
        that was started anew knows nothing of this process."""
        if self._server_is_new:
            self._server_is_new, self._last = False, ()
            log.warning("the server was started anew: rank %d announces itself to it", self.rank)
            self._silos.rewind()
            self._say_hello(returns=True)
        if not self._transport.shows_life and time.monotonic() - self._heard > self._patience:
            raise RunError(self._server_gone(self._patience))

    def _last_word(self) -> RunError | None:
        """What the server said at its end, while this process was busy with something else."""
        while (word := self._transport.arrived()) is not None:
            if isinstance(word, End):
                over = f"the run is over; it did without rank {self.rank}"
                return EndedByServer(brief(word.reason, 1000)) if word.reason else RunError(over)
        return None

    def _server_gone(self, seconds: float) -> str:
        return f"the server is gone: rank {self.rank} heard nothing of it for {seconds:.0f} s"

    def _announce(self) -> None:
        self._say_hello()
        if self._transport.shows_life:
            self._server = self._transport.processes[0]
            self._reached = time.monotonic()
            self._watch.start(ALIVE_S, self._show_life)

    def _say_hello(self, returns: bool = False) -> None:
        config = self._silos.plan.config
        counts = {silo: self._silos.samples(silo) for silo in self._mine}
        options = shared_options(config)
        hello = Online(
            sender=self.rank, receiver=0, samples=counts, options=options, process=self._process,
            run=run_id(self._silos.args), returns=returns,
        )  # fmt: skip
        # The server may come later, and is busy with the warm start before it listens.
        self._transport.send_message(hello, within=config.round_timeout_s)

    def _work(self, task: Task) -> None:
        kind, silo, round_idx = task.kind, task.silo, task.round
        if (kind, silo, round_idx) == self._last:  # sent again, because its arrival was not confirmed in time
            return
        self._last = (kind, silo, round_idx)
        try:
            self._silos.resume(round_idx)
            if kind == "train":
                state = self._silos.train_message(silo, round_idx, task.state, task.checkpoint)
                answer: dict[str, Any] = {"state": state}
            else:
                answer = {"metrics": self._silos.test_message(silo, task.state, task.epochs)}
            # Here, because a user's own trainer may return what is no state.
            result = Result(
                sender=self.rank, receiver=0, kind=kind, silo=silo, round=round_idx,
                samples=self._silos.samples(silo), structural=self._silos.structural_fingerprint,
                process=self._process, **answer,
            )  # fmt: skip
        except (Exception, SystemExit) as error:  # sys.exit() of a user's code, too
            # The server decides whether the run goes on; a process that ended by itself would end all of MPI.
            log.exception("silo %s failed", silo)
            self._failure = brief(f"silo {silo} failed in {kind}: {in_one_line(error)}", 500)
            self._say(Failed(sender=self.rank, receiver=0, reason=self._failure, process=self._process))
            return
        self._say(result)

    def _end(self, end: End) -> None:
        if end.process not in (None, self._process):
            return
        self._transport.stop()
        if end.reason:
            raise EndedByServer(brief(end.reason, 1000))
        # Over MPI, an error here would end the server before it has written its results.
        if self._failure and self._transport.shows_life:
            raise RunError(f"the run went on without rank {self.rank}: {self._failure}")

    def _say(self, message: Message) -> None:
        # Over MPI, the server takes messages when it is done with what it is at.
        within = SEND_S + self._return_s if self._transport.shows_life else self._patience
        self._transport.send_message(message, within=within)

    def _show_life(self) -> str | None:
        """In a thread, because training takes the other one for as long as it likes."""
        process = self._transport.show_life(0, within=ALIVE_S)
        if process is not None:
            self._reached = time.monotonic()
            if process != self._server:
                self._server, self._server_is_new = process, True
        elif time.monotonic() - self._reached > SILENCE_S + self._return_s:
            return self._server_gone(SILENCE_S + self._return_s)
        return None
