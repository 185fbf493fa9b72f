"""FedML's table of addresses for GRPC: where each process listens. Nothing here imports FedML or GRPC."""

from __future__ import annotations

import csv
from collections.abc import Collection

from ....errors import ConfigError

COLUMNS = "eid,rank,grpc_server_ip,grpc_server_port"


def addresses(path: str | None, ranks: Collection[int]) -> tuple[dict[int, str], dict[int, str]]:
    """Where each rank listens, and where the others find it, as host:port: from a CSV file, in which a row without an
    address means 127.0.0.1.

    Raises:
        ConfigError: the table cannot be read, or lacks one of the ranks.
    """
    if not path:
        raise ConfigError(f"comm_args.grpc_ipconfig_path is missing: a CSV file with the columns {COLUMNS}")
    listening, found = {}, {}
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                rank, port = int(row["rank"]), int(row["grpc_server_port"])
                # To gRPC, no address means all of them.
                here = row["grpc_server_ip"].strip() or "127.0.0.1"
                listening[rank] = _joined(here, port)
                found[rank] = _joined((row.get("ingress_ip") or "").strip() or here, port)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise ConfigError(
            f"comm_args.grpc_ipconfig_path {path} cannot be read ({error}); its columns are {COLUMNS}"
        ) from None
    missing = [str(rank) for rank in ranks if rank not in listening]
    if missing:
        raise ConfigError(f"comm_args.grpc_ipconfig_path {path} has no row for rank {', '.join(missing)}")
    return listening, found


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
