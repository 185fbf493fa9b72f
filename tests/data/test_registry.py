"""Data sets by name."""

from __future__ import annotations

import pytest

from fedsq_plugin.data.registry import NAMES, is_flamby, load
from fedsq_plugin.errors import ConfigError

from .recipes import config


def test_all_names_are_known() -> None:
    assert {"digits", "image_folder", "flamby/fed_ixi", "flamby/fed_synthetic"} <= set(NAMES)
    assert [name for name in NAMES if not is_flamby(name)] == ["digits", "image_folder"]


@pytest.mark.parametrize(("name", "nearest"), [("digit", "digits"), ("flamby/ixi", "flamby/fed_ixi"), ("cifar10", "")])
def test_an_unknown_name_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"data_args.dataset '{name}' is unknown.*{nearest}"):
        load(config(dataset=name))
