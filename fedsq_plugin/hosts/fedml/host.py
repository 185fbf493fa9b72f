"""FedML as a host of the commands. Importing this imports neither FedML nor torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...run.host import Host, Outcome
from . import names, offline
from .distributed import mpi

if TYPE_CHECKING:
    from ...run.host import OnRound, OnStart
    from ...settings.recipe import Families


class FedML:
    """See `run.host.Host`."""

    name = "FedML"
    datasets: Collection[str] = names.FEDML_DATASETS
    brings_silos: Collection[str] = names.SETS_CLIENT_NUMBER
    models: Collection[str] = names.FEDML_MODELS
    algorithms: Collection[str] = names.NATIVE_SP
    algorithm_options: Mapping[str, Collection[str]] = names.NATIVE_READS
    options: Mapping[str, str] = names.OTHER_OPTIONS
    partitions: Mapping[str, Collection[str]] = names.FEDML_PARTITIONS

    def require(self) -> None:
        offline.require_home()

    def problems(self, values: Mapping[str, Any], valid: Mapping[str, Any]) -> Iterable[str]:
        from .problems import problems

        return problems(values, valid)

    def ignored(self, values: Mapping[str, Any]) -> Iterable[str]:
        from .choice import ignored

        return ignored(values)

    def needs_several_processes(self, values: Mapping[str, Any]) -> bool:
        return names.backend_of(values) in names.BACKENDS[1:]

    def local_recipe(self, families: Families, clients: int, folder: Path) -> Families:
        from .local import local_recipe

        return local_recipe(families, clients, folder)

    def rank(self) -> int:
        from mpi4py import MPI

        return int(MPI.COMM_WORLD.Get_rank())

    def execute(self, families: Families, log_file: Path, on_start: OnStart, on_round: OnRound) -> Outcome:
        from . import execute

        return execute.execute(families, log_file, on_start, on_round)

    def serve(self, families: Families, log_file: Path, rank: int) -> None:
        from . import execute

        execute.serve(families, log_file, rank)

    def end_processes(self, status: int) -> None:
        mpi.abort(status)


HOST: Host = FedML()
