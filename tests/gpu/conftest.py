"""Tests that need an NVIDIA GPU; without one they are skipped, and say so."""

from __future__ import annotations

import pytest
import torch

COMMAND = "on a GPU node: pip install -e '.[test]' && pytest tests/gpu"


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip(f"torch sees no GPU; {COMMAND}")
    return torch.device("cuda:0")
