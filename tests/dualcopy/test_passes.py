"""Whole forwards: against the naive implementation, against the plain model, and off the beaten track."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fedsq_plugin import DualCopy
from fedsq_plugin.errors import GateError

from . import naive
from .nets import BACKBONES, SMALL_INPUT, Scaled, Shifted, SmallNet, backbone, every_activation, fill, move

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


class Pair(NamedTuple):
    """A DualCopy whose copies differ, and the same two copies for the naive implementation."""

    dual: DualCopy
    structural: nn.Module
    quantitative: nn.Module


def pair(model: nn.Module) -> Pair:
    dual = DualCopy(model)
    move(dual.quantitative)
    return Pair(dual, copy.deepcopy(dual.structural), copy.deepcopy(dual.quantitative))


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same_function(copies: Pair, x: Tensor) -> None:
    """Output, and the gradients of input and parameters, equal those of the naive implementation."""
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(0)  # for dropout
    out = copies.dual(x1)
    torch.manual_seed(0)
    expected = naive.gated(copies.structural, copies.quantitative, x2)
    assert_close(out, expected, **EXACT)
    out.square().mean().backward()
    expected.square().mean().backward()
    assert_close(x1.grad, x2.grad, **EXACT)
    grads = {name: p.grad for name, p in copies.dual.named_parameters()}
    assert_close(grads, {name: p.grad for name, p in copies.quantitative.named_parameters()}, **EXACT)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_against_the_naive_implementation(name: str, training: bool) -> None:
    size = BACKBONES[name]
    copies = pair(backbone(name).double().train(training))
    assert_same_function(copies, data(4, 3, size, size))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dims", [1, 3])
def test_every_activation_against_the_naive_implementation(dims: int, training: bool) -> None:
    copies = pair(every_activation(dims).double().train(training))
    assert_same_function(copies, data(3, 2, *[6] * dims))


def test_small_net_against_the_naive_implementation() -> None:
    assert_same_function(pair(fill(SmallNet(0.5)).double()), data(*SMALL_INPUT))


@pytest.mark.parametrize("name", BACKBONES)
def test_the_gates_matter(name: str) -> None:
    """Otherwise the tests above would show nothing."""
    size = BACKBONES[name]
    dual = pair(backbone(name).eval()).dual
    x = data(2, 3, size, size).float()
    with torch.no_grad():
        assert (dual(x) - dual.quantitative(x)).abs().max() > 0.1


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", BACKBONES)
def test_equal_copies_give_the_plain_output_bit_for_bit(name: str, grad: bool) -> None:
    model, size = backbone(name).eval(), BACKBONES[name]
    x = data(2, 3, size, size).float()
    with torch.set_grad_enabled(grad):
        assert torch.equal(DualCopy(model)(x), model(x))


@pytest.mark.parametrize("dims", [1, 3])
def test_equal_copies_of_every_activation_give_the_plain_output(dims: int) -> None:
    model = every_activation(dims).eval()
    x = data(3, 2, *[6] * dims).float()
    assert torch.equal(DualCopy(model)(x), model(x))


@pytest.mark.parametrize("name", BACKBONES)
def test_equal_copies_give_the_plain_gradient(name: str) -> None:
    model, size = backbone(name).double().eval(), BACKBONES[name]
    x = data(2, 3, size, size)
    params = list(model.parameters())
    expected = torch.autograd.grad(model(x).square().mean(), params)
    assert_close(torch.autograd.grad(DualCopy(model)(x).square().mean(), params), expected, **EXACT)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "shufflenet_v2_x1_0"])
def test_channels_last_gives_the_plain_output(name: str) -> None:
    model = backbone(name).eval().to(memory_format=torch.channels_last)
    x = data(2, 3, 32, 32).float().contiguous(memory_format=torch.channels_last)
    assert torch.equal(DualCopy(model)(x), model(x))


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v2"])
def test_autocast_gives_the_plain_output(name: str) -> None:
    model = backbone(name).eval()
    x = data(2, 3, 32, 32).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(DualCopy(model)(x), model(x))


def test_autocast_gives_the_plain_gradient() -> None:
    model = fill(SmallNet()).eval()
    x, params = data(*SMALL_INPUT).float(), list(model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        plain, gated = model(x), DualCopy(model)(x)
    expected = torch.autograd.grad(plain.sum(), params)
    assert_close(torch.autograd.grad(gated.sum(), params), expected, rtol=1e-2, atol=1e-2)


def test_autocast_trains_after_an_inspecting_forward() -> None:
    dual = DualCopy(fill(SmallNet()))
    with torch.autocast("cpu", torch.bfloat16):
        dual(data(*SMALL_INPUT).float()).float().sum().backward()
    assert all(p.grad is not None for p in dual.parameters())


# GoogLeNet with auxiliary heads


def googlenet() -> nn.Module:
    model = backbone("googlenet", aux_logits=True).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_auxiliary_heads_leave_the_main_output_gated() -> None:
    dual, structural, quantitative = pair(googlenet())
    quantitative.aux1 = quantitative.aux2 = structural.aux1 = structural.aux2 = None
    x = data(3, 3, 32, 32)
    assert_close(dual(x).logits, naive.gated(structural, quantitative, x).logits, **EXACT)


@pytest.mark.parametrize(("head", "field"), [("aux1", "aux_logits1"), ("aux2", "aux_logits2")])
def test_auxiliary_heads_keep_their_own_gates(head: str, field: str) -> None:
    dual = pair(googlenet()).dual
    x, seen = data(3, 3, 32, 32), []
    aux = getattr(dual.quantitative, head)
    dual(x)  # the inspecting forward
    aux.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = getattr(dual(x), field)
    assert_close(out, aux(seen[0]), **EXACT)


def test_auxiliary_heads_get_gradients() -> None:
    dual = pair(googlenet()).dual
    out = dual(data(3, 3, 32, 32))
    (out.logits.sum() + out.aux_logits1.sum() + out.aux_logits2.sum()).backward()
    assert all(p.grad is not None for p in dual.parameters())


def test_auxiliary_heads_in_evaluation_give_the_plain_output() -> None:
    model, x = googlenet().eval(), data(2, 3, 32, 32)
    assert torch.equal(DualCopy(model)(x), model(x))


def test_modes_can_alternate() -> None:
    dual, x = DualCopy(googlenet()), data(3, 3, 32, 32)
    for _ in range(2):
        assert not isinstance(dual.eval()(x), tuple)
        assert isinstance(dual.train()(x), tuple)


# Models that call things in their own ways


def assert_plain_when_equal(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    model.eval()
    expected = model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    assert_close(DualCopy(model)(*args, **kwargs), expected, rtol=0, atol=0)


class Shared(nn.Module):
    """One activation under two names, called several times; one layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.again = self.layer
        self.act = nn.ReLU()
        self.alias = self.act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.layer(x))
        x = self.alias(self.again(x) - 0.2)
        return self.again(self.act(self.layer(x)).relu())


def test_shared_modules_against_the_naive_implementation() -> None:
    assert_same_function(pair(fill(Shared()).double()), data(5, 4))


def test_shared_modules_have_a_gate_per_call() -> None:
    assert len(DualCopy(Shared()).gates(torch.randn(2, 4))) == 4


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 3, bias=False)
        self.decode = nn.Linear(3, 4, bias=False)
        self.decode.weight = nn.Parameter(torch.zeros(4, 3))
        self.twin = nn.Linear(4, 3, bias=False)
        self.twin.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.twin(F.relu(self.decode(F.relu(self.encode(x))) + x)))


def test_tied_weights_against_the_naive_implementation() -> None:
    assert_same_function(pair(fill(TiedWeights()).double()), data(5, 4))


def test_tied_weights_stay_tied_in_the_structural_copy() -> None:
    structural = DualCopy(TiedWeights()).structural
    assert structural.twin.weight is structural.encode.weight


def functional_net(x: Tensor) -> Tensor:
    x = F.leaky_relu(input=x, negative_slope=0.3, inplace=False)
    x = F.max_pool1d(input=x, kernel_size=2, stride=1, padding=1)
    x = F.hardtanh(x, min_val=-0.5, max_val=1.5)
    out: Tensor = F.adaptive_max_pool1d(x, output_size=3)
    return out


def test_functional_calls_with_keywords_against_the_naive_implementation() -> None:
    assert_same_function(pair(Shifted(functional_net).double()), data(2, 3, 8))


class Keywords(nn.Module):
    """Keyword-only arguments, one of them no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, *, image: Tensor, scale: float = 1.0, mode: Any = None) -> Tensor:
        return F.relu(self.layer(image)) * scale


def test_keyword_only_forward() -> None:
    assert_plain_when_equal(Keywords(), image=torch.randn(2, 4), scale=2.0)


class Mode(enum.Enum):
    A = 1


class Cyclic:
    def __init__(self) -> None:
        self.me = self
        self.x = torch.ones(())


@pytest.mark.parametrize("mode", [Mode.A, Cyclic(), torch, Cyclic, len], ids=lambda m: str(type(m)))
def test_arguments_that_are_no_tensors(mode: Any) -> None:
    dual = DualCopy(Keywords())
    assert dual(image=torch.randn(2, 4), mode=mode).shape == (2, 3)


class Out(NamedTuple):
    a: Tensor
    b: Tensor


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda x: (F.relu(x), x),
    "list": lambda x: [F.relu(x)],
    "dict": lambda x: {"a": F.relu(x), "b": {"c": x}},
    "namedtuple": lambda x: Out(F.relu(x), x),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_any_structure(kind: str) -> None:
    x = torch.randn(2, 3)
    out, expected = DualCopy(Shifted(OUTPUTS[kind]))(x), OUTPUTS[kind](x)
    assert type(out) is type(expected)
    assert_close(out, expected, rtol=0, atol=0)


def test_output_object_that_refers_to_itself() -> None:
    def f(x: Tensor) -> Cyclic:
        out = Cyclic()
        out.x = F.relu(x)
        return out

    assert torch.equal(DualCopy(Shifted(f))(torch.tensor([-1.0, 2.0])).x, torch.tensor([0.0, 2.0]))


def test_unpooling_network_against_the_naive_implementation() -> None:
    def f(x: Tensor) -> Tensor:
        values, index = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(F.relu(values), index, 2)

    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), Shifted(f)).double()
    assert_same_function(pair(model), data(2, 2, 6, 6))


def test_gated_views_against_the_naive_implementation() -> None:
    def f(x: Tensor) -> Tensor:
        x = x * 1
        x[:, :2].relu_()
        F.relu(x[:, 2:], inplace=True)
        return x

    assert_same_function(pair(nn.Sequential(nn.Linear(4, 4), Shifted(f)).double()), data(3, 4))


@pytest.fixture
def no_fused_transformer() -> Iterator[None]:
    """Torch's fused layer, which calls no ReLU that could be seen, is off when functions are watched."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("no_fused_transformer")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_transformer_layer_against_the_naive_implementation(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True).double()
    assert_same_function(pair(layer.train(training)), data(2, 5, 8))


def test_transformer_layer_is_gated_without_gradient_too() -> None:
    dual = pair(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()).dual
    x = data(2, 5, 8)
    expected = dual(x).detach()
    with torch.no_grad():
        assert_close(dual(x), expected, **EXACT)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "normalise",
    [
        torch.nn.utils.weight_norm,
        parametrizations.weight_norm,
        torch.nn.utils.spectral_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
    ids=lambda f: f"{f.__module__}.{f.__name__}",
)
def test_parametrised_layers(normalise: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(normalise(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    assert_plain_when_equal(model, torch.randn(3, 4))


def test_parametrised_layer_trains_its_originals() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU())
    DualCopy(model)(torch.randn(3, 4)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_relu_in_a_parametrisation_is_a_gated_call() -> None:
    class Positive(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return F.relu(weight)

    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Positive())
    assert_plain_when_equal(nn.Sequential(layer, nn.ReLU()), torch.randn(3, 4))


class Remembers(nn.Module):
    """Keeps what it computed, as models do that add a loss on features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.layer(x)
        return F.relu(self.features)


def test_stored_activations_do_not_disturb_the_inspection_in_the_other_mode() -> None:
    dual, x = DualCopy(Remembers()).eval(), torch.randn(2, 4)
    dual(x)
    assert dual.train()(x).shape == (2, 3)


def test_stored_activations_are_the_quantitative_copys() -> None:
    dual = pair(Remembers()).dual
    x = torch.randn(2, 4)
    dual(x)
    assert torch.equal(dual.features, dual.layer(x))
    assert dual.features.requires_grad


class WritesInput(nn.Module):
    """Normalises its input in place."""

    def __init__(self, leaky: bool) -> None:
        super().__init__()
        self.first: nn.Module = nn.LeakyReLU(0.5, inplace=True) if leaky else nn.Identity()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(1.0).mul_(2.0)
        return F.relu(self.layer(self.first(x)))


@pytest.mark.parametrize("leaky", [False, True])
def test_a_model_that_writes_into_its_input_does_so_once(leaky: bool) -> None:
    torch.manual_seed(0)
    assert_plain_when_equal(WritesInput(leaky), torch.randn(3, 4))


@pytest.mark.parametrize("call", ["forward", "gates"])
def test_the_structural_copy_does_not_write_into_the_input(call: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    dual, before = DualCopy(model), x.clone()
    dual(x) if call == "forward" else dual.gates(x)
    assert torch.equal(x, before)


def test_gates_leave_the_input_of_a_writing_model_alone() -> None:
    dual, x = DualCopy(WritesInput(True)), torch.randn(3, 4)
    before = x.clone()
    dual.gates(x)
    assert torch.equal(x, before)


def test_input_that_autograd_computed() -> None:
    stem = nn.Linear(4, 4)
    dual = DualCopy(nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    dual(stem(torch.randn(3, 4))).sum().backward()
    assert stem.weight.grad is not None


def test_no_gradient_reaches_the_input_through_the_structural_copy() -> None:
    # dh/dx = a(r) only; the structural copy's region is constant.
    dual = DualCopy(Scaled(F.relu))
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    dual(x).sum().backward()
    assert_close(x.grad, torch.tensor([0.0, 1.0]))


def test_functional_call_with_other_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    dual, x = DualCopy(model), torch.randn(2, 4)
    base = {name: p.detach().clone().requires_grad_() for name, p in dual.named_parameters()}
    out = torch.func.functional_call(dual, {name: 2 * p for name, p in base.items()}, (x,))
    assert_close(out, 2 * model(x))
    out.sum().backward()
    assert all(p.grad is not None for p in base.values())


def test_empty_batch() -> None:
    dual = DualCopy(fill(SmallNet()).eval())
    assert dual(torch.empty(0, 3, 8, 8)).shape == (0, 5)


def test_empty_batch_backward() -> None:
    dual = DualCopy(fill(SmallNet()).eval())
    dual(torch.empty(0, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in dual.parameters())


def test_batch_size_may_change() -> None:
    model = fill(SmallNet()).eval()
    dual = DualCopy(model)
    dual(torch.randn(4, 3, 8, 8))
    x = torch.randn(2, 3, 12, 10)
    assert torch.equal(dual(x), model(x))


def test_half_precision_model() -> None:
    model = fill(SmallNet()).bfloat16().eval()
    x = torch.randn(SMALL_INPUT).bfloat16()
    assert torch.equal(DualCopy(model)(x), model(x))


def test_frozen_part_under_no_grad() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = F.relu(self.body(x))
            return F.relu(self.head(x))

    dual = DualCopy(Frozen())
    dual(torch.randn(3, 4)).sum().backward()
    assert dual.body.weight.grad is None and dual.head.weight.grad is not None


# Autograd around the forward


def test_gradient_accumulates_over_backwards() -> None:
    dual = pair(fill(SmallNet()).double().eval()).dual
    x, params = data(4, 3, 8, 8), list(dual.parameters())
    expected = torch.autograd.grad(dual(x).sum(), params)
    for half in x.split(2):
        dual(half).sum().backward()
    assert_close([p.grad for p in params], list(expected), **EXACT)


def test_several_forwards_before_one_backward() -> None:
    dual = pair(fill(SmallNet()).double().eval()).dual
    x, params = data(4, 3, 8, 8), list(dual.parameters())
    expected = torch.autograd.grad(dual(x).sum(), params)
    first, second = x.split(2)
    grads = torch.autograd.grad(dual(first).sum() + dual(second).sum(), params)
    assert_close(grads, expected, **EXACT)


def test_no_grad_gives_an_output_without_a_graph() -> None:
    with torch.no_grad():
        assert not DualCopy(fill(SmallNet()))(torch.randn(SMALL_INPUT)).requires_grad


def test_inference_mode_gives_the_same_output() -> None:
    dual, x = pair(fill(SmallNet()).eval()).dual, torch.randn(SMALL_INPUT)
    expected = dual(x)
    with torch.inference_mode():
        assert torch.equal(dual(x), expected)


def test_input_made_in_inference_mode() -> None:
    dual = DualCopy(WritesInput(True))
    with torch.inference_mode():
        assert dual(torch.randn(2, 4)).shape == (2, 3)


def test_gates_taken_in_inference_mode_serve_training() -> None:
    dual, x = DualCopy(fill(SmallNet()).eval()), torch.randn(SMALL_INPUT)
    with torch.inference_mode():
        gates = dual.gates(x)
    dual.gated(gates, x).sum().backward()
    assert all(p.grad is not None for p in dual.parameters())


def test_gates_are_one_byte_each() -> None:
    gates = DualCopy(SmallNet()).gates(torch.randn(SMALL_INPUT))
    assert {gate.region.dtype for gate in gates} == {torch.uint8}


def test_given_gates_replace_the_structural_forward() -> None:
    dual, x = pair(fill(SmallNet()).eval()).dual, torch.randn(SMALL_INPUT)
    assert torch.equal(dual.gated(dual.gates(x), x), dual(x))


def test_given_gates_are_those_of_the_other_input() -> None:
    dual = DualCopy(Shifted(F.relu))
    gates = dual.gates(torch.tensor([-1.0, 1.0]))
    assert dual.gated(gates, torch.tensor([5.0, -3.0])).tolist() == [0.0, -3.0]


def test_second_derivative_against_the_naive_implementation() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.MaxPool1d(2), nn.LeakyReLU(), nn.PReLU(2))
    dual, structural, quantitative = pair(model.double())

    def penalty(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        x = data(2, 1, 8).requires_grad_()
        (grad,) = torch.autograd.grad(f(x).pow(3).sum(), x, create_graph=True)
        params = [p for m in (dual, quantitative) for p in m.parameters()]
        return torch.autograd.grad(grad.square().sum(), params, allow_unused=True)

    own = [g for g in penalty(dual) if g is not None]
    expected = [g for g in penalty(lambda x: naive.gated(structural, quantitative, x)) if g is not None]
    assert len(own) == 3  # the weights, the biases and the slopes
    assert_close(own, expected, **EXACT)


ignore_checkpoint_warning = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")


def checkpointed(reentrant: bool) -> DualCopy:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.body, x, use_reentrant=reentrant)
            return out

    return pair(Checkpointed()).dual


@ignore_checkpoint_warning
def test_reentrant_activation_checkpointing_is_refused() -> None:
    """Its second forward would use the quantitative copy's own gates: a wrong gradient, silently."""
    with pytest.raises(GateError, match="checkpoint"):
        checkpointed(True)(torch.randn(3, 4, requires_grad=True))


def test_activation_checkpointing_never_gives_a_wrong_gradient() -> None:
    out = checkpointed(False)(torch.randn(3, 4, requires_grad=True))
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        out.sum().backward()


@ignore_checkpoint_warning
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_fine_without_gradient(reentrant: bool) -> None:
    with torch.no_grad():
        assert checkpointed(reentrant)(torch.randn(3, 4)).shape == (3, 4)


# Copies that do not follow the same path


class Branching(nn.Module):
    """Its path depends on a parameter, so that the copies can part."""

    def __init__(self, other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.switch = nn.Parameter(torch.zeros(()))
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(x) if self.switch > 0 else F.relu(x)
        return F.relu(x)


OTHER_PATHS: dict[str, Callable[[Tensor], Tensor]] = {
    "more calls": lambda x: F.relu(F.relu(x)),
    "fewer calls": lambda x: x,
    "another kind": lambda x: F.relu6(x),
    "another shape": lambda x: F.relu(x[:1]),
    "pooling": lambda x: F.max_pool1d(x, 1),
}


def parted(path: str, training: bool) -> DualCopy:
    """A DualCopy whose copies part. The second path is tried at the first forward, so that no forward is right."""
    dual = DualCopy(Branching(OTHER_PATHS[path])).train(training)
    with torch.no_grad():
        dual.get_parameter("switch").fill_(1)
    return dual


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("path", OTHER_PATHS)
def test_copies_that_can_part_are_refused_at_the_first_forward(path: str, training: bool) -> None:
    dual = DualCopy(Branching(OTHER_PATHS[path])).train(training)
    with pytest.raises(GateError, match=r"the model itself: .*does not follow"):
        dual(torch.randn(2, 3, 4))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("path", OTHER_PATHS)
def test_copies_that_part_are_refused(path: str, training: bool) -> None:
    dual = parted(path, training)
    with pytest.raises(GateError, match="does not follow"):
        dual(torch.randn(2, 3, 4))


def test_nothing_is_left_behind_after_an_error() -> None:
    dual = parted("more calls", training=False)
    with pytest.raises(GateError):
        dual(torch.randn(2, 3, 4))
    assert F.relu(torch.tensor([-1.0])).tolist() == [0.0]
    assert not torch.overrides._get_current_function_mode_stack()


def test_nothing_is_left_behind_after_an_error_of_the_models_own() -> None:
    with pytest.raises(RuntimeError):
        DualCopy(SmallNet())(torch.randn(1, 2, 8, 8))
    assert not torch.overrides._get_current_function_mode_stack()


def test_gates_of_another_batch_are_refused() -> None:
    dual = DualCopy(fill(SmallNet()).eval())
    with pytest.raises(GateError, match="shape"):
        dual.gated(dual.gates(torch.randn(2, 3, 8, 8)), torch.randn(3, 3, 8, 8))


def test_gates_of_another_model_are_refused() -> None:
    x = torch.randn(2, 3, 8, 8)
    gates = DualCopy(nn.Sequential(nn.MaxPool2d(2), nn.ReLU())).gates(x)
    with pytest.raises(GateError):
        DualCopy(fill(SmallNet()).eval()).gated(gates, x)


def test_too_few_gates_are_refused() -> None:
    dual, x = DualCopy(fill(SmallNet()).eval()), torch.randn(SMALL_INPUT)
    with pytest.raises(GateError):
        dual.gated(dual.gates(x)[:-1], x)


# Randomness and threads


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_no_random_numbers_are_drawn_beyond_the_plain_models(training: bool) -> None:
    model, x = fill(SmallNet(0.5)).train(training), torch.randn(SMALL_INPUT)
    dual = DualCopy(copy.deepcopy(model))
    torch.manual_seed(0)
    model(x)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    dual(x)
    assert torch.equal(torch.get_rng_state(), expected)


def test_dropout_draws_the_plain_models_mask() -> None:
    model, x = fill(SmallNet(0.5)).train(), torch.randn(SMALL_INPUT)
    model.norm.eval()  # so that both copies compute the same
    dual = DualCopy(model)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(dual(x), expected)


def test_inspection_leaves_batch_statistics_alone() -> None:
    model, x = fill(SmallNet()).train(), torch.randn(SMALL_INPUT)
    dual = DualCopy(copy.deepcopy(model))
    model(x)
    dual(x)
    assert_close(dict(dual.named_buffers()), dict(model.named_buffers()), rtol=0, atol=0)


def test_gates_are_not_random_in_training() -> None:
    dual = DualCopy(nn.Sequential(nn.Linear(4, 4), nn.RReLU(), nn.Dropout(0.0))).train()
    x = torch.randn(3, 4)
    assert torch.equal(dual(x), dual(x))


@pytest.mark.parametrize("inspected", [False, True], ids=["first forward", "later"])
def test_threads_give_the_outputs_of_a_sequence(inspected: bool) -> None:
    dual = pair(fill(SmallNet()).eval()).dual
    inputs = [data(2, 3, 8, 8, seed=seed).float() for seed in range(24)]
    expected = [copy.deepcopy(dual)(x) for x in inputs]
    if inspected:
        dual(inputs[0])
    barrier = Barrier(4)

    def work(start: int) -> list[Tensor]:
        barrier.wait()
        return [dual(x) for x in inputs[start::4]]

    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(work, range(4)))
    outputs = [parts[i % 4][i // 4] for i in range(len(inputs))]
    assert_close(outputs, expected, rtol=0, atol=0)


def test_a_forward_in_one_thread_leaves_plain_models_in_others_alone() -> None:
    entered, left = Barrier(2), Barrier(2)

    def f(x: Tensor) -> Tensor:
        if waits:
            entered.wait()
            left.wait()
        return F.relu(x)

    waits = False
    dual, x = DualCopy(Shifted(f)), torch.tensor([-1.0, 2.0])
    gates = dual.gates(x)
    waits = True
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(dual.gated, gates, x)
        entered.wait()
        plain = F.relu(-x)
        left.wait()
        assert (plain.tolist(), other.result().tolist()) == ([1.0, 0.0], [0.0, 2.0])


def test_two_dual_copies_in_a_row() -> None:
    first, second = pair(nn.Sequential(nn.Linear(4, 4), nn.ReLU())).dual, pair(Shared()).dual
    x = torch.randn(3, 4)
    assert torch.equal(nn.Sequential(first, second)(x), second(first(x)))


def test_a_dual_copy_inside_a_plain_model_leaves_its_relu_alone() -> None:
    x = torch.tensor([-1.0, 2.0])
    outer = nn.Sequential(DualCopy(Shifted(F.relu)), Shifted(lambda h: h - 1), nn.ReLU())
    assert outer(x).tolist() == [0.0, 1.0]
