"""Messages between the processes of a run, in place of FedML's communication managers; and those over MPI.

FedML unpickles whatever reaches its port, and its receive loop spins. Here every message is decoded by
`wire.message`, one that is malformed is counted and logged, and the loop sleeps until a message comes or a
tick is due.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from ....errors import RunError, UpdateError
from ....wire.message import Message, decode, encode
from .mpi import leave_within

log = logging.getLogger(__name__)

TICK_S = 0.25
"""How often a waiting process looks at its clocks."""
SEND_S = 15.0
"""How long a message may wait for a peer that is not there."""
SILENCE_S = 15.0
"""Over GRPC, where a client shows life all the while, a process that is not heard of for so many seconds is lost."""
MARGIN_S = 15.0
"""How many seconds longer than `round_timeout_s` the server's own work may take; its clients wait twice as much."""


def run_id(args: Any) -> str:
    """What the starter of a process calls the run, by FedML's `--run_id`."""
    return str(getattr(args, "run_id", ""))


class Transport:
    """What the backends share. `refused` counts the messages that were no messages of ours, or not their sender's;
    `seen` holds when a rank last showed life, where the backend has signs of life."""

    shows_life = False

    def __init__(self, rank: int, limit_bytes: int) -> None:
        self.rank, self.limit_bytes, self.refused = rank, limit_bytes, 0
        self.seen: dict[int, float] = {}
        self._running = True
        self._refusing = threading.Lock()

    def send_message(self, message: Message, within: float = SEND_S, wait: bool = True) -> None:
        """Raises RunError when the peer cannot be reached within so many seconds; `wait` for one that does
        not listen yet."""
        self._send(message.receiver, encode(message), within, wait)

    def receive(self, take: Callable[[Message], None], tick: Callable[[], None] = lambda: None) -> None:
        """Until `stop`: `take` every message that comes, and call `tick` after each and every `TICK_S`."""
        while self._running:
            if (message := self.arrived(TICK_S)) is not None:
                take(message)
            tick()

    def stop(self) -> None:
        self._running = False

    def arrived(self, within: float = 0.0) -> Message | None:
        """The next message, where one comes within so many seconds; one that is refused is none."""
        came = self._next(within)
        if came is None:
            return None
        source, data = came
        try:
            message = decode(data, self.limit_bytes)
            if message.receiver != self.rank:
                raise UpdateError(f"it is for rank {message.receiver}")
            if message.sender != source:
                raise UpdateError(f"rank {source} sent it in the name of rank {message.sender}")
        except UpdateError as error:
            self._refuse(str(error))
            return None
        return message

    def _refuse(self, reason: str) -> None:
        with self._refusing:
            self.refused += 1
            log.warning("a message was refused (%d so far): %s", self.refused, reason)

    def _send(self, receiver: int, data: bytes, within: float, wait: bool) -> None:
        raise NotImplementedError

    def _next(self, timeout: float) -> tuple[int, bytes | bytearray] | None:
        """The next message as it came, with the rank that the backend has it from; None after `timeout` seconds."""
        raise NotImplementedError


class MpiTransport(Transport):
    """Bytes over MPI; FedML's own sends pickles.

    A rank sends only to one that is waiting, or soon is; a blocking send to one that is stopped would never
    return. `leaves_within`: seconds to wait for the others at the end of the process.
    """

    def __init__(self, comm: Any, rank: int, limit_bytes: int, leaves_within: float = SEND_S) -> None:
        super().__init__(rank, limit_bytes)
        self._comm = comm
        leave_within(leaves_within)
        self._unsent: list[Any] = []
        """MPI reads these buffers until the receiver has the message."""

    def _send(self, receiver: int, data: bytes, within: float, wait: bool) -> None:
        from mpi4py import MPI

        request, until = self._comm.Isend([data, MPI.BYTE], dest=receiver), time.monotonic() + within
        pause = 0.0
        while not request.Test():
            if time.monotonic() > until:
                self._unsent.append((request, data))
                raise RunError(f"rank {receiver} took no message of rank {self.rank} for {within:g} s")
            time.sleep(pause)
            pause = 0.001

    def _next(self, timeout: float) -> tuple[int, bytearray] | None:
        from mpi4py import MPI

        status, until = MPI.Status(), time.monotonic() + timeout
        while not self._comm.Iprobe(source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG, status=status):
            if time.monotonic() > until:
                return None
            time.sleep(0.002)
        size = status.Get_count(MPI.BYTE)
        if size > self.limit_bytes:
            raise RunError(f"rank {status.Get_source()} sent {size} bytes, more than {self.limit_bytes}")
        data = bytearray(size)
        self._comm.Recv([data, MPI.BYTE], source=status.Get_source(), tag=status.Get_tag())
        return status.Get_source(), data
