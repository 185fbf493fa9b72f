"""The client's side of a row, for every host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..dualcopy import Compiled, DualCopy, GateCache
from ..errors import UpdateError
from ..federation.client_states import ClientStates
from ..federation.local import LocalResult, LocalTraining, Objective, Part, Phase, local_update
from ..federation.messages import Announcement
from ..federation.roles import roles
from ..federation.seeding import derive
from ..federation.state import fingerprint
from ..federation.task import CLASSIFICATION, Loss
from .exchange import EVERYTHING, EXCHANGES, HEAD
from .objective import OBJECTIVES
from .options import Options
from .phases import PHASES
from .table import Algorithm

Batches = Iterable[tuple[Tensor, Tensor]]


class Worker:
    """Trains for the clients of one process, in one model, one client after the other.

    Args:
        model: the warm-started model as the row's view has it; what is sent to a client is loaded into it.
        seed: the run's.
        keep_gates: keep the gates of inputs, which then pass the structural copy once.
        compile: train through torch.compile.
        loss: of the data set's task.
    """

    def __init__(
        self,
        model: nn.Module,
        row: Algorithm,
        options: Options,
        training: LocalTraining,
        seed: int,
        keep_gates: bool = False,
        compile: bool = False,
        loss: Loss = CLASSIFICATION.loss,
    ) -> None:
        self._loss = loss
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
    ) -> LocalResult:
        """One round of one client, from the weights in the model and the part that stayed with it."""
        self.states.load(client, self.model)
        seed = derive("local", self.seed, round, client)
        objective = OBJECTIVES[self.row.objective](self.options)
        result = self._update(self.parts(round), batches, round, seed, device, objective)
        self.states.keep(client, self.model)
        return result

    def personalise(
        self,
        client: int,
        batches: Batches,
        epochs: int,
        head_only: bool,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make the model the client's own: the global weights, its own part, and a final fine-tuning of so
        many epochs, the same for every row, at the first round's learning rate. Nothing of it is kept."""
        self.states.load(client, self.model)
        if epochs:
            phase = Phase(epochs, HEAD if head_only else EVERYTHING)
            seed = derive("finetune", self.seed, client)
            self._update([phase], batches, 0, seed, device, objective=None)

    def _update(
        self,
        parts: Sequence[Part],
        batches: Batches,
        round: int,
        seed: int,
        device: torch.device | str,
        objective: Objective | None,
    ) -> LocalResult:
        return local_update(
            self.model,
            batches,
            self.training,
            parts,
            self.roles,
            round=round,
            seed=seed,
            objective=objective,
            loss=self._loss,
            device=device,
            forward=self._forward,
        )
