"""What the processes of a run, and a run that is resumed, must have in common: options of the recipe."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .config import OPTIONS, Config

MUST_AGREE = (
    *("model", "small_images", "image_size", "head", "federated_optimizer", "dataset", "partition_method"),
    *("partition_alpha", "client_num_in_total", "min_client_samples", "data_seed", "random_seed"),
    *("warm_start", "warm_start_public", "relu_ise", "epochs", "batch_size", "client_optimizer"),
    *("learning_rate", "momentum", "nesterov", "weight_decay", "clip_norm", "lr_schedule", "lr_decay"),
    *("lr_decay_rounds", "augmentation", "fedprox_mu", "gate_accept", "gate_pooling", "buffers"),
    *("head_epochs", "probe_rounds", "frozen_modules", "comm_round", "finetune_epochs", "finetune_part"),
    *("structural_precision", "channels_last", "compile", "extra"),
)
"""Options that server and silos must share."""

MAY_CHANGE = frozenset(
    (
        *("checkpoint_dir", "checkpoint_every", "resume", "threads", "using_gpu"),
        *("data_cache_dir", "warm_start_file", "warm_start_cache_dir"),
        *("min_clients", "round_timeout_s", "server_return_s", "nonfinite"),
        *("tls_cert", "tls_key", "tls_ca"),
        *(key for key in OPTIONS if key.startswith("gpu_")),
    )
)
"""Options that a resumed run may have otherwise."""


def kept_options(config: Config) -> dict[str, Any]:
    """The options that a resumed run must have as it had them."""
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in MAY_CHANGE}


SHOWN = 80
"""Characters of a value that a message or a line may have."""
_HASHED = "sha256:"


def shared_options(config: Config) -> dict[str, str]:
    """Each option that must agree, as JSON; by its hash where that is long, or nobody's business."""
    values = config.model_dump(mode="json")
    return {key: _shown(key, json.dumps(values[key], sort_keys=True)) for key in MUST_AGREE}


def disagreement(ours: dict[str, str], theirs: Any) -> str | None:
    """The options in which two sides differ, with both values, in words."""
    if not isinstance(theirs, dict):
        return "it sent no options"
    different = [_difference(key, value, theirs.get(key)) for key, value in ours.items()]
    said = [line for line in different if line]
    return f"its recipe has {', '.join(said)}" if said else None


def _shown(key: str, value: str) -> str:
    # A third party's options may hold a path, or a token.
    if key != "extra" and len(value) <= SHOWN:
        return value
    return _HASHED + hashlib.sha256(value.encode()).hexdigest()[:16]


def _difference(key: str, ours: str, theirs: Any) -> str | None:
    if isinstance(theirs, str) and theirs == ours:
        return None
    if not isinstance(theirs, str):
        return f"no {key}"
    if _HASHED in ours + theirs:
        return f"another {key}"
    return f"{key} {' '.join(theirs.split())[:SHOWN]} instead of {ours}"
