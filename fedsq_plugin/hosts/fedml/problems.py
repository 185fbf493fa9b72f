"""What FedML, or the plugin's use of it, is known to refuse in a recipe. Nothing here imports FedML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from ... import models
from ...algorithms import find
from ...dualcopy.precision import refuse_unsupported
from ...errors import ConfigError
from ...settings.config import family_of
from .devices import UNMAPPED, device_name, gpus
from .names import (
    FEDML_DATASETS,
    FEDML_MODELS,
    NO_COLOUR_IMAGES,
    OTHER_LOSSES,
    WITHOUT_GATES,
    backend_of,
    refused_backend,
    wrong_partition,
)
from .tracking import tracking_problems

HOST_DEVICE = ("device_type", "gpu_util_parse")
"""Options of FedML's that name a device, beside ours."""


def problems(values: Mapping[str, Any], valid: Mapping[str, Any]) -> Iterator[str]:
    """See `run.host.Host.problems`."""
    dataset, model = valid.get("dataset", ""), valid.get("model", "")
    algorithm, backend = find(valid.get("federated_optimizer", "")), backend_of(valid)[1]
    if reason := refused_backend({**valid, "scenario": values.get("scenario", "horizontal")}):
        yield reason
    elif (module := {"MPI": "mpi4py", "GRPC": "grpc"}.get(backend)) and find_spec(module) is None:
        yield f"comm_args.backend {backend} needs {module}: pip install 'fedsq-plugin[{backend.lower()}]'"
    if dataset in FEDML_DATASETS:
        for key in ("data_cache_dir", "partition_method", "partition_alpha", "batch_size"):
            if key not in values:
                yield f"{family_of(key)}.{key} is missing; FedML's loader of {dataset} has no default for it"
    if partition := wrong_partition(dataset, valid.get("partition_method", "homo")):
        yield partition
    if dataset and model in FEDML_MODELS and FEDML_MODELS[model] and dataset not in FEDML_MODELS[model]:
        homes = ", ".join(FEDML_MODELS[model])
        yield f"model_args.model {model} is FedML's for {homes}, not for {dataset}"
    if dataset in NO_COLOUR_IMAGES and model in models.names():
        yield f"model_args.model {model} takes images of three channels, {dataset} has none"
    if dataset in OTHER_LOSSES:
        yield f"data_args.dataset {dataset} is no classification task; pass a trainer of your own in main.py"
    if algorithm is not None and algorithm.gated and model in WITHOUT_GATES:
        yield f"model_args.model {model} has no ReLU-like activation that {algorithm.name} could gate"
    if algorithm is not None and algorithm.needs_head and not valid.get("head", "?") and model in FEDML_MODELS:
        yield f"{algorithm.name} treats the head apart from the body: set fedsq_args.head, {model}'s last layer"
    yield from _device({**{key: values.get(key) for key in HOST_DEVICE if key in values}, **valid})
    yield from tracking_problems(values)
    for key in ("enable_fhe", "enable_contribution"):
        if values.get(key):
            yield f"{key} is true, which this plugin's algorithms do not support"


def _device(values: dict[str, Any]) -> Iterator[str]:
    """Problems of this machine's device. A GPU mapping may be for other machines: those are left to the
    processes there."""
    try:
        mapped = values.get("using_gpu") and gpus(values) is not None
        device = device_name({**values, **UNMAPPED} if mapped else values)
    except ConfigError as error:
        yield str(error)
        return
    for key in ("precision", "structural_precision"):
        try:
            refuse_unsupported(values.get(key, "fp32"), device, f"fedsq_args.{key}")
        except ConfigError as error:
            yield str(error)
