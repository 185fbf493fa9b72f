"""The MLP for tabular data."""

from __future__ import annotations

import torch

from fedsq_plugin.dualcopy import DualCopy, validate
from fedsq_plugin.models.mlp import Mlp


def test_it_has_a_gate_for_every_hidden_unit_and_a_head() -> None:
    model = Mlp(13, 2)
    assert model(torch.randn(5, 13)).shape == (5, 2)
    assert [p.numel() for p in model.parameters()] == [13 * 64, 64, 64 * 64, 64, 64 * 2, 2]
    assert validate(model, (torch.randn(2, 13),)) == [] and model.head.out_features == 2


def test_a_probability_is_the_sigmoid_of_the_head_and_needs_no_gate() -> None:
    torch.manual_seed(0)
    model, x = Mlp(3, 1, hidden=(4,), probability=True), torch.randn(6, 3)
    assert torch.equal(model(x), torch.sigmoid(model.head(model.body(x))))
    assert torch.equal(DualCopy(model).eval()(x), model.eval()(x))
