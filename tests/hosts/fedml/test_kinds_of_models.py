"""What users bring to FedML: layers, states and loaders of many kinds, in one process and over GRPC. Each ends as in a
naive loop, or is refused in one line before anything is trained."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Sampler

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.state import fingerprint
from fedsq_plugin.hosts.fedml.local import free_addresses

from . import kinds, naive
from .conftest import final
from .naive import KINDS, assert_same, eight, net, pairs, points, three
from .test_distributed import LIMIT_S, ended, start

Run = Callable[..., Any]

# Layers and states


class Kept(nn.Module):
    """Keeps its normalisation in evaluation mode, and trains its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(3, nn.BatchNorm1d(12))
        self.net[1].running_mean.fill_(0.3)

    def train(self, mode: bool = True) -> Kept:
        super().train(mode)
        self.net[1].eval()
        return self

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class Asleep(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> Asleep:
        return super().train(False)


class Counter(nn.Module):
    """A counter of batches that no float holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.tensor(2**61 + 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 3
        return x


MODELS: dict[str, Callable[[], nn.Module]] = {
    "train() keeps a layer in evaluation": Kept,
    "a layer keeps itself in evaluation": lambda: net(3, Asleep(12)),
    "dropout of none, kept in evaluation": lambda: net(3, nn.BatchNorm1d(12), nn.Dropout(0.0)),
    "integers, masks and an extra state": kinds.Counting,
    "a large counter that moves": lambda: net(3, Counter()),
}


@pytest.mark.parametrize("kind", MODELS)
def test_layers_and_states_end_as_in_the_naive_loop(kind: str, run: Run) -> None:
    sets, model = points(three), MODELS[kind]()
    right = naive.of_sets(model, sets)
    assert_same(run(eight(sets, 3), model).aggregator.model.state_dict(), right)


@pytest.mark.parametrize("kind", ["train() keeps a layer in evaluation", "a layer keeps itself in evaluation"])
def test_under_fedsq_too_what_is_kept_in_evaluation_does_not_move(kind: str, run: Run) -> None:
    model = MODELS[kind]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    after = final(run(eight(points(three), 3), model, "FedSQ"))
    moved = {key.rpartition(".")[2] for key, value in before.items() if not torch.equal(value, after[key])}
    assert moved == {"weight", "bias"}


def test_silos_keep_their_normalisation_beside_a_mask_of_infinities(run: Run) -> None:
    sets = points(three)
    model = nn.Sequential(*net(3, nn.BatchNorm1d(12)))
    model[0].register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    right = naive.of_sets(model, sets, kept="1.")
    found = run(eight(sets, 3), model, "FedBN", head="3")
    assert_same(
        {k: v for k, v in final(found).items() if "1." not in k}, {k: v for k, v in right.items() if "1." not in k}
    )
    assert not any(record.notes for record in found.records)


def test_a_last_batch_of_one_is_refused_by_the_name_of_its_silo(run: Run, steps: list[int]) -> None:
    for name in ("FedAvg", "FedSQ"):
        data = eight(points(three, (16, 25, 40)), 3)
        with pytest.raises(ConfigError, match=r"^silo 1: .* does not train on a batch of 1 .*drop_last") as caught:
            run(data, net(3, nn.BatchNorm1d(12)), name)
        assert "\n" not in str(caught.value) and not steps


class Centre(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


GATES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "centred by the batch": (Centre, True),
    "BatchNorm without statistics": (lambda: nn.BatchNorm1d(12, track_running_stats=False), True),
    "BatchNorm": (lambda: nn.BatchNorm1d(12), False),
    "LayerNorm": (lambda: nn.LayerNorm(12), False),
}


@pytest.mark.parametrize("kind", GATES)
def test_gates_are_kept_only_where_a_sample_has_its_own(kind: str, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    layer, given_up = GATES[kind]
    found = []
    for keep in (False, True):
        torch.manual_seed(0)
        data = eight(points(three), 3, shuffle=True)
        caplog.clear()
        found.append(final(run(data, net(3, layer()), "FedSQ", comm_round=4, keep_gates=keep)))
    assert_same(found[1], found[0])
    assert any("keep_gates" in line for line in caplog.messages) == given_up


# Loaders


LEFT_OUT = "silo 0 has no batch to train on and is left out of the mean: its loader gives none"
IDLE = [[f"round {n}: {LEFT_OUT} (drop_last with fewer samples than batch_size?)"] for n in (1, 2)]


@pytest.mark.parametrize("kind", ["drop_last", "an empty list", "a sampler of nothing"])
def test_a_silo_without_a_batch_has_no_weight(kind: str, run: Run) -> None:
    data, sets = kinds.idle(), points(three, (4, 24, 40))
    if kind != "drop_last":
        empty = DataLoader(sets[0][0], batch_size=8, sampler=[])  # type: ignore[arg-type]
        data[5][0] = [] if kind == "an empty list" else empty
    found = run(data, kinds.Counting())
    right = naive.fedavg(kinds.Counting(), [[], *pairs(sets[0][1:])], (4, 24, 40), F.cross_entropy)
    assert_same(found.aggregator.model.state_dict(), right)
    assert [record.notes for record in found.records] == IDLE


class Drawing(Sampler[int]):
    """An order of its own generator's, of NumPy or of Python."""

    def __init__(self, size: int, generator: Any) -> None:
        self.size, self.generator = size, generator

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.size))
        self.generator.shuffle(order)
        return iter(order)


LOADERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "a generator": lambda one: {"shuffle": True, "generator": torch.Generator().manual_seed(4)},
    "a sampler's": lambda one: {"sampler": RandomSampler(one, generator=torch.Generator().manual_seed(5))},
    "NumPy's": lambda one: {"sampler": Drawing(len(one), np.random.default_rng(6))},
    "workers that persist": lambda one: {"shuffle": True, "num_workers": 1, "persistent_workers": True},
    "Python's": lambda one: {"sampler": Drawing(len(one), random.Random(7))},
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_resumed_run_draws_as_one_that_was_not_cut_off(kind: str, run: Run, tmp_path: Path) -> None:
    def data() -> list[Any]:
        sets = points(three)
        made = eight(sets, 3)
        made[5] = {silo: DataLoader(one, 8, **LOADERS[kind](one)) for silo, one in enumerate(sets[0])}
        return made

    how = {"comm_round": 4, "checkpoint_dir": str(tmp_path / "saved")}
    whole = fingerprint(final(run(data(), net(), "FedSQ", comm_round=4)))
    with pytest.raises(KeyboardInterrupt):
        run(data(), net(), "FedSQ", stop=3, **how)
    resumed = run(data(), net(), "FedSQ", resume=True, **how)
    assert [record.round for record in resumed.records] in ([3, 4], [4])
    assert fingerprint(final(resumed)) == whole


# Over GRPC


def processes(kind: str, python: Path, folder: Path) -> tuple[list[int | None], list[str]]:
    """A server and two client processes: their exit statuses, and what each wrote of an error."""
    (folder / "table-0.csv").write_text(free_addresses(3))
    command = (python, "-m", "fedsq_plugin", str(kinds.__file__), str(folder), kind)
    started = [start(*command, str(rank)) for rank in range(3)]
    with ended(*started):
        said = [process.communicate(timeout=LIMIT_S)[1] for process in started]
    return [process.returncode for process in started], said


def test_over_grpc_an_idle_silo_is_left_out_as_in_one_process(python: Path, tmp_path: Path, run: Run) -> None:
    status, said = processes("an idle silo", python, tmp_path)
    assert status == [0, 0, 0], said
    rounds, found = json.loads((tmp_path / "found.json").read_text())
    assert [one["notes"] for one in rounds] == IDLE
    here = run(kinds.idle(), kinds.Counting(), random_seed=3)
    assert fingerprint(here.server.state.model) == found
    assert [one["metrics"][0] for one in rounds] == [list(record.metrics) for record in here.records]


@pytest.mark.parametrize("kind", ["real values", "no data at the server"])
def test_server_and_silos_agree_on_a_task_that_the_labels_tell(kind: str, python: Path, tmp_path: Path) -> None:
    status, said = processes(kind, python, tmp_path)
    assert status == [0, 0, 0], said
    rounds = json.loads((tmp_path / "found.json").read_text())[0]
    known, sets, model = KINDS["real values"], points(KINDS["real values"].label), net(1)
    model.load_state_dict(naive.of_sets(model, sets, known.over))
    assert [one["notes"] for one in rounds] == [[], []]
    if kind != "real values":
        assert all(one["metrics"][0] is None or np.isnan(one["metrics"][0][0]) for one in rounds)
        return
    x, y = sets[1].tensors
    with torch.no_grad():
        right = known.figures(model.eval()(x), y)
    assert rounds[-1]["metrics"][0] == [pytest.approx(right.loss, rel=1e-5), pytest.approx(right.metric, abs=1e-5), 20]


def test_silos_of_different_tasks_are_refused_in_one_line(python: Path, tmp_path: Path) -> None:
    status, said = processes("silos of different tasks", python, tmp_path)
    assert status == [2, 2, 2]
    assert not any("Traceback" in text for text in said)
    lines = [[line for line in text.splitlines() if line.startswith("fedsq: error")] for text in said]
    assert all(len(found) == 1 for found in lines)
    assert all(
        "cannot take part" in found[0] and "regression" in found[0] and "classification" in found[0] for found in lines
    )
