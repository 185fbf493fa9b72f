"""What every road must run with the figures of one process: five lines of a user's script, on small data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedsq_plugin.algorithms import algorithms

from .conftest import SECURITY

PARTIAL = {"client_num_per_round": 2, "comm_round": 4}


@dataclass(frozen=True)
class Case:
    """One run. `parts` names the user's own trainer and aggregator, see `several`."""

    options: Mapping[str, Any]
    sizes: tuple[int, ...] = (16, 24, 40)
    parts: str = ""
    notes: tuple[str, ...] = field(default=())
    """All that the rounds must have said."""


def _row(name: str, **options: Any) -> Case:
    frozen = {"frozen_modules": ["0", "1"]} if "FrozenEarly" in name else {}
    return Case({"federated_optimizer": name, **frozen, **options})


def _secured(name: str, security: str) -> Case:
    options = {"federated_optimizer": name, "client_num_per_round": 3, **ATTACKED[security]}
    return Case(options, (16, 16, 24, 24, 40, 16, 16)[: options.get("client_num_in_total", 3)])


RANDOM = {**SECURITY["byzantine attack"], "attack_mode": "random"}
SEVEN = {"client_num_in_total": 7, "client_num_per_round": 7}
ATTACKED: dict[str, dict[str, Any]] = {
    **SECURITY,
    "multi-krum": {**SECURITY["krum"], "defense_type": "multikrum", "krum_param_m": 2, **SEVEN},
    "Laplace's noise": {**SECURITY["local privacy"], "mechanism_type": "laplace"},
    "random attack": RANDOM,
    "random attack that comes and goes": {**RANDOM, "attack_prob": 0.5, "comm_round": 4},
    "random attack against krum": {**SECURITY["krum"], **RANDOM},
    "zero attack against RFA": {**SECURITY["rfa"], **SECURITY["byzantine attack"]},
    "label flipping": {
        **{"enable_attack": True, "attack_type": "label_flipping", "ratio_of_poisoned_client": 0.5},
        **{"original_class_list": [0], "target_class_list": [1], "client_num_per_round": 2, "comm_round": 4},
    },
}

NOBODY = "silo 1 has no samples and is skipped"

CASES: dict[str, Case] = {
    **{name: _row(name) for name in algorithms()},
    "one round": _row("FedSQ", comm_round=1),
    **{f"{name} partial": _row(name, **PARTIAL) for name in ("FedSQ", "FedSQ+FedMR", "FedSQ+FedBN", "FedRep")},
    **{
        f"structural copy {how}": _row("FedSQ", structural_copy=how, structural_rounds=2, **PARTIAL)
        for how in ("refresh", "ema", "unfreeze")
    },
    "FedSQ+FrozenBN": _row("FedSQ+FrozenBN"),
    **{
        f"{name}, structural copy {how}": _row(name, structural_copy=how, structural_rounds=2, **PARTIAL)
        for name in ("FedSQ+FedMR", "FedSQ+FrozenBN")
        for how in ("refresh", "ema", "unfreeze")
    },
    "silos' own models": _row("FedAvg", silo_evaluation=True, finetune_epochs=2, finetune_part="head"),
    "buffers kept": _row("FedSQ", buffers="keep"),
    "an empty silo": Case(
        {"federated_optimizer": "FedSQ"}, (16, 0, 40), notes=(f"round 1: {NOBODY}", f"round 2: {NOBODY}")
    ),
    "tested every second round": _row("FedSQ", frequency_of_the_test=2, comm_round=4),
    **{f"{name}, {security}": _secured(name, security) for name in ("FedAvg", "FedSQ") for security in ATTACKED},
    "with all that FedML's MPI recipes have": _row(
        "FedSQ",
        **{"gpu_mapping_file": "config/gpu_mapping.yaml", "gpu_mapping_key": "mapping_default"},
        **{"is_mobile": 0, "log_file_dir": "./log", "wandb_key": "none", "wandb_name": "none"},
    ),
    "foreign parts": Case({"federated_optimizer": "FedAvg"}, parts="foreign"),
    "derived parts": Case({"federated_optimizer": "FedAvg"}, parts="derived"),
    "derived parts of FedSQ": Case({"federated_optimizer": "FedSQ"}, parts="derived"),
}
