"""What the processes of a run, and a run that is resumed, must have in common: options of the recipe."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .config import Config

MUST_AGREE = (
    *("model", "small_images", "image_size", "head", "federated_optimizer", "dataset", "partition_method"),
    *("partition_alpha", "client_num_in_total", "min_client_samples", "data_seed", "random_seed"),
    *("warm_start", "warm_start_public", "relu_ise", "epochs", "batch_size", "client_optimizer"),
    *("learning_rate", "momentum", "nesterov", "weight_decay", "clip_norm", "lr_schedule", "lr_decay"),
    *("lr_decay_rounds", "augmentation", "fedprox_mu", "gate_accept", "gate_pooling", "buffers"),
    *("head_epochs", "probe_rounds", "frozen_modules", "comm_round", "finetune_epochs", "finetune_part"),
    "extra",
)
"""Options that server and silos must share."""


def shared_options(config: Config) -> dict[str, str]:
    """A short fingerprint of each option that must agree."""
    values = config.model_dump(mode="json")
    return {
        key: hashlib.sha256(json.dumps(values[key], sort_keys=True).encode()).hexdigest()[:16]
        for key in MUST_AGREE
    }


def disagreement(ours: dict[str, str], theirs: Any) -> str | None:
    """The options in which two sides differ, in words."""
    if not isinstance(theirs, dict):
        return "it sent no options"
    different = [key for key, value in ours.items() if theirs.get(key) != value]
    return f"its recipe has another {', '.join(different)}" if different else None
