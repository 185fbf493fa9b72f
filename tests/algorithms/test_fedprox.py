"""FedProx: what it adds to the loss, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from fedsq_plugin.algorithms import algorithm
from fedsq_plugin.algorithms.fedprox import proximal
from fedsq_plugin.federation.state import fingerprint

from .task import AllOptions, Federation, changed, mlp


def test_fedavg_adds_nothing() -> None:
    assert algorithm("FedAvg").objective.make(AllOptions()) is None


def test_proximal_term_by_hand() -> None:
    # 0.5/2·((3-1)² + (1-1)² + (-2-1)²) = 0.25·(4 + 0 + 9)
    term = proximal(AllOptions(fedprox_mu=0.5))
    now, start = [torch.tensor([3.0, 1.0]), torch.tensor([[-2.0]])], [torch.ones(2), torch.ones(1, 1)]
    assert term(now, start).item() == 3.25


def test_gradient_of_the_proximal_term_by_hand() -> None:
    # μ·(w - w_global) = 0.5·(2, 0, -3)
    term = proximal(AllOptions(fedprox_mu=0.5))
    w = torch.tensor([3.0, 1.0, -2.0], requires_grad=True)
    term([w], [torch.ones(3)]).backward()
    assert w.grad is not None
    assert w.grad.tolist() == [1.0, 0.0, -1.5]


def test_proximal_term_is_zero_at_the_start() -> None:
    term = proximal(AllOptions(fedprox_mu=7.0))
    assert term([torch.ones(3)], [torch.ones(3)]).item() == 0.0


def test_parameters_without_their_start_are_refused() -> None:
    term = proximal(AllOptions())
    with pytest.raises(ValueError, match="zip"):
        term([torch.ones(1), torch.ones(1)], [torch.ones(1)])


# Federations


def test_fedprox_with_mu_zero_is_fedavg() -> None:
    prox = Federation("FedProx", options=changed(fedprox_mu=0.0)).repeat(5)
    assert fingerprint(prox.state) == fingerprint(Federation("FedAvg").repeat(5).state)


def test_large_mu_keeps_the_model_near_its_start() -> None:
    def distance(mu: float) -> float:
        found = Federation("FedProx", options=changed(fedprox_mu=mu)).repeat(1).state
        return sum(float((found[key] - p.detach()).square().sum()) for key, p in mlp().named_parameters())

    assert distance(5.0) < distance(0.5) < distance(0.0)
