"""Who is there: the server of a run over several processes, with clients that are a few lines of the test."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from fedsq_plugin.errors import RunError, UpdateError
from fedsq_plugin.federation.seeding import sample_clients
from fedsq_plugin.federation.state import clone, fingerprint
from fedsq_plugin.wire.message import End, Failed

from .bench import Bench, started
from .conftest import MakeArgs


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


RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "another run_id": ({"run": "7"}, "its run_id is 7 instead of 0"),
    "no run_id": ({"run": ""}, "its run_id is missing instead of 0"),
    "from a run whose server is gone": ({"returns": True}, "it took part in a run whose server is gone, and this one"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_process_of_another_run_is_sent_away_and_the_run_waits_for_its_own(make_args: MakeArgs, name: str) -> None:
    about, line = RUNS[name]
    bench = Bench(make_args)
    bench.come(1, process="left over", **about)
    (end,) = [message for message in bench.transport.sent if isinstance(message, End)]
    assert (end.receiver, end.process) == (1, "left over")
    assert end.reason.startswith(f"a process of another run called itself rank 1: {line}")
    bench.come(1, process="own")
    bench.come(2)
    bench.come(1, process="left over", **about)  # it did not get the word
    bench.processes[1] = "own"
    assert bench.there == {1, 2}
    bench.finish()
    assert [record.round for record in bench.records] == [1, 2]


def test_a_resumed_server_takes_its_clients_back(make_args: MakeArgs) -> None:
    bench = Bench(make_args, checkpoint_dir="unused", resume=True)
    for rank in (1, 2):
        bench.come(rank, process=f"{rank}", returns=True)
    assert bench.there == {1, 2}


@pytest.mark.parametrize("kind", ["answer", "failure"])
def test_what_a_process_of_another_run_sends_as_an_answer_counts_nowhere(make_args: MakeArgs, kind: str) -> None:
    """It was asked by the server before, for the same silo and round."""
    right = started(make_args, comm_round=1)
    expected = fingerprint(right.finish())
    bench = started(make_args, comm_round=1)
    task, other = bench.tasks()
    if kind == "failure":
        bench.say(Failed, task.receiver, reason="broken", process="left over")
    else:
        answer = bench.answer(task, process="left over")
        bench.deliver(answer.model_copy(update={"state": {k: v * 0 for k, v in answer.state.items()}}))
    assert bench.there == {1, 2}
    waiting = [task, other]
    while waiting:
        bench.deliver(bench.answer(waiting.pop(0)))
        waiting += bench.tasks()
    assert fingerprint(bench.server.aggregator.model.state_dict()) == expected
