"""Who is there: by hand."""

from __future__ import annotations

from typing import Any

import pytest

from fedsq_plugin.errors import RunError


@pytest.fixture
def module(fedml: Any) -> Any:
    from fedsq_plugin.hosts.fedml.distributed import attendance

    return attendance


@pytest.fixture
def clock(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "SILENCE_S", 10.0)
    return now


def came(module: Any, ranks: int, *online: int, least: int | None = None) -> Any:
    found = module.Attendance(ranks, least)
    for rank in online:
        found.hear(rank)
        found.come(rank, f"process {rank}")
    return found


def test_the_start_is_complete_with_those_that_were_refused(module: Any) -> None:
    found = came(module, 3, 1, 3)
    assert not found.complete and found.absent == [2]
    found.hear(2)
    found.refuse(2)
    assert found.complete and found.absent == [2]
    found.come(2, "another")
    assert found.complete and found.absent == []


def test_a_process_is_known_until_another_comes_or_it_is_lost(module: Any) -> None:
    found = came(module, 2, 1)
    assert found.is_there(1, "process 1")
    assert not found.is_there(1, "another") and not found.is_there(2, "process 1")
    found.lose(1, module.Lost.LATE)
    assert not found.is_there(1, "process 1")


def test_only_a_late_rank_may_answer(module: Any) -> None:
    found = came(module, 3, 1, 2, 3)
    kinds = module.Lost
    for rank, how in enumerate((kinds.LATE, kinds.SILENT, kinds.FOR_GOOD), start=1):
        found.lose(rank, how)
    assert [found.may_answer(rank) for rank in (1, 2, 3)] == [True, False, False]
    found.come(1)
    assert not found.may_answer(1)


def test_silence_is_more_than_ten_seconds_without_message_or_sign(module: Any, clock: list[float]) -> None:
    found = came(module, 4, 1, 2, 3)
    clock[0] = 110.0
    assert found.silent({}) == []
    clock[0] = 110.5
    assert found.silent({2: 100.6}) == [1, 3]


def test_a_sign_after_the_loss_brings_back_who_was_silent(module: Any, clock: list[float]) -> None:
    found = came(module, 3, 1, 2, 3)
    found.lose(1, module.Lost.SILENT)
    found.lose(2, module.Lost.FOR_GOOD)
    assert found.returned({1: 100.0, 2: 101.0}) == []
    assert found.returned({1: 100.1, 2: 101.0}) == [1]
    found.come(1)
    assert found.returned({1: 102.0}) == []


@pytest.mark.parametrize(
    ("least", "online", "more_may_come", "left"),
    [
        (None, (1, 2, 3), False, None),
        (None, (1, 2), False, 2),
        (None, (1, 2), True, None),  # rank 3 was not heard of
        (2, (1, 2), False, None),
        (2, (1,), False, 1),
        (2, (1,), True, None),
    ],
)
def test_a_quorum_by_hand(
    module: Any, least: int | None, online: tuple[int, ...], more_may_come: bool, left: int | None
) -> None:
    found = came(module, 3, *online, least=least)
    if left is None:
        found.require_quorum("why", more_may_come)
        return
    line = rf"why; {left} of 3 client processes are left, {least or 3} are needed \(fedsq_args.min_clients\)"
    with pytest.raises(RunError, match=line):
        found.require_quorum("why", more_may_come)


def test_who_came_and_is_gone_is_not_waited_for(module: Any) -> None:
    found = came(module, 3, 1, 2)
    found.lose(2, module.Lost.FOR_GOOD)
    with pytest.raises(RunError, match="2 of 3 client processes are left"):
        found.require_quorum("why", more_may_come=True)
