"""Phases: what trains when, as rounds of a worker show it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from fedsq_plugin.algorithms.class_means import apply, collect
from fedsq_plugin.algorithms.phases import PHASES
from torch import Tensor, nn

from fedsq_plugin.algorithms import Algorithm
from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.client import Client
from fedsq_plugin.federation.local import LocalTraining, Phase, Statistics
from fedsq_plugin.federation.roles import Role
from fedsq_plugin.federation.seeding import isolated
from fedsq_plugin.federation.state import State, state_of

ALL = frozenset(Role)
HEAD = frozenset({Role.HEAD, Role.HEAD_NORM_PARAMETER})
BODY = ALL - HEAD

from tests.algorithms.task import AllOptions


class Net(nn.Module):
    """An early and a late block with statistics, dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.late = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
        self.group = nn.GroupNorm(1, 5)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.late(torch.relu(self.early(x)))
        return self.head(self.dropout(torch.relu(self.group(x))))


def net() -> Net:
    with isolated(0):
        return Net()


def batches() -> list[tuple[Tensor, Tensor]]:
    with isolated(1):
        return [(torch.randn(8, 4) + 1, torch.randint(3, (8,))) for _ in range(3)]


OPTIONS = AllOptions(epochs=2, head="head", head_epochs=3, frozen_modules=("early",))
TRAINING = LocalTraining(learning_rate=0.1)


def worker(phases: str, model: nn.Module | None = None, **options: Any) -> Client:
    row = Algorithm("Own", "nowhere", phases=phases)
    return Client(net() if model is None else model, row, replace(OPTIONS, **options), TRAINING, seed=0)


def moved(phases: str, round: int = 0, **options: Any) -> set[str]:
    """The entries, statistics included, that a round of one client changes."""
    found = worker(phases, **options)
    found.train(0, batches(), round)
    return changed(found.model)


def changed(model: nn.Module) -> set[str]:
    start = net().state_dict()
    return {key for key, value in model.state_dict().items() if not torch.equal(value, start[key])}


STATISTICS = {f"{block}.1.{key}" for block in ("early", "late") for key in
              ("running_mean", "running_var", "num_batches_tracked")}  # fmt: skip
NORMS = {f"{path}.{key}" for path in ("early.1", "late.1", "group") for key in ("weight", "bias")}
# A bias before a batch normalisation has no gradient; rounding may move it or not.
LINEAR = {"early.0.weight", "late.0.weight"}
BIASES = {"early.0.bias", "late.0.bias"}
HEADS = {"head.weight", "head.bias"}

# Parts


@pytest.mark.parametrize(
    ("name", "round", "expected"),
    [
        ("all", 0, [Phase(2, ALL)]),
        ("all", 7, [Phase(2, ALL)]),
        ("head then body", 0, [Phase(3, HEAD), Phase(2, BODY)]),
        ("head then body", 7, [Phase(3, HEAD), Phase(2, BODY)]),
        ("body only", 0, [Phase(2, BODY)]),
        ("body only", 7, [Phase(2, BODY)]),
        ("without norm layers", 7, [Phase(2, frozenset({Role.BODY, Role.HEAD, Role.COUNTER}))]),
        ("without early layers", 7, [Phase(2, ALL, ("early",))]),
        ("class means first", 1, [Phase(2, ALL)]),
        ("class means first", 7, [Phase(2, ALL)]),
    ],
)
def test_parts_of_a_round(name: str, round: int, expected: list[Phase]) -> None:
    assert list(PHASES[name].parts(OPTIONS, round)) == expected


@pytest.mark.parametrize(
    ("probe_rounds", "heads"),
    [(0, [False, False, False]), (1, [True, False, False]), (2, [True, True, False])],
)
def test_head_first_for_the_probe_rounds(probe_rounds: int, heads: list[bool]) -> None:
    options = replace(OPTIONS, probe_rounds=probe_rounds)
    found = [PHASES["head first"].parts(options, round) for round in range(3)]
    assert [list(parts) for parts in found] == [[Phase(2, HEAD if head else ALL)] for head in heads]


def test_class_means_are_all_that_happens_in_the_first_round() -> None:
    (part,) = PHASES["class means first"].parts(OPTIONS, 0)
    assert isinstance(part, Statistics)


def test_early_layers_must_be_named() -> None:
    with pytest.raises(ConfigError, match=r"frozen_modules is empty: name the early modules"):
        PHASES["without early layers"].parts(replace(OPTIONS, frozen_modules=()), 0)


@pytest.mark.parametrize(
    ("name", "needs_head", "epochs"),
    [
        ("all", False, 0),
        ("head then body", True, 0),
        ("body only", True, 5),
        ("head first", True, 0),
        ("class means first", True, 0),
        ("without norm layers", False, 0),
        ("without early layers", False, 0),
    ],
)
def test_what_the_values_say_of_themselves(name: str, needs_head: bool, epochs: int) -> None:
    assert (PHASES[name].needs_head, PHASES[name].finetune_epochs) == (needs_head, epochs)


def test_phases_have_their_names() -> None:
    assert set(PHASES) == {
        "all", "head then body", "body only", "head first", "class means first",
        "without norm layers", "without early layers",
    }  # fmt: skip


# Rounds


@pytest.mark.parametrize(
    ("name", "round", "expected"),
    [
        ("all", 0, LINEAR | NORMS | STATISTICS | HEADS),
        ("head then body", 0, LINEAR | NORMS | STATISTICS | HEADS),
        ("body only", 0, LINEAR | NORMS | STATISTICS),
        ("head first", 0, HEADS),
        ("head first", 1, LINEAR | NORMS | STATISTICS | HEADS),
        ("class means first", 0, set()),
        ("class means first", 1, LINEAR | NORMS | STATISTICS | HEADS),
        ("without norm layers", 0, LINEAR | BIASES | HEADS),
    ],
)
def test_what_a_round_changes(name: str, round: int, expected: set[str]) -> None:
    found = moved(name, round)
    assert found - BIASES == expected - BIASES


def test_without_norm_layers_the_biases_before_them_move() -> None:
    assert moved("without norm layers") >= BIASES


EARLY = {key for key in LINEAR | NORMS | STATISTICS | BIASES if key.startswith("early.")}


@pytest.mark.parametrize("pattern", ["early", "ear*", "e?rly"])
def test_frozen_early_modules_stay_with_their_statistics(pattern: str) -> None:
    found = moved("without early layers", frozen_modules=(pattern,))
    assert found - BIASES == (LINEAR | NORMS | STATISTICS | HEADS) - EARLY


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        (("early.0",), {"early.0.weight"}),
        (("early.1",), {"early.1.weight", "early.1.bias"} | {k for k in STATISTICS if k[:5] == "early"}),
        (("*.1",), NORMS - {"group.weight", "group.bias"} | STATISTICS),
        (("early.0", "head"), {"early.0.weight", *HEADS}),
        (("head.bias",), {"head.bias"}),
    ],
    ids=["linear", "norm", "glob", "two", "parameter"],
)
def test_frozen_paths_and_patterns(frozen: tuple[str, ...], expected: set[str]) -> None:
    whole = LINEAR | NORMS | STATISTICS | HEADS
    assert moved("without early layers", frozen_modules=frozen) - BIASES == whole - expected


def test_frozen_path_is_no_prefix_of_a_name() -> None:
    class Ten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1, self.layer10 = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer10(self.layer1(x))

    model = Ten()
    start = state_of(model)
    worker("without early layers", model, head=None, frozen_modules=("layer1",)).train(0, batches(), 0)
    still = {key for key, value in model.state_dict().items() if torch.equal(value, start[key])}
    assert still == {"layer1.weight", "layer1.bias"}


@pytest.mark.parametrize(
    "head",
    [
        None,
        "1",
    ],
)
def test_norm_layer_of_the_head_stays_without_norm_layers(head: str | None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)))
    start = state_of(model)
    worker("without norm layers", model, head=head).train(0, batches(), 0)
    assert torch.equal(model.state_dict()["1.0.weight"], start["1.0.weight"])


class Seen(nn.Dropout):
    """Dropout that notes how many of its inputs it dropped."""

    dropped = 0

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.dropped += int(((out == 0) & (x != 0)).sum())
        return out


@pytest.mark.parametrize("name", sorted(set(PHASES) - {"class means first"}))
def test_dropout_is_active_while_parts_are_frozen(name: str) -> None:
    model = net()
    model.dropout = Seen(0.5)
    worker(name, model).train(0, batches(), 0)
    assert model.dropout.dropped > 0


def test_frozen_norm_layer_gives_the_output_of_evaluation_mode() -> None:
    # On a batch that is far from the running statistics (0 and 1) the two modes differ.
    model, seen = net(), []
    x, labels = batches()[0]
    model.early[1].register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    worker("without norm layers", model, epochs=1).train(0, [(x, labels)], 0)
    given, out = seen[0]
    assert torch.equal(out, copy.deepcopy(net().early[1]).eval()(given))


def test_body_trains_under_the_head_of_the_first_phase() -> None:
    # FedRep by two separate rounds: head alone, then body alone.
    both = worker("head then body", epochs=1, head_epochs=1, model=plain())
    both.train(0, batches(), 0)
    head, body = worker("head first", plain(), epochs=1), worker("body only", plain(), epochs=1)
    head.train(0, batches(), 0)
    body.model.load_state_dict(head.model.state_dict())
    body.train(0, batches(), 0)
    assert_same(state_of(both.model), state_of(body.model))


def plain() -> nn.Module:
    """Without dropout, whose draws follow the phases."""
    model = net()
    model.dropout = nn.Identity()
    return model


def assert_same(one: State, other: State) -> None:
    assert all(torch.equal(value, other[key]) for key, value in one.items())


# Afterwards


@pytest.mark.parametrize("name", sorted(PHASES))
@pytest.mark.parametrize("gated", [False, True])
def test_model_is_left_in_training_mode(name: str, gated: bool) -> None:
    model = DualCopy(net()) if gated else net()
    worker(name, model.eval()).train(0, batches(), 0)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", sorted(PHASES))
@pytest.mark.parametrize("fails", [False, True])
def test_model_is_put_back(name: str, fails: bool) -> None:
    model = net()
    model.late[0].weight.requires_grad_(False)
    before = {key: p.requires_grad for key, p in model.named_parameters()}
    data = [*batches(), (torch.zeros(8, 99), torch.zeros(8).long())] if fails else batches()
    if fails:
        with pytest.raises(RuntimeError):
            worker(name, model).train(0, data, 0)
    else:
        worker(name, model).train(0, data, 0)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == before
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("head then body", "head and norm parameter of the head"),
        ("head first", "head and norm parameter of the head"),
    ],
)
def test_phase_without_parameters_is_an_error(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"a phase that trains {said} finds no such parameter"):
        worker(name, head=None).train(0, batches(), 0)


def test_everything_frozen_is_an_error() -> None:
    with pytest.raises(ConfigError, match="finds no such parameter"):
        worker("without early layers", frozen_modules=("*",)).train(0, batches(), 0)


def test_model_of_norm_layers_alone_is_an_error_without_them() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    with pytest.raises(ConfigError, match="a phase that trains body and counter and head finds no"):
        worker("without norm layers", model, head=None).train(0, batches(), 0)


# Class means


def means_of(
    features: list[list[float]], labels: list[int], classes: int
) -> tuple[list[list[float]], list[int]]:
    """Means of the features by class, scaled to length one; a class without samples gets zeros."""
    rows, counts = [], []
    for c in range(classes):
        own = [feature for feature, label in zip(features, labels, strict=True) if label == c]
        mean = (
            [sum(column) / len(own) for column in zip(*own, strict=True)] if own else [0.0] * len(features[0])
        )
        length = sum(value**2 for value in mean) ** 0.5
        rows.append([value / length if length else 0.0 for value in mean])
        counts.append(len(own))
    return rows, counts


def test_class_means_by_hand() -> None:
    # The features are the inputs. Class 0: (3, 0), (3, 8): mean (3, 4), length 5. Class 1: (0, -2).
    # Class 2: none.
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 3))
    data = [
        (torch.tensor([[3.0, 0], [0, -2]]), torch.tensor([0, 1])),
        (torch.tensor([[3.0, 8]]), torch.tensor([0])),
    ]
    sums = collect("1")(model, data, "cpu")
    found = apply("1")(state_of(model), sums)
    assert torch.allclose(found["1.weight"], torch.tensor([[0.6, 0.8], [0, -1], [0, 0]]))
    assert found["1.bias"].tolist() == [0.0, 0.0, 0.0]
    assert {name: value.tolist() for name, value in sums.items()} == {
        "class sums": [[6, 8], [0, -2], [0, 0]],
    }


def test_class_means_follow_the_naive_ones_over_the_pooled_data() -> None:
    model = net()
    x, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    taken: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    with torch.no_grad():
        copy.deepcopy(model).eval()(x)
    handle.remove()
    found = apply("head")(state_of(model), worker("class means first").train(0, batches(), 0).sums)
    rows, _ = means_of(taken[0].tolist(), labels.tolist(), 3)
    assert found["head.weight"].tolist() == [pytest.approx(row, rel=1e-5, abs=1e-7) for row in rows]
