"""The device of a process: what FedML's keys say, and an error where FedML would go on with the CPU.

FedML 0.9.6 trains on the CPU, without a word, where torch sees no GPU (`ml/engine/ml_engine_adapter.py`,
get_torch_device) and where an MPI run has no gpu_mapping_file (`device/gpu_mapping_mpi.py`). Nothing here
imports FedML.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ...errors import ConfigError, nearest

NO_GPU = "device_args.using_gpu is true, but no GPU is available; set using_gpu: false"


def gpus(values: Mapping[str, Any], processes: int | None = None) -> list[int] | None:
    """The GPU of every process by its rank, as FedML's mapping has it; None where there is no mapping, and
    every process uses `gpu_id`.

    Args:
        values: a recipe's options, flat.
        processes: the server and the clients, where their number is known.

    Raises:
        ConfigError: the mapping cannot be read, or is for another number of processes.
    """
    if values.get("backend", "sp") == "sp":
        return None
    text, file = values.get("gpu_util_parse"), values.get("gpu_mapping_file")
    if text and values["backend"] == "MPI" and values.get("training_type") == "simulation":
        where, hosts = "device_args.gpu_util_parse", _parsed(str(text))
    elif file:
        key = values.get("gpu_mapping_key")
        where, hosts = f"device_args.gpu_mapping_file {file}: {key}", _read(str(file), key)
    else:
        return None
    if file and values.get("gpu_id") is not None and values.get("training_type") == "cross_silo":
        raise ConfigError(
            "device_args has gpu_id and gpu_mapping_file, of which FedML follows the first one alone across "
            "silos; leave one out"
        )
    found: list[int] = []
    for host, counts in hosts.items():
        whole = isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts)
        if not whole:
            raise ConfigError(
                f"{where}: {host} has {counts!r}; it must list the number of processes on each of its GPUs, as [2, 1]"
            )
        found += [gpu for gpu, count in enumerate(counts) for _ in range(count)]
    if processes is not None and len(found) != processes:
        raise ConfigError(
            f"{where} has places for {len(found)} processes, this run has {processes} (the server and "
            f"{processes - 1} clients)"
        )
    return found


def _read(file: str, key: Any) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"device_args.gpu_mapping_file {file}: {reason}") from None
    except yaml.YAMLError:
        raise ConfigError(f"device_args.gpu_mapping_file {file}: no valid YAML") from None
    if not isinstance(content, dict):
        raise ConfigError(f"device_args.gpu_mapping_file {file}: it must be a mapping of keys to hosts")
    if key not in content:
        known = [str(name) for name in content]
        raise ConfigError(f"device_args.gpu_mapping_key '{key}' is not in {file}{nearest(str(key), known)}")
    hosts = content[key]
    if not isinstance(hosts, dict):
        raise ConfigError(
            f"device_args.gpu_mapping_file {file}: {key} must be a mapping of hosts to numbers of processes"
        )
    return hosts


def _parsed(text: str) -> dict[Any, Any]:
    """`host:1,1;other:2`, as FedML has it."""
    hosts: dict[Any, Any] = {}
    for part in text.split(";"):
        host, colon, counts = part.partition(":")
        try:
            hosts[host] = [int(count) for count in counts.split(",")]
        except ValueError:
            colon = ""
        if not colon:
            raise ConfigError(
                f"device_args.gpu_util_parse: '{part}' must be a host and its processes per GPU, as host:2,1"
            )
    return hosts


UNMAPPED = {"gpu_id": None, "gpu_mapping_file": None, "gpu_util_parse": None}
"""In place of a mapping whose hosts may be other machines."""


def device_name(values: Mapping[str, Any], rank: int = 0, processes: int | None = None) -> str:
    """The device of a process of this machine, as torch names it.

    Raises:
        ConfigError: a GPU is asked for that is not there, or the mapping is wrong.
    """
    kind = values.get("device_type", "gpu")
    if not values.get("using_gpu") and not values.get("gpu_util_parse"):
        return "cpu"
    if kind not in ("gpu", "mps"):
        raise ConfigError(
            f"device_args.using_gpu is true and device_type is {kind!r}; set using_gpu: false, or device_type: gpu"
        )
    mapping = gpus(values, processes)
    if mapping is not None and rank >= len(mapping):
        raise ConfigError(f"device_args: the GPU mapping has no place for process {rank}, only for {len(mapping)}")
    index = mapping[rank] if mapping is not None else values.get("gpu_id") or 0
    import torch

    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("device_args.device_type is mps, which is not available; use gpu or using_gpu: false")
        return "mps"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ConfigError(NO_GPU)
    if index >= count:
        key = "gpu_id is" if mapping is None else f"the GPU mapping puts process {rank} on GPU"
        has = "1 GPU, which is 0" if count == 1 else f"{count} GPUs, 0 to {count - 1}"
        raise ConfigError(f"device_args: {key} {index}, but this machine has {has}")
    return f"cuda:{index}"


def device_of(args: Any) -> Any:
    """What `fedml.device.get_device` should give for FedML's arguments, made the process's own device."""
    import torch

    values = vars(args)
    processes = None
    if values.get("backend", "sp") != "sp":
        # FedML counts the server among the workers of an MPI simulation.
        processes = int(values["worker_num"]) + int(values.get("training_type") != "simulation")
    rank = values.get("process_id")
    device = torch.device(device_name(values, int(values.get("rank") or 0 if rank is None else rank), processes))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    args.using_gpu = device.type != "cpu"
    return device


def described(device: Any) -> str:
    """A device for a run's summary, a GPU with its name."""
    import torch

    device = torch.device(device)
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
