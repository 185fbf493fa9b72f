"""The silos of a process under FedML: its data, and one trainer that serves them in turn."""

from __future__ import annotations

from typing import Any

from ...data.silos import SilosData
from ...errors import ConfigError
from ...federation.checkpoints import SiloCheckpoints
from ...federation.client import Client
from ...federation.evaluate import Metrics
from ...federation.messages import Assignment, packed
from ...federation.seeding import derive, isolated, sample_clients
from ...federation.simulation import test_seeded
from ...federation.state import State, clone
from ...run.plan import Plan
from .adapters import FedSQTrainer, is_ours
from .aggregation import event
from .security import label_flipping
from .weights import take_weights


def draw_silos(plan: Plan, args: Any, round_idx: int) -> list[int]:
    """The silos of a round (0-based). FedML's loaders may have set their number."""
    seed = plan.config.seed("sampling")
    return sample_clients(args.client_num_in_total, args.client_num_per_round, round_idx, seed)


class Silos:
    """The silos of this process, and the trainer that serves them: ours, or a user's own.

    Args:
        checkpoints: what is saved of the silos' own parts; None: they are not saved here.
    """

    def __init__(
        self,
        plan: Plan,
        args: Any,
        device: Any,
        trainer: Any,
        data: SilosData,
        checkpoints: SiloCheckpoints | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self.plan, self.args, self.device, self.trainer, self.data = plan, args, device, trainer, data

    @property
    def client(self) -> Client | None:
        """That of our trainer; None: a user's own is sent weights alone, and sends weights alone."""
        return self.trainer.client if is_ours(self.trainer) else None

    @property
    def structural_fingerprint(self) -> str | None:
        """SHA-256 of the structural copy under which the trainer trains; None without one."""
        return None if self.client is None else self.client.structural_fingerprint

    def samples(self, silo: int) -> int:
        """Number of training samples of a silo."""
        data = self.data
        return int(data.sizes.get(silo) or 0) if data.train.get(silo) is not None else 0

    def resume(self, finished: int) -> None:
        """Before a task that comes after so many finished rounds: see `SiloCheckpoints.restore`."""
        if self._checkpoints is not None:
            self._checkpoints.restore(finished)

    def rewind(self) -> None:
        """The server was started anew: see `SiloCheckpoints.rewind`."""
        if self._checkpoints is not None:
            self._checkpoints.rewind()

    def train(self, silo: int, round: int, assignment: Assignment) -> State:
        """Train a round (0-based) of a silo: its answer."""
        return self.train_message(silo, round, packed(assignment))

    def train_message(self, silo: int, round: int, message: State, server_at: int = 0) -> State:
        """The same by FedML's whole life-cycle of a trainer, from a message. `server_at` is the round of the server's
        newest checkpoint."""
        trainer, args, samples = self.trainer, self.args, self.data.sizes[silo]
        args.round_idx = round
        with event("train", f"{round}_{silo}"):
            local = self.data.train[silo], self.data.test.get(silo)
            if (attack := label_flipping()) is not None:
                # It chooses by counting the calls of its process: this is the count that one process would have.
                position = draw_silos(self.plan, args, round).index(silo)
                attack.counter = round * args.client_num_per_round + position
            # A user's own trainer draws from the global generators, too.
            with isolated(derive("client", self.plan.config.random_seed, round, silo)):
                trainer.set_id(silo)
                trainer.update_dataset(*local, samples)
                # A user's own may go on training what it is given.
                trainer.set_model_params(clone(message) if self.client is None else message)
                # A data-poisoning attack puts other data into the trainer.
                data = local[0] if trainer.local_train_dataset is None else trainer.local_train_dataset
                trainer.on_before_local_training(data, self.device, args)
                trainer.train(data, self.device, args)
                trainer.on_after_local_training(data, self.device, args)
            if self._checkpoints is not None:
                self._checkpoints.save(silo, round, server_at)
        return self._answer(silo, message)

    def _answer(self, silo: int, message: State) -> State:
        answer: State = self.trainer.get_model_params()
        if is_ours(self.trainer) and type(self.trainer).get_model_params is FedSQTrainer.get_model_params:
            return answer
        return take_weights(answer, message, f"silo {silo}: get_model_params of your client_trainer")

    def test(self, silo: int, assignment: Assignment, epochs: int) -> Metrics:
        """The silo's own model on its own test data, after a fine-tuning of so many epochs."""
        return self.test_message(silo, packed(assignment), epochs)

    def test_message(self, silo: int, message: State, epochs: int) -> Metrics:
        """The same from a message."""
        batches, config = self.data.test.get(silo), self.plan.config
        if batches is None:
            return Metrics(float("nan"), float("nan"), 0)
        if self.client is None:
            raise ConfigError("a trainer of your own has no models of its silos")
        train = self.data.train[silo] if self.samples(silo) else ()
        self.trainer.set_model_params(message)
        head_only = config.finetune_part == "head"
        self.client.personalise(silo, train, epochs if train else 0, head_only, self.device)
        return test_seeded(self.trainer.model, batches, self.device, self.plan.task, config.random_seed)
