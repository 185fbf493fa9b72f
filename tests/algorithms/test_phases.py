"""Phases: what trains when, as rounds of a client show it, for every algorithm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.federation.algorithm import BODY, EVERYTHING, HEAD
from fedsq_plugin.federation.local import Phase
from fedsq_plugin.federation.roles import Role

from .phased import BIASES, HEADS, LINEAR, NORMS, OPTIONS, PHASES, STATISTICS, batches, client, moved, net


@pytest.mark.parametrize(
    ("name", "round", "expected"),
    [
        ("all", 0, [Phase(2, EVERYTHING)]),
        ("all", 7, [Phase(2, EVERYTHING)]),
        ("head then body", 0, [Phase(3, HEAD), Phase(2, BODY)]),
        ("head then body", 7, [Phase(3, HEAD), Phase(2, BODY)]),
        ("body only", 0, [Phase(2, BODY)]),
        ("body only", 7, [Phase(2, BODY)]),
        ("without norm layers", 7, [Phase(2, frozenset({Role.BODY, Role.HEAD, Role.COUNTER}))]),
        ("without early layers", 7, [Phase(2, EVERYTHING, ("early",))]),
        ("class means first", 1, [Phase(2, EVERYTHING)]),
        ("class means first", 7, [Phase(2, EVERYTHING)]),
    ],
)
def test_parts_of_a_round(name: str, round: int, expected: list[Phase]) -> None:
    assert list(PHASES[name].parts(OPTIONS, round)) == expected


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
    client(name, model).train(0, batches(), 0)
    assert model.dropout.dropped > 0


@pytest.mark.parametrize("name", sorted(PHASES))
@pytest.mark.parametrize("gated", [False, True])
def test_model_is_left_in_training_mode(name: str, gated: bool) -> None:
    model = DualCopy(net()) if gated else net()
    client(name, model.eval()).train(0, batches(), 0)
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
            client(name, model).train(0, data, 0)
    else:
        client(name, model).train(0, data, 0)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == before
    assert all(module.training for module in model.modules())
