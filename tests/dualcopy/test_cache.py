"""Gates kept for inputs that come again, against the structural copy run anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedsq_plugin import DualCopy
from fedsq_plugin.dualcopy import GateCache
from fedsq_plugin.errors import GateError


def moved(seed: int = 0) -> DualCopy:
    """Two regions, three regions and pooling, under a quantitative copy that has moved away."""
    torch.manual_seed(seed)
    dual = DualCopy(
        nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(5, 7, 3),
            nn.ReLU6(),
            nn.Flatten(),
            nn.Linear(28, 3),
        )
    )
    with torch.no_grad():
        for p in dual.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return dual


def test_output_and_gradients_are_those_of_the_dualcopy() -> None:
    dual, x = moved(), torch.randn(6, 3, 8, 8)
    cache = GateCache(dual)
    grads = []
    for forward in (dual, cache, cache):
        dual.zero_grad()
        output = forward(x)
        output.square().sum().backward()
        grads.append([output, *(p.grad.clone() for p in dual.parameters())])
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=0, atol=0)


def test_a_sample_passes_the_structural_copy_once() -> None:
    dual, x = moved(), torch.randn(6, 3, 8, 8)
    cache, runs = GateCache(dual), []
    dual.structural.register_forward_pre_hook(lambda _, args: runs.append(len(args[0])))
    dual(x)  # the first forward is inspected, too
    runs.clear()
    cache(x[:4])
    cache(x[[3, 2, 1, 0]])
    cache(x)
    cache(x[[5, 0]])
    assert runs == [4, 2]
    assert (cache.hits, cache.misses) == (4 + 4 + 2, 4 + 2)


def test_shuffled_samples_get_their_own_gates() -> None:
    dual, x = moved(), torch.randn(6, 3, 8, 8)
    cache = GateCache(dual)
    cache(x)
    order = torch.tensor([4, 0, 5])
    torch.testing.assert_close(cache(x[order]), dual(x[order]))


def test_memory_is_one_bit_for_two_regions_and_one_byte_for_others() -> None:
    cache = GateCache(moved())
    cache(torch.randn(2, 3, 8, 8))
    # ReLU 5·8·8 bits = 40 bytes; pooling codes 5·4·4 = 80; ReLU6 7·2·2 = 28 bytes; two samples.
    assert cache.nbytes == 2 * (40 + 80 + 28)


def test_beyond_the_limit_nothing_is_added_and_results_stay_right() -> None:
    dual, x = moved(), torch.randn(4, 3, 8, 8)
    cache = GateCache(dual, limit=2 * 148)
    for _ in range(2):
        torch.testing.assert_close(cache(x), dual(x))
    assert cache.nbytes == 2 * 148
    assert cache.misses == 4 + 2


def test_a_refreshed_structural_copy_makes_kept_gates_void() -> None:
    dual, x = moved(), torch.randn(4, 3, 8, 8)
    cache = GateCache(dual)
    before = cache(x)
    dual.refresh()
    after = cache(x)
    torch.testing.assert_close(after, dual(x))
    assert not torch.allclose(after, before)


def test_calls_without_a_row_per_sample_are_refused() -> None:
    class Folded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x.view(-1, 2)).view(x.shape)

    with pytest.raises(GateError, match="has not one row per sample"):
        GateCache(DualCopy(Folded()))(torch.randn(3, 4))


def test_samples_of_several_sizes_keep_gates_of_their_own() -> None:
    torch.manual_seed(0)
    dual = DualCopy(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)))
    cache, small, large = GateCache(dual), torch.randn(2, 1, 5, 5), torch.randn(2, 1, 7, 7)
    for x in (small, large, small, large):
        torch.testing.assert_close(cache(x), dual(x))
    assert (cache.hits, cache.misses) == (4, 4)


def test_equal_bytes_in_another_shape_are_another_sample() -> None:
    dual = DualCopy(nn.Sequential(nn.ReLU()))
    cache, x = GateCache(dual), torch.randn(2, 6)
    cache(x)
    assert cache(x.view(2, 2, 3)).shape == (2, 2, 3)


def test_an_empty_batch_has_empty_gates() -> None:
    dual = DualCopy(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    assert GateCache(dual)(torch.zeros(0, 3)).shape == (0, 4)
