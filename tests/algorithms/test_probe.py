"""FedNCM's head: the same for any partition, for any head that is a Linear. LP-FT's rounds on the head."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsq_plugin.algorithms import algorithm
from fedsq_plugin.algorithms.probe import ClassMeans, class_means_first, probe_first
from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.errors import ConfigError, UpdateError
from fedsq_plugin.federation.algorithm import EVERYTHING, HEAD
from fedsq_plugin.federation.client import Client
from fedsq_plugin.federation.evaluate import evaluate
from fedsq_plugin.federation.local import Phase, Statistics
from fedsq_plugin.federation.messages import Update
from fedsq_plugin.federation.roles import roles
from fedsq_plugin.federation.seeding import isolated
from fedsq_plugin.federation.server import Server, add_sums
from fedsq_plugin.federation.state import fingerprint, state_of

from . import phased
from .task import OPTIONS, Batches, Federation, changed, corners, mlp, silos

CLASSES, FEATURES = 3, 2
Sample = tuple[tuple[int, int], int]
samples = st.lists(
    st.tuples(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), st.integers(0, CLASSES - 1)), min_size=1, max_size=20
)


def model(bias: bool = True) -> nn.Module:
    with isolated(0):
        return nn.Sequential(nn.Identity(), nn.Linear(FEATURES, CLASSES, bias=bias))


def batch(data: list[Sample]) -> tuple[Tensor, Tensor]:
    return torch.tensor([x for x, _ in data]).float().view(-1, FEATURES), torch.tensor([y for _, y in data])


@given(samples, st.data())
def test_any_partition_gives_the_same_head(data: list[Sample], draw: st.DataObject) -> None:
    # Integer features: their sums do not depend on their order.
    silo = [draw.draw(st.integers(0, 2)) for _ in data]
    parts = [[sample for sample, own in zip(data, silo, strict=True) if own == n] for n in range(3)]
    net = model()
    whole = ClassMeans("1").collect(net, [batch(data)], "cpu")
    split = add_sums(ClassMeans("1").collect(net, [batch(part)] if part else [], "cpu") for part in parts)
    start = state_of(net)
    assert fingerprint(ClassMeans("1").apply(start, split)) == fingerprint(ClassMeans("1").apply(start, whole))


@given(samples)
def test_rows_have_length_one_or_are_zero(data: list[Sample]) -> None:
    net = model()
    rows = ClassMeans("1").apply(state_of(net), ClassMeans("1").collect(net, [batch(data)], "cpu"))["1.weight"]
    assert all(length == 0 or abs(length - 1) < 1e-6 for length in rows.norm(dim=1).tolist())


def test_class_without_a_sample_gets_zeros() -> None:
    net = model()
    found = ClassMeans("1").apply(
        state_of(net), ClassMeans("1").collect(net, [batch([((1, 2), 0), ((3, 4), 2)])], "cpu")
    )
    assert found["1.weight"][1].tolist() == [0.0, 0.0]


def test_head_without_a_bias_gets_none() -> None:
    net = model(bias=False)
    found = ClassMeans("1").apply(state_of(net), ClassMeans("1").collect(net, [batch([((1, 2), 0)])], "cpu"))
    assert list(found) == ["1.weight"]


def test_only_the_head_changes() -> None:
    net = mlp()
    start = state_of(net)
    found = ClassMeans("3").apply(start, ClassMeans("3").collect(net, [corners(20, seed=0)], "cpu"))
    assert {key for key in start if found[key] is not start[key]} == {"3.weight", "3.bias"}
    assert list(found) == list(start)


def test_state_that_comes_in_is_left_alone() -> None:
    net = mlp()
    start = state_of(net)
    before = fingerprint(start)
    ClassMeans("3").apply(start, ClassMeans("3").collect(net, [corners(20, seed=0)], "cpu"))
    assert fingerprint(start) == before


def test_type_of_the_head_is_the_models() -> None:
    net = mlp().half()
    sums = {"class sums": torch.ones(2, 32, dtype=torch.float64)}
    assert ClassMeans("3").apply(state_of(net), sums)["3.weight"].dtype is torch.float16


def test_features_are_those_of_evaluation_mode() -> None:
    # Dropout would scale what it keeps by 2, and the norm would take the batch's own statistics.
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 2)).train()
    x = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    sums = ClassMeans("2").collect(net, [(x, torch.tensor([0, 0]))], "cpu")
    # Running statistics of a new layer: mean 0, variance 1.
    assert sums["class sums"][0].tolist() == pytest.approx([9.0, 12.0], rel=1e-4)
    assert int(net[0].num_batches_tracked) == 0


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_put_back_and_the_hook_removed(training: bool) -> None:
    net = model().train(training)
    ClassMeans("1").collect(net, [batch([((1, 2), 0)])], "cpu")
    assert (net.training, len(net[1]._forward_pre_hooks)) == (training, 0)


def test_hook_is_removed_after_an_exception() -> None:
    net = model()
    with pytest.raises(RuntimeError):
        ClassMeans("1").collect(net, [(torch.zeros(1, 99), torch.tensor([0]))], "cpu")
    assert (net.training, len(net[1]._forward_pre_hooks)) == (True, 0)


def test_no_graph_is_kept() -> None:
    sums = ClassMeans("3").collect(mlp(), [corners(20, seed=0)], "cpu")
    assert not any(value.requires_grad for value in sums.values())


def test_head_that_is_no_linear_is_an_error() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match=r"head '1' is Sequential: class means need an nn\.Linear"):
        ClassMeans("1").collect(net, [], "cpu")


def test_dualcopy_gives_the_features_under_its_gates() -> None:
    dual = DualCopy(mlp())
    nn.init.constant_(dual.quantitative[0].weight, 0.3)  # moved away from the structural copy
    x, labels = corners(30, seed=0)
    taken: list[Tensor] = []
    handle = dual.quantitative[3].register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    with torch.no_grad():
        dual.eval()(x)
    features = taken[-1].detach().double()
    handle.remove()
    found = ClassMeans("3").collect(dual, [(x, labels)], "cpu")["class sums"]
    wanted = torch.stack([features[labels == c].sum(0) for c in range(2)])
    assert torch.allclose(found, wanted)
    own = ClassMeans("3").collect(dual.quantitative, [(x, labels)], "cpu")["class sums"]
    assert not torch.allclose(found, own)


# A federation


def test_first_round_sets_the_head_and_nothing_else() -> None:
    found = Federation("FedNCM").repeat(1)
    start = state_of(mlp())
    pooled = [batch for silo in silos() for batch in silo]
    wanted = ClassMeans("3").apply(start, ClassMeans("3").collect(mlp(), pooled, "cpu"))
    for key, value in found.state.items():
        assert torch.allclose(value, wanted[key], atol=1e-7), key
        assert key.startswith("3.") or torch.equal(value, start[key])


def test_silos_send_their_sums_alone_in_the_first_round() -> None:
    found = Federation("FedNCM").repeat(2)
    assert [list(answer) for answer in found.answers[0].values()] == [["fedsq:sums:class sums"]] * 3
    assert [list(answer) for answer in found.answers[1].values()] == [list(state_of(mlp()))] * 3


def test_first_head_is_better_than_chance() -> None:
    # The features separate little here, but more than a head that was drawn.
    found = Federation("FedNCM").repeat(1)
    assert found.accuracy() > 0.6


def test_slots_get_the_head_too() -> None:
    found = Federation("FedNCM+FedMR").repeat(2)
    assert len(found.own_server.state.slots) == 3


def test_round_without_any_sums_is_an_error() -> None:
    server = Server(algorithm("FedNCM"), OPTIONS, state_of(mlp()), roles(mlp(), "3"), 0)
    with pytest.raises(UpdateError, match="there are no sums to add up"):
        server.begin([0]).finish()


def test_sums_of_a_silo_that_is_lost_are_not_counted() -> None:
    found = Federation("FedNCM")
    found.round([0, 1, 2], lost=[1])
    others = [batch for n, silo in enumerate(silos()) if n != 1 for batch in silo]
    wanted = ClassMeans("3").apply(state_of(mlp()), ClassMeans("3").collect(mlp(), others, "cpu"))
    assert torch.allclose(found.state["3.weight"], wanted["3.weight"], atol=1e-7)


def test_client_gives_sums_without_a_step() -> None:
    data: Batches = silos()[0]
    found = Client(mlp(), algorithm("FedNCM"), OPTIONS, Federation("FedNCM").client.training, 0)
    result = found.train(0, data, 0)
    assert (result.steps, sorted(result.sums)) == (0, ["class sums"])


def test_model_is_evaluated_with_the_new_head() -> None:
    found = Federation("FedNCM").repeat(1)
    assert evaluate(found.model(), silos()[0]) != evaluate(mlp(), silos()[0])


def test_update_with_sums_alone_counts() -> None:
    server = Server(algorithm("FedNCM"), OPTIONS, state_of(mlp()), roles(mlp(), "3"), 0)
    gathering = server.begin([0])
    gathering.add(Update(0, 5, {}, ClassMeans("3").collect(mlp(), silos()[0], "cpu")))
    gathering.finish()
    assert server.state.round == 1


@pytest.mark.parametrize("bias", [True, False])
def test_expected_sums_are_like_those_that_silos_send(bias: bool) -> None:
    net = model(bias)
    sent, wanted = ClassMeans("1").collect(net, [batch([((1, 2), 0)])], "cpu"), ClassMeans("1").expected(state_of(net))
    assert [(k, v.shape, v.dtype) for k, v in sent.items()] == [(k, v.shape, v.dtype) for k, v in wanted.items()]


def test_sums_are_expected_in_the_first_round_alone() -> None:
    found = Federation("FedNCM")
    first = list(found.own_server.expected_sums), list(found.own_server.expected)
    found.repeat(1)
    assert first == (["class sums"], [])
    assert (found.own_server.expected_sums, list(found.own_server.expected)) == ({}, list(state_of(mlp())))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (torch.zeros(4, 1), "the targets of a batch are 4x1 torch.float32"),
        (torch.full((4,), 0.5), "the targets of a batch are 4 torch.float32"),
        (torch.tensor([0, 1, 3, 2]), "labels from 0 to 3 for a head of 3 outputs"),
        (torch.tensor([0, -1, 1, 2]), "labels from -1 to 2 for a head of 3 outputs"),
    ],
)
def test_targets_that_are_no_labels_are_refused(targets: Tensor, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ClassMeans("1").collect(model(), [(torch.ones(4, FEATURES), targets)], "cpu")


def naive_head(features: list[list[float]], labels: list[int], classes: int) -> list[list[float]]:
    """Means of the features by class, scaled to length one; a class without samples gets zeros."""
    rows = []
    for c in range(classes):
        own = [feature for feature, label in zip(features, labels, strict=True) if label == c]
        mean = [sum(column) / len(own) for column in zip(*own, strict=True)] if own else [0.0] * len(features[0])
        length = sum(value**2 for value in mean) ** 0.5
        rows.append([value / length if length else 0.0 for value in mean])
    return rows


def test_class_means_by_hand() -> None:
    # The features are the inputs. Class 0: (3, 0), (3, 8): mean (3, 4), length 5. Class 1: (0, -2).
    # Class 2: none.
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 3))
    data = [(torch.tensor([[3.0, 0], [0, -2]]), torch.tensor([0, 1])), (torch.tensor([[3.0, 8]]), torch.tensor([0]))]
    sums = ClassMeans("1").collect(model, data, "cpu")
    found = ClassMeans("1").apply(state_of(model), sums)
    assert torch.allclose(found["1.weight"], torch.tensor([[0.6, 0.8], [0, -1], [0, 0]]))
    assert found["1.bias"].tolist() == [0.0, 0.0, 0.0]
    assert {name: value.tolist() for name, value in sums.items()} == {"class sums": [[6, 8], [0, -2], [0, 0]]}


def test_class_means_follow_the_naive_ones_over_the_pooled_data() -> None:
    net = phased.net()
    x, labels = (torch.cat(parts) for parts in zip(*phased.batches(), strict=True))
    taken: list[Tensor] = []
    handle = net.head.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    with torch.no_grad():
        copy.deepcopy(net).eval()(x)
    handle.remove()
    sums = phased.client("class means first").train(0, phased.batches(), 0).sums
    found = ClassMeans("head").apply(state_of(net), sums)["head.weight"].tolist()
    expected = naive_head(taken[0].tolist(), labels.tolist(), 3)
    assert found == [pytest.approx(row, rel=1e-5, abs=1e-7) for row in expected]


def test_class_means_are_all_that_happens_in_the_first_round() -> None:
    (part,) = class_means_first(OPTIONS, 0)
    assert isinstance(part, Statistics)
    assert phased.moved("class means first") == set()


def test_everything_is_trained_after_the_first_round() -> None:
    assert [list(class_means_first(OPTIONS, round)) for round in (1, 7)] == [[Phase(2, EVERYTHING)]] * 2


# LP-FT


@pytest.mark.parametrize(
    ("probe_rounds", "heads"), [(0, [False, False, False]), (1, [True, False, False]), (2, [True, True, False])]
)
def test_head_alone_for_the_probe_rounds(probe_rounds: int, heads: list[bool]) -> None:
    options = changed(probe_rounds=probe_rounds)
    found = [list(probe_first(options, round)) for round in range(3)]
    assert found == [[Phase(2, HEAD if head else EVERYTHING)] for head in heads]


def test_without_a_head_there_is_nothing_to_probe() -> None:
    said = "a phase that trains head and norm parameter of the head finds no such parameter"
    with pytest.raises(ConfigError, match=said):
        phased.client("head first", head=None).train(0, phased.batches(), 0)
