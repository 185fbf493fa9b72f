"""Weights & Biases, which FedML starts in `fedml.init`: what it fails with there. Nothing here imports FedML."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import ConfigError, in_one_line
from .names import backend_of

TEXTS = ("wandb_project", "wandb_entity", "run_name")
"""What FedML hands to W&B as it stands; it does not read wandb_key and wandb_name."""
NOT_IN_A_PROJECT = "/\\#?%:"


def tracking_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """One line per key of FedML's with which `fedml.init` ends in a trace, where the recipe turns W&B on."""
    enabled = values.get("enable_wandb")
    if enabled is not None and not isinstance(enabled, bool):
        yield f"tracking_args.enable_wandb is {enabled!r}, which FedML takes for true: write true or false"
    if not enabled:
        return
    if not values.get("wandb_project"):
        yield "tracking_args.wandb_project is missing; enable_wandb: true needs it"
    for key in TEXTS:
        value = values.get(key)
        if value is not None and not isinstance(value, str):
            yield f"tracking_args.{key} is {value!r}, and W&B takes a text: write it in quotes"
    project = str(values.get("wandb_project"))
    if found := [letter for letter in NOT_IN_A_PROJECT if letter in project]:
        yield f"tracking_args.wandb_project '{project}': W&B takes no {' '.join(found)} in it"
    if values.get("wandb_only_server") and backend_of(values) == ("simulation", "sp"):
        yield (
            "tracking_args.wandb_only_server is for several processes: in one process (backend sp) FedML ends with "
            "\"no attribute 'process_id'\"; leave it out"
        )


def start_failure(error: Exception) -> ConfigError | None:
    """What W&B said as it started, in one line; None where the error is none of its own."""
    raised_in = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not any(name.partition(".")[0] == "wandb" for name in raised_in):
        return None
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error  # "problem" is all that it may say
    return ConfigError(
        f"tracking_args.enable_wandb: W&B cannot start ({in_one_line(cause)}); log in by `wandb login`, or set "
        "WANDB_API_KEY or WANDB_MODE=offline (FedML does not read wandb_key), or enable_wandb: false"
    )
