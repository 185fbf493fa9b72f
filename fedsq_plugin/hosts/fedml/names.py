"""What FedML 0.9.6 knows by name, and what it must be told. Nothing here imports FedML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import nearest

NATIVE_SP = (
    *("FedAvg", "FedOpt", "FedNova", "FedDyn", "FedProx", "SCAFFOLD", "Mime"),
    *("HierarchicalFL", "turbo_aggregate", "classical_vertical"),
)
"""Algorithms that FedML's `sp` runs by itself."""

NATIVE_READS = {"FedNova": ("momentum", "nesterov"), "Mime": ("momentum", "weight_decay"), "FedDyn": ("weight_decay",)}
"""What some of FedML's own algorithms read and its others ignore; all train by plain SGD else."""

FEDML_DATASETS = (
    *("mnist", "femnist", "shakespeare", "fed_shakespeare", "fed_cifar100", "stackoverflow_lr"),
    *("stackoverflow_nwp", "ILSVRC2012", "gld23k", "gld160k", "cifar10", "cifar100", "cinic10"),
)
"""What fedml.data.load knows by name; any other name it takes for CIFAR-10."""

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

FEDML_PARTITIONS = {**dict.fromkeys(("cifar10", "cifar100", "cinic10"), ("homo", "hetero", "hetero-fix"))}
"""The values of partition_method that FedML's loaders take. Its other loaders do not read it: those data sets come
divided, or are divided in one way."""
_FIXED = "data_preprocessing/non-iid-distribution"
"""Where FedML's loaders look, in the current folder, for the files of partition_method hetero-fix."""


def wrong_partition(dataset: str, method: str) -> str | None:
    """What is wrong with a partition method for a data set of FedML's, in one line. FedML's loaders end in the middle
    of their work."""
    methods = FEDML_PARTITIONS.get(dataset)
    if methods is None:
        return None
    if method not in methods:
        return (
            f"data_args.partition_method '{method}' is unknown{nearest(method, methods)}"
            f" (FedML's loader of {dataset} takes {', '.join(methods)})"
        )
    files = (Path(_FIXED, dataset.upper(), name) for name in ("net_dataidx_map.txt", "distribution.txt"))
    missing = [str(file) for file in files if method == "hetero-fix" and not file.is_file()]
    if missing:
        return f"data_args.partition_method hetero-fix: FedML reads {missing[0]}, and there is no such file; use hetero"
    return None


SETS_CLIENT_NUMBER = (
    *("mnist", "femnist", "shakespeare", "fed_shakespeare", "fed_cifar100", "stackoverflow_lr"),
    *("stackoverflow_nwp", "gld23k", "gld160k"),
)
"""Data sets of FedML whose loader sets client_num_in_total itself, whatever the recipe says."""

NO_COLOUR_IMAGES = ("mnist", "femnist", "shakespeare", "fed_shakespeare", "stackoverflow_lr", "stackoverflow_nwp")
"""Data sets of FedML that give flat vectors, grey levels without a channel, or text."""

OTHER_LOSSES = ("fed_shakespeare", "stackoverflow_nwp", "stackoverflow_lr")
"""Data sets that FedML trains with other losses than cross-entropy over classes."""

BACKENDS = (("simulation", "sp"), ("simulation", "MPI"), ("cross_silo", "GRPC"), ("cross_silo", "MPI"))
"""Training platforms and backends on which our algorithms run."""

_BROKEN = {
    "NCCL": "FedML 0.9.6 comes without its NCCL simulation",
    "hierarchical": "FedML 0.9.6 ends a hierarchical run at its start",
    "TRPC": "FedML's TRPC ends before the training does",
    "MQTT_S3": "MQTT_S3 needs FedML's platform, a broker and a store",
}


def backend_of(values: Mapping[str, Any]) -> tuple[str, str]:
    """The training platform and the backend of options, with FedML's defaults."""
    return str(values.get("training_type", "simulation")), str(values.get("backend", "sp"))


def broken_backend(values: Mapping[str, Any]) -> str | None:
    """What is wrong with a backend with which FedML 0.9.6 itself runs nothing: it fails oddly, or ends with status
    0."""
    if backend_of(values) == ("simulation", "NCCL"):
        return f"comm_args.backend NCCL: {_BROKEN['NCCL']}; use backend: MPI"
    if backend_of(values)[0] == "cross_silo" and values.get("scenario") == "hierarchical":
        return f"common_args.scenario hierarchical: {_BROKEN['hierarchical']}; use scenario: horizontal"
    return None


def refused_backend(values: Mapping[str, Any]) -> str | None:
    """Why our algorithms do not run with a backend, in one line; None where they do."""
    training_type, backend = backend_of(values)
    if broken := broken_backend(values):
        return broken
    horizontal = training_type == "simulation" or values.get("scenario", "horizontal") == "horizontal"
    if (training_type, backend) in BACKENDS and horizontal:
        return None
    known = ", ".join(f"{platform} with {name}" for platform, name in BACKENDS)
    reason = f" ({_BROKEN[backend]})" if backend in _BROKEN else ""
    return (
        f"comm_args.backend {backend}, common_args.training_type {training_type}: this version does not run "
        f"there{reason}; it runs {known}"
    )


OTHER_OPTIONS = {
    key: family
    for family, keys in {
        "common_args": "scenario using_mlops config_version mlops_api_key mlops_project_name mlops_run_name",
        "data_args": "data_file_path partition_file_path part_file test_batch_size private_local_data "
        "synthetic_data_url",
        "model_args": "deeplearning_backend model_file_cache_folder global_model_file_path",
        "train_args": "run_id rank role client_id_list worker_num server_optimizer lr wd mu gmf alpha feddyn_alpha "
        "mimelite group_method group_num group_comm_round ci",
        "validation_args": "test_on_clients frequency_of_train_acc_report",
        "device_args": "device_type gpu_util_parse n_proc_in_silo n_proc_per_node n_node_in_silo",
        "comm_args": "is_mobile grpc_ipconfig_path trpc_master_config_path mqtt_config_path s3_config_path",
        "tracking_args": "enable_tracking enable_wandb wandb_key wandb_entity wandb_project wandb_name "
        "wandb_only_server wandb_group_id run_name log_file_dir sys_perf_profiling",
        "attack_args": "enable_attack attack_type poison_type attack_prob ratio_of_poisoned_client",
        "defense_args": "enable_defense defense_type",
        "dp_args": "enable_dp dp_solution_type mechanism_type epsilon delta sensitivity clipping_norm",
        "fhe_args": "enable_fhe enable_contribution contribution_alg",
    }.items()
    for key in keys.split()
}
"""Families of the options that FedML reads beside ours, by key: those of its own recipes, and of its guides."""

MPI_DEFAULTS: dict[str, Any] = {"gpu_mapping_file": None, "gpu_mapping_key": None}
"""What FedML reads with the backend MPI, in `device_args`, GPU or none."""

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
    defaults = {family: dict(options) for family, options in HOST_DEFAULTS.items()}
    if any(options.get("backend") == "MPI" for options in families.values()):
        defaults["device_args"].update(MPI_DEFAULTS)
    if any(options.get("gpu_mapping_file") for options in families.values()):
        del defaults["device_args"]["gpu_id"]  # across silos it would go before the mapping
    for family, options in defaults.items():
        missing = {key: value for key, value in options.items() if key not in present}
        result.setdefault(family, {}).update(missing)
    return result
