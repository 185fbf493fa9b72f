"""Weights files as users have them: state dicts under names, and keys under prefixes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedsq_plugin import DualCopy, models
from fedsq_plugin.errors import WeightsError
from fedsq_plugin.models import load_weights, open_weights, read_state

State = dict[str, Tensor]
HEAD = "fc"


class Net(nn.Module):
    """Convolution, batch normalisation, head."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2)
        self.relu, self.fc = nn.ReLU(), nn.Linear(2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.relu(self.bn(self.conv(x))).mean((2, 3)))
        return out


def state(value: float = 4, outputs: int = 3) -> State:
    return {key: torch.full_like(one, value) for key, one in Net(outputs).state_dict().items()}


def under(prefix: str, content: State | None = None) -> State:
    return {f"{prefix}{key}": value for key, value in (content or state()).items()}


def loaded(folder: Path, content: Any, name: str = "w.pt", value: float = 4) -> list[str]:
    """What loading a file says, once it is sure that all of it was loaded."""
    model, path = Net(), folder / name
    save_file(content, path) if name.endswith("safetensors") else torch.save(content, path)
    lines = load_weights(model, open_weights(path), HEAD)
    assert all(bool((one == value).all()) for one in model.state_dict().values())
    return lines


def refused(folder: Path, content: Any) -> str:
    """Why a file is not loaded, once it is sure that nothing of it was."""
    model, path = Net(), folder / "w.pt"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(content, path)
    with pytest.raises(WeightsError) as caught:
        load_weights(model, open_weights(path), HEAD)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


PREFIXES = ["_orig_mod.", "module.", "model.", "net.", "backbone.", "module._orig_mod.", "model.net._orig_mod.", "a/b."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_prefix_is_taken_off(tmp_path: Path, prefix: str, name: str) -> None:
    assert loaded(tmp_path, under(prefix), name) == [f"the prefix '{prefix}' is taken off the keys"]


def test_a_file_with_the_models_own_keys_needs_no_line(tmp_path: Path) -> None:
    assert loaded(tmp_path, state()) == []


@pytest.mark.parametrize(
    ("content", "nest"),
    [
        ({"state_dict": state(), "epoch": 3}, "state_dict"),
        ({"model_state_dict": state(), "optimizer_state_dict": {"state": {0: {"step": torch.ones(1)}}}},
         "model_state_dict"),
        ({"model": state(), "best_acc": torch.tensor(0.9)}, "model"),
        ({"net": state(), "acc": 91.2}, "net"),
        ({"checkpoint": {"model": {"state_dict": state()}}}, "checkpoint.model.state_dict"),
        ({"state_dict_ema": state()}, "state_dict_ema"),
        # Both are the same weights: there is nothing to choose.
        ({"last": state(), "best": state()}, "last"),
    ],
)  # fmt: skip
def test_a_state_dict_under_a_name_is_taken(tmp_path: Path, content: Any, nest: str) -> None:
    assert loaded(tmp_path, content)[0].startswith(f"the state dict under '{nest}' is taken")


def test_a_file_of_lightnings(tmp_path: Path) -> None:
    content = {
        **{"epoch": 2, "global_step": 10, "pytorch-lightning_version": "2.4.0", "hyper_parameters": {"lr": 0.1}},
        **{"callbacks": {}, "optimizer_states": [{"state": {}}], "loops": {"fit_loop": {"state_dict": {}}}},
        "state_dict": {**under("model."), "criterion.weight": torch.ones(3)},
    }
    assert loaded(tmp_path, content, "epoch=2.ckpt") == [
        "the state dict under 'state_dict' is taken; the prefix 'model.' is taken off the keys; "
        "left, because they are not the model's: criterion.weight"
    ]


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": state(), "state_dict_ema": state(5)},
        {"model": state(), "model_ema": under("module.", state(5))},
        {"state_dict": {**under("model."), **under("ema_model.", state(5))}},
        {**under("quantitative."), **under("structural.", state(5))},
        {**under("module.quantitative."), **under("module.structural.", state(5))},
        {**under("model/"), **under("memory momentum/", state(5)), **under("slot 0/", state(5))},
    ],
)
def test_averages_and_structural_copies_are_not_taken_and_said(tmp_path: Path, content: Any) -> None:
    (line,) = loaded(tmp_path, content)
    assert "fitting too, not taken: the " in line


@pytest.mark.parametrize(
    ("wrap", "line"),
    [
        (nn.DataParallel, "the prefix 'module.' is taken off the keys"),
        (torch.compile, "the prefix '_orig_mod.' is taken off the keys"),
        (lambda net: nn.DataParallel(torch.compile(net)), "the prefix 'module._orig_mod.' is taken off the keys"),
        (torch.optim.swa_utils.AveragedModel,
         "the prefix 'module.' is taken off the keys; left, because they are not the model's: n_averaged"),
    ],
)  # fmt: skip
def test_what_torch_itself_wraps_is_read(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module], line: str) -> None:
    net = Net()
    net.load_state_dict(state())
    assert loaded(tmp_path, dict(wrap(net).state_dict())) == [line]


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_part_that_was_wrapped_alone(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module], prefix: str) -> None:
    net = Net()
    net.load_state_dict(state())
    net.conv = wrap(net.conv)  # type: ignore[assignment]
    content = under(prefix, dict(net.state_dict()))
    assert f"{prefix}conv.weight" not in content
    (line,) = loaded(tmp_path, content)
    assert line.endswith("the names of wrappers ('module.', '_orig_mod.') are taken out of the keys")


def test_keys_of_which_some_have_a_prefix(tmp_path: Path) -> None:
    content = {f"module.{key}" if "conv" in key else key: value for key, value in state().items()}
    assert loaded(tmp_path, content) == ["the names of wrappers ('module.', '_orig_mod.') are taken out of the keys"]


def test_a_saved_run_of_fedsqs_is_a_weights_file(tmp_path: Path) -> None:
    net = Net()
    net.load_state_dict(state(5))
    dual = DualCopy(net)
    dual.load_state_dict(state())
    content = {key: value.contiguous().clone() for key, value in dual.full_state_dict().items()}
    (line,) = loaded(tmp_path, content, "FedSQ-seed0.safetensors")
    assert line == (
        "the prefix 'quantitative.' (the quantitative copy of a DualCopy) is taken off the keys; "
        "fitting too, not taken: the prefix 'structural.'"
    )
    assert all(bool((value == 4).all()) for value in read_state(tmp_path / "FedSQ-seed0.safetensors").values())


def test_a_head_of_another_size_under_a_prefix(tmp_path: Path) -> None:
    torch.save(under("model.", state(outputs=7)), tmp_path / "w.pt")
    lines = load_weights(Net(), open_weights(tmp_path / "w.pt"), HEAD)
    assert lines == [
        "the prefix 'model.' is taken off the keys",
        "head fc: the file has 7 outputs, the model 3; newly initialised",
    ]


@pytest.mark.parametrize(
    ("content", "places"),
    [
        ({**under("teacher."), **under("student.", state(5))}, ("the prefix 'teacher.'", "the prefix 'student.'")),
        ({"last": state(), "best": state(5)}, ("the nest 'last'", "the nest 'best'")),
        ({"a": under("module."), "b": state(5)}, ("the nest 'a' and the prefix 'module.'", "the nest 'b'")),
    ],
)
def test_two_state_dicts_that_fit_are_refused_by_name(tmp_path: Path, content: Any, places: tuple[str, ...]) -> None:
    message = refused(tmp_path, content)
    assert "is ambiguous" in message and all(place in message for place in places)


def test_shapes_tell_two_state_dicts_apart(tmp_path: Path) -> None:
    other = {key: torch.ones(5, *value.shape[1:]) if value.dim() else value for key, value in state().items()}
    assert loaded(tmp_path, {"one": state(), "other": other})[0].startswith("the state dict under 'one' is taken")


@pytest.mark.parametrize(
    ("content", "beginning"),
    [
        (under("backbone.", {k: v for k, v in state().items() if "fc" not in k}),
         "without the prefix 'backbone.', the file's tensors do not fit: 2 missing in the file (fc.weight 3x2"),
        ({"net": {k: v for k, v in state().items() if k != "bn.bias"}},
         "without the nest 'net', the file's tensors do not fit: 1 missing in the file (bn.bias 2)"),
        ({"state_dict": under("model.", {"conv.weight": torch.ones(1)})},
         "without the nest 'state_dict' and the prefix 'model.', the file's tensors do not fit: 1 of another shape"),
        ({"x.y": torch.ones(1)}, "the file's tensors do not fit: 7 missing"),
    ],
)  # fmt: skip
def test_a_state_dict_that_does_not_fit_is_refused_by_its_place(tmp_path: Path, content: Any, beginning: str) -> None:
    assert refused(tmp_path, content).startswith(beginning)


@pytest.mark.parametrize("broken", [3, "text", torch.eye(2).to_sparse()])
def test_what_is_no_tensor_under_a_prefix_is_refused(tmp_path: Path, broken: Any) -> None:
    message = refused(tmp_path, {**under("model."), "model.fc.bias": broken})
    assert message.startswith("weights file ") and "bias is " in message


def test_values_that_are_not_finite_under_a_prefix_are_refused(tmp_path: Path) -> None:
    content = under("model.", {**state(), "bn.bias": torch.tensor([1.0, float("nan")])})
    assert "bn.bias has values in the file that are not finite" in refused(tmp_path, {"state_dict": content})


def test_an_entry_that_the_model_has_not_finite_itself_may_be_so_in_the_file() -> None:
    model, mask = nn.Linear(1, 1), torch.tensor([0.0, float("-inf")])
    model.register_buffer("mask", mask.clone())
    weights = {"weight": torch.ones(1, 1), "bias": torch.ones(1), "mask": mask}
    assert load_weights(model, weights, None) == []
    with pytest.raises(WeightsError, match="bias has values in the file that are not finite"):
        load_weights(model, {**weights, "bias": torch.full((1,), float("inf"))}, None)


def test_code_beside_a_state_dict_never_runs(tmp_path: Path) -> None:
    torch.save({"state_dict": state(), "callback": Path}, tmp_path / "w.ckpt")
    with pytest.raises(WeightsError, match=r"which is code, not a tensor"):
        open_weights(tmp_path / "w.ckpt")


def test_a_state_dict_in_memory_may_have_a_prefix() -> None:
    model = Net()
    assert load_weights(model, under("module."), HEAD) == ["the prefix 'module.' is taken off the keys"]
    assert bool((model.fc.weight == 4).all())


def test_a_backbone_says_what_it_took(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = models.create("resnet18", 4, small_images=True).state_dict()
    torch.save({"state_dict": {f"net.{key}": value for key, value in weights.items()}}, tmp_path / "w.ckpt")
    model = models.create("dualcopy_resnet18", 4, weights=tmp_path / "w.ckpt", small_images=True)
    assert torch.equal(model.structural.conv1.weight, weights["conv1.weight"])
    assert any("the prefix 'net.' is taken off the keys" in line for line in caplog.messages)
