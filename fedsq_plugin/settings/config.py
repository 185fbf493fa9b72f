"""Every option: type, default, meaning, and the family of the recipe it stands in.

FedML flattens the families of a YAML into one object, so a key has one meaning wherever it stands; the
family is where it is documented. `fedsq_args` and `warm_start_args` are ours: a key there that is not in
this file is an error. The other families are FedML's and may hold more than is listed here.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ..hosts.fedml.names import SETS_CLIENT_NUMBER

OURS = ("fedsq_args", "warm_start_args")
"""Families that this plugin adds to FedML's."""

Kind = Literal["missing", "value", "misfit", "unknown", "family", "misspelt", "two families", "repeated"]


class Finding(NamedTuple):
    """One thing that is wrong with a recipe."""

    kind: Kind
    key: str
    """The option, or the family, or of several options the one to mend."""
    line: str

    def __str__(self) -> str:
        return self.line


def _option(default: Any, family: str, meaning: str, **constraints: Any) -> Any:
    return Field(default, description=meaning, json_schema_extra={"family": family}, **constraints)


class Config(BaseModel):
    """The options of one run, checked. Field descriptions are the reference of the recipe's keys."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    # FedML's own keys
    training_type: Literal["simulation", "cross_silo", "cross_device", "cross_cloud", "fedml_serving"] = (
        _option("simulation", "common_args", "FedML's training platform")
    )
    random_seed: int = _option(0, "common_args", "seed of everything that has no seed of its own", ge=0)
    dataset: str = _option(
        ..., "data_args", "digits, image_folder, flamby/fed_… (FLamby's), or a data set that FedML knows"
    )
    data_cache_dir: str = _option(
        "", "data_args", "folder of the data set's files; empty, for FLamby's: as FLamby is configured"
    )
    partition_method: str = _option("hetero", "data_args", "homo (i.i.d.) or hetero (Dirichlet)")
    partition_alpha: float = _option(0.5, "data_args", "alpha of the Dirichlet partition", gt=0)
    model: str = _option(
        ..., "model_args", "backbone, ours or FedML's; mlp, mlp_bn and flamby/baseline for FLamby's data sets"
    )
    federated_optimizer: str = _option(..., "train_args", "algorithm, by its published name")
    client_num_in_total: int = _option(..., "train_args", "number of silos", ge=1)
    client_num_per_round: int = _option(..., "train_args", "silos that train in a round", ge=1)
    comm_round: int = _option(..., "train_args", "number of rounds", ge=1)
    epochs: int = _option(1, "train_args", "local epochs per round", ge=0)
    batch_size: int | None = _option(
        None, "train_args", "samples per step; null: FLamby's own, else 32; -1: a silo's data at once"
    )
    client_optimizer: Literal["sgd", "adam", "adamw"] = _option("sgd", "train_args", "client's optimizer")
    learning_rate: float = _option(0.01, "train_args", "client's learning rate", gt=0)
    momentum: float = _option(0.0, "train_args", "momentum of sgd", ge=0, lt=1)
    weight_decay: float = _option(0.0, "train_args", "L2 penalty of sgd and adam, decay of adamw", ge=0)
    fedprox_mu: float = _option(0.01, "train_args", "μ of FedProx's proximal term", ge=0)
    server_lr: float | None = _option(
        None, "train_args", "server's learning rate; FedAvgM: 1, FedAdam and FedYogi: 0.01", gt=0
    )
    server_momentum: float = _option(0.9, "train_args", "β of FedAvgM, β₁ of FedAdam and FedYogi", ge=0, lt=1)
    frequency_of_the_test: int = _option(1, "validation_args", "rounds from one evaluation to the next", ge=1)
    using_gpu: bool = _option(False, "device_args", "train on a GPU; an error where there is none")
    gpu_id: int | None = _option(
        None,
        "device_args",
        "GPU of this machine; null: 0, or what the mapping of a run of processes says",
        ge=0,
    )
    gpu_mapping_file: str | None = _option(
        None, "device_args", "YAML file: key -> host -> processes on each of its GPUs, the server first"
    )
    gpu_mapping_key: str | None = _option(None, "device_args", "key of gpu_mapping_file to go by")
    backend: str = _option("sp", "comm_args", "FedML's back end; sp is one process")

    # ours
    head: str | None = _option(None, "fedsq_args", "module path of the head; known for our own backbones")
    small_images: bool = _option(False, "fedsq_args", "3x3 stem and no first pooling, for small images")
    image_size: int | None = _option(None, "fedsq_args", "resize images to this many pixels a side", ge=1)
    min_client_samples: int = _option(2, "fedsq_args", "least number of samples of a silo", ge=0)
    data_seed: int | None = _option(None, "fedsq_args", "seed of splits and partition", ge=0)
    model_seed: int | None = _option(None, "fedsq_args", "seed of initial weights and warm start", ge=0)
    sampling_seed: int | None = _option(None, "fedsq_args", "seed of the choice of silos per round", ge=0)
    gate_accept: tuple[str, ...] = _option(
        (), "fedsq_args", "paths of activations that cannot be gated and may stay ungated"
    )
    gate_pooling: Literal["structural", "own"] = _option(
        "structural", "fedsq_args", "who chooses in max-pooling: the structural copy, or each copy itself"
    )
    keep_gates: bool = _option(
        False, "fedsq_args", "keep the gates of training images, which then pass the structural copy once"
    )
    precision: Literal["fp32", "bf16", "fp16"] = _option(
        "fp32",
        "fedsq_args",
        "what silos train in, by autocast, fp16 with a scaled loss; what travels and what is tested is fp32",
    )
    structural_precision: Literal["fp32", "bf16", "fp16"] = _option(
        "fp32",
        "fedsq_args",
        "what gates are computed in, whatever precision is, in training and tests; fp32 without TF32",
    )
    channels_last: bool = _option(False, "fedsq_args", "keep weights and images with channels last in memory")
    compile: bool = _option(
        False, "fedsq_args", "train through torch.compile, both copies whole; meant for GPUs"
    )
    structural_copy: Literal["fixed", "refresh", "ema", "unfreeze"] = _option(
        "fixed",
        "fedsq_args",
        "structural copy over the rounds: fixed; refreshed from the global model every structural_rounds; "
        "an average with it every structural_rounds; given up after structural_rounds",
    )
    structural_rounds: int = _option(1, "fedsq_args", "rounds that structural_copy counts", ge=1)
    structural_decay: float = _option(
        0.9, "fedsq_args", "share of itself that the structural copy keeps (ema)", ge=0, le=1
    )
    server_beta2: float = _option(0.99, "fedsq_args", "β₂ of FedAdam and FedYogi", ge=0, lt=1)
    server_tau: float = _option(1e-3, "fedsq_args", "τ of FedAdam and FedYogi", gt=0)
    fedmr_unit: Literal["key", "module"] = _option(
        "key", "fedsq_args", "what FedMR permutes: each key (as published), or a module's keys together"
    )
    first_stage_bound: int = _option(0, "fedsq_args", "rounds before FedMR recombines", ge=0)
    head_epochs: int = _option(1, "fedsq_args", "FedRep's local epochs on the head", ge=0)
    probe_rounds: int = _option(1, "fedsq_args", "LP-FT's rounds on the head alone", ge=0)
    frozen_modules: tuple[str, ...] = _option(
        (), "fedsq_args", "modules that FrozenEarly leaves frozen; known for our own backbones"
    )
    silo_evaluation: bool | None = _option(
        None,
        "fedsq_args",
        "test every silo's own model on its own test data; null: where silos have models of their own",
    )
    finetune_epochs: int | None = _option(
        None,
        "fedsq_args",
        "epochs of a final fine-tuning at every silo, tested on its own data; null: 5 for FedBABU, else 0",
        ge=0,
    )
    finetune_part: Literal["all", "head"] = _option("all", "fedsq_args", "what the final fine-tuning trains")
    extra: dict[str, Any] = _option({}, "fedsq_args", "options of third-party algorithms")
    buffers: Literal["average", "keep"] = _option(
        "average", "fedsq_args", "BatchNorm's statistics: average the silos', or keep the server's"
    )
    nonfinite: Literal["skip", "fail"] = _option(
        "skip", "fedsq_args", "an update that is refused (NaN, wrong keys): go on without it, or end"
    )
    min_clients: int | None = _option(
        None, "fedsq_args", "client processes with which a run goes on when others are lost; null: all", ge=1
    )
    round_timeout_s: float = _option(
        3600.0, "fedsq_args", "seconds to wait for the clients, at the start and in a round", gt=0
    )
    checkpoint_dir: str | None = _option(
        None, "fedsq_args", "folder of the run's checkpoints; null: none, fedsq run: in the run directory"
    )
    checkpoint_every: int = _option(1, "fedsq_args", "rounds from one checkpoint to the next", ge=1)
    resume: bool = _option(False, "fedsq_args", "go on from the newest checkpoint, where there is one")
    server_return_s: float = _option(
        0.0, "fedsq_args", "seconds that a client waits for a server that is gone to come back (GRPC)", ge=0
    )
    tls_cert: str | None = _option(
        None,
        "fedsq_args",
        "certificate of this process, PEM, for mutual TLS over GRPC; in its path, {rank} is the rank",
    )
    tls_key: str | None = _option(
        None, "fedsq_args", "its private key, PEM without a password; {rank} likewise"
    )
    tls_ca: str | None = _option(
        None, "fedsq_args", "certificate of the authority that issued all ranks' certificates, PEM"
    )
    nesterov: bool = _option(False, "fedsq_args", "Nesterov momentum (sgd)")
    clip_norm: float | None = _option(None, "fedsq_args", "bound on the norm of a step's gradient", gt=0)
    lr_schedule: Literal["constant", "cosine", "step"] = _option(
        "constant", "fedsq_args", "learning rate over rounds"
    )
    lr_decay: float = _option(0.1, "fedsq_args", "factor of the step schedule", gt=0)
    lr_decay_rounds: int = _option(10, "fedsq_args", "rounds between two steps of the step schedule", ge=1)
    augmentation: tuple[Literal["crop", "flip"], ...] = _option(
        (), "fedsq_args", "augmentation of training images, in order"
    )
    threads: int | None = _option(None, "fedsq_args", "CPU threads of torch; default: torch's own", ge=1)
    warm_start: Literal["none", "imagenet", "file", "public"] = _option(
        "none",
        "warm_start_args",
        "pretrained weights: torchvision's, a file's, or by training on a public split",
    )
    warm_start_file: str | None = _option(None, "warm_start_args", "weights, .safetensors or .pt")
    warm_start_public: float = _option(
        0.2,
        "warm_start_args",
        "share of the training data that is public: held by no silo (warm_start: public, or relu_ise)",
        gt=0,
        lt=1,
    )
    warm_start_epochs: int = _option(10, "warm_start_args", "epochs on the public split", ge=1)
    warm_start_learning_rate: float = _option(0.05, "warm_start_args", "its learning rate (sgd)", gt=0)
    warm_start_momentum: float = _option(0.9, "warm_start_args", "its momentum", ge=0, lt=1)
    warm_start_batch_size: int = _option(32, "warm_start_args", "its batch size", ge=2)
    relu_ise: bool = _option(
        False,
        "warm_start_args",
        "turn GELU, SiLU and Hardswish into ReLU on the public split, before the first round (λ-GELU)",
    )
    relu_ise_learn_epochs: int = _option(
        2, "warm_start_args", "epochs in which λ is learned with the weights", ge=0
    )
    relu_ise_harden_epochs: int = _option(
        4, "warm_start_args", "epochs in which λ is raised to its target", ge=1
    )
    relu_ise_schedule: Literal["linear", "geometric", "cosine"] = _option(
        "geometric", "warm_start_args", "how λ is raised"
    )
    relu_ise_tolerance: float = _option(
        0.01, "warm_start_args", "ε of the target λ* = √(2/π)/ε (GELU)", gt=0, lt=0.79
    )
    relu_ise_learning_rate: float | None = _option(
        None, "warm_start_args", "its learning rate; null: warm_start_learning_rate", gt=0
    )
    relu_ise_lr_factor: float = _option(10.0, "warm_start_args", "factor of that for λ", ge=0)
    relu_ise_initial: float = _option(1.01, "warm_start_args", "λ at the start", gt=1)
    relu_ise_temperature: float = _option(0.1, "warm_start_args", "t of λ = 1 + softplus(s/t)", gt=0)
    warm_start_cache_dir: str = _option(
        "~/.cache/fedsq", "warm_start_args", "where trained warm starts are kept, by content"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _switch_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Otherwise pydantic takes `clip_norm: true` for a bound of 1.0.
        wanted = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {wanted, *get_args(wanted)} & {int, float}:
            raise PydanticCustomError("number", "Input should be a number, not a switch")
        return value

    @field_validator("client_optimizer", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("batch_size")
    @classmethod
    def _size(cls, value: int | None) -> int | None:
        if value is not None and value < 1 and value != -1:
            raise PydanticCustomError("size", "Use a number above 0, or -1 for all data")
        return value

    @field_validator("*")
    @classmethod
    def _kept(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic gives back nothing of a model that has one wrong field.
        if info.context is not None:
            info.context[info.field_name] = value
        return value

    def seed(self, purpose: Literal["data", "model", "sampling"]) -> int:
        """The seed for a purpose: its own, or `random_seed`."""
        own: int | None = getattr(self, f"{purpose}_seed")
        return self.random_seed if own is None else own

    @property
    def has_public_split(self) -> bool:
        """Whether a share of the training data goes to no silo."""
        return self.warm_start == "public" or self.relu_ise

    @property
    def cache_dir(self) -> Path:
        return Path(os.path.expanduser(self.warm_start_cache_dir))


OPTIONS = Config.model_fields


def family_of(key: str) -> str:
    """The family in which an option is documented."""
    extra = OPTIONS[key].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["family"])


def reference() -> str:
    """The options as a Markdown table, by family."""
    rows = ["| family | key | default | meaning |", "| --- | --- | --- | --- |"]
    for key, option in OPTIONS.items():
        default = "required" if option.is_required() else _as_yaml(option.default)
        choices = ", ".join(_choices(option.annotation))
        meaning = f"{option.description} ({choices})" if choices else option.description
        rows.append(f"| `{family_of(key)}` | `{key}` | {default} | {meaning} |")
    return "\n".join(rows)


def _choices(annotation: Any) -> list[str]:
    """The words that an option takes, where it takes only some."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in _choices(part)]


def _as_yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def parse(values: Mapping[str, Any]) -> tuple[Config | None, list[Finding]]:
    """Check flat values: the config, or everything that is wrong."""
    valid, found = validated(values)
    found += misfits(valid)
    return (None if found else Config(**valid)), found


def validated(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """The options that are valid by themselves, defaults included, and what is wrong with the others."""
    given = {key: value for key, value in values.items() if key in OPTIONS}
    valid = {
        key: option.default
        for key, option in OPTIONS.items()
        if key not in given and not option.is_required()
    }
    try:
        Config.model_validate(given, context=valid)
    except ValidationError as error:
        wrong = [_finding(e, given) for e in error.errors()]
        return {k: v for k, v in valid.items() if k not in {f.key for f in wrong}}, wrong
    return valid, []


def _finding(error: Any, given: Mapping[str, Any]) -> Finding:
    key = str(error["loc"][0])
    where = f"{family_of(key)}.{key}"
    if error["type"] == "missing":
        return Finding("missing", key, f"{where} is missing ({OPTIONS[key].description})")
    message = str(error["msg"]).replace("valid tuple", "list").partition(", unable to parse")[0]
    return Finding("value", key, f"{where} is {given.get(key)!r}: {message[0].lower()}{message[1:]}")


def misfits(valid: Mapping[str, Any]) -> list[Finding]:
    """Options that do not go together, among those that are valid by themselves."""
    return [
        Finding("misfit", next(iter(inspect.signature(rule).parameters)), line)
        for rule, line in said(_RULES, valid)
    ]


Rule = Callable[..., str | None]
"""Reads the options that its parameters name; says what does not go together, or None."""


def said(rules: Iterable[Rule], valid: Mapping[str, Any]) -> list[tuple[Rule, str]]:
    """What rules say. A rule is passed over where an option that it must have is not valid."""
    found = []
    for rule in rules:
        wanted = inspect.signature(rule).parameters
        if all(key in valid or p.default is not p.empty for key, p in wanted.items()):
            line = rule(**{key: valid[key] for key in wanted if key in valid})
            found += [(rule, line)] if line else []
    return found


def _silos(client_num_per_round: int, client_num_in_total: int, dataset: str = "") -> str | None:
    if client_num_per_round <= client_num_in_total or dataset in SETS_CLIENT_NUMBER:
        return None
    return (
        f"client_num_per_round is {client_num_per_round}, more than client_num_in_total {client_num_in_total}"
    )


def _weights(warm_start_file: str | None, warm_start: str) -> str | None:
    if warm_start == "file" and not warm_start_file:
        return "warm_start is 'file': warm_start_file must name the weights"
    if warm_start != "file" and warm_start_file:
        return f"warm_start_file is given but warm_start is '{warm_start}'; set warm_start: file"
    return None


def _gates(keep_gates: bool, augmentation: tuple[str, ...]) -> str | None:
    if keep_gates and augmentation:
        return "keep_gates is for images that come again; it does not go with augmentation"
    return None


def _tls(tls_cert: str | None, tls_key: str | None, tls_ca: str | None) -> str | None:
    given = {"tls_cert": tls_cert, "tls_key": tls_key, "tls_ca": tls_ca}
    missing = [key for key, path in given.items() if not path]
    if 0 < len(missing) < len(given):
        return f"tls_cert, tls_key and tls_ca go together: {' and '.join(missing)} is missing"
    return None


def _tls_road(tls_cert: str | None, backend: str) -> str | None:
    # In one process there is nothing to encrypt; elsewhere nobody shall believe that it is.
    if tls_cert and backend not in ("sp", "GRPC"):
        return f"tls_cert is given, but only backend GRPC has TLS, and backend is {backend}"
    return None


def _nesterov(nesterov: bool, momentum: float, client_optimizer: str) -> str | None:
    if nesterov and (momentum == 0 or client_optimizer != "sgd"):
        return "nesterov needs client_optimizer sgd and a momentum above 0"
    return None


def _resume(resume: bool, checkpoint_dir: str | None) -> str | None:
    if resume and checkpoint_dir is None:
        return "resume needs checkpoint_dir, the folder of the run's checkpoints (or: fedsq run --resume DIR)"
    return None


_RULES: tuple[Rule, ...] = (_silos, _weights, _gates, _tls, _tls_road, _nesterov, _resume)
