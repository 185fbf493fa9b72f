"""A recipe for a data set of ours."""

from __future__ import annotations

from typing import Any

from fedsq_plugin.settings.config import Config


def config(**options: Any) -> Config:
    given = {
        "dataset": "digits",
        "model": "resnet18",
        "federated_optimizer": "FedSQ",
        "client_num_in_total": 4,
        "client_num_per_round": 4,
        "comm_round": 1,
        "partition_method": "homo",
    }
    return Config(**{**given, **options})
