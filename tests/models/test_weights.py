import argparse
import os
import pickle
import re
import warnings
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedsq_plugin import DualCopy
from fedsq_plugin.errors import WeightsError
from fedsq_plugin.models import load_weights, read_state


def net(outputs=3):
    """A backbone in small: keys 0.weight, 1.* (BatchNorm), 5.weight and 5.bias (the head)."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, outputs),
    )


HEAD = "5"


def state(outputs=3, **replaced):
    """A state dict that fits `net`, of values that differ from every fresh one."""
    values = {key: torch.full_like(value, 4) for key, value in net(outputs).state_dict().items()}
    return values | {key.replace("_", ".", 1): value for key, value in replaced.items()}


def read_error(path):
    with pytest.raises(WeightsError) as caught:
        read_state(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def load_error(file, model=None, head=HEAD):
    """The message of the error that loading raises, once it is sure that nothing was loaded."""
    model = model or net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, file, head)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.bin", "W.PT"])
def test_every_format_gives_back_what_was_saved(tmp_path, name):
    path = tmp_path / name
    values = {
        "a": torch.tensor([[1.5, -2.0]]),
        "b": torch.tensor([0.1], dtype=torch.float16),
        "c": torch.tensor([3.0], dtype=torch.bfloat16),
        "n": torch.tensor(7),
    }
    save_file(values, path) if name.endswith("safetensors") else torch.save(values, path)
    for given in (path, str(path)):
        read = read_state(given)
        assert set(read) == set("abcn")
        for key, value in values.items():
            assert read[key].dtype == value.dtype and torch.equal(read[key], value)


def test_a_safetensors_file_need_not_be_the_pickled_kind(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    assert "is damaged or no safetensors file" in read_error(tmp_path / "w.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "w.pt")
    assert "is damaged or holds something else" in read_error(tmp_path / "w.pt")


def test_the_old_format_of_torch_save_is_read(tmp_path):
    torch.save(state(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_state(tmp_path / "w.pt")["0.weight"], torch.full((2, 1, 3, 3), 4.0))


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_nested_state_dict_is_taken_out(tmp_path, key):
    torch.save({"epoch": 3, key: OrderedDict(a=torch.ones(2))}, tmp_path / "w.pt")
    assert list(read_state(tmp_path / "w.pt")) == ["a"]


def test_a_tensor_that_is_called_model_is_a_tensor(tmp_path):
    torch.save({"model": torch.ones(2), "b": torch.ones(1)}, tmp_path / "w.pt")
    assert set(read_state(tmp_path / "w.pt")) == {"model", "b"}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_prefix_of_data_parallel_goes_only_when_every_key_has_it(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    save = save_file if suffix == "safetensors" else torch.save
    save({"module.a": torch.ones(1), "module.module.b": torch.ones(1)}, path)
    assert set(read_state(path)) == {"a", "module.b"}
    save({"module.a": torch.ones(1), "b": torch.ones(1)}, path)
    assert set(read_state(path)) == {"module.a", "b"}


def test_parameters_come_as_plain_tensors_without_gradient(tmp_path):
    torch.save({"a": nn.Parameter(torch.ones(2))}, tmp_path / "w.pt")
    value = read_state(tmp_path / "w.pt")["a"]
    assert type(value) is torch.Tensor and not value.requires_grad


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pt")
    assert list(read_state("~/w.pt")) == ["a"]


def test_a_path_without_a_file_is_refused(tmp_path):
    assert "does not exist; give 'imagenet' or a file (.safetensors, .pt" in read_error(tmp_path / "w.pt")
    (tmp_path / "folder.pt").mkdir()
    assert "does not exist" in read_error(tmp_path / "folder.pt")


@pytest.mark.parametrize("name", ["w.onnx", "w", "w.pt.zip"])
def test_another_suffix_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    assert "must end in .safetensors, .pt, .pth, .bin" in read_error(tmp_path / name)


@pytest.mark.parametrize(("name", "reader"), [("w.pt", "torch.load"), ("w.safetensors", "safetensors.torch.load_file")])
def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch, name, reader):
    def forbidden(*args, **kwargs):  # root, which tests may run as, could read any file
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(reader, forbidden)
    (tmp_path / name).write_bytes(b"x")
    assert read_error(tmp_path / name).endswith("cannot be read: Permission denied")


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "legacy.pt"])
def test_a_file_cut_anywhere_is_refused(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        save_file(state(), path)
    else:
        torch.save(state(), path, _use_new_zipfile_serialization=suffix == "pt")
    whole = path.read_bytes()
    for share in (0, 0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert "is damaged or " in read_error(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([torch.ones(1)], "holds list, not a state dict"),
        (torch.ones(1), "holds Tensor, not a state dict"),
        ({}, "holds an empty dict"),
        ({"model": {}}, "holds an empty dict"),
        ({"a": torch.ones(1), "epoch": 3}, "epoch is int, not a dense tensor"),
        ({"a": {"b": torch.ones(1)}}, "a is dict, not a dense tensor"),
        ({3: torch.ones(1)}, "has the key 3, not a name"),
        ({"a": torch.eye(2).to_sparse()}, "a is sparse, quantized or without values"),
        ({"a": torch.ones(2, device="meta")}, "a is sparse, quantized or without values"),
        ({"a\nb": 3}, "a b is int"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, what):
    torch.save(content, tmp_path / "w.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor is there more than the one line
        message = read_error(tmp_path / "w.pt")
    assert what in message and "torch.save(model.state_dict(), file)" in message


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    torch.save({"a": torch.ones(1).expand(10**12)}, tmp_path / "w.pt")
    assert "a is expanded, not a dense tensor" in read_error(tmp_path / "w.pt")


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["zip", "legacy", "raw"])
@pytest.mark.parametrize("suffix", ["pt", "pth", "bin"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, form, suffix, monkeypatch):
    # The variable that makes torch.load trust files must not matter here.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, marker = tmp_path / f"w.{suffix}", tmp_path / "ran"
    content = state() | {"x": Evil(marker)}
    if form == "raw":
        path.write_bytes(pickle.dumps({"x": Evil(marker)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    message = read_error(path)
    assert not marker.exists()
    if form == "raw":
        pickle.loads(path.read_bytes())
    else:
        assert "mkdir, which is code, not a tensor" in message
        torch.load(path, weights_only=False)
    assert marker.exists()  # the trap was a real one


def test_a_whole_module_or_its_options_are_refused(tmp_path):
    torch.save(net(), tmp_path / "w.pt")
    assert "holds torch.nn.modules.container.Sequential" in read_error(tmp_path / "w.pt")
    torch.save({"model": state(), "args": argparse.Namespace(lr=1)}, tmp_path / "w.pt")
    assert "holds argparse.Namespace" in read_error(tmp_path / "w.pt")


# Loading


def test_a_file_that_fits_is_loaded_whole_and_in_place():
    model = net()
    weight = model[0].weight
    assert load_weights(model, state(), HEAD) == []
    assert model[0].weight is weight and weight.requires_grad
    assert all(bool((value == 4).all()) for value in model.state_dict().values())
    assert model[1].num_batches_tracked.dtype == torch.int64


def test_a_head_of_another_size_keeps_its_new_values_and_is_reported():
    model = net(3)
    fresh = model[5].weight.clone(), model[5].bias.clone()
    assert load_weights(model, state(200), HEAD) == ["head 5: the file has 200 outputs, the model 3; newly initialised"]
    assert torch.equal(model[5].weight, fresh[0]) and torch.equal(model[5].bias, fresh[1])
    assert bool((model[0].weight == 4).all())


def test_a_head_that_differs_in_one_tensor_stays_whole():
    model = net(3)
    fresh = model[5].bias.clone()
    lines = load_weights(model, state(**{"5_weight": torch.ones(3, 9)}), HEAD)
    assert lines == ["head 5: the file has 3x9, the model 3x2; newly initialised"]
    assert torch.equal(model[5].bias, fresh)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load_into_float32(dtype):
    file = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state().items()}
    file["1.bias"] = torch.tensor([0.1, -2.0], dtype=dtype)
    model = net()
    load_weights(model, file, HEAD)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    # 0.1 in half precision is 1638 / 2^14; in bfloat16, 205 / 2^11.
    value = {torch.float16: 1638 / 2**14, torch.bfloat16: 205 / 2**11, torch.float64: 0.1}[dtype]
    assert model[1].bias.tolist() == torch.tensor([value, -2.0]).tolist()
    assert model[1].num_batches_tracked.dtype == torch.int64


def test_an_averaged_counter_is_rounded_and_stays_an_integer():
    model = net()
    load_weights(model, state(**{"1_num_batches_tracked": torch.tensor(12.6)}), HEAD)
    assert model[1].num_batches_tracked.dtype == torch.int64
    assert model[1].num_batches_tracked.item() == 13


def test_a_file_without_counters_loads():
    model = net()
    file = state()
    del file["1.num_batches_tracked"]
    assert load_weights(model, file, HEAD) == []
    assert model[1].num_batches_tracked.item() == 0
    whole = nn.Sequential(OrderedDict(fc=nn.Linear(1, 1), bn=nn.BatchNorm1d(1)))
    assert load_weights(whole, {k: v for k, v in whole.state_dict().items() if "num" not in k}, "fc") == []


def test_missing_and_unknown_keys_are_named():
    file = state()
    del file["1.bias"]
    assert load_error(file) == (
        "the file's tensors do not fit: 1 missing in the file (1.bias 2); use the model that the file was made with"
    )
    assert "1 unknown to the model (6.weight 3x1)" in load_error(state(**{"6_weight": torch.ones(3, 1)}))
    message = load_error({f"x{i}": torch.tensor(1.0) for i in range(5)})
    # Not the counter.
    assert "7 missing in the file (0.weight 2x1x3x3; 1.weight 2; 1.bias 2; 4 more)" in message
    assert "5 unknown to the model (x0 a single number; x1 a single number; " in message


@pytest.mark.parametrize("gone", [["5.weight"], ["5.bias"], ["5.weight", "5.bias"]])
@pytest.mark.parametrize("outputs", [3, 200])
def test_a_missing_head_is_missing(gone, outputs):
    file = {key: value for key, value in state(outputs).items() if key not in gone}
    assert f"{len(gone)} missing in the file ({gone[0]}" in load_error(file)


def test_another_shape_is_named_with_both():
    message = load_error(state(**{"1_weight": torch.ones(5)}))
    assert "1 of another shape (1.weight: file 5, model 2); use the model" in message
    # Only the stem is a matter of options.
    assert load_error(state(**{"0_weight": torch.ones(2, 1, 7, 7)})).endswith("needs small_images: false")
    assert load_error(state(**{"0_weight": torch.ones(2, 3, 3, 3)})).endswith("needs in_channels: 3")
    for wrong in (torch.ones(4, 1, 7, 7), torch.ones(2, 9)):
        assert load_error(state(**{"0_weight": wrong})).endswith("the file was made with")


@pytest.mark.parametrize("key", ["0_weight", "1_running_var", "5_bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(key, value):
    file = state()
    file[key.replace("_", ".", 1)].view(-1)[-1] = value
    message = load_error(file)
    assert key.replace("_", ".", 1) in message and "not finite in float32" in message


def test_a_head_that_is_left_out_must_be_finite_too():
    file = state(200)
    file["5.weight"][150, 1] = float("nan")
    assert "5.weight has values in the file that are not finite" in load_error(file)


def test_values_that_the_models_dtype_cannot_hold_are_refused():
    large = torch.full((2,), 1e300, dtype=torch.float64)
    assert "1.bias has values in the file that are not finite in float32" in load_error(state(**{"1_bias": large}))
    for value in (float("nan"), 1e30):
        file = state(**{"1_num_batches_tracked": torch.tensor(value)})
        assert "1.num_batches_tracked" in load_error(file)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_numbers_of_another_kind_are_refused(dtype):
    message = load_error(state(**{"1_bias": torch.ones(2, dtype=dtype)}))
    assert re.search(r"1\.bias is (int8|bool|complex64) in the file, float32 in the model", message)


def test_a_head_that_the_model_lacks_is_refused():
    assert "the model has no head 'fc'" in load_error(state(), head="fc")
    assert "the model has no head '2'" in load_error(state(), head="2")


def test_a_dual_copy_is_refused_because_its_structural_copy_would_stay_behind():
    assert "before the DualCopy is made" in load_error(state(), DualCopy(net()))


def test_a_name_with_control_characters_stays_on_one_printable_line():
    message = load_error(state(**{"a\nb\x1b[2J": torch.ones(1)}))
    assert "a b?[2J 1" in message and message.isprintable()
