"""The end of a process whose main thread does not come back by itself: it trains, or a user's code hangs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

from ....errors import RunError
from ....run.ending import record
from .mpi import abort

HANGING_S = 8.0
"""Seconds that an interrupted main thread has to end."""


class Watch:
    """A look at the main thread, from another one, until `close`."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._ended = threading.Event()

    def start(self, seconds: float, look: Callable[[], str | None]) -> None:
        """Call `look` every so many seconds: why the main thread must end, or None."""
        threading.Thread(target=self._run, args=(seconds, look), daemon=True).start()

    def close(self) -> None:
        self._ended.set()

    def failure(self, error: BaseException) -> BaseException:
        """What an error of the main thread is for the user."""
        if isinstance(error, KeyboardInterrupt) and self._reason is not None:
            return RunError(self._reason)
        return error

    def _run(self, seconds: float, look: Callable[[], str | None]) -> None:
        while not self._ended.wait(seconds):
            reason = look()
            if reason is not None and not self._ended.is_set():
                self._reason = reason
                self._end(reason)
                return

    def _end(self, reason: str) -> None:
        # A signal, because it also wakes what sleeps or waits for a lock.
        os.kill(os.getpid(), signal.SIGINT)
        if self._ended.wait(HANGING_S):
            return
        record(reason, 2)
        print(f"fedsq: error: {reason}", file=sys.stderr, flush=True)
        abort(2)
        os._exit(2)
