"""A server of a run over several processes, and what its clients say to it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch

from fedsq_plugin.errors import RunError
from fedsq_plugin.federation.checkpoints import ServerCheckpoints
from fedsq_plugin.federation.state import State
from fedsq_plugin.hosts.fedml.adapters import FedSQTrainer
from fedsq_plugin.hosts.fedml.arguments import config_of
from fedsq_plugin.hosts.fedml.dataset import from_tuple
from fedsq_plugin.hosts.fedml.hook import prepare_host
from fedsq_plugin.hosts.fedml.silo import Silos
from fedsq_plugin.run.plan import build_view, plan_of
from fedsq_plugin.settings.agreement import shared_options
from fedsq_plugin.wire.message import End, Online, Result, Task

from .conftest import MakeArgs, network, silos


class Transport:
    """Keeps what the server sends; `unreachable` ranks cannot be sent anything."""

    shows_life = True

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.unreachable: set[int] = set()
        self.seen: dict[int, float] = {}
        self.stopped = False

    def send_message(self, message: Any, within: float = 1.0, wait: bool = True) -> None:
        if message.receiver in self.unreachable:
            raise RunError(f"rank 0 cannot reach rank {message.receiver}")
        self.sent.append(message)

    def stop(self) -> None:
        self.stopped = True


class Bench:
    """A server of two client ranks over three silos: rank 1 serves 0 and 2, rank 2 serves 1."""

    def __init__(self, make_args: MakeArgs, **options: Any) -> None:
        from fedsq_plugin.hosts.fedml.distributed.server import Server
        from fedsq_plugin.hosts.fedml.scoring import Scoring

        options = {"head": "4", "fedsq_own_rows": True, "federated_optimizer": "FedAvg", **options}
        args = make_args(**options)
        data = from_tuple(silos(), "points")
        config = config_of(args)
        model = network()
        self.plan = plan_of(config, model)
        prepare_host(args)
        model = build_view(model, self.plan)
        from fedsq_plugin.hosts.fedml.adapters import FedSQAggregator

        aggregator = FedSQAggregator(model, args, self.plan)
        scoring = Scoring(self.plan, args, torch.device("cpu"), aggregator, data)
        checkpoints = ServerCheckpoints(None, {}, 1, args.comm_round, False)
        self.args, self.transport = args, Transport()
        self.server = Server(args, self.transport, self.plan, aggregator.server, scoring, 2, checkpoints)
        self.records: list[Any] = []
        self.server.on_round = self.records.append
        trainer = FedSQTrainer(copy.deepcopy(model), args, self.plan)
        self.silos = Silos(self.plan, args, torch.device("cpu"), trainer, data)
        self.options = shared_options(config)
        self.processes: dict[int, str] = {}
        """What the processes that came last call themselves, by rank."""

    @property
    def there(self) -> set[int]:
        online: set[int] = self.server._attendance.online
        return online

    def say(self, kind: type[Any], rank: int, /, **params: Any) -> None:
        self.deliver(kind(sender=rank, receiver=0, **params))

    def come(self, rank: int, **params: Any) -> None:
        self.processes[rank] = params.get("process", "")
        samples = {1: {0: 16, 2: 40}, 2: {1: 24}}.get(rank, {})
        self.say(Online, rank, **{"samples": samples, "options": self.options, "run": self.args.run_id, **params})

    def tasks(self) -> list[Any]:
        """Taken off: what was sent since the last call."""
        sent, self.transport.sent = self.transport.sent, []
        return [m for m in sent if isinstance(m, Task)]

    def answer(self, asked: Any, **wrong: Any) -> Any:
        silo = asked.silo
        state = self.silos.train_message(silo, asked.round, asked.state)
        said = {"kind": "train", "silo": silo, "round": asked.round, "state": state}
        said |= {"process": self.processes.get(asked.receiver, "")}
        said |= {"samples": self.silos.samples(silo), "structural": self.silos.structural_fingerprint}
        return Result(**{"sender": asked.receiver, "receiver": 0, **said, **wrong})

    def deliver(self, message: Any) -> None:
        self.server.receive(message)

    def finish(self, last_first: bool = False) -> State:
        waiting = self.tasks()
        while waiting:
            self.deliver(self.answer(waiting.pop(-1 if last_first else 0)))
            waiting += self.tasks()
        return OrderedDict(self.server.aggregator.model.state_dict())

    @property
    def ends(self) -> dict[int, Any]:
        sent = [m for m in self.transport.sent if isinstance(m, End)]
        return {m.receiver: m.reason for m in sent}


def started(make_args: MakeArgs, **options: Any) -> Bench:
    bench = Bench(make_args, **options)
    bench.come(1)
    bench.come(2)
    return bench
