"""What a recipe asks for that would silently do nothing, or not what is meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import models
from ..algorithms import algorithms, find
from ..data.flamby.backbones import MODELS
from ..data.registry import OURS, is_flamby
from ..models.backbones import PREFIX
from ..settings.config import OPTIONS, family_of

GATES = ("keep_gates", "gate_accept", "gate_pooling", "structural_copy", "structural_precision")
DATA = ("data_seed", "image_size", "min_client_samples")
PUBLIC = ("warm_start_public", "warm_start_momentum", "warm_start_batch_size", "warm_start_cache_dir")
RELU_ISE = tuple(key for key in OPTIONS if key.startswith("relu_ise_"))
LOOP = (
    *("keep_gates", "buffers", "nonfinite", "nesterov", "clip_norm", "sampling_seed", "structural_copy"),
    *("lr_schedule", "lr_decay", "lr_decay_rounds", "silo_evaluation", "finetune_epochs", "checkpoint_dir"),
    *("precision", "channels_last", "compile"),
)
"""Read by our own loop, trainer and aggregator alone."""


def unused(valid: Mapping[str, Any], ours: bool = True) -> list[str]:
    """A line for every option that is not at its default and has no effect beside the others.

    Args:
        valid: options that are valid by themselves; a wrong one is taken for one that has an effect.
        ours: whether our rows run the recipe, rather than FedML's own optimizer.
    """
    get = valid.get
    model, dataset, name = str(get("model", "")), str(get("dataset", "")), str(get("federated_optimizer", ""))
    warm, row = get("warm_start", "public"), find(name) if ours else None
    gated = model.startswith(PREFIX) or (row is not None and row.gated)
    idle: dict[str, str] = {}

    def mark(keys: tuple[str, ...], why: str) -> None:
        for key in keys:
            idle.setdefault(key, why)

    if not ours:
        if get("client_optimizer", "adam") == "sgd":
            mark(("momentum", "weight_decay"), f"FedML's own {name} trains by plain SGD")
        mark(LOOP, f"FedML's own {name} runs the rounds")
        if warm != "public":
            mark(("augmentation",), f"FedML's own {name} trains")
        if warm not in ("file", "imagenet"):
            mark(("head",), f"FedML's own {name} knows no head")
    if not gated and (row is not None or not ours):
        mark(GATES, f"{name} trains the plain model, without gates")
    if "model" in valid and model not in models.names():
        mark(("small_images",), f"{model} is none of our models")
    if is_flamby(dataset):
        mark((*DATA[1:], "partition_method", "partition_alpha"), f"the centres of {dataset} are the silos")
    elif "dataset" in valid and dataset not in OURS:
        mark(DATA, f"{dataset} is FedML's own data set")
    if ours and get("client_optimizer", "sgd") != "sgd":
        mark(("momentum",), f"{valid['client_optimizer']} has none")
    if row is not None:
        mark(tuple(_of_methods() - {*row.option_names, *GATES}), f"{name} does not read it")
    rounds = get("comm_round", float("inf"))
    if get("structural_rounds", 1) >= rounds:
        mark(("structural_copy",), f"the run ends after {rounds} rounds")
    if get("structural_copy", "ema") == "fixed":
        mark(("structural_rounds",), "structural_copy is 'fixed'")
    if get("structural_copy", "ema") != "ema":
        mark(("structural_decay",), f"structural_copy is '{valid['structural_copy']}'")
    own = row.finetune_epochs if row is not None else 0
    if get("using_gpu") and get("backend") == "sp":
        mark(("gpu_mapping_file", "gpu_mapping_key"), "sp is one process, on gpu_id")
    tuning = get("finetune_epochs", 1)
    if not (own if tuning is None else tuning):
        mark(("finetune_part",), "there is no final fine-tuning")
    road = get("training_type", "simulation"), get("backend", "")
    if road == ("simulation", "sp"):
        mark(("min_clients", "round_timeout_s", "server_return_s"), "sp is one process")
    if road[1] == "MPI":
        mark(("server_return_s",), "over MPI all processes end with the server")
    if row is not None and "extra" not in row.option_names:
        mark(("extra",), f"{name} does not read it")
    relu_ise = get("relu_ise", True)
    if not relu_ise:
        mark(RELU_ISE, "relu_ise is false")
    if warm != "public":
        mark(("warm_start_epochs",), f"warm_start is '{warm}'")
        if not relu_ise:
            mark(("warm_start_learning_rate", *PUBLIC), f"warm_start is '{warm}'")
    if get("backend", "GRPC") == "sp":
        mark(("tls_cert", "tls_key", "tls_ca"), "backend sp is one process")
    if get("lr_schedule", "step") != "step":
        mark(("lr_decay", "lr_decay_rounds"), f"lr_schedule is '{valid['lr_schedule']}'")
    return [
        f"{family_of(key)}.{key} has no effect: {why}"
        for key, why in idle.items()
        if key in valid and valid[key] != OPTIONS[key].default
    ]


def _of_methods() -> set[str]:
    """The options that only some algorithms read."""
    return {key for row in algorithms().values() for key in row.option_names}


def untrained_gates(valid: Mapping[str, Any]) -> list[str]:
    """A line when the gates of one of our models are frozen before anything was learned."""
    model, row = str(valid.get("model", "")), find(str(valid.get("federated_optimizer", "")))
    gated = model.startswith(PREFIX) or (row is not None and row.gated)
    if gated and model in (*models.names(), *MODELS) and valid.get("warm_start", "none") == "none":
        return ["warm_start is none: the gates of random weights are frozen; FedSQ is meant for pretrained ones"]
    return []


def compiled_for_cpu(valid: Mapping[str, Any]) -> list[str]:
    """A line when torch.compile is asked for where it costs time."""
    if not valid.get("compile") or valid.get("using_gpu"):
        return []
    return ["compile is true and using_gpu false: on a CPU, compiled steps were slower than plain ones"]
