"""DualCopy as a module: what the outside sees is the plain model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fedsq_plugin import DualCopy
from fedsq_plugin.errors import GateError

from .nets import SMALL_INPUT, SmallNet, backbone, fill, move

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "sgd with momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
}


def small(seed: int = 0) -> SmallNet:
    model = fill(SmallNet(), seed)
    assert isinstance(model, SmallNet)
    return model


def images(seed: int = 0) -> Tensor:
    return torch.randn(SMALL_INPUT, generator=torch.Generator().manual_seed(seed))


def moved() -> DualCopy:
    """A DualCopy whose copies differ, in evaluation mode."""
    dual = DualCopy(small())
    move(dual.quantitative)
    return dual.eval()


def train(dual: nn.Module, steps: int = 3, optimizer: str = "sgd with momentum") -> None:
    dual.train()
    steps_with = OPTIMIZERS[optimizer](dual.parameters())
    for seed in range(steps):
        steps_with.zero_grad()
        dual(images(seed)).square().mean().backward()
        steps_with.step()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_equal_states(a: Any, b: Any) -> None:
    assert_close(dict(a), dict(b), rtol=0, atol=0)


class Buffers(nn.Module):
    """A buffer that is not saved, next to one that is."""

    scratch: Tensor
    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        self.register_buffer("kept", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x)) * self.scratch * self.kept


# Names, order and identity


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_state_dict_has_the_plain_keys_in_order(name: str) -> None:
    model = backbone(name)
    assert list(DualCopy(model).state_dict()) == list(model.state_dict())


def test_state_dict_tensors_are_the_models() -> None:
    model = small()
    dual = DualCopy(model).state_dict(keep_vars=True)
    assert all(dual[name] is tensor for name, tensor in model.state_dict(keep_vars=True).items())


def test_state_dict_shares_memory_with_the_model() -> None:
    model = small()
    state = DualCopy(model).state_dict()
    assert all(state[n].data_ptr() == t.data_ptr() for n, t in model.state_dict().items())


def test_state_dict_keeps_the_metadata() -> None:
    model = small()
    assert DualCopy(model).state_dict()._metadata == model.state_dict()._metadata


def test_state_dict_takes_a_prefix() -> None:
    assert "a.conv.weight" in DualCopy(small()).state_dict(prefix="a.")


@pytest.mark.parametrize("walk", ["named_parameters", "named_buffers", "named_children"])
def test_walks_give_the_models_own_objects(walk: str) -> None:
    model = small()
    dual = list(getattr(DualCopy(model), walk)())
    plain = list(getattr(model, walk)())
    assert [n for n, _ in dual] == [n for n, _ in plain]
    assert all(a is b for (_, a), (_, b) in zip(dual, plain, strict=True))


def test_named_modules_has_the_plain_names() -> None:
    model = small()
    assert [n for n, _ in DualCopy(model).named_modules()] == [n for n, _ in model.named_modules()]


def test_structural_copy_is_in_no_walk() -> None:
    dual = DualCopy(small())
    inner = set(dual.structural.modules())
    assert not inner & set(dual.modules())


def test_tied_weights_are_one_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert len(list(DualCopy(model).parameters())) == 3


def test_buffer_that_is_not_saved_stays_unsaved() -> None:
    assert list(DualCopy(Buffers()).state_dict()) == ["kept", "layer.weight", "layer.bias"]


def test_buffer_that_is_not_saved_is_a_buffer() -> None:
    assert dict(DualCopy(Buffers()).named_buffers()).keys() == {"scratch", "kept"}


def test_quantitative_is_the_model_itself() -> None:
    model = small()
    assert DualCopy(model).quantitative is model


def test_structural_starts_as_the_model() -> None:
    dual = DualCopy(small())
    assert_equal_states(dual.structural.state_dict(), dual.quantitative.state_dict())


def test_structural_shares_no_tensor_with_the_model() -> None:
    dual = DualCopy(small())
    own = {t.data_ptr() for t in dual.state_dict().values()}
    assert not own & {t.data_ptr() for t in dual.structural.state_dict().values()}


def test_attributes_of_the_model_can_be_read() -> None:
    dual = DualCopy(small())
    assert dual.head.out_features == 5


def test_methods_that_would_bypass_the_gates_are_refused() -> None:
    class WithMethod(SmallNet):
        def features(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(AttributeError, match=r"\.quantitative\.features"):
        _ = DualCopy(WithMethod()).features


def test_missing_attributes_are_missing() -> None:
    assert not hasattr(DualCopy(small()), "nothing_of_this_name")


def test_a_replaced_layer_is_used() -> None:
    dual = DualCopy(small())
    dual.head = nn.Linear(6, 2)
    assert dual(images()).shape == (3, 2)


def test_as_a_part_of_another_module_its_keys_are_the_plain_ones() -> None:
    model = small()
    outer, plain = nn.Sequential(DualCopy(model), nn.Linear(5, 2)), nn.Sequential(model, nn.Linear(5, 2))
    assert list(outer.state_dict()) == list(plain.state_dict())


def test_as_a_part_of_another_module_it_loads() -> None:
    outer = nn.Sequential(DualCopy(small()), nn.Linear(5, 2))
    state = nn.Sequential(small(seed=5), nn.Linear(5, 2)).state_dict()
    outer.load_state_dict(state)
    assert_equal_states(outer.state_dict(), state)


def test_as_a_part_of_another_module_unsaved_buffers_are_not_missed() -> None:
    outer = nn.Sequential(DualCopy(Buffers()))
    outer.load_state_dict(outer.state_dict(), strict=True)


# Training leaves the structural copy alone


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_moves_the_quantitative_copy(optimizer: str) -> None:
    dual = DualCopy(small())
    before = snapshot(dual)
    train(dual, optimizer=optimizer)
    weights = {name: p for name, p in dual.named_parameters() if name.endswith("weight")}
    assert all(not torch.equal(before[name], p) for name, p in weights.items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_does_not_move_the_structural_copy(optimizer: str) -> None:
    dual = DualCopy(small())
    before = snapshot(dual.structural)
    train(dual, optimizer=optimizer)
    assert_equal_states(dual.structural.state_dict(), before)


def test_structural_parameters_never_get_gradients() -> None:
    dual = DualCopy(small())
    train(dual)
    assert all(p.grad is None and not p.requires_grad for p in dual.structural.parameters())


def test_gradients_of_the_model_are_not_copied() -> None:
    model = small()
    model(images()).sum().backward()
    assert all(p.grad is None for p in DualCopy(model).structural.parameters())


def test_gradients_of_the_model_are_kept() -> None:
    model = small()
    model(images()).sum().backward()
    DualCopy(model)
    assert all(p.grad is not None for p in model.parameters())


def test_training_the_spectral_norm_leaves_the_structural_copy_alone() -> None:
    layer = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    dual = DualCopy(nn.Sequential(layer, nn.ReLU())).train()
    before = snapshot(dual.structural)
    dual(torch.randn(2, 4))
    assert_equal_states(dual.structural.state_dict(), before)


def test_freezing_a_layer_freezes_it_in_training() -> None:
    dual = DualCopy(small())
    dual.conv.requires_grad_(False)
    before = dual.conv.weight.clone()
    train(dual)
    assert torch.equal(dual.conv.weight, before)


def test_requires_grad_leaves_the_structural_copy_frozen() -> None:
    dual = DualCopy(small()).requires_grad_(True)
    assert not any(p.requires_grad for p in dual.structural.parameters())


# train, eval, to


def modes(module: nn.Module) -> set[bool]:
    return {m.training for m in module.modules()}


@pytest.mark.parametrize("mode", [True, False])
def test_train_reaches_the_quantitative_copy(mode: bool) -> None:
    dual = DualCopy(small()).train(not mode).train(mode)
    assert modes(dual) | modes(dual.quantitative) == {mode}


@pytest.mark.parametrize("mode", [True, False])
def test_train_leaves_the_structural_copy_in_evaluation(mode: bool) -> None:
    assert modes(DualCopy(small()).train(mode).structural) == {False}


@pytest.mark.parametrize("mode", [True, False])
def test_construction_keeps_the_mode(mode: bool) -> None:
    dual = DualCopy(small().train(mode))
    assert modes(dual) == {mode}


def test_train_of_an_outer_module_reaches_it() -> None:
    dual = DualCopy(small())
    nn.Sequential(dual).eval()
    assert modes(dual.quantitative) == {False}


def test_a_models_own_train_is_used() -> None:
    class Frozen(SmallNet):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.norm.eval()
            return self

    dual = DualCopy(Frozen()).train()
    assert dual.conv.training and not dual.norm.training


def test_train_and_eval_return_the_dual_copy() -> None:
    dual = DualCopy(small())
    assert dual.train() is dual and dual.eval() is dual


@pytest.mark.parametrize("copy_of", ["quantitative", "structural"])
def test_to_converts_both_copies(copy_of: str) -> None:
    dual = DualCopy(small()).to(torch.float64)
    floats = [t for t in getattr(dual, copy_of).state_dict().values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.float64}


def test_to_keeps_the_parameters_the_models() -> None:
    model = small()
    dual = DualCopy(model).double()
    assert all(a is b for a, b in zip(dual.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_gives_the_plain_output(dtype: torch.dtype) -> None:
    model = small().eval()
    dual = DualCopy(model).to(dtype)
    x = images().to(dtype)
    assert torch.equal(dual(x), model(x))


def test_to_channels_last_reaches_both_copies() -> None:
    dual = DualCopy(small()).to(memory_format=torch.channels_last)
    for module in (dual.quantitative, dual.structural):
        assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_to_of_an_outer_module_reaches_both_copies() -> None:
    dual = DualCopy(small())
    nn.Sequential(dual).double()
    assert dual.structural.conv.weight.dtype == dual.conv.weight.dtype == torch.float64


def test_to_an_integer_counter_stays() -> None:
    dual = DualCopy(small()).half()
    assert dual.structural.norm.num_batches_tracked.dtype == torch.int64


def test_training_after_to() -> None:
    dual = DualCopy(small()).double()
    before = snapshot(dual)
    dual(images().double()).sum().backward()
    torch.optim.SGD(dual.parameters(), lr=0.1).step()
    assert not torch.equal(dual.head.weight, before["head.weight"])


def test_apply_reaches_the_quantitative_copy_only() -> None:
    def zero(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)

    dual = DualCopy(small()).apply(zero)
    assert not dual.head.weight.any() and dual.structural.head.weight.any()


# Copies, pickles, files


def by_deepcopy(dual: DualCopy) -> DualCopy:
    return copy.deepcopy(dual)


def by_pickle(dual: DualCopy) -> DualCopy:
    copied: DualCopy = pickle.loads(pickle.dumps(dual))
    return copied


def by_file(dual: DualCopy) -> DualCopy:
    file = io.BytesIO()
    torch.save(dual, file)
    file.seek(0)
    copied: DualCopy = torch.load(file, weights_only=False)
    return copied


each_way = pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle, by_file])
Duplicate = Callable[[DualCopy], DualCopy]


@each_way
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_duplicate_gives_the_same_output(duplicate: Duplicate, used: bool) -> None:
    dual, x = moved(), images()
    if used:
        train(dual)
        dual.eval()
    assert torch.equal(duplicate(dual)(x), dual(x))


@each_way
def test_a_duplicate_has_the_keys(duplicate: Duplicate) -> None:
    dual = moved()
    assert_equal_states(duplicate(dual).state_dict(), dual.state_dict())


@each_way
def test_a_duplicate_has_the_structural_copy(duplicate: Duplicate) -> None:
    dual = moved()
    assert_equal_states(duplicate(dual).structural.state_dict(), dual.structural.state_dict())


@each_way
def test_a_duplicates_parameters_are_its_quantitative_copys(duplicate: Duplicate) -> None:
    twin = duplicate(moved())
    assert all(a is b for a, b in zip(twin.parameters(), twin.quantitative.parameters(), strict=True))


@each_way
@pytest.mark.parametrize("copy_of", ["quantitative", "structural"])
def test_training_a_duplicate_leaves_the_original_alone(duplicate: Duplicate, copy_of: str) -> None:
    dual = moved()
    before = snapshot(getattr(dual, copy_of))
    train(duplicate(dual))
    assert_equal_states(getattr(dual, copy_of).state_dict(), before)


@each_way
def test_training_a_duplicate_moves_it(duplicate: Duplicate) -> None:
    twin = duplicate(moved())
    before = snapshot(twin)
    train(twin)
    assert not torch.equal(twin.head.weight, before["head.weight"])


@each_way
def test_a_duplicate_converts_both_copies(duplicate: Duplicate) -> None:
    twin = duplicate(moved()).double()
    assert twin.structural.head.weight.dtype == twin.head.weight.dtype == torch.float64


@each_way
def test_a_duplicate_keeps_its_options(duplicate: Duplicate) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.GELU(), nn.Unflatten(1, (2, 2)), nn.MaxPool1d(2))
    twin = duplicate(DualCopy(net, accept=["2"], pooling="own"))
    assert len(twin.gates(torch.randn(2, 4))) == 1


def test_a_checkpoint_loads_into_the_plain_model() -> None:
    dual, plain, file = moved(), small(seed=7), io.BytesIO()
    torch.save(dual.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert_equal_states(plain.state_dict(), dual.quantitative.state_dict())


def test_a_plain_checkpoint_loads() -> None:
    dual, state = moved(), small(seed=7).state_dict()
    dual.load_state_dict(state)
    assert_equal_states(dual.quantitative.state_dict(), state)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_leaves_the_structural_copy_alone(assign: bool) -> None:
    dual = moved()
    before = snapshot(dual.structural)
    dual.load_state_dict(small(seed=7).state_dict(), assign=assign)
    assert_equal_states(dual.structural.state_dict(), before)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_used(assign: bool) -> None:
    dual, other = moved(), small(seed=7)
    dual.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(dual.eval().release()(images()), other.eval()(images()))


def test_loading_reports_missing_and_unexpected_keys() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*Unexpected"):
        moved().load_state_dict({"nothing": torch.zeros(1)})


def test_loading_other_than_strictly_returns_the_keys() -> None:
    result = moved().load_state_dict({"nothing": torch.zeros(1)}, strict=False)
    assert result.unexpected_keys == ["nothing"]


# release, refresh, both copies in one file


def test_release_is_a_plain_module() -> None:
    assert type(moved().release()) is SmallNet


def test_release_has_its_own_gates() -> None:
    dual = moved()
    assert torch.equal(dual.release()(images()), dual.quantitative(images()))


def test_release_is_another_function_once_the_copies_differ() -> None:
    dual = moved()
    assert not torch.equal(dual.release()(images()), dual(images()))


def test_release_is_independent() -> None:
    dual = moved()
    released = dual.release()
    before = snapshot(dual)
    train(released)
    assert_equal_states(dual.state_dict(), before)


def test_release_of_a_model_that_stores_activations() -> None:
    class Remembers(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            self.out = super().forward(x)
            return self.out

    dual = DualCopy(Remembers())
    train(dual)
    assert dual.release()(images()).shape == (3, 5)


def test_refresh_makes_the_output_the_plain_models() -> None:
    dual = moved()
    dual.refresh()
    assert torch.equal(dual(images()), dual.quantitative(images()))


def test_refresh_leaves_the_quantitative_copy_alone() -> None:
    dual = moved()
    before = snapshot(dual)
    dual.refresh()
    assert_equal_states(dual.state_dict(), before)


def test_refresh_shares_no_memory() -> None:
    dual = moved()
    dual.refresh()
    assert dual.structural.head.weight.data_ptr() != dual.head.weight.data_ptr()


def test_refresh_leaves_the_structural_copy_frozen() -> None:
    dual = moved()
    dual.refresh()
    assert not any(p.requires_grad for p in dual.structural.parameters())


def test_refresh_takes_a_state() -> None:
    dual, state = moved(), small(seed=7).state_dict()
    dual.refresh(state)
    assert_equal_states(dual.structural.state_dict(), state)


def test_refresh_is_seen_by_the_next_forward() -> None:
    dual = moved()
    dual(images())
    dual.refresh()
    assert torch.equal(dual(images()), dual.quantitative(images()))


def test_full_state_dict_has_both_copies() -> None:
    dual = moved()
    keys = list(dual.state_dict())
    expected = [f"{name}.{key}" for name in ("quantitative", "structural") for key in keys]
    assert list(dual.full_state_dict()) == expected


def test_full_state_dict_round_trip() -> None:
    dual, other = moved(), DualCopy(small(seed=7)).eval()
    file = io.BytesIO()
    torch.save(dual.full_state_dict(), file)
    file.seek(0)
    other.load_full_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(images()), dual(images()))


def test_full_state_dict_round_trip_restores_every_tensor() -> None:
    dual, other = moved(), DualCopy(small(seed=7))
    other.load_full_state_dict(dual.full_state_dict())
    assert_equal_states(other.full_state_dict(), dual.full_state_dict())


def test_a_full_state_dict_without_the_structural_copy_is_refused() -> None:
    dual = moved()
    state = {k: v for k, v in dual.full_state_dict().items() if k.startswith("quantitative.")}
    with pytest.raises(RuntimeError, match="Missing"):
        dual.load_full_state_dict(state)


# Hooks, and other tools that look at modules


def test_hooks_on_a_layer_see_the_gated_forward() -> None:
    dual, seen = moved(), []
    dual.head.register_forward_hook(lambda _, args, out: seen.append(out))
    out = dual(images())
    assert len(seen) == 1 and torch.equal(seen[0], out)


def test_hooks_on_the_dual_copy_run() -> None:
    dual, seen = moved(), []
    dual.register_forward_hook(lambda _, args, out: seen.append(out))
    out = dual(images())
    assert len(seen) == 1 and seen[0] is out


def test_clipping_gradients() -> None:
    dual = moved()
    (1e3 * dual(images())).sum().backward()
    nn.utils.clip_grad_norm_(dual.parameters(), 1.0)
    norms = torch.stack([p.grad.norm() for p in dual.parameters() if p.grad is not None])
    assert norms.norm() <= 1.0 + 1e-4


def test_zero_grad() -> None:
    dual = moved()
    dual(images()).sum().backward()
    dual.zero_grad()
    assert all(p.grad is None for p in dual.quantitative.parameters())


def test_weights_as_one_vector() -> None:
    dual = moved()
    vector = nn.utils.parameters_to_vector(dual.parameters())
    nn.utils.vector_to_parameters(torch.zeros_like(vector), dual.parameters())
    assert not any(p.any() for p in dual.quantitative.parameters())


# Wrong use


def test_accept_as_a_string_is_refused() -> None:
    with pytest.raises(GateError, match="list of names"):
        DualCopy(small(), accept="act")


def test_an_unknown_pooling_is_refused() -> None:
    with pytest.raises(GateError, match="'structural' or 'own'"):
        DualCopy(small(), pooling="max")  # type: ignore[arg-type]


def test_a_refused_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU()).train()
    with pytest.raises(GateError):
        DualCopy(model)
    assert modes(model) == {True} and all(p.requires_grad for p in model.parameters())
