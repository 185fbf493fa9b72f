"""A run that is cut off goes on: what its processes write down after a round, and read when they start anew.

No generator is among it: everything that is drawn is drawn from a seed of the recipe and the round.
"""

from __future__ import annotations

import logging
from pathlib import Path

from ...errors import ConfigError, WeightsError
from ...federation.server_state import ServerState
from ...federation.snapshots import ServerSnapshots, SiloSnapshots, refuse_started
from ...run.plan import Plan
from ...settings.agreement import kept_options
from .adapters import FedSQAggregator, FedSQTrainer
from .security import security_enabled

log = logging.getLogger(__name__)


class ServerCheckpoints:
    """Of the server process, where `checkpoint_dir` names a folder. `round` is the round of the
    newest, `oldest` that of the one that the run can go back to at most.

    Raises:
        ConfigError: the folder holds another run, or the same one that is not to be resumed.
        WeightsError: the newest checkpoint is damaged, or of another recipe.
    """

    def __init__(self, plan: Plan) -> None:
        config, self._begun, self._plan = plan.config, None, plan
        self._store: ServerSnapshots | None = None
        self.round = self.oldest = 0
        if config.checkpoint_dir is None:
            return
        folder = Path(config.checkpoint_dir).expanduser()
        self._store = ServerSnapshots(folder, kept_options(config))
        refuse_started(folder, self._store.rounds(), config.resume)
        self._begun = self._store.newest()
        self.oldest = min(self._store.rounds(), default=0)
        if self._begun is None and config.resume:
            log.warning("there is no checkpoint in %s yet: the run begins with round 1", folder)

    @property
    def resumes(self) -> bool:
        """Whether the run goes on from a checkpoint, and so needs no warm start."""
        return self._begun is not None

    def restore(self, aggregator: FedSQAggregator, trainer: FedSQTrainer | None = None) -> None:
        """Give the aggregator, and the trainer where it is in this process, what they had."""
        if self._begun is None:
            return
        state, silos = self._begun
        self._begun = None
        try:
            aggregator.resume(state)
            if trainer is not None:
                trainer.resume(state, silos)
        except (RuntimeError, KeyError) as error:  # torch names every key and shape
            reason = " ".join(str(error).split())[:300]
            raise WeightsError(f"{self._plan.config.checkpoint_dir}: not of this model: {reason}") from None
        self.round = state.round
        log.warning("the run goes on after round %d", state.round)
        if security_enabled():
            log.warning("what FedML's defences and privacy accounts remember of those rounds is lost")

    def after(self, state: ServerState, trainer: FedSQTrainer | None = None) -> None:
        """A round is over. Raises ConfigError where its checkpoint cannot be written."""
        config = self._plan.config
        due = state.round % config.checkpoint_every == 0 or state.round == config.comm_round
        if self._store is None or not due:
            return
        self._store.save(state, {} if trainer is None else trainer.worker.states.tensors())
        self.round = state.round
        self.oldest = min(self._store.rounds())


class SiloCheckpoints:
    """Of a client process: what stays with its silos. Nothing is written where everything travels.

    Raises:
        ConfigError: as ServerCheckpoints.
    """

    def __init__(self, plan: Plan, trainer: FedSQTrainer, silos: list[int]) -> None:
        config = plan.config
        self._trainer, self._silos, self._resume = trainer, silos, config.resume
        self._store: SiloSnapshots | None = None
        if config.checkpoint_dir is not None and trainer.worker.states.kept:
            folder = Path(config.checkpoint_dir).expanduser()
            self._store = SiloSnapshots(folder, kept_options(config))
            refuse_started(folder, self._store.rounds(), config.resume)

    def rewind(self) -> None:
        """The next task may come after fewer finished rounds than the last one. Raises ConfigError."""
        if self._store is None and self._trainer.worker.states.kept:
            raise ConfigError(
                "the server was started anew, and what stays with the silos was not written down here: set "
                "fedsq_args.checkpoint_dir at the clients, too"
            )
        self._resume = True

    def before(self, finished: int) -> None:
        """The first task of this process comes after so many finished rounds. Raises WeightsError."""
        if self._store is None or not self._resume:
            return
        self._resume = False
        parts = {silo: self._store.load(silo, finished) for silo in self._silos}
        if finished and not any(parts.values()):
            log.warning("what stays with silos %s is not here: they begin with the server's", self._silos)
        self._trainer.worker.states.restore(
            {f"{silo}/{key}": value for silo, part in parts.items() for key, value in part.items()}
        )

    def after(self, silo: int, finished: int, server_at: int) -> None:
        """A silo has trained in the round after so many; the server has a checkpoint of `server_at`."""
        if self._store is not None:
            part = self._trainer.worker.states.of(silo)
            if part:
                self._store.save(silo, finished + 1, part, server_at)
