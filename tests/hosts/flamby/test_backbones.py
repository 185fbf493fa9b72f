"""Networks for FLamby's data sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fedsq_plugin import DualCopy
from fedsq_plugin.errors import ConfigError, WeightsError
from fedsq_plugin.hosts.flamby.backbones import factory
from fedsq_plugin.hosts.flamby.catalogue import CATALOGUE

TABULAR = {row.name: row for row in CATALOGUE.values() if row.features}


@pytest.mark.parametrize("dataset", list(TABULAR))
def test_an_mlp_fits_the_data_set_and_has_gates(dataset: str) -> None:
    net = factory(dataset, "mlp", None, nn.Linear)()
    shape = (3, TABULAR[dataset].features)
    x = torch.randn(shape)
    assert net(x).shape == (3, TABULAR[dataset].outputs)
    assert torch.equal(
        DualCopy(
            net,
        ).eval()(x),
        net.eval()(x),
    )  # type: ignore[arg-type]


def test_isic_has_our_backbones_with_its_classes() -> None:
    net = factory("fed_isic2019", "alexnet", None, nn.Linear)()
    assert net.get_submodule("classifier.6").out_features == 8


def test_baseline_is_flambys_own_with_the_arguments_that_it_is_given() -> None:
    net = factory("fed_camelyon16", "baseline", None, nn.Linear)(768, 2)
    assert (net.in_features, net.out_features) == (768, 2)


def test_weights_are_what_it_begins_with(tmp_path: Path) -> None:
    file = tmp_path / "heart.pt"
    begun = factory("fed_heart_disease", "mlp", None, None)()
    torch.save(begun.state_dict(), file)
    again = factory("fed_heart_disease", "mlp", str(file), None)()
    assert all(torch.equal(a, b) for a, b in zip(begun.parameters(), again.parameters(), strict=True))
    with pytest.raises(WeightsError, match="do not fit"):
        factory("fed_tcga_brca", "mlp", str(file), None)()


@pytest.mark.parametrize(
    ("dataset", "backbone", "weights", "said"),
    [
        ("fed_ixi", "mlp", None, "fed_ixi can have baseline"),
        ("fed_heart_disease", "resnet18", None, "fed_heart_disease can have baseline, mlp, mlp_bn"),
        ("fed_heart_disease", "mlp", "imagenet", "there are none for mlp"),
    ],
)
def test_what_a_data_set_cannot_have_is_said(
    dataset: str, backbone: str, weights: str | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        factory(dataset, backbone, weights, nn.Linear)
