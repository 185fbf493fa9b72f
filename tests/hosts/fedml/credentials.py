"""The options of a process under TLS."""

from __future__ import annotations

from pathlib import Path

from fedsq_plugin.settings.config import Config
from fedsq_plugin.wire import certificates

NEEDED = {
    **{"dataset": "digits", "model": "resnet18", "federated_optimizer": "FedSQ", "comm_round": 1},
    **{"client_num_in_total": 1, "client_num_per_round": 1},
}


def config(folder: Path, **changes: str) -> Config:
    paths = {key: str(folder / name) for key, name in certificates.OPTIONS.items()}
    return Config(**NEEDED, backend="GRPC", **{**paths, **changes})
