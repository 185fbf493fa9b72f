"""The client's side of a row, for every host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..algorithms.exchange import EVERYTHING, EXCHANGES, HEAD
from ..algorithms.objective import OBJECTIVES
from ..algorithms.options import Options
from ..algorithms.phases import PHASES
from ..algorithms.table import Algorithm
from ..dualcopy import Compiled, DualCopy, GateCache
from ..errors import ConfigError, UpdateError
from .client_states import ClientStates
from .local import LocalResult, LocalTraining, Optimizers, Part, Phase, local_update
from .messages import Announcement
from .roles import roles
from .seeding import derive
from .state import fingerprint
from .task import CLASSIFICATION, Loss

Batches = Iterable[tuple[Tensor, Tensor]]


class Worker:
    """Trains for the clients of one process, in one model, one client after the other.

    Args:
        model: the warm-started model as the row's view has it; what is sent to a client is loaded into it.
        seed: the run's; None: training draws from the process's generators, as the host has them.
        keep_gates: keep the gates of inputs, which then pass the structural copy once.
        compile: train through torch.compile.
        loss: of the data set's task.
        keep_optimizers: a client's optimizers go on from round to round, with their moments; the learning
            rate must be constant then.
    """

    def __init__(
        self,
        model: nn.Module,
        row: Algorithm,
        options: Options,
        training: LocalTraining,
        seed: int | None,
        keep_gates: bool = False,
        compile: bool = False,
        loss: Loss = CLASSIFICATION.loss,
        keep_optimizers: bool = False,
    ) -> None:
        if keep_optimizers and training.lr_schedule != "constant":
            raise ConfigError(
                f"optimizers that are kept need lr_schedule constant, not {training.lr_schedule}"
            )
        self.loss, self._keep_optimizers = loss, keep_optimizers
        self._optimizers: dict[int, Optimizers] = {}
        self.model, self.row, self.options, self.training, self.seed = model, row, options, training, seed
        self.roles = roles(model, options.head)
        self.states = ClientStates(model, self.roles, EXCHANGES[row.exchange])
        compiled = Compiled(model) if compile else None
        self._forward: Callable[[Tensor], object] | None = compiled
        if keep_gates and isinstance(model, DualCopy):
            self._forward = GateCache(model, passes=compiled)
        self.follows: str | None = None
        """Fingerprint of the structural copy that the server announced last, and that the model has."""

    def follow(self, announced: Announcement) -> None:
        """Take over the structural copy that the server announced, after the weights that came with it.

        Raises:
            UpdateError: it is not the one that the server means.
        """
        assert isinstance(self.model, DualCopy)
        if announced.fingerprint is None:
            self.model.unfreeze()
            self.follows = None
            return
        if announced.fingerprint == self.follows:  # another client of this process was told the same
            return
        self.model.refresh(announced.state)
        found = fingerprint({k: v.cpu() for k, v in self.model.structural.state_dict().items()})
        if found != announced.fingerprint:
            raise UpdateError(
                f"the structural copy is {found[:12]}…, the server announced {announced.fingerprint[:12]}…"
            )
        self.follows = found

    def parts(self, round: int) -> Sequence[Part]:
        """What happens in a round (0-based), in order."""
        return PHASES[self.row.phases].parts(self.options, round)

    def train(
        self,
        client: int,
        batches: Batches,
        round: int,
        device: torch.device | str = "cpu",
        data: Batches | None = None,
        on_step: Callable[[Tensor], None] | None = None,
    ) -> LocalResult:
        """One round of one client, from the weights in the model and the part that stayed with it.

        `data` and `on_step` are those of `local_update`.
        """
        self.states.load(client, self.model)
        objective = OBJECTIVES[self.row.objective](self.options)
        result = local_update(
            self.model,
            batches,
            self.training,
            self.parts(round),
            self.roles,
            round=round,
            seed=self._derived("local", round, client),
            objective=objective,
            loss=self.loss,
            device=device,
            forward=self._forward,
            data=data,
            optimizers=self._optimizers.setdefault(client, {}) if self._keep_optimizers else None,
            on_step=on_step,
        )
        self.states.keep(client, self.model)
        return result

    def personalise(
        self,
        client: int,
        batches: Batches,
        epochs: int,
        head_only: bool,
        device: torch.device | str = "cpu",
        on_step: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Make the model the client's own: the global weights, its own part, and a final fine-tuning of so
        many epochs, the same for every row, at the first round's learning rate. Nothing of it is kept."""
        self.states.load(client, self.model)
        if epochs:
            phase = Phase(epochs, HEAD if head_only else EVERYTHING)
            local_update(
                self.model,
                batches,
                self.training,
                [phase],
                self.roles,
                round=0,
                seed=self._derived("finetune", client),
                loss=self.loss,
                device=device,
                forward=self._forward,
                on_step=on_step,
            )

    def _derived(self, *keys: int | str) -> int | None:
        return None if self.seed is None else derive(keys[0], self.seed, *keys[1:])
