"""A silo's side of a round, on every host: receive an assignment, train, answer with an update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..dualcopy import Compiled, DualCopy, GateCache
from ..errors import ConfigError, UpdateError
from .algorithm import EVERYTHING, HEAD, Algorithm
from .beside import Beside
from .client_states import ClientStates
from .local import BatchError, LocalResult, Optimizers, Part, Phase, local_update, trains
from .messages import Announcement, Assignment, idle_answer, with_sums
from .reading import DataError, Reading
from .reseeding import refuse_once
from .roles import roles, with_roles
from .seeding import derive
from .server_state import ServerState, load_state
from .state import (
    State,
    extras_of,
    fingerprint,
    form_of,
    put_extras,
    refuse_reformed,
    state_of,
    tensors_of,
    with_extras,
)
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
        self._extras, self._form, self._beside = extras_of(model), form_of(model), Beside(model)
        self.idle = False
        """Whether the silo that trained last took no step, because its loader gave no batch."""
        compiled = Compiled(model) if compile else None
        self._forward: Callable[[Tensor], object] | None = compiled
        if keep_gates and isinstance(model, DualCopy):
            self._forward = GateCache(model, passes=compiled)
        self.structural_fingerprint: str | None = None
        """SHA-256 of the structural copy that the server announced last and the model has; None: it announced none,
        or dropped it."""

    def receive(self, assignment: Assignment) -> None:
        """Load what the server sent: weights, and the structural copy where it is announced. What `get_extra_state`
        gives, and what the model holds beside its state (`beside`), is put back to what it was when the run began,
        because the silos of a process share one model.

        Raises:
            UpdateError: the structural copy that the model has now is not the one that the server means.
        """
        self.model.load_state_dict(with_extras(self.model, {**tensors_of(self.model), **assignment.state}))
        put_extras(self.model, self._extras)
        self._beside.put_back()
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
        structural = self.model.structural
        if announced.state is None:
            self.model.refresh()
        else:
            self.model.refresh(with_extras(structural, announced.state))
        found = fingerprint({k: v.cpu() for k, v in tensors_of(self.model.structural).items()})
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
        parts = self.parts(round)
        result = self._update(
            silo,
            batches,
            parts,
            round=round,
            seed=self._derive("local", round, silo),
            objective=self.algorithm.objective.make(self.options),
            device=device,
            data=data,
            optimizers=self._optimizers.setdefault(silo, {}) if self._keep_optimizers else None,
            on_step=on_step,
        )
        refuse_reformed(self.model, self._form)
        self.states.keep(silo, self.model)
        self.idle = not result.steps and any(isinstance(part, Phase) and part.epochs for part in parts)
        return result

    def _update(self, silo: int, batches: Batches, parts: Sequence[Part], **how: Any) -> LocalResult:
        refuse_once(batches, silo)
        about: dict[str, Any] = {"loss": self.loss, "reading": self.reading, "forward": self._forward, **how}
        if about["seed"] is not None:
            self._beside.seed(about["seed"])
        try:
            return local_update(self.model, batches, self.training, parts, self.roles, **about)
        except (BatchError, DataError) as error:
            error.after(f"silo {silo}: ")
            raise

    def answer(self, round: int, sums: Mapping[str, Tensor]) -> State:
        """What the silo that trained last sends: an independent copy of the part of the model that travels, where the
        round changed it, and its sums; or that it was idle."""
        if self.idle:
            return idle_answer()
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
            parts, seed = [Phase(epochs, HEAD if head_only else EVERYTHING)], self._derive("finetune", silo)
            self._update(silo, batches, parts, round=0, seed=seed, device=device, on_step=on_step)

    def _derive(self, *keys: int | str) -> int | None:
        return None if self.seed is None else derive(keys[0], self.seed, *keys[1:])
