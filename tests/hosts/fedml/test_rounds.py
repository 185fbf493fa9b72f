"""Tasks and answers: the server of a run over several processes, with clients that are a few lines of the test."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsq_plugin.errors import UpdateError
from fedsq_plugin.wire.message import Failed, Result

from .bench import started
from .conftest import MakeArgs


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


def test_a_rank_that_was_given_nothing_yet_is_told_all_with_its_first_test(make_args: MakeArgs) -> None:
    """Its silo was not drawn: what it tests with would be its own random weights and gates."""
    bench = started(make_args, federated_optimizer="FedSQ", comm_round=1, client_num_per_round=1, silo_evaluation=True)
    (task,) = bench.tasks()
    bench.deliver(bench.answer(task))
    tests = {test.silo: test.state for test in bench.tasks()}
    assert task.silo == 1
    assert "fedsq:fingerprint" in tests[0] and "fedsq:fingerprint" not in tests[1]
