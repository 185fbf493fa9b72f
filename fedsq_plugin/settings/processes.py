"""The options of the processes of a run, and of how long they wait for one another."""

from __future__ import annotations

from typing import Literal

from ..federation.options import Options, option


def _one_process(training_type: str, backend: str) -> str | None:
    return "sp is one process" if (training_type, backend) == ("simulation", "sp") else None


def _mpi(backend: str) -> str | None:
    return "over MPI all processes end with the server" if backend == "MPI" else None


class ProcessOptions(Options):
    """Who runs where, and what happens when a process is lost."""

    training_type: Literal["simulation", "cross_silo", "cross_device", "cross_cloud", "fedml_serving"] = option(
        "simulation", "common_args", "FedML's training platform"
    )
    backend: str = option("sp", "comm_args", "FedML's back end; sp is one process")
    min_clients: int | None = option(
        None,
        "fedsq_args",
        "client processes with which a run goes on when others are lost; null: all",
        may_change=True,
        idle=_one_process,
        ge=1,
    )
    round_timeout_s: float = option(
        3600.0,
        "fedsq_args",
        "seconds to wait for the clients, at the start and in a round",
        may_change=True,
        idle=_one_process,
        gt=0,
    )
    server_return_s: float = option(
        0.0,
        "fedsq_args",
        "seconds that a client waits for a server that is gone to come back (GRPC)",
        may_change=True,
        idle=(_one_process, _mpi),
        ge=0,
    )
