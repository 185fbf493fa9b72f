"""Batches of many forms and outputs of many kinds: what is taken, and what is refused in which words."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fedsq_plugin.algorithms import algorithm
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.client import Client
from fedsq_plugin.federation.evaluate import evaluate
from fedsq_plugin.federation.local import Phase, local_update
from fedsq_plugin.federation.reading import Arguments, Reading, ReadingOptions, call, move
from fedsq_plugin.federation.roles import Role, roles
from fedsq_plugin.federation.training import LocalTraining
from tests.algorithms.task import AllOptions

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class Sample(NamedTuple):
    label: Tensor
    image: Tensor


# Batches


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        {"image": X, "label": Y},
        {"y": Y, "x": X},
        OrderedDict(Target=Y, pixels=X),
        UserDict(inputs=X, targets=Y),
        Sample(Y, X),
        (X.numpy(), Y.numpy()),
        (X, Y.tolist()),
    ],
    ids=["tuple", "list", "dict", "label first", "ordered", "user's", "named tuple", "arrays", "list of labels"],
)
def test_a_pair_and_two_named_parts_are_inputs_and_labels(batch: Any) -> None:
    inputs, labels = Reading().read(batch)
    assert torch.equal(inputs, X) and torch.equal(labels, Y)


@pytest.mark.parametrize("inputs", [(X, 6), {"x": X, "mask": None}, [X, [X]], pack_sequence([X[0], X[1]])])
def test_nested_inputs_are_one_argument(inputs: Any) -> None:
    assert call(lambda given: given, Reading().read((inputs, Y)).inputs) is inputs


@pytest.mark.parametrize(
    ("batch", "form"),
    [
        ((X, Y, Y), "(8x6 float32, 8 int64, 8 int64)"),
        ({"ids": X, "mask": X, "label": Y}, "{ids: 8x6 float32, mask: 8x6 float32, label: 8 int64}"),
        ({"image": X, "mask": Y}, "{image: 8x6 float32, mask: 8 int64}"),
        ({"label": Y, "target": Y}, "{label: 8 int64, target: 8 int64}"),
        (X, "8x6 float32"),
        ((X,), "(8x6 float32)"),
        ((X, {"boxes": Y}), "{boxes: 8 int64} in the place of the labels is no tensor"),
        ((X, None), "None in the place of the labels is no tensor"),
        (None, "None"),
    ],
)
def test_what_is_not_clear_is_refused_with_the_form_that_came(batch: Any, form: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Reading().read(batch)
    line = str(caught.value)
    assert form in line and line.startswith("a batch is ") and "batch: {inputs: …, labels: …}" in line
    assert "\n" not in line


def given(**options: Any) -> Reading:
    return ReadingOptions(**options).reading()


def test_the_option_names_the_parts_of_any_batch() -> None:
    index = given(batch={"inputs": 1, "labels": 0}).read((Y, X, "id"))
    key = given(batch={"inputs": "pixels", "labels": "age"}).read({"pixels": X, "age": Y, "id": 3})
    for inputs, labels in (index, key):
        assert torch.equal(inputs, X) and torch.equal(labels, Y)


def test_several_inputs_are_several_arguments_by_keyword_where_the_batch_has_names() -> None:
    positional = given(batch={"inputs": [0, 1], "labels": 2}).read((X, 2 * X, Y))
    named = given(batch={"inputs": ["ids", "mask"], "labels": "y"}).read({"mask": 2 * X, "ids": X, "y": Y})
    assert positional.inputs == Arguments((X, positional.inputs.args[1]))
    assert torch.equal(call(lambda a, b: a - b, positional.inputs), -X)
    assert torch.equal(call(lambda mask, ids: ids - mask, named.inputs), -X)


def test_a_part_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"\{x: 8x6 float32, y: 8 int64\}, and there is no 'img' in it"):
        given(batch={"inputs": "img", "labels": "y"}).read({"x": X, "y": Y})
    with pytest.raises(ConfigError, match="there is no 5 in it"):
        given(batch={"inputs": 0, "labels": 5}).read((X, Y))


@pytest.mark.parametrize("wrong", [{}, {"inputs": 0}, {"inputs": [], "labels": 1}, {"inputs": 0, "labels": [1]},
                                   {"inputs": True, "labels": 1}, {"inputs": 0, "labels": 1, "id": 2}])  # fmt: skip
def test_a_wrong_option_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"Give|give \{inputs: …, labels: …\}"):
        ReadingOptions(batch=wrong)


def test_everything_nested_moves_and_containers_keep_their_class() -> None:
    class Bag(UserDict[str, Any]):
        pass

    value = {"a": [X, (Y, "text")], "b": Bag(c=X), "s": Sample(Y, X), "p": pack_sequence([X[0]])}
    moved = move(value, "meta")
    assert moved["a"][0].is_meta and moved["a"][1][0].is_meta and moved["a"][1][1] == "text"
    assert isinstance(moved["b"], Bag) and moved["b"]["c"].is_meta and not value["b"]["c"].is_meta
    assert isinstance(moved["s"], Sample) and moved["s"].image.is_meta
    assert isinstance(moved["p"], PackedSequence) and moved["p"].data.is_meta


# Outputs


@dataclass
class Found:
    features: Tensor
    logits: Tensor


FEATURES, LOGITS = torch.randn(8, 16), torch.randn(8, 3)


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (FEATURES, LOGITS),
        [LOGITS, FEATURES],
        {"embedding": FEATURES, "scores": LOGITS},
        {"loss": torch.tensor(0.5), "logits": LOGITS, "aux": LOGITS.neg()},
        {"out": LOGITS, "aux": LOGITS.neg()},
        Found(FEATURES, LOGITS),
        (LOGITS, None),
        (LOGITS, torch.zeros(8, 3, dtype=torch.long)),
        (LOGITS, (FEATURES, FEATURES)),
        {"head": {"logits": LOGITS}, "count": 3},
    ],
)
def test_the_tensor_with_a_column_for_every_class_is_the_prediction(output: Any) -> None:
    assert Reading(classes=3).prediction(output) is LOGITS


@pytest.mark.parametrize("width", [3, 16])
def test_logits_come_before_out_whatever_stands_first_and_fits(width: int) -> None:
    other = torch.randn(8, width)
    for output in ({"out": other, "logits": LOGITS}, {"logits": LOGITS, "out": other}):
        assert Reading(classes=3).prediction(output) is LOGITS
        assert Reading().prediction(output) is LOGITS


@pytest.mark.parametrize(
    ("output", "form"),
    [
        ((LOGITS, LOGITS.neg()), "(8x3 float32, 8x3 float32)"),
        ((FEATURES, FEATURES), "(8x16 float32, 8x16 float32)"),
        ({"a": LOGITS, "b": LOGITS}, "{a: 8x3 float32, b: 8x3 float32}"),
        (None, "None"),
        ((), "tuple"),
    ],
)
def test_outputs_that_do_not_decide_are_refused(output: Any, form: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Reading(classes=3).prediction(output)
    line = f"the model returns {form}, and which of them is the prediction, of 3 columns, is not clear; set output to"
    assert str(caught.value).startswith(line)


def test_without_the_number_of_classes_only_one_tensor_decides() -> None:
    assert Reading().prediction((LOGITS, torch.tensor(1.0))) is LOGITS
    with pytest.raises(ConfigError, match="set output"):
        Reading().prediction((FEATURES, LOGITS))


@pytest.mark.parametrize(
    ("output", "key"),
    [((LOGITS, LOGITS.neg()), 0), ((FEATURES, FEATURES, LOGITS), 2), ((FEATURES, LOGITS), -1),
     ({"logits": FEATURES, "b": LOGITS}, "b"), (Found(LOGITS, FEATURES), "features"), (LOGITS, "any")],
)  # fmt: skip
def test_the_option_names_the_prediction(output: Any, key: Any) -> None:
    assert given(output=key).prediction(output) is LOGITS


def test_an_entry_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="set output"):
        given(output="logit").prediction({"logits": LOGITS, "b": LOGITS})


# Training and evaluation


class Net(nn.Module):
    """Takes its inputs in many forms; gives features first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Any, mask: Any = None) -> Any:
        while not isinstance(x, Tensor):
            x = x["x"] if isinstance(x, dict) else x[0]
        h = self.body(x if mask is None else x * mask).relu()
        return h, self.head(h)


def naive(mask: float | None = None) -> dict[str, Tensor]:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for part in (slice(0, 5), slice(5, 8)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(X[part] if mask is None else X[part] * mask)[1], Y[part]).backward()
        optimizer.step()
    return net.state_dict()


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "pair": (lambda x, y: (x, y), {}),
    "dict": (lambda x, y: {"img": x, "label": y}, {}),
    "triple": (lambda x, y: (x, y, y), {"batch": {"inputs": 0, "labels": 1}}),
    "nested": (lambda x, y: (({"x": x}, 3), y), {}),
    "keywords": (
        lambda x, y: {"x": x, "mask": torch.full((6,), 2.0), "y": y, "id": 0},
        {"batch": {"inputs": ["x", "mask"], "labels": "y"}},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_training_equals_the_naive_loop_in_every_form(form: str) -> None:
    make, options = FORMS[form]
    batches = [make(X[:5], Y[:5]), make(X[5:], Y[5:])]
    reading, mask = ReadingOptions(**options).reading(3), 2.0 if form == "keywords" else None
    net = Net()
    phases = [Phase(1, frozenset(Role))]
    training = LocalTraining(learning_rate=0.1, comm_round=1)
    local_update(net, batches, training, phases, roles(net), round=0, seed=0, reading=reading)
    assert all(torch.equal(value, naive(mask)[key]) for key, value in net.state_dict().items())
    loss = nn.functional.cross_entropy(net(X * (mask or 1.0))[1].detach(), Y)
    assert evaluate(net, batches, reading=reading).loss == pytest.approx(float(loss), rel=1e-6)


def test_inputs_that_are_no_tensor_pass_the_model_where_gates_would_be_kept() -> None:
    from fedsq_plugin import DualCopy

    class Tall(Net):
        def forward(self, x: Any, mask: Any = None) -> Any:
            return self.head(torch.relu(self.body(x["x"])))

    batches = [({"x": X}, Y)]
    found = []
    for keep in (False, True):
        net = DualCopy(Tall())
        client = Client(net, algorithm("FedSQ"), AllOptions(), LocalTraining(learning_rate=0.1), 0, keep_gates=keep)
        client.train(0, batches, 0)
        found.append(copy.deepcopy(net.state_dict()))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_augmentation_is_for_images() -> None:
    training = LocalTraining(learning_rate=0.1, augmentation=("flip",))
    net = Net()
    with pytest.raises(ConfigError, match=r"augmentation is for images .* not for \{x: 8x6 float32\}"):
        phases = [Phase(1, frozenset(Role))]
        local_update(net, [({"x": X}, Y)], training, phases, roles(net), round=0, seed=0)


def test_class_means_read_batches_alike() -> None:
    from fedsq_plugin.algorithms.probe import ClassMeans

    net = Net()
    reading = Reading(classes=3)
    means = [
        ClassMeans("head").collect(net, reading.read_all(batches), "cpu")["class sums"]
        for batches in ([(X, Y)], [{"a": X, "label": Y}])
    ]
    assert torch.equal(*means)
    assert np.isfinite(means[0].numpy()).all()
