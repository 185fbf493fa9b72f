"""W&B under FedML: what `fedml.init` fails with is one line, before anything runs and in `fedsq check`."""

from __future__ import annotations

from typing import Any

import pytest

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.hosts.fedml.tracking import tracking_problems

from .conftest import MakeArgs

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "for the server alone, in one process": (
        {"wandb_project": "p", "wandb_only_server": True},
        "tracking_args.wandb_only_server is for several processes",
    ),
    "no project": ({}, "tracking_args.wandb_project is missing"),
    "an entity without a project": ({"wandb_entity": "e"}, "tracking_args.wandb_project is missing"),
    "a project that is a number": ({"wandb_project": 12}, "tracking_args.wandb_project is 12, and W&B takes a text"),
    "a run's name that is a number": (
        {"wandb_project": "p", "run_name": 12},
        "tracking_args.run_name is 12, and W&B takes a text",
    ),
    "a project with a slash": ({"wandb_project": "a/b"}, "tracking_args.wandb_project 'a/b': W&B takes no / in it"),
    "a switch that is a word": (
        {"wandb_project": "p", "enable_wandb": "false"},
        "tracking_args.enable_wandb is 'false', which FedML takes for true",
    ),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_wandb_fails_with_is_one_line_at_the_start(
    name: str, fedml: Any, make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def never(**options: Any) -> None:
        raise AssertionError("W&B was started")

    monkeypatch.setattr(wandb, "init", never)
    options, line = WRONG[name]
    with pytest.raises(ConfigError) as refusal:
        make_args(**{"enable_wandb": True, **options})
    assert line in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_is_right_or_turned_off_is_let_through() -> None:
    good = {"enable_wandb": True, "wandb_project": "p", "wandb_entity": "e", "run_name": "r", "wandb_key": "none"}
    for values in (
        good,
        {**good, "enable_wandb": False, "wandb_project": None, "wandb_only_server": True},
        {"wandb_only_server": True, "run_name": 1},
        {**good, "wandb_only_server": True, "backend": "MPI", "training_type": "simulation"},
        {**good, "wandb_only_server": True, "backend": "GRPC", "training_type": "cross_silo"},
    ):
        assert list(tracking_problems(values)) == []


def test_wandb_without_a_login_is_one_line(
    fedml: Any, make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """The real wandb.init, which finds no key and no terminal to ask at."""
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"W&B cannot start \(.*WANDB_MODE=offline .FedML does not read wandb_key."):
        make_args(enable_wandb=True, wandb_project="p", wandb_key="none")


def test_another_error_of_the_start_is_not_called_wandbs(
    fedml: Any, make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(args: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(fedml, "_manage_profiling_args", broken)
    with pytest.raises(OSError, match="the disk is full"):
        make_args(enable_wandb=True, wandb_project="p")
