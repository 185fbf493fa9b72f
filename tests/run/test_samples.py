"""Samples through a model before the first round: what is refused, and that nothing is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fedsq_plugin import DualCopy
from fedsq_plugin.algorithms import algorithm
from fedsq_plugin.errors import GateError
from fedsq_plugin.federation.reading import Batch
from fedsq_plugin.federation.training import LocalTraining
from fedsq_plugin.run.first_batches import Taken
from fedsq_plugin.run.samples import OneEpoch, SampleError, run_samples
from tests.algorithms.task import OPTIONS


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))


class Gelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu, self.layer = nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.layer(F.gelu(x)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wrap", [lambda net: net, DualCopy])
def test_the_model_and_the_generators_stay_as_they_are(wrap: type[DualCopy], training: bool) -> None:
    model, samples = wrap(network()), torch.randn(5, 4)
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    outputs = run_samples(model, samples, training)
    assert outputs.shape == (5, 3)
    assert model.training
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_call_that_cannot_be_gated_is_refused() -> None:
    with pytest.raises(GateError, match="gelu has no fixed linear gate"):
        run_samples(DualCopy(Gelu()), torch.randn(2, 4))
    assert run_samples(Gelu(), torch.randn(2, 4)).shape == (2, 3)


@pytest.mark.parametrize(
    ("samples", "training", "line"),
    [
        (torch.randn(2, 5), False, "the model does not run on a sample (mat1 and mat2 shapes cannot be"),
        (torch.randn(1, 4), True, "the model does not train on a batch of 1 (Expected more than 1 value"),
    ],
)
def test_samples_that_do_not_fit_are_an_error_with_fields(samples: Tensor, training: bool, line: str) -> None:
    with pytest.raises(SampleError) as caught:
        run_samples(network(), samples, training)
    error = caught.value
    assert str(error).startswith(line)
    assert (error.shape, error.count, error.training) == (samples.shape[1:], len(samples), training)
    assert str(error).endswith(f"({error.reason})")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_batch_is_tried_up_to_the_gradients_and_no_optimizer_takes_a_step(precision: str) -> None:
    model, seen, steps = network(), [], []
    before = [p.detach().clone() for p in model.parameters()]
    next(model.parameters()).register_hook(seen.append)
    training = LocalTraining(comm_round=1, client_optimizer="adam", precision=precision, clip_norm=1.0)
    batch = (torch.randn(6, 4), torch.arange(6) % 3)
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        OneEpoch(model, algorithm("FedAvg"), OPTIONS, training, 0).try_batch(
            Taken("silo 0", 0, batch), Batch(*batch), 1, "cpu"
        )
    finally:
        hook.remove()
    assert seen
    assert not steps
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))
