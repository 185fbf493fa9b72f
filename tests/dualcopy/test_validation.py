"""What cannot be gated: found, named, refused, or accepted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn

from fedsq_plugin import DualCopy, validate
from fedsq_plugin.dualcopy import Finding
from fedsq_plugin.errors import FedSQError, GateError

from .nets import BACKBONES, SMALL_INPUT, Shifted, SmallNet, backbone, every_activation

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def with_module(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(activation), nn.Linear(4, 2))


class Calls(nn.Module):
    """A block that makes a functional call, in a model that is gated elsewhere."""

    def __init__(self, f: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.block = Shifted(f)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.block(self.first(x)))
        return out


# What is fine


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_have_no_findings(name: str) -> None:
    assert validate(backbone(name).eval(), torch.randn(1, 3, BACKBONES[name], BACKBONES[name])) == []


@pytest.mark.parametrize("dims", [1, 3])
def test_every_gated_activation_is_no_finding(dims: int) -> None:
    assert validate(every_activation(dims), torch.randn(2, 2, *[6] * dims)) == []


def test_googlenet_with_auxiliary_heads_is_no_finding() -> None:
    assert validate(backbone("googlenet", aux_logits=True), torch.randn(2, 3, 64, 64)) == []


def test_without_an_example_a_gated_model_is_no_finding() -> None:
    assert validate(SmallNet()) == []


def test_pooling_alone_is_a_gate() -> None:
    assert validate(nn.Sequential(nn.MaxPool1d(2)), torch.randn(1, 1, 4)) == []


def test_average_pooling_needs_no_gate() -> None:
    model = nn.Sequential(nn.ReLU(), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(1), nn.LPPool1d(2, 1))
    assert validate(model, torch.rand(1, 1, 4)) == []


EXAMPLES: dict[str, Any] = {
    "tensor": torch.randn(SMALL_INPUT),
    "tuple": (torch.randn(SMALL_INPUT),),
    "list": [torch.randn(SMALL_INPUT)],
    "dict": {"x": torch.randn(SMALL_INPUT)},
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_an_example_is_a_tensor_or_the_arguments(kind: str) -> None:
    assert validate(SmallNet(), EXAMPLES[kind]) == []


# Ungateable activations

SMOOTH_MODULES: dict[str, nn.Module] = {
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "elu": nn.ELU(),
    "celu": nn.CELU(),
    "selu": nn.SELU(),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "logsigmoid": nn.LogSigmoid(),
    "softsign": nn.Softsign(),
    "tanhshrink": nn.Tanhshrink(),
    "softshrink": nn.Softshrink(),
    "hardshrink": nn.Hardshrink(),
}
each_smooth_module = pytest.mark.parametrize("kind", SMOOTH_MODULES)


@each_smooth_module
def test_module_is_found_without_an_example(kind: str) -> None:
    assert [f.path for f in validate(with_module(SMOOTH_MODULES[kind]))] == ["2.0"]


@each_smooth_module
def test_module_is_found_once_with_an_example(kind: str) -> None:
    assert [f.path for f in validate(with_module(SMOOTH_MODULES[kind]), X)] == ["2.0"]


@each_smooth_module
def test_module_is_refused_at_construction(kind: str) -> None:
    with pytest.raises(GateError, match=rf"2\.0: {type(SMOOTH_MODULES[kind]).__name__}"):
        DualCopy(with_module(SMOOTH_MODULES[kind]))


@each_smooth_module
def test_refusal_names_a_way_out(kind: str) -> None:
    with pytest.raises(GateError, match=r"use nn\.|by nn\.ReLU"):
        DualCopy(with_module(SMOOTH_MODULES[kind]))


SMOOTH_FUNCTIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "F.gelu": ("gelu", F.gelu),
    "F.gelu tanh": ("gelu", lambda x: F.gelu(x, approximate="tanh")),
    "F.silu": ("silu", F.silu),
    "F.silu inplace": ("silu", lambda x: F.silu(x, inplace=True)),
    "F.elu": ("elu", F.elu),
    "F.elu_": ("elu", lambda x: F.elu_(x)),
    "F.celu": ("celu", F.celu),
    "torch.celu": ("celu", torch.celu),
    "F.selu": ("selu", F.selu),
    "torch.selu_": ("selu", lambda x: torch.selu_(x)),
    "F.mish": ("mish", F.mish),
    "F.softplus": ("softplus", F.softplus),
    "F.hardswish": ("hardswish", F.hardswish),
    "F.hardsigmoid": ("hardsigmoid", F.hardsigmoid),
    "F.logsigmoid": ("logsigmoid", F.logsigmoid),
    "F.softsign": ("softsign", F.softsign),
    "F.tanhshrink": ("tanhshrink", F.tanhshrink),
    "F.softshrink": ("softshrink", F.softshrink),
    "x.hardshrink": ("hardshrink", lambda x: x.hardshrink(0.1)),
    "F.glu": ("glu", lambda x: F.glu(torch.cat([x, x], -1))),
    "torch.sigmoid": ("sigmoid", torch.sigmoid),
    "F.sigmoid": ("sigmoid", F.sigmoid),
    "x.sigmoid": ("sigmoid", lambda x: x.sigmoid()),
    "x.sigmoid_": ("sigmoid", lambda x: x.sigmoid_()),
    "torch.special.expit": ("sigmoid", torch.special.expit),
    "x * sigmoid": ("sigmoid", lambda x: x * torch.sigmoid(x)),
    "torch.tanh": ("tanh", torch.tanh),
    "F.tanh": ("tanh", F.tanh),
    "x.tanh": ("tanh", lambda x: x.tanh()),
    "nn.Sigmoid": ("sigmoid", nn.Sigmoid()),
    "nn.Tanh": ("tanh", nn.Tanh()),
}
each_smooth_function = pytest.mark.parametrize("spelling", SMOOTH_FUNCTIONS)


@each_smooth_function
def test_function_is_found_with_an_example(spelling: str) -> None:
    kind, f = SMOOTH_FUNCTIONS[spelling]
    (finding,) = validate(Calls(f), X)
    assert finding.path.startswith("block") and kind in finding.what


@each_smooth_function
def test_function_is_refused_at_the_first_forward(spelling: str) -> None:
    dual = DualCopy(Calls(SMOOTH_FUNCTIONS[spelling][1]))
    with pytest.raises(GateError, match="block"):
        dual(X)


@each_smooth_function
def test_function_is_refused_at_construction_with_an_example(spelling: str) -> None:
    with pytest.raises(GateError, match="block"):
        DualCopy(Calls(SMOOTH_FUNCTIONS[spelling][1]), example=X)


@each_smooth_function
def test_function_is_accepted_by_path_and_kind(spelling: str) -> None:
    kind, f = SMOOTH_FUNCTIONS[spelling]
    path = "block.f" if isinstance(f, nn.Module) else "block"
    model = Calls(f).eval()
    assert torch.equal(DualCopy(model, accept=[f"{path}:{kind}"])(X), model(X))


def test_refused_again_at_the_second_forward() -> None:
    dual = DualCopy(Calls(F.gelu))
    for _ in range(2):
        with pytest.raises(GateError):
            dual(X)


@pytest.mark.parametrize("first", [True, False])
def test_a_call_made_in_training_only_is_refused_there(first: bool) -> None:
    class Augmented(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.gelu(x) if self.training else x)

    dual = DualCopy(Augmented()).eval()
    if not first:
        dual(X)
    with pytest.raises(GateError, match="gelu"):
        dual.train()(X)


def test_one_finding_per_place_and_kind() -> None:
    def f(x: Tensor) -> Tensor:
        return F.gelu(F.gelu(x)) + F.silu(x)

    assert len(validate(Calls(f), X)) == 2


def test_findings_of_one_kind_are_counted_in_the_refusal() -> None:
    model = nn.Sequential(*[nn.GELU() for _ in range(5)], nn.SiLU(), nn.ReLU())
    with pytest.raises(GateError) as refusal:
        DualCopy(model)
    gelu, silu = str(refusal.value).split(" | ")
    assert gelu.endswith("accept=['0'] (and 4 more like it, all of them: accept=['*:gelu'])")
    assert silu.startswith("5: SiLU") and "more" not in silu


def test_the_remedy_for_all_of_a_kind_works() -> None:
    model = nn.Sequential(*[nn.GELU() for _ in range(5)], nn.ReLU())
    assert validate(model, X, accept=["*:gelu"]) == []


def test_the_refusal_is_one_line() -> None:
    with pytest.raises(GateError) as refusal:
        DualCopy(nn.Sequential(*[nn.GELU() for _ in range(5)], nn.ReLU()))
    assert "\n" not in str(refusal.value)


def test_the_refusal_is_an_error_for_users() -> None:
    assert issubclass(GateError, FedSQError)


def test_a_finding_reads_as_a_sentence() -> None:
    assert str(Finding("a.b", "GELU", "use ReLU")) == "a.b: GELU; use ReLU"


def test_a_finding_about_the_whole_model_says_so() -> None:
    assert str(Finding("", "no gate", "use ReLU")).startswith("the model itself: ")


@pytest.mark.parametrize("pool", [nn.FractionalMaxPool2d(2, 2), nn.FractionalMaxPool3d(2, 2)])
def test_fractional_pooling_is_refused(pool: nn.Module) -> None:
    with pytest.raises(GateError, match=r"nn\.MaxPool"):
        DualCopy(nn.Sequential(nn.ReLU(), pool))


@pytest.mark.parametrize("return_indices", [False, True])
def test_functional_fractional_pooling_is_refused(return_indices: bool) -> None:
    def f(x: Tensor) -> Any:
        return F.fractional_max_pool2d(F.relu(x), 2, 2, return_indices=return_indices)

    with pytest.raises(GateError, match="fractional"):
        DualCopy(Shifted(f))(torch.randn(1, 1, 6, 6))


@pytest.mark.parametrize("make", [torchvision.models.efficientnet_b0, torchvision.models.convnext_tiny])
def test_smooth_backbones_are_refused(make: Callable[..., nn.Module]) -> None:
    with torch.device("meta"):
        model = make(weights=None)
    assert validate(model)


# Output activations

OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "sigmoid module": nn.Sigmoid(),
    "in place": lambda x: x.sigmoid_(),
    "squeeze": lambda x: x[:, :1].sigmoid().squeeze(1),
    "view": lambda x: x.sigmoid().view(-1),
    "flatten": lambda x: x.sigmoid().flatten(),
    "float": lambda x: x.sigmoid().float(),
    "slice": lambda x: x.sigmoid()[:, 0],
    "tuple": lambda x: (x, x.sigmoid()),
    "dict": lambda x: {"probability": x.sigmoid(), "logits": x},
    "nested": lambda x: {"a": [{"b": (x.sigmoid(), 1)}]},
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_output_activation_is_fine(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Shifted(OUTPUTS[kind]))
    assert validate(model, X) == []


def test_output_activation_inside_an_object_is_fine() -> None:
    class Result:
        def __init__(self, probability: Tensor) -> None:
            self.probability = probability

    model = nn.Sequential(nn.ReLU(), Shifted(lambda x: Result(x.sigmoid())))
    assert validate(model, X) == []


@pytest.mark.parametrize(
    "f",
    [lambda x: x.sigmoid() * 2, lambda x: 1 - x.sigmoid(), lambda x: (x.sigmoid() * x, x), lambda x: x.sigmoid().log()],
)
def test_activation_that_is_computed_with_is_hidden(f: Callable[[Tensor], Any]) -> None:
    assert [finding.what for finding in validate(nn.Sequential(nn.ReLU(), Shifted(f)), X)] == [
        "hidden sigmoid has no fixed linear gate"
    ]


def test_output_activation_does_not_excuse_a_hidden_one() -> None:
    def f(x: Tensor) -> Tensor:
        return (x * x.sigmoid()).sigmoid()

    assert len(validate(nn.Sequential(nn.ReLU(), Shifted(f)), X)) == 1


# Recurrent cells

CELLS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(4, 4),
    "gru": lambda: nn.GRU(4, 4),
    "rnn": lambda: nn.RNN(4, 4),
}


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell = CELLS[kind]()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.cell(x)[0])
        return out


@pytest.mark.parametrize("kind", CELLS)
def test_recurrent_network_is_refused(kind: str) -> None:
    with pytest.raises(GateError, match="recurrent cells have smooth gates of their own"):
        DualCopy(Recurrent(kind))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("how", ["cell", "cell:{}", "c*", "*:{}"])
def test_recurrent_network_is_accepted_by_name(kind: str, how: str) -> None:
    model = Recurrent(kind).eval()
    x = torch.randn(5, 2, 4)
    assert torch.equal(DualCopy(model, accept=[how.format(kind)])(x), model(x))


@pytest.mark.parametrize(("cell", "kind"), [(nn.LSTMCell, "lstm"), (nn.GRUCell, "gru"), (nn.RNNCell, "rnn")])
def test_recurrent_cell_is_named_by_its_kind(cell: type[nn.Module], kind: str) -> None:
    model = with_module(cell(4, 4))
    assert validate(model, accept=[f"2.0:{kind}"]) == []
    assert validate(model) != []


# Accepting


@pytest.mark.parametrize("accept", ["2.0", "2.*", "*", "2.0:gelu", "*:gelu", "?.?", "[12].0"])
def test_accepted_module(accept: str) -> None:
    model = with_module(nn.GELU()).eval()
    assert torch.equal(DualCopy(model, accept=[accept])(X), model(X))


@pytest.mark.parametrize("accept", ["2", "0", "gelu", "2.0:silu", "GELU", ":gelu", ""])
def test_name_that_does_not_fit_accepts_nothing(accept: str) -> None:
    with pytest.raises(GateError):
        DualCopy(with_module(nn.GELU()), accept=[accept])


def test_accepting_one_place_leaves_the_others_refused() -> None:
    model = nn.Sequential(nn.ReLU(), nn.GELU(), nn.GELU())
    assert [f.path for f in validate(model, X, accept=["1"])] == ["2"]


def test_accepting_one_kind_leaves_the_others_refused() -> None:
    def f(x: Tensor) -> Tensor:
        return F.gelu(x) + F.silu(x)

    (finding,) = validate(Calls(f), X, accept=["block:gelu"])
    assert "silu" in finding.what


def test_accept_may_be_any_iterable() -> None:
    assert validate(with_module(nn.GELU()), X, accept=iter(["2.0"])) == []


def test_the_remedy_of_a_module_works() -> None:
    model = with_module(nn.GELU())
    (finding,) = validate(model, X)
    assert "accept=['2.0']" in finding.remedy
    assert validate(model, X, accept=["2.0"]) == []


def test_the_remedy_of_a_call_in_the_model_itself_works() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.gelu(x))

    (finding,) = validate(Root(), X)
    assert "accept=[':gelu']" in finding.remedy
    assert validate(Root(), X, accept=[":gelu"]) == []


def test_accepted_activation_is_the_quantitative_copys() -> None:
    dual = DualCopy(nn.Sequential(nn.ReLU(), Shifted(F.gelu)), accept=["1"])
    with torch.no_grad():
        dual.get_parameter("1.shift").fill_(2.0)
    # gelu(1 + 2), not gelu(1)
    torch.testing.assert_close(dual(torch.ones(1)), F.gelu(torch.tensor([3.0])))


# No gate at all, and modules that cannot be looked into


@pytest.mark.parametrize("model", [nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 2), nn.Softmax(-1)), nn.Identity()])
def test_no_gate_is_refused_at_the_first_forward(model: nn.Module) -> None:
    dual = DualCopy(model)
    with pytest.raises(GateError, match="no gate"):
        dual(X)


def test_no_gate_is_refused_at_construction_with_an_example() -> None:
    with pytest.raises(GateError, match="no gate"):
        DualCopy(nn.Linear(4, 2), example=X)


def test_no_gate_is_a_finding() -> None:
    (finding,) = validate(nn.Linear(4, 2), X)
    assert "no gate" in finding.what


def test_accepting_everything_does_not_make_a_gate() -> None:
    assert len(validate(nn.Sequential(nn.GELU()), X, accept=["*"])) == 1


def test_pooling_alone_is_no_gate_where_it_is_left_alone() -> None:
    (finding,) = validate(nn.Sequential(nn.MaxPool1d(2)), torch.randn(1, 1, 4), pooling="own")
    assert "no gate" in finding.what


def test_a_gate_that_training_alone_has_is_enough_there() -> None:
    class InTraining(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) if self.training else x

    assert DualCopy(InTraining()).train()(X).shape == X.shape


def test_a_dual_copy_is_refused() -> None:
    with pytest.raises(GateError, match=r"DualCopy already.*\.quantitative"):
        DualCopy(DualCopy(SmallNet()))


def test_a_dual_copy_inside_a_model_is_named() -> None:
    model = nn.Sequential(nn.ReLU(), DualCopy(SmallNet()))
    assert [f.path for f in validate(model, torch.randn(SMALL_INPUT))] == ["1"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
class TestTorchScript:
    @pytest.fixture
    def scripted(self) -> nn.Module:
        module: nn.Module = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        return module

    def test_scripted_model_is_refused(self, scripted: nn.Module) -> None:
        with pytest.raises(GateError, match="TorchScript"):
            DualCopy(scripted)

    def test_scripted_part_is_named(self, scripted: nn.Module) -> None:
        model = nn.Sequential(nn.ReLU(), scripted)
        assert "1" in [f.path for f in validate(model, X)]

    def test_traced_model_is_refused(self) -> None:
        with pytest.raises(GateError, match="TorchScript"):
            DualCopy(torch.jit.trace(nn.Sequential(nn.ReLU()), X))


# Looking leaves everything as it was


def test_validate_leaves_the_state_alone() -> None:
    model = SmallNet(0.5).train()
    before = copy.deepcopy(model.state_dict())
    validate(model, torch.randn(SMALL_INPUT))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_validate_draws_no_random_numbers() -> None:
    model, x = SmallNet(0.5).train(), torch.randn(SMALL_INPUT)
    before = torch.get_rng_state()
    validate(model, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_validate_leaves_the_mode_alone() -> None:
    model = SmallNet().train()
    validate(model, torch.randn(SMALL_INPUT))
    assert all(m.training for m in model.modules())


def test_validate_leaves_no_hook() -> None:
    model = SmallNet()
    validate(model, torch.randn(SMALL_INPUT))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_validate_leaves_the_example_alone() -> None:
    x = X.clone()
    validate(nn.Sequential(nn.LeakyReLU(inplace=True)), x)
    assert torch.equal(x, X)


def test_validate_makes_no_gradient() -> None:
    model, x = SmallNet(), torch.randn(SMALL_INPUT, requires_grad=True)
    validate(model, x)
    assert x.grad is None and all(p.grad is None for p in model.parameters())


def test_an_error_of_the_model_passes_through() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        validate(nn.Sequential(nn.Linear(5, 2), nn.ReLU()), X)


def test_a_sigmoid_that_is_written_into_is_hidden() -> None:
    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x).sigmoid().mul_(x)

    assert [finding.what for finding in validate(Swish(), torch.randn(2, 3))] == [
        "hidden sigmoid has no fixed linear gate"
    ]


def test_a_single_example_validates_a_model_in_training_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()).train()
    assert validate(model, torch.randn(1, 3)) == []
    assert model.training
