"""What goes wrong in a process of a run, put there from outside: the plugin knows nothing of it.

The environment variable FAULTS is JSON, {"constants": {name: value}, "<rank>": "<when>:<what>[:<round>]"}; a
run in one process has rank 0. FAULTS_FOLDER gets a file `<rank>.pid` of each process, and `<rank>.fault` just
before a fault.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def install(arguments: Sequence[str]) -> None:
    from fedsq_plugin.run import session

    wanted, folder = json.loads(os.environ["FAULTS"]), Path(os.environ["FAULTS_FOLDER"])
    session.write_report = lambda directory: "pictures take a second"
    _constants(wanted.get("constants", {}))
    if arguments[0] == "launch":
        return
    rank = os.environ.get("OMPI_COMM_WORLD_RANK", "0")
    if "--rank" in arguments:
        rank = arguments[arguments.index("--rank") + 1]
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    if rank in wanted:
        when, what, *number = wanted[rank].split(":")
        act = functools.partial(_do, what, folder / f"{rank}.fault", folder / "go")
        _at(when, int(number[0]) if number else 1, act)


def _constants(values: dict[str, float]) -> None:
    """Times of minutes would make tests of minutes."""
    for module in [module for name, module in sys.modules.items() if name.startswith("fedsq_plugin")]:
        for name, value in values.items():
            if hasattr(module, name):
                setattr(module, name, value)
    if "SEND_S" in values:
        from fedsq_plugin.hosts.fedml.distributed.transport import Transport

        Transport.send_message.__defaults__ = values["SEND_S"], True


def _do(what: str, mark: Path, go: Path) -> None:
    mark.touch()
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "raise":
        raise KeyError("the user's own code")
    elif what == "exit":
        sys.exit(0)
    elif what == "hang":
        time.sleep(1e6)
    elif what == "hold":
        while not go.exists():
            time.sleep(0.05)
    else:
        time.sleep(float(what.removeprefix("slow")))


def _at(when: str, number: int, act: Callable[[], None]) -> None:
    """Let `act` happen once, in round `number` (1-based) where there are rounds."""
    from fedsq_plugin.federation import round as rounds
    from fedsq_plugin.hosts.fedml import execute as run
    from fedsq_plugin.hosts.fedml.adapters import FedSQTrainer
    from fedsq_plugin.hosts.fedml.distributed.client import Client
    from fedsq_plugin.hosts.fedml.distributed.server import Server
    from fedsq_plugin.hosts.fedml.distributed.transport import Transport
    from fedsq_plugin.hosts.fedml.scoring import Scoring

    done: list[bool] = []

    def before(owner: Any, name: str, is_it: Callable[..., bool], after: bool = False) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            hit = not done and is_it(*args, **kwargs)
            if hit:
                done.append(True)
            if hit and not after:
                act()
            result = original(*args, **kwargs)
            if hit and after:
                act()
            return result

        setattr(owner, name, wrapped)

    def message(kind: str) -> Callable[..., bool]:
        return lambda _, m, **__: (m.type, getattr(m, "round", None)) == (kind, number - 1)

    points: dict[str, tuple[Any, str, Callable[..., bool]]] = {
        "start": (run, "_fedml_arguments", lambda *_, **__: True),
        "loading": (run, "_load", lambda *_: True),
        "training": (FedSQTrainer, "train", lambda *args: args[3].round_idx == number - 1),
        "sending": (Transport, "send_message", message("result")),
        "sent": (Transport, "send_message", message("result")),
        "giving": (Transport, "send_message", message("task")),
        "waiting": (Server, "_look", lambda s: s.rounds.stage == "train" and s.rounds.number == number - 1),
        "aggregating": (rounds.Round, "close", lambda r: r.record.round == number),
        "evaluating": (Scoring, "score", lambda _, record: record.round == number),
        "end": (Client, "_end", lambda *_: True),
        "over": (Server, "_end_all", lambda *_: True),
        "saving": (run, "execute", lambda *_: True),
    }
    before(*points[when], after=when in ("sent", "saving"))
