"""A silo's side of a round, on every host: receive an assignment, train, answer with an update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..dualcopy import Compiled, DualCopy, GateCache
from ..errors import ConfigError, UpdateError
from .algorithm import EVERYTHING, HEAD, Algorithm
from .client_states import ClientStates
from .local import LocalResult, Optimizers, Part, Phase, local_update, trains
from .messages import Announcement, Assignment, with_sums
from .reading import Reading
from .roles import roles, with_roles
from .seeding import derive
from .server_state import ServerState, load_state
from .state import State, fingerprint, state_of
from .task import CLASSIFICATION, Batches, Loss
from .training import LocalTraining


class Client:
    """Trains the silos of one process in one model, one silo after the other.

    Args:
        model: the warm-started model as the algorithm's view has it. What a silo is sent is loaded into it.
        options: what the algorithm reads.
        seed: the run's. None: training draws from the process's generators, as the host has them.
        keep_gates: keep the gates of inputs, which then pass the structural copy only once.
        compile: train through torch.compile.
        loss: of the data set's task.
        reading: of its batches, and of the model's outputs.
        keep_optimizers: a silo's optimizers, with their moments, go on from round to round.

    Raises:
        ConfigError: optimizers are to be kept under a learning rate that is not constant.
    """

    def __init__(
        self,
        model: nn.Module,
        algorithm: Algorithm,
        options: object,
        training: LocalTraining,
        seed: int | None,
        keep_gates: bool = False,
        compile: bool = False,
        loss: Loss = CLASSIFICATION.loss,
        keep_optimizers: bool = False,
        reading: Reading = CLASSIFICATION.reading,
    ) -> None:
        if keep_optimizers and training.lr_schedule != "constant":
            raise ConfigError(f"optimizers that are kept need lr_schedule constant, not {training.lr_schedule}")
        self.loss, self.reading, self._keep_optimizers = loss, reading, keep_optimizers
        self._optimizers: dict[int, Optimizers] = {}
        self.model, self.algorithm, self.options = model, algorithm, options
        self.training, self.seed = training, seed
        self.roles = roles(model, getattr(options, "head", None))
        self.states = ClientStates(model, self.roles, algorithm.exchange.travels)
        compiled = Compiled(model) if compile else None
        self._forward: Callable[[Tensor], object] | None = compiled
        if keep_gates and isinstance(model, DualCopy):
            self._forward = GateCache(model, passes=compiled)
        self.structural_fingerprint: str | None = None
        """SHA-256 of the structural copy that the server announced last and the model has; None: it announced none,
        or dropped it."""

    def receive(self, assignment: Assignment) -> None:
        """Load what the server sent: weights, and the structural copy where it is announced.

        Raises:
            UpdateError: the structural copy that the model has now is not the one that the server means.
        """
        self.model.load_state_dict({**self.model.state_dict(), **assignment.state})
        travels = self.algorithm.exchange.travels
        if any(self.roles[key] not in travels for key in assignment.state):
            # The whole model: the first broadcast, from which silos begin their own parts.
            self.states.begin(self.model)
        if assignment.structural is not None:
            self._follow(assignment.structural)

    def _follow(self, announced: Announcement) -> None:
        assert isinstance(self.model, DualCopy)
        if announced.fingerprint is None:
            self.model.unfreeze()
            self.structural_fingerprint = None
            return
        if announced.fingerprint == self.structural_fingerprint:
            return  # another silo of this process was told before
        self.model.refresh(announced.state)
        found = fingerprint({k: v.cpu() for k, v in self.model.structural.state_dict().items()})
        if found != announced.fingerprint:
            raise UpdateError(
                f"the structural copy is {found[:12]}…, the server announced {announced.fingerprint[:12]}…"
            )
        self.structural_fingerprint = found

    def resume(self, state: ServerState, silos: Mapping[str, Tensor]) -> None:
        """Go on where a run was between two rounds; `silos` is what `ClientStates.tensors` gave."""
        load_state(self.model, state)
        self.states.begin(self.model)
        self.states.restore(silos)

    def parts(self, round: int) -> Sequence[Part]:
        """What happens in a round (0-based), in order."""
        return self.algorithm.phases.parts(self.options, round)

    def train(
        self,
        silo: int,
        batches: Batches,
        round: int,
        device: torch.device | str = "cpu",
        data: Batches | None = None,
        on_step: Callable[[Tensor], None] | None = None,
    ) -> LocalResult:
        """Train one round of a silo, from the weights in the model and the part that stayed with the silo.

        `data` and `on_step` are those of `local_update`.
        """
        self.states.load(silo, self.model)
        result = self._update(
            batches,
            self.parts(round),
            round=round,
            seed=self._derive("local", round, silo),
            objective=self.algorithm.objective.make(self.options),
            device=device,
            data=data,
            optimizers=self._optimizers.setdefault(silo, {}) if self._keep_optimizers else None,
            on_step=on_step,
        )
        self.states.keep(silo, self.model)
        return result

    def _update(self, batches: Batches, parts: Sequence[Part], **how: Any) -> LocalResult:
        about: dict[str, Any] = {"loss": self.loss, "reading": self.reading, "forward": self._forward, **how}
        return local_update(self.model, batches, self.training, parts, self.roles, **about)

    def answer(self, round: int, sums: Mapping[str, Tensor]) -> State:
        """What the silo that trained last sends: an independent copy of the part of the model that travels, where the
        round changed it, and its sums."""
        return with_sums(self.travelling() if trains(self.parts(round)) else {}, sums)

    def travelling(self) -> State:
        """An independent copy of the part of the model that travels, on the CPU."""
        return with_roles(state_of(self.model), self.roles, self.algorithm.exchange.travels)

    def forget_optimizers(self, silo: int) -> None:
        """Let a silo's next round begin with new optimizers: the moments of a refused update are worth nothing."""
        self._optimizers.pop(silo, None)

    def personalise(
        self,
        silo: int,
        batches: Batches,
        epochs: int,
        head_only: bool,
        device: torch.device | str = "cpu",
        on_step: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Make the model the silo's own: global weights, the silo's own part, and a fine-tuning of so many epochs at
        the learning rate of the first round. It is the same for every algorithm, and nothing of it is kept."""
        self.states.load(silo, self.model)
        if epochs:
            parts = [Phase(epochs, HEAD if head_only else EVERYTHING)]
            self._update(batches, parts, round=0, seed=self._derive("finetune", silo), device=device, on_step=on_step)

    def _derive(self, *keys: int | str) -> int | None:
        return None if self.seed is None else derive(keys[0], self.seed, *keys[1:])
