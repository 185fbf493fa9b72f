from __future__ import annotations

import json
import os
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsq_plugin.errors import ConfigError, WeightsError
from fedsq_plugin.federation.server_state import ServerState
from fedsq_plugin.federation.snapshots import ServerSnapshots, SiloSnapshots, Versions, refuse_started
from fedsq_plugin.federation.state import State, fingerprint

RUN = {"learning_rate": 0.1, "augmentation": ["crop"]}


def state(value: float) -> State:
    return OrderedDict(weight=torch.full((2, 2), value), steps=torch.tensor(3))


def server(round: int, structural: float | None = 0.0, **parts: Any) -> ServerState:
    copy = None if structural is None else state(structural)
    return ServerState(state(round), structural=copy, round=round, **parts)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    memory = {"moment": state(7.0)}
    given = server(1, slots=(state(5.0), state(6.0)), memory=memory, told={2: 1}, clients=2)
    silos = {"0/weight": torch.ones(1), "11/weight": torch.zeros(1)}
    ServerSnapshots(tmp_path, RUN).save(given, silos)
    found = ServerSnapshots(tmp_path, RUN).newest()
    assert found is not None
    assert (found[0].about(), fingerprint(found[0].tensors())) == (given.about(), fingerprint(given.tensors()))
    assert fingerprint(found[1]) == fingerprint(silos)


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert ServerSnapshots(tmp_path / "new", RUN).newest() is None


def test_two_snapshots_stay_and_the_structural_copy_is_written_once(tmp_path: Path) -> None:
    snapshots = ServerSnapshots(tmp_path, RUN)
    for round in (1, 2, 3):
        snapshots.save(server(round), {})
    stem = f"structural-{fingerprint(state(0.0))[:16]}"
    assert names(tmp_path) == [
        *("server-round00002.json", "server-round00002.safetensors"),
        *("server-round00003.json", "server-round00003.safetensors"),
        *(f"{stem}.json", f"{stem}.safetensors"),
    ]


def test_a_structural_copy_that_no_snapshot_names_is_removed(tmp_path: Path) -> None:
    snapshots = ServerSnapshots(tmp_path, RUN)
    for round in (1, 2, 3):
        snapshots.save(server(round, structural=float(round), structural_version=round), {})
    kept = {f"structural-{fingerprint(state(value))[:16]}.json" for value in (2.0, 3.0)}
    assert {name for name in names(tmp_path) if name.startswith("s") and "structural" in name} == {
        *kept,
        *(name.replace("json", "safetensors") for name in kept),
    }
    found = snapshots.newest()
    assert found is not None and found[0].structural is not None
    assert fingerprint(found[0].structural) == fingerprint(state(3.0))


def test_one_without_its_json_does_not_count(tmp_path: Path) -> None:
    snapshots = ServerSnapshots(tmp_path, RUN)
    snapshots.save(server(1), {})
    (tmp_path / "server-round00002.safetensors").write_bytes(b"half")
    found = snapshots.newest()
    assert found is not None and found[0].round == 1


def test_the_structural_copy_must_be_the_one_that_is_named(tmp_path: Path) -> None:
    snapshots = ServerSnapshots(tmp_path, RUN)
    snapshots.save(server(1), {})
    mine, other = (tmp_path / f"structural-{fingerprint(state(v))[:16]}.safetensors" for v in (0.0, 1.0))
    ServerSnapshots(tmp_path / "other", RUN).save(server(1, structural=1.0), {})
    for suffix in (".safetensors", ".json"):
        content = (tmp_path / "other" / other.name).with_suffix(suffix).read_bytes()
        mine.with_suffix(suffix).write_bytes(content)
    with pytest.raises(WeightsError, match="not the structural copy"):
        snapshots.newest()


@pytest.mark.parametrize(
    ("run", "line"),
    [
        ({**RUN, "learning_rate": 0.2}, r"it is of a run with learning_rate 0.1 \(here 0.2\); start anew"),
        ({"augmentation": ["crop"]}, r"learning_rate 0.1 \(here None\)"),
        ({**RUN, "a": 1, "b": 2, "c": 3, "d": 4}, r"a None \(here 1\), .* and more"),
    ],
)
def test_another_run_is_named(run: dict[str, Any], line: str, tmp_path: Path) -> None:
    ServerSnapshots(tmp_path, RUN).save(server(1), {})
    with pytest.raises(WeightsError, match=line):
        ServerSnapshots(tmp_path, run).newest()


def test_another_format_is_refused(tmp_path: Path) -> None:
    ServerSnapshots(tmp_path, RUN).save(server(1), {})
    path = tmp_path / "server-round00001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    with pytest.raises(WeightsError, match="this version reads format 2"):
        ServerSnapshots(tmp_path, RUN).newest()


def test_a_round_under_another_name_is_refused(tmp_path: Path) -> None:
    ServerSnapshots(tmp_path, RUN).save(server(1), {})
    for path in tmp_path.glob("server-*"):
        path.rename(tmp_path / path.name.replace("00001", "00004"))
    with pytest.raises(WeightsError, match="the snapshot of round 4 is of another one"):
        ServerSnapshots(tmp_path, RUN).newest()


def test_a_folder_that_cannot_be_written_keeps_what_was_there(tmp_path: Path) -> None:
    snapshots = ServerSnapshots(tmp_path, RUN)
    snapshots.save(server(1, structural=None), {})
    (tmp_path / "server-round00002.safetensors").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        snapshots.save(server(2, structural=None), {})
    found = snapshots.newest()
    assert found is not None and found[0].round == 1


def test_a_silo_goes_back_as_far_as_the_server(tmp_path: Path) -> None:
    silos = SiloSnapshots(tmp_path, RUN)
    for round, server_at in ((1, 0), (2, 0), (3, 2), (5, 2)):
        silos.save(4, round, state(round), server_at)
    assert silos.rounds() == [2, 3, 5]
    found = {round: silos.load(4, round).get("weight") for round in (9, 5, 4, 3, 2, 1)}
    values = {round: None if part is None else part[0, 0].item() for round, part in found.items()}
    assert values == {9: 5.0, 5: 5.0, 4: 3.0, 3: 3.0, 2: 2.0, 1: None}


def test_what_came_after_the_round_that_is_gone_on_from_is_forgotten(tmp_path: Path) -> None:
    silos = SiloSnapshots(tmp_path, RUN)
    for round in (1, 2, 3):
        silos.save(4, round, state(round), 0)
    silos.load(4, 2)
    assert silos.rounds() == [1, 2]


def test_silos_and_server_share_a_folder(tmp_path: Path) -> None:
    silos = SiloSnapshots(tmp_path, RUN)
    ServerSnapshots(tmp_path, RUN).save(server(1), {})
    silos.save(1, 1, state(1.0), 0)
    silos.save(12, 2, state(2.0), 0)
    assert silos.rounds() == [1, 2]
    assert ServerSnapshots(tmp_path, RUN).rounds() == [1]
    assert silos.load(1, 9)["weight"][0, 0] == 1.0


def test_only_a_run_that_resumes_may_find_rounds(tmp_path: Path) -> None:
    refuse_started(tmp_path, [], resume=False)
    refuse_started(tmp_path, [3], resume=True)
    with pytest.raises(ConfigError, match=r"holds round 3 of a run: set fedsq_args\.resume: true"):
        refuse_started(tmp_path, [3], resume=False)


def test_mutated_snapshots_are_read_or_refused(tmp_path: Path) -> None:
    """FEDSQ_FUZZ is the number of cases, 300 when unset. What is read is what was written."""
    draw = random.Random(0)
    snapshots, given = ServerSnapshots(tmp_path, RUN), server(1, memory={"moment": state(7.0)}, told={0: 1})
    snapshots.save(given, {"0/weight": torch.ones(1)})
    files = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    refused = 0
    for _ in range(int(os.environ.get("FEDSQ_FUZZ", "300"))):
        path = draw.choice(list(files))
        path.write_bytes(mutated(files[path], draw))
        try:
            found = snapshots.newest()
            assert found is not None
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


def test_versions_of_another_name_do_not_count(tmp_path: Path) -> None:
    Versions(tmp_path, "silo-1", RUN).save(3, state(1.0), {})
    assert Versions(tmp_path, "silo-11", RUN).rounds() == []
    assert Versions(tmp_path, "silo", RUN).rounds() == []
