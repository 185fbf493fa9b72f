"""What the processes of a run say to each other, as FedML messages.

client -> server  ONLINE  its silos' sample counts, and the options that must agree
server -> client  TASK    train or evaluate one silo, from this message
client -> server  RESULT  what came of it
client -> server  FAILED  why it cannot go on
server -> client  END     with a reason where the run failed
server -> client  ALIVE   the server is there, and needs nothing just now

Over GRPC a client shows life all the while, see `transport`; there ALIVE is not needed.
"""

from __future__ import annotations

from typing import Any

from fedml.core.distributed.communication.message import Message

ONLINE, TASK, RESULT, FAILED, END, ALIVE = (
    f"fedsq.{name}" for name in ("online", "task", "result", "failed", "end", "alive")
)

SILENCE_S = 15.0
"""Over GRPC, a process that is not heard of for so long is lost."""
MARGIN_S = 15.0
"""How much longer than `round_timeout_s` the server's own work may take; its clients wait twice as much."""


def message(kind: str, sender: int, receiver: int, **params: Any) -> Message:
    result = Message(kind, sender, receiver)
    for key, value in params.items():
        result.add_params(key, value)
    return result
