"""One federated round: whatever the host, the same updates give the same model, and a bad one is refused by name."""

from __future__ import annotations

import gc
import itertools
import logging
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsq_plugin.algorithms import algorithm
from fedsq_plugin.errors import UpdateError
from fedsq_plugin.federation.record import RoundRecord
from fedsq_plugin.federation.round import Round, skip_empty
from fedsq_plugin.federation.server import Server
from fedsq_plugin.federation.state import State, fingerprint, nbytes
from tests.algorithms.rules import ROLES, SERVER, state
from tests.algorithms.task import AllOptions

SAMPLES = {4: 1.0, 7: 3.0, 9: 2.0}
SILOS = list(SAMPLES)
NAN = float("nan")


def served(name: str = "FedAvg", **options: Any) -> Server:
    return Server(algorithm(name), AllOptions(head="head", **options), SERVER, ROLES, seed=0)


def begun(server: Server | None = None, fatal: str | None = None, silos: list[int] = SILOS) -> Round:
    server = server or served()
    return Round(server, silos, SAMPLES, RoundRecord(server.state.round + 1), fatal)


def answers(server: Server) -> dict[int, State]:
    """By silo; the third of a float's digits differ, so that the order of a float32 sum would show."""
    sent = {4: state(0.1, 4, 8, 10, -4), 7: state(1 / 3, 8, -8, 13, 4), 9: state(1e8, 1, 2, 11, 6)}
    return {silo: server.travelling(one) for silo, one in sent.items()}


def run(server: Server, wrong: dict[int, Any], fatal: str | None = None) -> Round:
    """A round in which these silos answer otherwise than the others, or, with None, not at all."""
    current = begun(server, fatal)
    for silo, answer in {**answers(server), **wrong}.items():
        if answer is not None:
            current.take(silo, answer)
    current.close()
    return current


# Gathering

EVERY = ["FedAvg", "FedMR", "FedAdam", "FedBN", "FedRep", "FedSQ", "FedSQ+FedMR"]


@pytest.mark.parametrize("name", EVERY)
def test_order_of_arrival_changes_nothing(name: str) -> None:
    found = set()
    for order in itertools.permutations(SILOS):
        server = served(name)
        current, sent = begun(server), answers(server)
        for silo in order:
            current.take(silo, sent[silo])
        current.close()
        found.add(fingerprint(server.state.tensors()))
    assert len(found) == 1


def test_mean_by_samples() -> None:
    server = served()
    run(server, {})
    # (8 - 3·8 + 2·2)/6 and (-4 + 3·4 + 2·6)/6
    assert server.state.model["mean"].item() == -2.0
    assert server.state.model["head"].item() == pytest.approx(20 / 6)
    assert server.state.round == 1


def test_an_answer_is_held_no_longer_than_until_its_turn() -> None:
    """So that a round needs the memory of a few updates, not of all."""
    server = served()
    current, sent = begun(server), answers(server)
    alive = {silo: weakref.ref(answer["weight"]) for silo, answer in sent.items()}
    held = []
    for silo in (9, 4, 7):
        current.take(silo, sent.pop(silo))
        gc.collect()
        held.append([one for one, reference in alive.items() if one not in sent and reference() is not None])
    assert held == [[9], [9], []]


def test_silos_that_have_not_answered() -> None:
    server = served()
    current = begun(server)
    assert current.missing == SILOS
    current.take(7, answers(server)[7])
    assert current.missing == [4, 9]


def test_round_may_close_without_all() -> None:
    server, other = served(), served()
    run(server, {4: None})
    current = begun(other, silos=[7, 9])
    for silo in (7, 9):
        current.take(silo, answers(other)[silo])
    current.close()
    assert fingerprint(server.state.model) == fingerprint(other.state.model)
    assert (server.state.clients, other.state.clients) == (3, 2)


def test_fedmrs_slot_of_a_silo_that_did_not_answer_stays() -> None:
    server = served("FedMR")
    run(server, {7: None})
    assert sorted(slot["count"].item() for slot in server.state.slots) == [10, 11, 100]


# Refusals


def with_key(key: str, value: Tensor | None) -> State:
    """Silo 7's answer with another value under a key; None: without it."""
    found = OrderedDict(answers(served())[7])
    found.pop(key, None)
    if value is not None:
        found[key] = value
    return found


WRONG = {
    "nan": (with_key("weight", torch.tensor([NAN])), "weight has NaN or infinite values"),
    "infinite": (with_key("mean", torch.tensor([float("inf")])), "mean has NaN or infinite values"),
    "missing": (with_key("norm", None), "it lacks norm"),
    "unknown": (with_key("extra", torch.ones(1)), "it has the unknown key extra"),
    "shape": (with_key("weight", torch.ones(2)), "weight has shape (2,) instead of (1,)"),
    "dtype": (
        with_key("weight", torch.ones(1, dtype=torch.float64)),
        "weight is torch.float64 instead of torch.float32",
    ),
    "reserved": (
        with_key("fedsq:fingerprint", torch.ones(1)),
        "the update of silo 7 has the key 'fedsq:fingerprint', which only the server may send",
    ),
    "sums": (with_key("fedsq:sums:class sums", torch.ones(1)), "it has the unknown key class sums"),
    "empty": (State(), "it lacks count"),
}


@pytest.mark.parametrize("what", sorted(WRONG))
def test_bad_update_is_refused_by_name_and_the_round_goes_on(what: str, caplog: pytest.LogCaptureFixture) -> None:
    answer, reason = WRONG[what]
    server, without = served(), served()
    with caplog.at_level(logging.WARNING):
        current = run(server, {7: answer})
    line = f"round 1: the update of silo 7 is refused: {reason}"
    assert current.refused == [7]
    assert current.record.notes == caplog.messages == [line]
    run(without, {7: None})
    assert fingerprint(server.state.model) == fingerprint(without.state.model)


@pytest.mark.parametrize("name", EVERY)
def test_no_algorithm_takes_a_nan(name: str) -> None:
    server, without = served(name), served(name)
    bad = {key: value.clone() for key, value in answers(server)[7].items()}
    bad["weight"][:] = NAN
    assert run(server, {7: bad}).refused == [7]
    run(without, {7: None})
    assert fingerprint(server.state.tensors()) == fingerprint(without.state.tensors())
    assert all(torch.isfinite(value).all() for value in server.state.tensors().values())


def test_what_should_stay_with_the_silo_is_refused() -> None:
    current = run(served("FedRep"), {7: state(1, 1, 1, 1, 1)})
    assert current.record.notes == ["round 1: the update of silo 7 is refused: it has the unknown key head"]


@pytest.mark.parametrize("what", sorted(WRONG))
def test_refused_update_ends_the_run_where_the_recipe_says_so(what: str) -> None:
    answer, reason = WRONG[what]
    server = served()
    with pytest.raises(UpdateError) as caught:
        run(server, {7: answer}, fatal="fedsq_args.nonfinite: fail")
    line = f"round 1: the update of silo 7 is refused: {reason} (fedsq_args.nonfinite: fail)"
    assert str(caught.value) == line
    assert fingerprint(server.state.model) == fingerprint(SERVER)


def test_silo_that_answers_twice_counts_once() -> None:
    server, once = served(), served()
    current, sent = begun(server), answers(server)
    for silo in (4, 7, 7, 9):
        current.take(silo, sent[silo])
    current.close()
    assert current.record.notes == ["round 1: the update of silo 7 is refused: it has answered already"]
    run(once, {})
    assert fingerprint(server.state.model) == fingerprint(once.state.model)
    assert current.record.bytes_up == sum(nbytes(one) for one in sent.values())


def test_silo_that_is_not_in_the_round_does_not_count() -> None:
    server, without = served(), served()
    current, sent = begun(server), answers(server)
    current.take(5, sent[7])
    for silo, answer in sent.items():
        current.take(silo, answer)
    current.close()
    assert current.record.notes == ["round 1: the update of silo 5 is refused: it is not in this round"]
    run(without, {})
    assert fingerprint(server.state.model) == fingerprint(without.state.model)


def test_host_may_object_to_an_answer() -> None:
    server, without = served(), served()
    current, sent = begun(server), answers(server)
    for silo, answer in sent.items():
        current.take(silo, answer, "it came late" if silo == 7 else None)
    current.close()
    assert current.record.notes == ["round 1: the update of silo 7 is refused: it came late"]
    run(without, {7: None})
    assert fingerprint(server.state.model) == fingerprint(without.state.model)


def test_refused_first_silo_does_not_hold_up_the_others() -> None:
    server = served()
    current = run(server, {4: with_key("weight", torch.tensor([NAN]))})
    assert (current.refused, current.missing, server.state.round) == ([4], [], 1)


@pytest.mark.parametrize("samples", [0.0, -1.0, NAN])
def test_silo_without_a_weight_is_refused(samples: float) -> None:
    server = served()
    current = Round(server, SILOS, {**SAMPLES, 7: samples}, RoundRecord(1))
    for silo, answer in answers(server).items():
        current.take(silo, answer)
    current.close()
    assert current.refused == [7]


def test_close_without_an_update_says_why_and_changes_nothing() -> None:
    server = served()
    current = begun(server, silos=[7])
    current.take(7, with_key("weight", torch.tensor([NAN])))
    with pytest.raises(UpdateError) as caught:
        current.close()
    line = "round 1: the update of silo 7 is refused: weight has NaN or infinite values"
    assert str(caught.value) == f"no update is left to aggregate: {line}"
    assert fingerprint(server.state.model) == fingerprint(SERVER)
    assert server.state.round == 0


def test_close_without_an_answer_is_an_error() -> None:
    with pytest.raises(UpdateError, match="no update is left to aggregate: no silo answered"):
        begun().close()


# A round that trains nothing


def sums(*rows: list[float]) -> State:
    return State({"fedsq:sums:class sums": torch.tensor(rows, dtype=torch.float64)})


def test_sums_are_gathered_and_misfits_refused() -> None:
    model = OrderedDict(weight=torch.zeros(1, 1), **{"fc.weight": torch.zeros(2, 2)})
    known = dict.fromkeys(model, ROLES["head"])
    server = Server(algorithm("FedNCM"), AllOptions(head="fc"), model, known, seed=0)
    current = begun(server)
    current.take(4, sums([3, 0], [0, 1]))
    current.take(7, sums([3, 8], [0, 0]))
    current.take(9, sums([NAN, 0], [0, 0]))
    current.close()
    (line,) = current.record.notes
    assert line == "round 1: the update of silo 9 is refused: class sums has NaN or infinite values"
    # (6, 8) and (0, 1), scaled to length one.
    torch.testing.assert_close(server.state.model["fc.weight"], torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


# The structural copy


def test_round_lets_the_structural_copy_follow_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    server = served("FedSQ", structural_copy="refresh")
    with caplog.at_level(logging.INFO):
        run(server, {})
        assert caplog.messages == []
        current = begun(server)
    assert caplog.messages == ["round 2: the structural copy has changed"]
    assert all(sent.structural is not None for sent in current.assignments.values())


def test_gates_that_are_unfrozen_are_told(caplog: pytest.LogCaptureFixture) -> None:
    server = served("FedSQ", structural_copy="unfreeze", structural_rounds=1)
    run(server, {})
    with caplog.at_level(logging.INFO):
        begun(server)
    assert caplog.messages == ["round 2: the gates are unfrozen"]


def test_silo_that_answered_has_been_told_and_the_others_have_not() -> None:
    server = served("FedSQ", structural_copy="refresh")
    run(server, {})
    run(server, {7: None})
    assert server.state.told == {4: 1, 9: 1}


def test_silo_whose_answer_the_host_refuses_has_not_been_told() -> None:
    server = served("FedSQ", structural_copy="refresh")
    run(server, {})
    current = begun(server)
    current.take(7, answers(server)[7], "it is of another process")
    assert server.state.told == {}


# Bytes, and rounds without updates


def test_bytes_are_those_of_what_is_sent_and_answered() -> None:
    server = served()
    record = run(server, {7: None}).record
    assert record.bytes_down == 3 * nbytes(SERVER)
    assert record.bytes_up == 2 * nbytes(SERVER)


def test_bytes_of_an_announcement_are_counted() -> None:
    server = served("FedSQ", structural_copy="refresh")
    run(server, {})
    assert begun(server).record.bytes_down == 3 * (nbytes(SERVER) + 64)  # SHA-256 in hex


def test_round_that_is_passed_over_leaves_the_model() -> None:
    server = served("FedAvgM")
    run(server, {})
    before = server.state
    begun(server).pass_over()
    assert server.state.round == 2
    assert fingerprint(server.state.tensors()) == fingerprint(before.tensors())


def test_silos_without_samples_are_skipped_and_noted() -> None:
    record = RoundRecord(3)
    assert skip_empty([9, 4, 7], {9: 2, 4: 0}, record) == [9]
    assert record.notes == [
        "round 3: silo 4 has no samples and is skipped",
        "round 3: silo 7 has no samples and is skipped",
    ]


def test_round_without_a_silo_that_has_samples_is_an_error() -> None:
    said = r"round 3: none of the silos \[4, 7\] has a sample to train on"
    with pytest.raises(UpdateError, match=said):
        skip_empty([4, 7], {4: 0}, RoundRecord(3))
