"""The client's side on every road: a trainer that serves silos in turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedml import mlops

from ...errors import ConfigError
from ...federation.evaluate import Metrics, evaluate
from ...federation.seeding import derive, isolated
from ...federation.state import State, clone
from ...run.plan import Plan
from .adapters import FedSQTrainer
from .checkpoints import SiloCheckpoints
from .round import drawn
from .security import label_flipping


class Silos:
    """The silos of this process: FedML's data dictionaries and one trainer."""

    def __init__(
        self,
        plan: Plan,
        args: Any,
        device: Any,
        trainer: Any,
        sizes: Mapping[int, int],
        train: Mapping[int, Any],
        test: Mapping[int, Any],
        checkpoints: SiloCheckpoints | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self.plan, self.args, self.device, self.trainer = plan, args, device, trainer
        self._sizes, self._train, self._test = sizes, train, test

    @property
    def structural_fingerprint(self) -> str | None:
        """Of the structural copy under which this process trains now; None without one."""
        return self.trainer.worker.follows if isinstance(self.trainer, FedSQTrainer) else None

    def samples(self, silo: int) -> int:
        """Training samples of a silo."""
        return int(self._sizes.get(silo) or 0) if self._train.get(silo) is not None else 0

    def resume(self, finished: int) -> None:
        """A task comes after so many finished rounds. Raises WeightsError where the silos' own parts of a run
        that is resumed are damaged."""
        if self._checkpoints is not None:
            self._checkpoints.before(finished)

    def rewind(self) -> None:
        """The server goes on from its checkpoint, perhaps behind what the silos have done since.

        Raises:
            ConfigError: something stays with the silos, and nothing of it was written down.
        """
        if self._checkpoints is not None:
            self._checkpoints.rewind()

    def train(self, silo: int, round_idx: int, message: State, server_at: int = 0) -> State:
        """One round of one silo, by FedML's whole life-cycle of a trainer: what the silo answers. `server_at`
        is the round of the server's newest checkpoint."""
        trainer, args = self.trainer, self.args
        args.round_idx = round_idx
        event = f"{round_idx}_{silo}"
        mlops.event("train", event_started=True, event_value=event)
        ours = isinstance(trainer, FedSQTrainer)
        local = self._train[silo], self._test.get(silo)
        if (attack := label_flipping()) is not None:
            # It chooses by counting the calls of its process: the count that one process would have.
            position = drawn(self.plan, args, round_idx).index(silo)
            attack.counter = round_idx * args.client_num_per_round + position
        # A user's own trainer draws from the global generators, too.
        with isolated(derive("client", self.plan.config.random_seed, round_idx, silo)):
            trainer.set_id(silo)
            trainer.update_dataset(*local, self._sizes[silo])
            # Ours copies what it is given; another trainer might go on training it.
            trainer.set_model_params(message if ours else clone(message))
            # A data-poisoning attack puts other data into the trainer.
            data = local[0] if trainer.local_train_dataset is None else trainer.local_train_dataset
            trainer.on_before_local_training(data, self.device, args)
            trainer.train(data, self.device, args)
            trainer.on_after_local_training(data, self.device, args)
        if self._checkpoints is not None:
            self._checkpoints.after(silo, round_idx, server_at)
        mlops.event("train", event_started=False, event_value=event)
        state: State = trainer.get_model_params()
        return state if ours else clone(state)

    def test(self, silo: int, message: State, epochs: int) -> Metrics:
        """The silo's own model on its own test data, after a fine-tuning of so many epochs."""
        batches = self._test.get(silo)
        if batches is None:
            return Metrics(float("nan"), float("nan"), 0)
        if not isinstance(self.trainer, FedSQTrainer):
            raise ConfigError("a trainer of your own has no models of its silos")
        head_only = self.plan.config.finetune_part == "head"
        train = self._train[silo] if self.samples(silo) else ()
        self.trainer.set_model_params(message)
        self.trainer.worker.personalise(silo, train, epochs if train else 0, head_only, self.device)
        with isolated(derive("test", self.plan.config.random_seed)):
            return evaluate(self.trainer.model, batches, self.device, *self.plan.task)
