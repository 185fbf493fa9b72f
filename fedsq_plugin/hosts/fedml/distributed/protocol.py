"""The patience of the processes of a run with each other; their messages are those of `wire.message`.

Over GRPC a client shows life all the while, see `transport`; there the server sends no `Alive`.
"""

SILENCE_S = 15.0
"""Over GRPC, a process that is not heard of for so many seconds is lost."""
MARGIN_S = 15.0
"""How many seconds longer than `round_timeout_s` the server's own work may take; its clients wait twice as much."""
