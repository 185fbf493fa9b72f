"""The server's side of a run over several processes, with clients that are a few lines of the test."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from typing import Any

import pytest
import torch

from fedsq_plugin.agreement import shared_options
from fedsq_plugin.errors import RunError, UpdateError
from fedsq_plugin.federation.state import State
from fedsq_plugin.hosts.fedml.adapters import FedSQTrainer
from fedsq_plugin.hosts.fedml.hook import prepare_host
from fedsq_plugin.hosts.fedml.plan import config_of, plan_of, viewed
from fedsq_plugin.hosts.fedml.silo import Silos

from .conftest import MakeArgs, network, silos

ONLINE, TASK, RESULT, FAILED, END = (f"fedsq.{k}" for k in ("online", "task", "result", "failed", "end"))


class Transport:
    """Keeps what the server sends; `unreachable` ranks cannot be sent anything."""

    shows_life = True

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.unreachable: set[int] = set()
        self.seen: dict[int, float] = {}
        self.stopped = False

    def add_observer(self, observer: Any) -> None:
        pass

    def send_message(self, message: Any, within: float = 1.0, wait: bool = True) -> None:
        if message.get_receiver_id() in self.unreachable:
            raise RunError(f"rank 0 cannot reach rank {message.get_receiver_id()}")
        self.sent.append(message)

    def stop_receive_message(self) -> None:
        self.stopped = True


class Bench:
    """A server of two client ranks over three silos: rank 1 serves 0 and 2, rank 2 serves 1."""

    def __init__(self, make_args: MakeArgs, **options: Any) -> None:
        from fedsq_plugin.hosts.fedml.distributed.protocol import message
        from fedsq_plugin.hosts.fedml.distributed.server import Server
        from fedsq_plugin.hosts.fedml.scoring import Scoring

        self.message = message
        options = {"head": "4", "fedsq_own_rows": True, "federated_optimizer": "FedAvg", **options}
        args = make_args(**options)
        data = silos()
        config = config_of(args)
        model = network()
        self.plan = plan_of(config, model)
        prepare_host(args)
        model = viewed(model, self.plan)
        from fedsq_plugin.hosts.fedml.adapters import FedSQAggregator

        aggregator = FedSQAggregator(model, args, self.plan)
        scoring = Scoring(self.plan, args, torch.device("cpu"), aggregator, (data[3], 60), (data[5], data[6]))
        self.transport = Transport()
        self.server = Server(args, self.transport, self.plan, aggregator, scoring, 2)
        self.server.register_message_receive_handlers()
        self.records: list[Any] = []
        self.server.on_round = self.records.append
        trainer = FedSQTrainer(copy.deepcopy(model), args, self.plan)
        self.silos = Silos(self.plan, args, torch.device("cpu"), trainer, data[4], data[5], data[6])
        self.options = shared_options(config)

    def say(self, kind: str, rank: int, **params: Any) -> None:
        self.server.receive_message(kind, self.message(kind, rank, 0, **params))

    def come(self, rank: int, **params: Any) -> None:
        samples = {1: {0: 16, 2: 40}, 2: {1: 24}}.get(rank, {})
        self.say(ONLINE, rank, **{"samples": samples, "options": self.options, **params})

    def tasks(self) -> list[Any]:
        """Taken off: what was sent since the last call."""
        sent, self.transport.sent = self.transport.sent, []
        return [m for m in sent if m.get_type() == TASK]

    def answer(self, task: Any) -> Any:
        state = self.silos.train(task.get("silo"), task.get("round"), task.get("payload"))
        return self.message(
            RESULT,
            task.get_receiver_id(),
            0,
            **{"task": "train", "silo": task.get("silo"), "round": task.get("round"), "payload": state},
        )

    def deliver(self, answer: Any) -> None:
        self.server.receive_message(RESULT, answer)

    def finish(self, last_first: bool = False) -> State:
        waiting = self.tasks()
        while waiting:
            self.deliver(self.answer(waiting.pop(-1 if last_first else 0)))
            waiting += self.tasks()
        return OrderedDict(self.server.aggregator.model.state_dict())

    @property
    def ends(self) -> dict[int, Any]:
        sent = [m for m in self.transport.sent if m.get_type() == END]
        return {m.get_receiver_id(): m.get("reason") for m in sent}


def started(make_args: MakeArgs, **options: Any) -> Bench:
    bench = Bench(make_args, **options)
    bench.come(1)
    bench.come(2)
    return bench


def test_the_order_of_answers_makes_no_difference(make_args: MakeArgs) -> None:
    first, second = (started(make_args).finish(last) for last in (False, True))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_rank_has_one_task_at_a_time_and_the_end_is_said(make_args: MakeArgs) -> None:
    bench = started(make_args, comm_round=1)
    tasks = bench.tasks()
    assert [(t.get_receiver_id(), t.get("silo")) for t in tasks] == [(1, 0), (2, 1)]
    bench.deliver(bench.answer(tasks[0]))
    (third,) = bench.tasks()
    assert (third.get_receiver_id(), third.get("silo")) == (1, 2)
    bench.deliver(bench.answer(third))
    assert not bench.records
    bench.deliver(bench.answer(tasks[1]))
    assert [record.round for record in bench.records] == [1]
    assert bench.ends == {1: None, 2: None} and bench.transport.stopped


def test_what_was_not_asked_for_is_refused(make_args: MakeArgs) -> None:
    bench = started(make_args, comm_round=1)
    first, other = bench.tasks()
    answer = bench.answer(first)
    bench.deliver(answer)
    bench.deliver(answer)  # again
    (third,) = bench.tasks()
    late, foreign = bench.answer(third), bench.answer(third)
    late.add_params("round", 7)
    bench.deliver(late)
    foreign.sender_id = 2
    bench.deliver(foreign)
    bench.say(RESULT, 9, task="train", silo=0, round=0, payload={})
    bench.deliver(bench.answer(third))
    bench.deliver(bench.answer(other))
    assert [note.partition(" is refused")[0] for note in bench.records[0].notes] == [
        "round 1: an answer of rank 1 for silo 0",
        "round 1: an answer of rank 1 for silo 2",
        "round 1: an answer of rank 2 for silo 2",
    ]


@pytest.mark.parametrize("payload", [None, 3, {"0.weight": "text"}, {"0.weight": torch.zeros(1)}])
def test_an_answer_that_is_no_state_is_refused_by_name(make_args: MakeArgs, payload: Any) -> None:
    bench = started(make_args, comm_round=1)
    tasks = bench.tasks()
    broken = bench.answer(tasks[1])
    broken.add_params("payload", payload)
    bench.deliver(broken)
    bench.deliver(bench.answer(tasks[0]))
    bench.deliver(bench.answer(bench.tasks()[0]))
    assert "the update of silo 1 is refused" in bench.records[0].notes[0]


def test_without_a_quorum_a_lost_rank_ends_the_run(make_args: MakeArgs) -> None:
    bench = started(make_args)
    with pytest.raises(RunError, match=r"rank 2 is lost: boom; 1 of 2 .*2 are needed \(fedsq_args.min_cl"):
        bench.say(FAILED, 2, reason="boom")


def test_with_a_quorum_the_round_goes_on_without_it(make_args: MakeArgs) -> None:
    bench = started(make_args, min_clients=1, comm_round=2)
    first = bench.tasks()[0]
    bench.say(FAILED, 2, reason="boom")
    bench.deliver(bench.answer(first))
    bench.deliver(bench.answer(bench.tasks()[0]))
    assert bench.records[0].notes == ["round 1: rank 2 is lost: boom"]
    bench.finish()
    assert bench.records[1].notes == ["from round 2 on, silo 1 is not there"]


def test_one_that_comes_back_begins_with_the_whole_model(make_args: MakeArgs) -> None:
    options = {"federated_optimizer": "FedRep", "silo_evaluation": False}
    bench = started(make_args, min_clients=1, comm_round=3, **options)

    def one_round(absent: int | None = None) -> dict[int, set[str]]:
        """What each silo was sent; the rank `absent` is started anew before it answers."""
        sent, number = {}, len(bench.records)
        if absent:
            bench.come(absent)
        while len(bench.records) == number:
            for task in (waiting := bench.tasks()):
                sent[task.get("silo")] = set(task.get("payload"))
                if task.get_receiver_id() != absent:
                    bench.deliver(bench.answer(task))
            assert waiting
        return sent

    first, second, third = one_round(), one_round(absent=2), one_round()
    assert first[0] == first[1] == third[1] > second[1] == second[0] == third[0]
    assert bench.records[1].notes == ["round 2: rank 2 is lost: its process was started anew"]


def test_one_that_is_silent_is_lost(make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = started(make_args)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 100)
    bench.transport.seen = {1: now + 99, 2: now}
    with pytest.raises(RunError, match=r"rank 2 is lost: it showed no life for 15 s"):
        bench.server._look()


def test_one_that_is_late_is_lost_and_taken_back_when_it_is_free(
    make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = started(make_args, min_clients=1, round_timeout_s=50.0, comm_round=2)
    first, slow = bench.tasks()
    bench.deliver(bench.answer(first))
    bench.deliver(bench.answer(bench.tasks()[0]))
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    bench.transport.seen = {1: now + 59, 2: now + 59}
    bench.server._look()
    assert bench.records[0].notes == ["round 1: rank 2 is lost: it did not answer within 50 s (fedsq_args."
                                      "round_timeout_s)"]  # fmt: skip
    bench.deliver(bench.answer(slow))
    assert bench.server._online == {1, 2}
    bench.finish()
    assert "an answer of rank 2 for silo 1 is refused" in "".join(bench.records[1].notes)


def test_one_that_never_comes(make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    alone, quorum = Bench(make_args), Bench(make_args, min_clients=1)
    for bench in (alone, quorum):
        bench.come(1)
        bench.transport.seen = {1: now + 9999}
    monkeypatch.setattr(time, "monotonic", lambda: now + 4000)
    with pytest.raises(RunError, match=r"rank 2 did not come within 3600 s .*; 1 of 2 client processes"):
        alone.server._look()
    quorum.server._look()
    assert [t.get("silo") for t in quorum.tasks()] == [0]


def test_one_that_cannot_be_reached_is_lost(make_args: MakeArgs) -> None:
    bench = Bench(make_args)
    bench.transport.unreachable = {2}
    bench.come(1)
    with pytest.raises(RunError, match="rank 2 is lost: rank 0 cannot reach rank 2"):
        bench.come(2)


def test_nobody_left_ends_the_run(make_args: MakeArgs) -> None:
    bench = Bench(make_args, min_clients=1)
    bench.transport.unreachable = {1, 2}
    bench.come(1)
    with pytest.raises((RunError, UpdateError)):
        bench.come(2)


def test_a_recipe_that_disagrees_is_refused_by_option(make_args: MakeArgs) -> None:
    bench = Bench(make_args)
    with pytest.raises(RunError, match=r"rank 1 cannot take part: its recipe has another learning_rate, mom"):
        bench.come(1, options={**bench.options, "learning_rate": "x", "momentum": "y"})
    late = started(make_args)
    late.transport.sent = []
    late.come(1, options=None)
    assert late.ends == {1: "rank 1 cannot take part: it sent no options"}


@pytest.mark.parametrize("samples", [None, {"0": 3}, {0: -1}, {0: 1.5}])
def test_sample_counts_must_be_counts(make_args: MakeArgs, samples: Any) -> None:
    with pytest.raises(RunError, match="rank 1 cannot take part: it sent no sample counts"):
        Bench(make_args).come(1, samples=samples)
