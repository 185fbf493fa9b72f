"""One process of a distributed run, in the place of FedML's own client and server managers."""

from __future__ import annotations

from typing import Any

from torch import nn

from ....data.silos import SilosData
from ....errors import ConfigError
from ....federation.checkpoints import ServerCheckpoints, SiloCheckpoints
from ....federation.state import nbytes, state_of
from ....run.plan import Plan
from ....settings.agreement import kept_options
from ....settings.config import Config
from ....wire.tls import credentials
from ..adapters import FedSQAggregator, FedSQTrainer, is_ours, server_of
from ..aggregation import restore
from ..scoring import Scoring
from ..silo import Silos
from . import rounds
from .addresses import addresses
from .client import Client
from .server import Server
from .transport import MARGIN_S, SEND_S, MpiTransport

MIB = 2**20


def is_client(args: Any) -> bool:
    """Whether this process gets its model from another one, and so needs no warm start."""
    return int(args.rank) > 0


def refuse_unreachable(args: Any, config: Config) -> None:
    """Raise ConfigError for what keeps this process from its peers, before a warm start that takes long."""
    peers = _peers(args)
    if args.backend == "GRPC":
        addresses(getattr(args, "grpc_ipconfig_path", None), (int(args.rank), *peers))
        credentials(config, int(args.rank))


def silos_of(args: Any) -> list[int]:
    """The silos that this process serves; none, where it is the server."""
    return rounds.silos_of(int(args.rank), range(args.client_num_in_total), _ranks(args))


def node(
    args: Any,
    device: Any,
    data: SilosData,
    model: nn.Module,
    plan: Plan,
    client_trainer: Any,
    server_aggregator: Any,
    checkpoints: ServerCheckpoints | None,
) -> Server | Client:
    """What FedMLRunner runs in this process; the arguments are FedMLRunner's and the plan.

    Raises:
        ConfigError: the parts do not go together, or there is no way to the others.
    """
    if not (is_ours(client_trainer) and is_ours(server_aggregator)) and plan.algorithm.gated:
        raise ConfigError(
            f"{plan.algorithm.name}: between processes, only the plugin's own trainer and aggregator send "
            "the structural copy; pass none, or use backend: sp"
        )
    for part in (client_trainer, server_aggregator):
        if part is not None:
            part.model = model
    if is_client(args):
        trainer, mine = client_trainer or FedSQTrainer(model, args, plan), silos_of(args)
        config, saved = plan.config, None
        if is_ours(trainer):
            run = kept_options(config)
            saved = SiloCheckpoints(config.checkpoint_dir, run, trainer.client.states, mine, config.resume)
        silos = Silos(plan, args, device, trainer, data, saved)
        return Client(_transport(args, plan, model), silos, mine)
    assert checkpoints is not None
    aggregator = server_aggregator or FedSQAggregator(model, args, plan)
    server, scoring = server_of(aggregator, plan), Scoring(plan, args, device, aggregator, data, client_trainer)
    restore(checkpoints, server, plan, None)
    return Server(args, _transport(args, plan, model), plan, server, scoring, _ranks(args), checkpoints)


def _ranks(args: Any) -> int:
    """The number of client processes. FedML counts the server among the workers of an MPI simulation."""
    ranks = int(args.worker_num) - int(args.training_type == "simulation")
    if ranks < 1:
        raise ConfigError("this run has no client process: start it with mpirun -np 2 or more, or fedsq launch")
    if int(args.rank) > ranks:
        raise ConfigError(f"rank {args.rank} is none of this run's: worker_num is {ranks}")
    return ranks


def _peers(args: Any) -> list[int]:
    ranks = _ranks(args)
    return [0] if is_client(args) else list(range(1, ranks + 1))


def _transport(args: Any, plan: Plan, model: nn.Module) -> Any:
    # The most that is sent at once is the whole model with its structural copy.
    limit = 4 * nbytes(state_of(model)) + MIB
    if args.backend == "MPI":
        # The server is through last: it writes what came of the run.
        patience = plan.config.round_timeout_s + 2 * MARGIN_S if is_client(args) else SEND_S
        return MpiTransport(args.comm, int(args.rank), limit, patience)
    try:
        from .grpc_transport import GrpcTransport
    except ImportError as error:
        raise ConfigError(f"comm_args.backend GRPC: {error}; pip install 'fedsq-plugin[grpc]'") from None
    rank, table = int(args.rank), getattr(args, "grpc_ipconfig_path", None)
    return GrpcTransport(table, rank, _peers(args), limit, credentials(plan.config, rank))
