"""How a run that was cut off goes on: what its server and its client processes save, and read when they start anew."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsq_plugin.errors import ConfigError, WeightsError
from fedsq_plugin.federation.checkpoints import ServerCheckpoints, SiloCheckpoints
from fedsq_plugin.federation.server_state import ServerState
from fedsq_plugin.federation.state import fingerprint
from tests.algorithms.task import Federation, changed

RUN = {"federated_optimizer": "FedSQ+FedRep", "learning_rate": 0.1}
SILOS = [0, 1, 2]


def server(folder: Path | None, resume: bool = False, every: int = 1, rounds: int = 9, **run: Any) -> ServerCheckpoints:
    return ServerCheckpoints(None if folder is None else str(folder), {**RUN, **run}, every, rounds, resume)


def silos(found: Federation, folder: Path | None, resume: bool = False, **run: Any) -> SiloCheckpoints:
    place = None if folder is None else str(folder)
    return SiloCheckpoints(place, {**RUN, **run}, found.client.states, SILOS, resume)


def federation(name: str = "FedSQ+FedRep") -> Federation:
    return Federation(name, options=changed(structural_copy="ema"))


def saved(checkpoints: ServerCheckpoints, rounds: int, name: str = "FedSQ+FedRep") -> Federation:
    """So many rounds, each of which is offered to the checkpoints."""
    found = federation(name)
    for _ in range(rounds):
        found.repeat(1)
        checkpoints.save(found.own_server.state, found.client.states.tensors())
    return found


def newest(folder: Path) -> tuple[ServerState, dict[str, torch.Tensor]]:
    found = server(folder, resume=True).take_newest()
    assert found is not None
    return found


# The server


@pytest.mark.parametrize("name", ["FedSQ+FedRep", "FedSQ+FedMR", "FedAdam", "FedBN"])
def test_run_goes_on_from_the_newest_as_if_it_had_not_stopped(name: str, tmp_path: Path) -> None:
    saved(server(tmp_path), 2, name)
    whole, second = federation(name).repeat(4), federation(name)
    state, parts = newest(tmp_path)
    second.own_server.state = state
    second.client.resume(state, parts)
    second.repeat(2)
    assert fingerprint(second.own_server.state.tensors()) == fingerprint(whole.own_server.state.tensors())
    assert second.own_server.state.about() == whole.own_server.state.about()
    assert fingerprint(second.client.states.tensors()) == fingerprint(whole.client.states.tensors())


def test_newest_is_given_once_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(server(tmp_path), 3)
    found = server(tmp_path, resume=True)
    assert (found.resumes, found.round) == (True, 0)
    assert found.take_newest() is not None
    assert (found.resumes, found.round) == (False, 3)
    assert caplog.messages == found.notes == ["the run goes on after round 3"]
    assert found.take_newest() is None


@pytest.mark.parametrize(
    ("every", "rounds", "expected"), [(1, 5, [1, 2, 3, 4, 5]), (2, 5, [2, 4, 5]), (3, 3, [3]), (9, 5, [5])]
)
def test_rounds_that_are_saved(every: int, rounds: int, expected: list[int], tmp_path: Path) -> None:
    checkpoints, found, seen = server(tmp_path, every=every, rounds=rounds), federation("FedAvg"), []
    for _ in range(rounds):
        found.repeat(1)
        checkpoints.save(found.own_server.state, {})
        seen.append(checkpoints.round)
    assert sorted(set(seen) - {0}) == expected


def test_run_can_go_back_to_the_one_before_the_newest(tmp_path: Path) -> None:
    checkpoints = server(tmp_path)
    saved(checkpoints, 4, "FedAvg")
    assert (checkpoints.oldest, checkpoints.round) == (3, 4)
    (tmp_path / "server-round00004.json").unlink()
    assert newest(tmp_path)[0].round == 3


def test_without_a_folder_nothing_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints = server(None, resume=True)
    saved(checkpoints, 1)
    assert (checkpoints.resumes, checkpoints.take_newest(), checkpoints.round) == (False, None, 0)
    assert list(tmp_path.iterdir()) == []


def test_folder_without_a_checkpoint_begins_with_round_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = server(tmp_path / "new", resume=True)
    assert (found.resumes, found.notes) == (False, caplog.messages)
    (line,) = caplog.messages
    assert line.endswith("new yet: the run begins with round 1")


def test_folder_of_a_run_is_not_written_over(tmp_path: Path) -> None:
    saved(server(tmp_path), 2)
    with pytest.raises(ConfigError, match=r"holds round 2 of a run: set fedsq_args\.resume: true"):
        server(tmp_path)


def test_checkpoint_of_another_recipe_is_refused_by_option(tmp_path: Path) -> None:
    saved(server(tmp_path), 1)
    with pytest.raises(WeightsError, match=r"it is of a run with learning_rate 0\.1 \(here 0\.5\)"):
        server(tmp_path, resume=True, learning_rate=0.5)


def test_damaged_checkpoint_names_the_way_back(tmp_path: Path) -> None:
    saved(server(tmp_path), 2)
    newest_file = tmp_path / "server-round00002.safetensors"
    newest_file.write_bytes(newest_file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"not a whole checkpoint .* remove it to go on from round 1"):
        server(tmp_path, resume=True)


def test_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError):
        saved(server(tmp_path / "file" / "folder"), 1)


# The client processes


def trained(name: str, folder: Path, rounds: int, server_at: int = 0) -> Federation:
    """So many rounds of all silos, whose own parts are saved."""
    found = federation(name)
    checkpoints = silos(found, folder)
    for number in range(rounds):
        found.repeat(1)
        for silo in SILOS:
            checkpoints.save(silo, number, server_at)
    return found


@pytest.mark.parametrize("finished", [1, 2, 3])
@pytest.mark.parametrize("name", ["FedRep", "FedBN"])
def test_silos_go_on_from_the_round_of_the_server(name: str, finished: int, tmp_path: Path) -> None:
    trained(name, tmp_path, 3)
    second = federation(name)
    silos(second, tmp_path, resume=True).restore(finished)
    whole = federation(name).repeat(finished)
    assert fingerprint(second.client.states.tensors()) == fingerprint(whole.client.states.tensors())


def test_silos_are_restored_before_the_first_task_alone(tmp_path: Path) -> None:
    trained("FedRep", tmp_path, 2)
    second = federation("FedRep")
    checkpoints = silos(second, tmp_path, resume=True)
    checkpoints.restore(2)
    second.client.states.restore({})
    checkpoints.restore(2)
    assert second.client.states.tensors() == {}


def test_server_that_was_started_anew_takes_its_silos_back(tmp_path: Path) -> None:
    found = federation("FedRep")
    checkpoints, parts = silos(found, tmp_path), []
    for number in range(3):
        found.repeat(1)
        parts.append(fingerprint(found.client.states.tensors()))
        for silo in SILOS:
            checkpoints.save(silo, number, server_at=0)
    checkpoints.restore(1)  # the process was not started anew, so this changes nothing
    assert fingerprint(found.client.states.tensors()) == parts[2]
    checkpoints.rewind()
    checkpoints.restore(1)
    assert fingerprint(found.client.states.tensors()) == parts[0]


def test_parts_that_the_server_cannot_need_any_more_are_removed(tmp_path: Path) -> None:
    found = federation("FedRep")
    checkpoints = silos(found, tmp_path)
    for number in range(4):
        found.repeat(1)
        checkpoints.save(0, number, server_at=number)
    kept = sorted(path.name for path in tmp_path.glob("silo-0-round*.json"))
    assert kept == ["silo-0-round00003.json", "silo-0-round00004.json"]


def test_nothing_is_written_where_everything_travels(tmp_path: Path) -> None:
    found = trained("FedAvg", tmp_path / "parts", 1)
    assert not (tmp_path / "parts").exists()
    checkpoints = silos(found, None)
    checkpoints.rewind()
    checkpoints.restore(5)


def test_parts_that_were_not_saved_cannot_be_taken_back() -> None:
    with pytest.raises(ConfigError, match=r"was not written down here: set fedsq_args\.checkpoint_dir at the clients"):
        silos(federation("FedRep"), None).rewind()


def test_folder_of_silos_is_not_written_over(tmp_path: Path) -> None:
    trained("FedRep", tmp_path, 2)
    with pytest.raises(ConfigError, match=r"holds round 2 of a run: set fedsq_args\.resume: true"):
        silos(federation("FedRep"), tmp_path)


def test_silos_without_saved_parts_begin_with_the_servers_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = federation("FedRep")
    with caplog.at_level(logging.WARNING):
        silos(found, tmp_path / "new", resume=True).restore(3)
    assert caplog.messages == ["what stays with silos [0, 1, 2] is not here: they begin with the server's"]
    assert found.client.states.tensors() == {}


def test_parts_of_another_recipe_are_refused(tmp_path: Path) -> None:
    trained("FedRep", tmp_path, 1)
    with pytest.raises(WeightsError, match="it is of a run with learning_rate"):
        silos(federation("FedRep"), tmp_path, resume=True, learning_rate=0.5).restore(1)


def test_parts_of_another_model_are_refused(tmp_path: Path) -> None:
    trained("FedRep", tmp_path, 1)
    with pytest.raises(WeightsError, match="silo 0 has other keys than those that stay here"):
        silos(federation("FedBN"), tmp_path, resume=True).restore(1)
