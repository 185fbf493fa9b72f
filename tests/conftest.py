"""Shared by all tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings

FEDML = "tests/hosts/fedml"

# Several test processes share a small machine, and one thread makes sums come in one order.
torch.set_num_threads(1)
# A machine that is busy with something else makes no test fail.
settings.register_profile("fedsq", deadline=None)
settings.load_profile("fedsq")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, all tests of a file run in one process; so do all tests in FedML, because they start processes that
    listen on ports and have deadlines."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return FEDML if nodeid.startswith(FEDML) else nodeid.partition("::")[0]

    return Scheduling(config, log)
