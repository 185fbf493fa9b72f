"""Networks for FLamby's data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedsq_plugin import DualCopy
from fedsq_plugin.data.flamby.backbones import create, factory
from fedsq_plugin.data.flamby.catalogue import CATALOGUE, FlambyData
from fedsq_plugin.errors import ConfigError, WeightsError

TABULAR = [row for row in CATALOGUE.values() if row.features]


def made(dataset: str, backbone: str, weights: str | None = None) -> Any:
    return factory(CATALOGUE[f"flamby/{dataset}"], backbone, weights, nn.Linear)


@pytest.mark.parametrize("backbone", ["mlp", "mlp_bn"])
@pytest.mark.parametrize("about", TABULAR, ids=lambda about: about.name)
def test_an_mlp_fits_the_data_set_and_has_gates(about: FlambyData, backbone: str) -> None:
    net = made(about.name, backbone)()
    assert any(isinstance(module, nn.BatchNorm1d) for module in net.modules()) == (backbone == "mlp_bn")
    x = torch.randn(3, about.features or 0)
    assert net(x).shape == (3, about.outputs)
    assert torch.equal(DualCopy(net).eval()(x), net.eval()(x))
    recipe = create(backbone, about.key, about.outputs, seed=0)
    assert recipe.state_dict().keys() == net.state_dict().keys()


def test_isic_has_our_backbones_with_its_classes() -> None:
    net = made("fed_isic2019", "alexnet")()
    assert net.get_submodule("classifier.6").out_features == 8


def test_baseline_is_flambys_own_with_the_arguments_that_it_is_given() -> None:
    net = made("fed_camelyon16", "baseline")(768, 2)
    assert (net.in_features, net.out_features) == (768, 2)


def test_weights_are_what_it_begins_with(tmp_path: Path) -> None:
    file = tmp_path / "heart.pt"
    begun = made("fed_heart_disease", "mlp")()
    torch.save(begun.state_dict(), file)
    again = made("fed_heart_disease", "mlp", str(file))()
    assert all(torch.equal(a, b) for a, b in zip(begun.parameters(), again.parameters(), strict=True))
    with pytest.raises(WeightsError, match="do not fit"):
        made("fed_tcga_brca", "mlp", str(file))()


@pytest.mark.parametrize(
    ("dataset", "backbone", "weights", "said"),
    [
        ("fed_ixi", "mlp", None, "fed_ixi can have baseline"),
        ("fed_heart_disease", "resnet18", None, "fed_heart_disease can have baseline, mlp, mlp_bn"),
        ("fed_heart_disease", "mlp", "imagenet", "there are none for mlp"),
    ],
)
def test_what_a_data_set_cannot_have_is_said(dataset: str, backbone: str, weights: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made(dataset, backbone, weights)
