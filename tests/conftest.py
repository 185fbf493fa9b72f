"""Shared by all tests."""

from __future__ import annotations

import torch
from hypothesis import settings

# Several test processes share a small machine, and one thread makes sums come in one order.
torch.set_num_threads(1)
# A machine that is busy with something else makes no test fail.
settings.register_profile("fedsq", deadline=None)
settings.load_profile("fedsq")
