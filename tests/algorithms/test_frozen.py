"""FrozenBN and FrozenEarly: what is frozen stays at the warm start, statistics included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fedsq_plugin.algorithms import algorithm
from fedsq_plugin.algorithms.frozen import without_early
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.state import state_of

from .phased import BIASES, HEADS, LINEAR, NORMS, OPTIONS, STATISTICS, batches, client, moved, net


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
    client("without early layers", model, head=None, frozen_modules=("layer1",)).train(0, batches(), 0)
    still = {key for key, value in model.state_dict().items() if torch.equal(value, start[key])}
    assert still == {"layer1.weight", "layer1.bias"}


@pytest.mark.parametrize("head", [None, "1"])
def test_norm_layer_of_the_head_stays_without_norm_layers(head: str | None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)))
    start = state_of(model)
    client("without norm layers", model, head=head).train(0, batches(), 0)
    assert torch.equal(model.state_dict()["1.0.weight"], start["1.0.weight"])


def test_frozen_norm_layer_gives_the_output_of_evaluation_mode() -> None:
    # On a batch that is far from the running statistics (0 and 1) the two modes differ.
    model, seen = net(), []
    x, labels = batches()[0]
    model.early[1].register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    client("without norm layers", model, epochs=1).train(0, [(x, labels)], 0)
    given, out = seen[0]
    assert torch.equal(out, copy.deepcopy(net().early[1]).eval()(given))


def test_early_layers_must_be_named() -> None:
    with pytest.raises(ConfigError, match=r"frozen_modules is empty: name the early modules"):
        without_early(OPTIONS.model_copy(update={"frozen_modules": ()}), 0)


def test_everything_frozen_is_an_error() -> None:
    with pytest.raises(ConfigError, match="finds no such parameter"):
        client("without early layers", frozen_modules=("*",)).train(0, batches(), 0)


def test_model_of_norm_layers_alone_is_an_error_without_them() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    with pytest.raises(ConfigError, match="a phase that trains body and counter and head finds no"):
        client("without norm layers", model, head=None).train(0, batches(), 0)


@pytest.mark.parametrize(
    ("frozen", "said"),
    [
        ((), "FrozenEarly: set frozen_modules to the early modules that stay frozen"),
        (("earl",), r"frozen_modules: the model has no 'earl'; did you mean 'early'\?"),
    ],
)
def test_modules_to_freeze_must_be_the_models(frozen: tuple[str, ...], said: str) -> None:
    options = OPTIONS.model_copy(update={"frozen_modules": frozen})
    with pytest.raises(ConfigError, match=said):
        algorithm("FrozenEarly").refuse_misfit(net(), options)


def test_model_without_norm_layers_has_none_to_freeze() -> None:
    with pytest.raises(ConfigError, match="FrozenBN treats normalisation layers apart, and the model has none"):
        algorithm("FrozenBN").refuse_misfit(nn.Linear(4, 3), OPTIONS.model_copy(update={"head": None}))
