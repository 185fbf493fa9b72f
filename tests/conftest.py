"""Shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

FEDML = Path(__file__).parent / "hosts" / "fedml"

# Several test processes share a small machine, and one thread makes sums come in one order.
torch.set_num_threads(1)
# A machine that is busy with something else makes no test fail.
settings.register_profile("fedsq", deadline=None)
settings.load_profile("fedsq")


def pytest_itemcollected(item: pytest.Item) -> None:
    """The groups of `--dist loadgroup`: a file is one. So are all tests in FedML: they start processes that listen on
    ports and have deadlines."""
    item.add_marker(pytest.mark.xdist_group("fedml" if FEDML in item.path.parents else str(item.path)))
