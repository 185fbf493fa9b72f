"""Shared by the tests of FLamby."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def plain_path() -> Iterator[Path]:
    """Without 'test' in it: FLamby takes such slides of Camelyon for test data."""
    with tempfile.TemporaryDirectory(prefix="fedsq-") as folder:
        yield Path(folder)
