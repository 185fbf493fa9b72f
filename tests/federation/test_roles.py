"""Roles of state-dict keys, found by module type and an explicit head."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from fedsq_plugin.dualcopy import DualCopy
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.roles import Role, roles


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return resnet18(num_classes=3)


def test_every_key_has_a_role_in_the_order_of_the_state_dict(resnet: nn.Module) -> None:
    assert list(roles(resnet, "fc")) == list(resnet.state_dict())


def test_resnet18_has_its_keys_by_role(resnet: nn.Module) -> None:
    # 20 convolutions (1 stem, 16 in blocks, 3 downsampling), a BatchNorm after each, and fc.
    assert Counter(roles(resnet, "fc").values()) == {
        Role.BODY: 20,
        Role.HEAD: 2,
        Role.NORM_PARAMETER: 20 * 2,
        Role.NORM_BUFFER: 20 * 2,
        Role.COUNTER: 20,
    }


@pytest.mark.parametrize("stage", [2, 3, 4])
def test_downsampling_norms_are_found_although_their_names_lack_bn(resnet: nn.Module, stage: int) -> None:
    found = roles(resnet)
    assert {key: found[f"layer{stage}.0.downsample.1.{key}"] for key in ("weight", "running_mean")} == {
        "weight": Role.NORM_PARAMETER,
        "running_mean": Role.NORM_BUFFER,
    }


def test_convolution_beside_a_norm_is_body(resnet: nn.Module) -> None:
    assert roles(resnet)["layer2.0.downsample.0.weight"] is Role.BODY


def test_without_a_head_nothing_is_head(resnet: nn.Module) -> None:
    found = roles(resnet)
    assert (found["fc.weight"], found["fc.bias"]) == (Role.BODY, Role.BODY)


def test_head_is_matched_by_whole_path_components() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(1, 1), "fc2": nn.Linear(1, 1)})
    assert [key for key, role in roles(model, "fc").items() if role is Role.HEAD] == ["fc.weight", "fc.bias"]


def test_norm_parameters_inside_the_head_have_a_role_of_their_own() -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))})
    assert roles(model, "head") == {
        "body.weight": Role.BODY,
        "body.bias": Role.BODY,
        "head.0.weight": Role.HEAD_NORM_PARAMETER,
        "head.0.bias": Role.HEAD_NORM_PARAMETER,
        "head.0.running_mean": Role.NORM_BUFFER,
        "head.0.running_var": Role.NORM_BUFFER,
        "head.0.num_batches_tracked": Role.COUNTER,
        "head.1.weight": Role.HEAD,
        "head.1.bias": Role.HEAD,
    }


def test_unknown_head_is_an_error_with_the_nearest_module(resnet: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"head 'fcc' is no module of the model; did you mean 'fc'\?"):
        roles(resnet, "fcc")


def test_empty_head_is_an_error_and_not_silently_no_head(resnet: nn.Module) -> None:
    with pytest.raises(ConfigError, match="head '' is no module of the model; known: avgpool, bn1"):
        roles(resnet, "")


def test_parameter_is_no_head() -> None:
    with pytest.raises(ConfigError, match=r"head '0\.weight' is no module"):
        roles(nn.Sequential(nn.Linear(1, 1)), "0.weight")


@pytest.mark.parametrize(
    "norm",
    [nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.RMSNorm(4), nn.InstanceNorm2d(4, affine=True), nn.LazyBatchNorm2d()],
    ids=lambda norm: type(norm).__name__,
)
def test_other_normalisations_are_found_by_type(norm: nn.Module) -> None:
    assert roles(nn.Sequential(norm))["0.weight"] is Role.NORM_PARAMETER


def test_norm_as_the_whole_model_is_found() -> None:
    assert list(roles(nn.BatchNorm1d(2)).values()) == [
        Role.NORM_PARAMETER,
        Role.NORM_PARAMETER,
        Role.NORM_BUFFER,
        Role.NORM_BUFFER,
        Role.COUNTER,
    ]


class Buffered(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)


def test_float_buffer_outside_a_norm_is_not_trained_and_so_a_norm_buffer() -> None:
    assert roles(Buffered(torch.zeros(2))) == {"value": Role.NORM_BUFFER}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_integer_and_boolean_entries_are_counters(dtype: torch.dtype) -> None:
    assert roles(Buffered(torch.zeros((), dtype=dtype))) == {"value": Role.COUNTER}


def test_complex_buffer_is_no_counter() -> None:
    assert roles(Buffered(torch.zeros(1, dtype=torch.complex64))) == {"value": Role.NORM_BUFFER}


def test_shared_module_has_a_role_under_both_names() -> None:
    norm = nn.BatchNorm1d(2)
    found = roles(nn.ModuleDict({"first": norm, "second": norm}))
    assert found["first.weight"] is found["second.weight"] is Role.NORM_PARAMETER


def test_tied_weight_is_a_parameter_under_both_names() -> None:
    encoder, decoder = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    decoder.weight = encoder.weight
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    assert roles(model) == {"encoder.weight": Role.BODY, "decoder.weight": Role.BODY}


def test_tied_tensor_has_one_role_that_of_its_first_name() -> None:
    embedding, head = nn.Embedding(2, 2), nn.Linear(2, 2, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    assert roles(model, "head") == {"embedding.weight": Role.BODY, "head.weight": Role.BODY}


def test_dualcopy_has_the_plain_models_roles(resnet: nn.Module) -> None:
    assert roles(DualCopy(resnet), "fc") == roles(resnet, "fc")
