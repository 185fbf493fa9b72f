"""Shared by all tests."""

from __future__ import annotations

import torch

# Several test processes share a small machine, and one thread makes sums come in one order.
torch.set_num_threads(1)
