"""How a run that was cut off goes on: what its server and its client processes save, and read when they start anew."""

from __future__ import annotations

import json
import logging
import os
import random
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsq_plugin.errors import ConfigError, WeightsError
from fedsq_plugin.federation.checkpoints import ServerCheckpoints, SiloCheckpoints
from fedsq_plugin.federation.server_state import ServerState
from fedsq_plugin.federation.state import State, fingerprint
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


# Its files


def filled(value: float) -> State:
    return OrderedDict(weight=torch.full((2, 2), value), steps=torch.tensor(3))


def between(round: int, structural: float | None = 0.0, **parts: Any) -> ServerState:
    """The server after so many rounds."""
    copy = None if structural is None else filled(structural)
    return ServerState(filled(round), structural=copy, round=round, **parts)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    memory = {"moment": filled(7.0)}
    given = between(1, slots=(filled(5.0), filled(6.0)), memory=memory, told={2: 1}, clients=2)
    silos = {"0/weight": torch.ones(1), "11/weight": torch.zeros(1)}
    server(tmp_path).save(given, silos)
    found = newest(tmp_path)
    assert (found[0].about(), fingerprint(found[0].tensors())) == (given.about(), fingerprint(given.tensors()))
    assert fingerprint(found[1]) == fingerprint(silos)


def test_two_snapshots_stay_and_the_structural_copy_is_written_once(tmp_path: Path) -> None:
    snapshots = server(tmp_path)
    for round in (1, 2, 3):
        snapshots.save(between(round), {})
    stem = f"structural-{fingerprint(filled(0.0))[:16]}"
    assert names(tmp_path) == [
        *("server-round00002.json", "server-round00002.safetensors"),
        *("server-round00003.json", "server-round00003.safetensors"),
        *(f"{stem}.json", f"{stem}.safetensors"),
    ]


def test_a_structural_copy_that_no_snapshot_names_is_removed(tmp_path: Path) -> None:
    snapshots = server(tmp_path)
    for round in (1, 2, 3):
        snapshots.save(between(round, structural=float(round), structural_version=round), {})
    kept = {f"structural-{fingerprint(filled(value))[:16]}.json" for value in (2.0, 3.0)}
    assert {name for name in names(tmp_path) if name.startswith("s") and "structural" in name} == {
        *kept,
        *(name.replace("json", "safetensors") for name in kept),
    }
    found = newest(tmp_path)
    assert found[0].structural is not None
    assert fingerprint(found[0].structural) == fingerprint(filled(3.0))


def test_one_without_its_json_does_not_count(tmp_path: Path) -> None:
    snapshots = server(tmp_path)
    snapshots.save(between(1), {})
    (tmp_path / "server-round00002.safetensors").write_bytes(b"half")
    found = newest(tmp_path)
    assert found[0].round == 1


def test_the_structural_copy_must_be_the_one_that_is_named(tmp_path: Path) -> None:
    snapshots = server(tmp_path)
    snapshots.save(between(1), {})
    mine, other = (tmp_path / f"structural-{fingerprint(filled(v))[:16]}.safetensors" for v in (0.0, 1.0))
    server(tmp_path / "other").save(between(1, structural=1.0), {})
    for suffix in (".safetensors", ".json"):
        content = (tmp_path / "other" / other.name).with_suffix(suffix).read_bytes()
        mine.with_suffix(suffix).write_bytes(content)
    with pytest.raises(WeightsError, match="not the structural copy"):
        newest(tmp_path)


@pytest.mark.parametrize(
    ("run", "line"),
    [
        ({**RUN, "learning_rate": 0.2}, r"it is of a run with learning_rate 0.1 \(here 0.2\); start anew"),
        ({"federated_optimizer": "FedSQ+FedRep"}, r"learning_rate 0.1 \(here None\)"),
        ({**RUN, "a": 1, "b": 2, "c": 3, "d": 4}, r"a None \(here 1\), .* and more"),
    ],
)
def test_another_run_is_named(run: dict[str, Any], line: str, tmp_path: Path) -> None:
    server(tmp_path).save(between(1), {})
    with pytest.raises(WeightsError, match=line):
        ServerCheckpoints(str(tmp_path), run, 1, 9, resume=True)


def test_another_format_is_refused(tmp_path: Path) -> None:
    server(tmp_path).save(between(1), {})
    path = tmp_path / "server-round00001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    with pytest.raises(WeightsError, match="this version reads format 2"):
        newest(tmp_path)


def test_a_round_under_another_name_is_refused(tmp_path: Path) -> None:
    server(tmp_path).save(between(1), {})
    for path in tmp_path.glob("server-*"):
        path.rename(tmp_path / path.name.replace("00001", "00004"))
    with pytest.raises(WeightsError, match="the snapshot of round 4 is of another one"):
        newest(tmp_path)


def test_a_folder_that_cannot_be_written_keeps_what_was_there(tmp_path: Path) -> None:
    snapshots = server(tmp_path)
    snapshots.save(between(1, structural=None), {})
    (tmp_path / "server-round00002.safetensors").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        snapshots.save(between(2, structural=None), {})
    found = newest(tmp_path)
    assert found[0].round == 1


def test_mutated_snapshots_are_read_or_refused(tmp_path: Path) -> None:
    """FEDSQ_FUZZ is the number of cases, 300 when unset. What is read is what was written."""
    draw = random.Random(0)
    snapshots, given = server(tmp_path), between(1, memory={"moment": filled(7.0)}, told={0: 1})
    snapshots.save(given, {"0/weight": torch.ones(1)})
    files = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    refused = 0
    for _ in range(int(os.environ.get("FEDSQ_FUZZ", "300"))):
        path = draw.choice(list(files))
        path.write_bytes(mutated(files[path], draw))
        try:
            found = newest(tmp_path)
            assert found[0].about() == given.about()
            assert fingerprint(found[0].tensors()) == fingerprint(given.tensors())
        except WeightsError as error:
            assert "\n" not in str(error)
            refused += 1
        path.write_bytes(files[path])
    print(f"{refused} refused")
    assert refused > 0


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Cut off, with bytes changed, doubled, or replaced by noise."""
    kind, place = draw.randrange(5), draw.randrange(len(content))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + content[place : place + draw.randrange(40)] + content[place:]
    if kind == 2:
        return draw.randbytes(draw.randrange(200))
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


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


def part_of(value: float) -> Any:
    """The states of silos that have no part but this one."""
    return SimpleNamespace(kept=True, of=lambda silo: filled(value), restore=lambda parts: None)


def kept_rounds(folder: Path) -> list[int]:
    return sorted(int(path.stem[-5:]) for path in folder.glob("silo-*.json"))


def loaded(folder: Path, finished: int) -> float | None:
    """What silo 4 goes on with after so many rounds."""
    found: dict[str, torch.Tensor] = {}
    states: Any = SimpleNamespace(kept=True, restore=found.update)
    SiloCheckpoints(str(folder), RUN, states, [4], True).restore(finished)
    return found["4/weight"][0, 0].item() if found else None


def test_a_silo_goes_back_as_far_as_the_server(tmp_path: Path) -> None:
    for round, server_at in ((1, 0), (2, 0), (3, 2), (5, 2)):
        SiloCheckpoints(str(tmp_path), RUN, part_of(round), [4], True).save(4, round - 1, server_at)
    assert kept_rounds(tmp_path) == [2, 3, 5]
    values = {finished: loaded(tmp_path, finished) for finished in (9, 5, 4, 3, 2, 1)}
    assert values == {9: 5.0, 5: 5.0, 4: 3.0, 3: 3.0, 2: 2.0, 1: None}


def test_what_came_after_the_round_that_is_gone_on_from_is_forgotten(tmp_path: Path) -> None:
    for round in (1, 2, 3):
        SiloCheckpoints(str(tmp_path), RUN, part_of(round), [4], True).save(4, round - 1, 0)
    loaded(tmp_path, 2)
    assert kept_rounds(tmp_path) == [1, 2]


def test_silos_and_server_share_a_folder(tmp_path: Path) -> None:
    server(tmp_path).save(between(1), {})
    checkpoints = SiloCheckpoints(str(tmp_path), RUN, part_of(4.0), [4, 12], True)
    checkpoints.save(4, 0, 0)
    checkpoints.save(12, 1, 0)
    assert kept_rounds(tmp_path) == [1, 2]
    assert newest(tmp_path)[0].round == 1
    assert loaded(tmp_path, 9) == 4.0
