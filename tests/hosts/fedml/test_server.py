"""The server's side of a run over several processes, with clients that are a few lines of the test."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from typing import Any

import pytest
import torch

from fedsq_plugin.errors import RunError, UpdateError
from fedsq_plugin.federation.checkpoints import ServerCheckpoints
from fedsq_plugin.federation.seeding import sample_clients
from fedsq_plugin.federation.state import State, clone
from fedsq_plugin.hosts.fedml.adapters import FedSQTrainer
from fedsq_plugin.hosts.fedml.arguments import config_of
from fedsq_plugin.hosts.fedml.dataset import from_tuple
from fedsq_plugin.hosts.fedml.hook import prepare_host
from fedsq_plugin.hosts.fedml.sides import server_side
from fedsq_plugin.hosts.fedml.silo import Silos
from fedsq_plugin.run.plan import build_view, plan_of
from fedsq_plugin.settings.agreement import shared_options
from fedsq_plugin.wire.message import End, Failed, Online, Result, Task

from .conftest import MakeArgs, network, silos


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
        if message.receiver in self.unreachable:
            raise RunError(f"rank 0 cannot reach rank {message.receiver}")
        self.sent.append(message)

    def stop_receive_message(self) -> None:
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

        side = server_side(FedSQAggregator(model, args, self.plan), self.plan)
        scoring = Scoring(self.plan, args, torch.device("cpu"), side, data)
        checkpoints = ServerCheckpoints(None, {}, 1, args.comm_round, False)
        self.transport = Transport()
        self.server = Server(args, self.transport, self.plan, side, scoring, 2, checkpoints)
        self.server.register_message_receive_handlers()
        self.records: list[Any] = []
        self.server.on_round = self.records.append
        trainer = FedSQTrainer(copy.deepcopy(model), args, self.plan)
        self.silos = Silos(self.plan, args, torch.device("cpu"), trainer, data)
        self.options = shared_options(config)

    @property
    def there(self) -> set[int]:
        online: set[int] = self.server._attendance.online
        return online

    def say(self, kind: type[Any], rank: int, /, **params: Any) -> None:
        self.deliver(kind(sender=rank, receiver=0, **params))

    def come(self, rank: int, **params: Any) -> None:
        samples = {1: {0: 16, 2: 40}, 2: {1: 24}}.get(rank, {})
        self.say(Online, rank, **{"samples": samples, "options": self.options, **params})

    def tasks(self) -> list[Any]:
        """Taken off: what was sent since the last call."""
        sent, self.transport.sent = self.transport.sent, []
        return [m for m in sent if isinstance(m, Task)]

    def answer(self, asked: Any, **wrong: Any) -> Any:
        silo = asked.silo
        state = self.silos.train_message(silo, asked.round, asked.state)
        said = {"kind": "train", "silo": silo, "round": asked.round, "state": state}
        said |= {"samples": self.silos.samples(silo), "structural": self.silos.side.structural_fingerprint}
        return Result(**{"sender": asked.receiver, "receiver": 0, **said, **wrong})

    def deliver(self, message: Any) -> None:
        self.server.receive_message(message.type, message)

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


def test_the_order_of_answers_makes_no_difference(make_args: MakeArgs) -> None:
    first, second = (started(make_args).finish(last) for last in (False, True))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_rank_has_one_task_at_a_time_and_the_end_is_said(make_args: MakeArgs) -> None:
    bench = started(make_args, comm_round=1)
    tasks = bench.tasks()
    assert [(t.receiver, t.silo) for t in tasks] == [(1, 0), (2, 1)]
    bench.deliver(bench.answer(tasks[0]))
    (third,) = bench.tasks()
    assert (third.receiver, third.silo) == (1, 2)
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
    bench.deliver(bench.answer(third, round=7))
    bench.deliver(bench.answer(third, sender=2))
    bench.say(Result, 9, kind="train", silo=0, round=0, samples=16, state={})
    bench.deliver(bench.answer(third))
    bench.deliver(bench.answer(other))
    assert [note.partition(" is refused")[0] for note in bench.records[0].notes] == [
        "round 1: an answer of rank 1 for silo 0",
        "round 1: an answer of rank 1 for silo 2",
        "round 1: an answer of rank 2 for silo 2",
    ]


@pytest.mark.parametrize(
    "wrong", [{"state": None, "metrics": (0.1, 0.5, 24)}, {"state": {}}, {"state": {"0.weight": torch.zeros(1)}}]
)
def test_an_answer_that_is_no_state_of_the_model_is_refused_by_name(make_args: MakeArgs, wrong: dict[str, Any]) -> None:
    bench = started(make_args, comm_round=1)
    tasks = bench.tasks()
    bench.deliver(bench.answer(tasks[1], **wrong))
    bench.deliver(bench.answer(tasks[0]))
    bench.deliver(bench.answer(bench.tasks()[0]))
    assert "the update of silo 1 is refused" in bench.records[0].notes[0]


def test_without_a_quorum_a_lost_rank_ends_the_run(make_args: MakeArgs) -> None:
    bench = started(make_args)
    with pytest.raises(RunError, match=r"rank 2 is lost: boom; 1 of 2 .*2 are needed \(fedsq_args.min_cl"):
        bench.say(Failed, 2, reason="boom")


def test_with_a_quorum_the_round_goes_on_without_it(make_args: MakeArgs) -> None:
    bench = started(make_args, min_clients=1, comm_round=2)
    first = bench.tasks()[0]
    bench.say(Failed, 2, reason="boom")
    bench.deliver(bench.answer(first))
    bench.deliver(bench.answer(bench.tasks()[0]))
    assert bench.records[0].notes == ["round 1: rank 2 is lost: boom"]
    bench.finish()
    assert bench.records[1].notes == ["from round 2 on, silo 1 is not there"]


@pytest.mark.parametrize("name", ["FedSQ", "FedMR", "FedAdam"])
def test_a_round_whose_silos_are_all_lost_leaves_the_model_as_it_is(make_args: MakeArgs, name: str) -> None:
    """Silo 1, which is drawn alone in rounds 1 and 2, is lost in round 1; silo 0 trains in round 3."""
    bench = Bench(
        make_args, federated_optimizer=name, min_clients=1, comm_round=3, client_num_per_round=1,
        sampling_seed=seed_that_draws([1, 1, 0]),
    )  # fmt: skip
    before = clone(bench.server.aggregator.model.state_dict())
    bench.come(1)
    bench.come(2)
    (task,) = bench.tasks()
    bench.say(Failed, 2, reason="boom")
    after = bench.server.aggregator.model.state_dict()
    assert task.silo == 1 and all(torch.equal(before[key], after[key]) for key in before)
    assert not bench.tasks()
    bench.server._look()
    (task,) = bench.tasks()
    assert task.silo == 0 and task.round == 2
    assert bench.server.aggregator.server.state.round == 2
    bench.deliver(bench.answer(task))
    line = "none of its silos answered, the model stays as it is"
    assert [record.notes for record in bench.records] == [
        ["round 1: rank 2 is lost: boom", f"round 1: {line}"],
        ["from round 2 on, silo 1 is not there", f"round 2: {line}"],
        [],
    ]
    assert not all(torch.equal(before[key], after[key]) for key in before)


def seed_that_draws(wanted: list[int]) -> int:
    """One of each round's three silos."""
    for seed in range(1000):
        if [sample_clients(3, 1, round_idx, seed) for round_idx in range(len(wanted))] == [[n] for n in wanted]:
            return seed
    raise AssertionError


def test_one_that_comes_back_begins_with_the_whole_model(make_args: MakeArgs) -> None:
    options = {"federated_optimizer": "FedRep", "silo_evaluation": False}
    bench = started(make_args, min_clients=1, comm_round=3, **options)

    def one_round(absent: int | None = None) -> dict[int, set[str]]:
        """What each silo was sent; the rank `absent` is started anew before it answers."""
        sent, number = {}, len(bench.records)
        if absent:
            bench.come(absent, process="another")
        while len(bench.records) == number:
            for task in (waiting := bench.tasks()):
                sent[task.silo] = set(task.state)
                if task.receiver != absent:
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
    assert bench.there == {1, 2}
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
    assert [t.silo for t in quorum.tasks()] == [0]


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
    line = r"rank 1 cannot take part: its recipe has learning_rate 0.1 instead of 0.05, another extra; 1 of 2"
    with pytest.raises(RunError, match=line):
        bench.come(1, options={**bench.options, "learning_rate": "0.1", "extra": "sha256:0"})
    late = started(make_args)
    late.transport.sent = []
    late.come(1, options={})
    assert late.ends[1].startswith("rank 1 cannot take part: its recipe has no ")
    assert all(f"no {option}" in late.ends[1] for option in bench.options)


def test_with_a_quorum_one_that_cannot_take_part_is_refused_and_may_come_again(make_args: MakeArgs) -> None:
    bench = Bench(make_args, min_clients=1, comm_round=2)
    bench.come(2, options={key: value for key, value in bench.options.items() if key != "momentum"})
    assert bench.ends == {2: "rank 2 cannot take part: its recipe has no momentum"}
    bench.come(1)
    first, second = bench.tasks()[0], None
    bench.deliver(bench.answer(first))
    bench.come(2)
    second = bench.tasks()[0]
    assert [task.silo for task in (first, second)] == [0, 2]
    bench.deliver(bench.answer(second))
    assert sorted(task.silo for task in bench.tasks()) == [0, 1]
    assert bench.records[0].notes == [
        "rank 2 cannot take part: its recipe has no momentum",
        "from round 1 on, silo 1 is not there",
    ]


COUNTS: dict[str, tuple[Any, str]] = {
    "no silo": ({}, "it announced the silos none instead of 0, 2"),
    "another's silo": ({0: 3, 1: 9, 2: 4}, "it announced the silos 0, 1, 2 instead of 0, 2"),
    "negative": ({0: -1, 2: 40}, "silo 0 has the sample count -1"),
    "absurd": ({0: 10**18, 2: 40}, "silo 0 has the sample count 1000000000000000000"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_sample_counts_must_be_counts(make_args: MakeArgs, name: str) -> None:
    samples, line = COUNTS[name]
    with pytest.raises(RunError, match=f"rank 1 cannot take part: {line}; 1 of 2 client processes"):
        Bench(make_args).come(1, samples=samples)


def test_a_silo_that_comes_back_has_the_samples_that_it_had(make_args: MakeArgs) -> None:
    bench = started(make_args, min_clients=1)
    bench.say(Failed, 2, reason="boom")
    bench.transport.sent = []
    bench.come(2, samples={1: 25})
    assert bench.ends == {2: "rank 2 cannot take part: silo 1 has 25 samples, and had 24 before"}
    assert bench.there == {1}


@pytest.mark.parametrize("samples", [23, 25, 0, -24, 10**18])
def test_an_update_with_another_sample_count_is_refused(make_args: MakeArgs, samples: int) -> None:
    notes = refused(make_args, samples=samples)
    assert "the update of silo 1 is refused: its sample count is" in notes[0]
    assert notes[0].endswith(", and it announced 24")


def refused(make_args: MakeArgs, **wrong: Any) -> list[str]:
    """The notes of a round in which silo 1 answers something wrong."""
    bench = started(make_args, comm_round=1, **wrong.pop("options", {}))
    first, broken = bench.tasks()
    bench.deliver(bench.answer(broken, **wrong))
    bench.deliver(bench.answer(first))
    bench.deliver(bench.answer(bench.tasks()[0]))
    (record,) = bench.records
    assert len(record.notes) == 1
    notes: list[str] = record.notes
    return notes


@pytest.mark.parametrize("structural", [None, "0" * 64, ""])
def test_an_update_from_under_another_structural_copy_is_refused(make_args: MakeArgs, structural: Any) -> None:
    notes = refused(make_args, options={"federated_optimizer": "FedSQ"}, structural=structural)
    assert notes[0].startswith("round 1: the update of silo 1 is refused: it was made under the structural")


def test_a_silo_with_another_structural_copy_does_not_train(make_args: MakeArgs) -> None:
    """The server announces a fingerprint that is not that of the weights beside it."""
    bench = started(make_args, federated_optimizer="FedSQ")
    task = bench.tasks()[1]
    payload = task.state
    payload["4.weight"] = payload["4.weight"] + 1
    with pytest.raises(UpdateError, match=r"the structural copy is \w{12}…, the server announced \w{12}…"):
        bench.answer(task)


def test_the_first_task_of_every_process_announces_the_structural_copy(make_args: MakeArgs) -> None:
    bench = started(make_args, federated_optimizer="FedSQ", comm_round=2)
    first = bench.tasks()
    assert all("fedsq:fingerprint" in task.state for task in first)
    bench.deliver(bench.answer(first[0]))
    third = bench.tasks()
    for task in (*third, first[1]):
        bench.deliver(bench.answer(task))
    assert bench.records[0].notes == []
    assert not any("fedsq:fingerprint" in task.state for task in bench.tasks())


TESTS: dict[str, Any] = {
    "no metrics": (None, "it is no loss, accuracy and sample count"),
    "accuracy above 1": ((0.1, 1.5, 60), "its accuracy is 1.5"),
    "negative count": ((0.1, 0.5, -60), "its sample count is -60"),
    "absurd count": ((0.1, 0.5, 10**18), "its sample count is 1000000000000000000"),
}


@pytest.mark.parametrize("name", TESTS)
def test_a_test_that_cannot_be_is_refused_by_name(make_args: MakeArgs, name: str) -> None:
    payload, line = TESTS[name]
    bench = started(make_args, comm_round=1, silo_evaluation=True)
    waiting = bench.tasks()
    while waiting:
        task = waiting.pop(0)
        if task.kind == "train":
            bench.deliver(bench.answer(task))
        else:
            found = payload if task.silo == 1 else (0.5, 0.25 * task.silo, 60)
            about = {"kind": task.kind, "silo": task.silo, "round": task.round}
            about |= {"samples": bench.silos.samples(task.silo), "state": {} if found is None else None}
            bench.say(Result, task.receiver, **about, metrics=found)
        waiting += bench.tasks()
    (record,) = bench.records
    assert record.notes == [f"round 1: the test of silo 1 is refused: {line}"]
    assert record.silos == (0.5, 0.25, 120)


@pytest.mark.parametrize("wrong", [{"silo": 0}, {"silo": -1}, {"round": 1}, {"kind": "tune"}], ids=str)
def test_an_answer_about_something_else_is_refused(make_args: MakeArgs, wrong: dict[str, Any]) -> None:
    bench = started(make_args)
    bench.deliver(bench.answer(bench.tasks()[1], **wrong))
    assert "is refused: it was not asked for, or is late" in bench.server.rounds.current.record.notes[0]


def test_one_that_says_twice_that_it_is_there_is_not_lost(make_args: MakeArgs) -> None:
    bench = Bench(make_args)
    for rank in (1, 1, 2, 2):
        bench.come(rank, process=f"{rank}")
    assert bench.there == {1, 2} and len(bench.tasks()) == 2


def test_one_that_is_started_anew_before_the_first_round_needs_no_quorum(make_args: MakeArgs) -> None:
    bench = Bench(make_args)
    bench.come(1, process="first")
    bench.come(1, process="second")
    bench.come(2)
    assert bench.there == {1, 2} and len(bench.tasks()) == 2
    assert bench.server.rounds.current.record.notes == ["rank 1 was started anew before the first round"]


def test_one_that_was_silent_without_a_task_is_taken_back(make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = started(make_args, min_clients=1, comm_round=2)
    task, other = bench.tasks()
    bench.deliver(bench.answer(other))
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 100)
    bench.transport.seen = {1: now + 99, 2: now + 1}
    bench.server._look()
    assert bench.there == {1}
    bench.transport.seen[2] = now + 101
    bench.server._look()
    assert bench.there == {1, 2}
    bench.deliver(bench.answer(task))
    bench.finish()
    assert bench.records[0].notes == [
        "round 1: rank 2 is lost: it showed no life for 15 s",
        "round 1: rank 2 shows life again",
    ]
    assert bench.records[1].notes == []


def test_a_rank_that_was_given_nothing_yet_is_told_all_with_its_first_test(make_args: MakeArgs) -> None:
    """Its silo was not drawn: what it tests with would be its own random weights and gates."""
    bench = started(make_args, federated_optimizer="FedSQ", comm_round=1, client_num_per_round=1, silo_evaluation=True)
    (task,) = bench.tasks()
    bench.deliver(bench.answer(task))
    tests = {test.silo: test.state for test in bench.tasks()}
    assert task.silo == 1
    assert "fedsq:fingerprint" in tests[0] and "fedsq:fingerprint" not in tests[1]


def test_a_start_goes_on_when_one_that_came_is_gone_and_a_quorum_may_come(make_args: MakeArgs) -> None:
    bench = Bench(make_args, min_clients=1)
    bench.come(1)
    bench.say(Failed, 1, reason="broken")
    bench.come(2)
    bench.server._give_up_waiting()
    assert [task.silo for task in bench.tasks()] == [1]


def test_a_client_that_restarts_in_a_round_of_nobody_is_told_all_again(make_args: MakeArgs) -> None:
    bench = started(make_args, federated_optimizer="FedSQ", client_num_per_round=1, comm_round=3, min_clients=1)
    (task,) = bench.tasks()
    bench.come(task.receiver, process="another")
    assert bench.server.aggregator.server.state.told[task.silo] == -1
    assert "none of its silos answered" in " ".join(bench.records[0].notes)
