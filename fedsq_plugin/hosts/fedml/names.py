"""What FedML 0.9.6 knows by name, and what it must be told. Nothing here imports FedML."""

from __future__ import annotations

from typing import Any

NATIVE_SP = (
    *("FedAvg", "FedOpt", "FedNova", "FedDyn", "FedProx", "SCAFFOLD", "Mime"),
    *("HierarchicalFL", "turbo_aggregate", "classical_vertical"),
)
"""Algorithms that FedML's `sp` runs by itself."""

FEDML_MODELS: dict[str, tuple[str, ...]] = {
    "lr": ("mnist", "cifar10", "stackoverflow_lr"),
    "cnn_web": ("cifar10",),
    "cnn": ("mnist", "femnist"),
    "resnet18_gn": ("fed_cifar100",),
    "rnn": ("shakespeare", "fed_shakespeare", "stackoverflow_nwp"),
    "darts": ("cifar10",),
    **dict.fromkeys(("resnet56", "mobilenet", "mobilenet_v3", "efficientnet"), ()),
}
"""What fedml.model.create knows by name, and the data sets that it has it for; none named: for all."""

WITHOUT_GATES = ("lr", "rnn")
"""Models of FedML's without a piecewise-linear activation."""

SETS_CLIENT_NUMBER = (
    *("mnist", "femnist", "shakespeare", "fed_shakespeare", "fed_cifar100", "stackoverflow_lr"),
    *("stackoverflow_nwp", "gld23k", "gld160k"),
)
"""Data sets of FedML whose loader sets client_num_in_total itself, whatever the recipe says."""

NO_COLOUR_IMAGES = (
    *("mnist", "femnist", "shakespeare", "fed_shakespeare", "stackoverflow_lr", "stackoverflow_nwp"),
)
"""Data sets of FedML that give flat vectors, grey levels without a channel, or text."""

OTHER_LOSSES = ("fed_shakespeare", "stackoverflow_nwp", "stackoverflow_lr")
"""Data sets that FedML trains with other losses than cross-entropy over classes."""

HOST_DEFAULTS: dict[str, dict[str, Any]] = {
    "common_args": {"training_type": "simulation", "random_seed": 0},
    "train_args": {"client_id_list": "[]"},
    "device_args": {"using_gpu": False, "gpu_id": 0},
    "comm_args": {"backend": "sp"},
    "validation_args": {"frequency_of_the_test": 1},
    "tracking_args": {"enable_wandb": False},
}
"""Options without which FedML fails, or asks the network."""


def with_host_defaults(families: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A recipe's families, completed by what FedML needs to run at all."""
    result = {family: dict(options) for family, options in families.items()}
    present = {key for options in families.values() for key in options}
    for family, options in HOST_DEFAULTS.items():
        missing = {key: value for key, value in options.items() if key not in present}
        result.setdefault(family, {}).update(missing)
    return result
