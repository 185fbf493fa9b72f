"""The recipe of a run whose processes are all on this machine. Nothing here imports FedML."""

from __future__ import annotations

import secrets
import socket
from contextlib import ExitStack
from pathlib import Path

from ...settings.recipe import Families, flat
from .devices import device_name
from .distributed.addresses import COLUMNS
from .names import with_host_defaults


def local_recipe(families: Families, clients: int, folder: Path) -> Families:
    """See `run.host.Host`."""
    values = flat(with_host_defaults(families))
    for rank in range(clients + 1):
        device_name(values, rank, clients + 1)
    families = _with(families, "train_args", "worker_num", clients)
    families = _with(families, "train_args", "run_id", str(secrets.randbelow(10**12)))
    if values["backend"] == "GRPC":
        table = folder / "grpc_ipconfig.csv"
        table.write_text(free_addresses(clients + 1))
        families = _with(families, "comm_args", "grpc_ipconfig_path", str(table))
    return families


def free_addresses(processes: int) -> str:
    """FedML's table of addresses for so many processes, with free ports of this machine."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(processes)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    rows = [f"{rank},{rank},127.0.0.1,{port}" for rank, port in enumerate(ports)]
    return "\n".join([COLUMNS, *rows, ""])


def _with(families: Families, family: str, key: str, value: object) -> Families:
    """The families with this option, where the recipe has it or else in `family`."""
    home = next((name for name, options in families.items() if key in options), family)
    return {**families, home: {**families.get(home, {}), key: value}}
