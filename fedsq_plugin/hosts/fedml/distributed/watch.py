"""The end of a process whose main thread does not come back by itself: it trains, or a user's code hangs."""

from __future__ import annotations

import os
import signal
import sys
import threading

from .mpi import abort

HANGING_S = 8.0
"""Seconds that an interrupted main thread has to end."""


def end_main_thread(line: str, ended: threading.Event) -> None:
    """From another thread: raise KeyboardInterrupt in the main thread; where `ended` is not set soon after,
    end the process with `line` on standard error and status 2."""
    # A signal, because it also wakes what sleeps or waits for a lock.
    os.kill(os.getpid(), signal.SIGINT)
    if ended.wait(HANGING_S):
        return
    print(f"fedsq: error: {line}", file=sys.stderr, flush=True)
    abort(2)
    os._exit(2)
