"""Our algorithms as strategies of FLamby: its constructor, `perform_round()` and `run()`, around the core's round."""

from __future__ import annotations

import copy
import inspect
import secrets
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...algorithms import Algorithm, algorithm
from ...errors import ConfigError, nearest
from ...federation.client import Client
from ...federation.mean import MeanOfDifferences
from ...federation.messages import Assignment
from ...federation.reading import Reading, ReadingOptions
from ...federation.record import RoundRecord
from ...federation.reseeding import refuse_once
from ...federation.roles import roles
from ...federation.round import Round
from ...federation.server import Server
from ...federation.state import State, state_of
from ...federation.training import LocalTraining, OptimizerClass, OptimizerTraining
from ...settings.config import Config, family_of, validated
from .batches import EndlessBatches, Updates
from .privacy import Privacy
from .steplog import StepLog

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Silo:
    """One of FLamby's clients: its batches, of which a round takes `updates`, and what trains on them."""

    client: Client
    number: int
    batches: EndlessBatches
    updates: int
    device: torch.device
    on_step: Callable[[Tensor], None] | None

    @property
    def model(self) -> nn.Module:
        """Where FLamby evaluates it."""
        return self.client.model

    def train(self, assignment: Assignment, round: int) -> State:
        """One round from what the server assigns: the silo's answer."""
        self.client.receive(assignment)
        batches = Updates(self.batches, self.updates)
        result = self.client.train(self.number, batches, round, self.device, self.batches.loader, self.on_step)
        self.client.idle = self.client.idle and self.updates > 0
        return self.client.answer(round, result.sums)

    def load(self, state: State) -> None:
        """Take over the part of the model that travels, beside the part that stays here."""
        self.client.receive(Assignment(state))
        self.client.states.load(self.number, self.model)

    def personalise(self, steps: int) -> None:
        """Fine-tune for so many updates, after the last round."""
        batches = Updates(self.batches, steps)
        self.client.personalise(self.number, batches, 1, head_only=False, device=self.device, on_step=self.on_step)


class Strategy:
    """An algorithm in FLamby. Use the classes that `strategy_class` makes.

    Arguments up to `seed` are those of FLamby's FedAvg. Where `seed` is not given, it is that of torch's generator,
    and the noise of differential privacy cannot be repeated. As in FLamby, optimizers and their moments live through
    all rounds, clients are weighted by their samples, and GPU 0 is used where there is one. Unlike there, running
    statistics are averaged (`buffers`), and `bits_counting_function` is given the state that a client sends, which
    holds them; and an update that is not finite or does not fit is refused by name: the round goes on without it, or
    ends the run (`nonfinite`).

    Args:
        num_fine_tuning_steps: updates of every client's model after the last round, as in FedAvgFineTuning; None: what
            the algorithm says, none for most.
        options: the algorithm's, checked as in a recipe.

    Raises:
        ConfigError: an argument is wrong, or does not go with the algorithm or the model.
        GateError: FedSQ's model cannot be gated.
        UpdateError: from a round: an update was refused and `nonfinite` is "fail", or no update was left.
    """

    algorithm: ClassVar[Algorithm]

    def __init__(
        self,
        training_dataloaders: Sequence[Any],
        model: nn.Module,
        loss: Loss,
        optimizer_class: OptimizerClass,
        learning_rate: float,
        num_updates: int,
        nrounds: int,
        dp_target_epsilon: float | None = None,
        dp_target_delta: float | None = None,
        dp_max_grad_norm: float | None = None,
        log: bool = False,
        log_period: int = 100,
        bits_counting_function: Callable[[list[Any]], object] | None = None,
        logdir: str = "./runs",
        log_basename: str | None = None,
        seed: int | None = None,
        num_fine_tuning_steps: int | None = None,
        **options: Any,
    ) -> None:
        self._refuse_empty(training_dataloaders)
        self.nrounds, self.num_updates = nrounds, num_updates
        self.bits_counting_function = bits_counting_function
        privacy = self.privacy(dp_target_epsilon, dp_target_delta, dp_max_grad_norm, num_fine_tuning_steps)
        viewed, chosen, nonfinite, reading = self.viewed(model, options)
        self._fatal = "nonfinite: fail" if nonfinite == "fail" else None
        self.training_dataloaders_with_memory = [EndlessBatches(loader) for loader in training_dataloaders]
        epochs, steps = self.algorithm.finetune_epochs, num_fine_tuning_steps
        self._fine_tuning = [epochs * len(one) if steps is None else steps for one in training_dataloaders]
        if privacy is not None:
            privacy.warn(training_dataloaders, num_updates)
        device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        name = self.algorithm.name if log_basename is None else log_basename
        self.models_list: list[Silo] = []
        for number, batches in enumerate(self.training_dataloaders_with_memory):
            own: nn.Module = copy.deepcopy(viewed).to(device)
            optimizer = optimizer_class
            if privacy is not None:
                # Whoever knows the seed of the noise can take it away.
                noise = secrets.randbits(63) if seed is None else seed
                made = privacy.optimizer(own, optimizer_class, learning_rate, batches.loader, nrounds, noise, device)
                optimizer = _always(made)
            training = OptimizerTraining(optimizer=optimizer, learning_rate=learning_rate, comm_round=max(nrounds, 1))
            client = self._client(own, chosen, training, copy.deepcopy(loss), reading)
            on_step = None
            if log:
                on_step = StepLog(own, number, len(batches.loader), num_updates, log_period, logdir, name)
            self.models_list.append(Silo(client, number, batches, num_updates, device, on_step))
        server_seed, known = torch.initial_seed() if seed is None else seed, roles(viewed, chosen.head)
        self.server = Server(self.algorithm, chosen, state_of(viewed), known, server_seed, MeanOfDifferences)

    def _refuse_empty(self, loaders: Sequence[Any]) -> None:
        for number, loader in enumerate(loaders):
            refuse_once(loader, number)
            if loader is not None and not isinstance(getattr(loader, "dataset", None), Sized):
                raise ConfigError(
                    f"{self.algorithm.name}: training_dataloaders[{number}] is a {type(loader).__name__} without the "
                    "number of its samples, by which FLamby weights a client: give a DataLoader of a data set that has "
                    "a length"
                )
            if loader is None or not len(loader.dataset):
                raise ConfigError(f"{self.algorithm.name}: training_dataloaders[{number}] has no samples: leave it out")

    def _client(self, model: nn.Module, options: Any, training: LocalTraining, loss: Loss, reading: Reading) -> Client:
        return Client(
            model,
            self.algorithm,
            options,
            training,
            seed=None,  # as FLamby: what the process's generators give, in the order of the clients
            keep_gates=getattr(options, "keep_gates", False),
            loss=loss,
            keep_optimizers=True,
            reading=reading,
        )

    @classmethod
    def privacy(
        cls,
        dp_target_epsilon: float | None = None,
        dp_target_delta: float | None = None,
        dp_max_grad_norm: float | None = None,
        num_fine_tuning_steps: int | None = None,
    ) -> Privacy | None:
        """What these arguments of the constructor ask for; the errors are the constructor's."""
        found = Privacy.of(dp_target_epsilon, dp_target_delta, dp_max_grad_norm)
        if found is not None:
            steps = cls.algorithm.finetune_epochs if num_fine_tuning_steps is None else num_fine_tuning_steps
            found.refuse(cls.algorithm, steps)
        return found

    @classmethod
    def viewed(cls, model: nn.Module, options: dict[str, Any]) -> tuple[nn.Module, Any, str, Reading]:
        """A copy of the model as the algorithm trains it, what the algorithm reads, the option `nonfinite`, and how
        batches and outputs are read. The errors are those of the constructor."""
        name, known = cls.algorithm.name, known_options(cls.algorithm)
        for key in options:
            if key not in known:
                raise ConfigError(f"{name} has no option '{key}'{nearest(key, known)}")
        every, found = validated(options)
        if wrong := [f.line.removeprefix(f"{family_of(f.key)}.") for f in found if f.key in options]:
            raise ConfigError(f"{name}: {'; '.join(wrong)}")
        valid = {key: every[key] for key in options}
        nonfinite = str(valid.pop("nonfinite", "skip"))
        reading = ReadingOptions(batch=valid.pop("batch", None), output=valid.pop("output", None)).reading()
        chosen = cls.algorithm.settings(**valid)
        cls.algorithm.refuse_misfit(model, chosen)
        return cls.algorithm.view.make(copy.deepcopy(model), chosen), chosen, nonfinite, reading

    def perform_round(self) -> None:
        """Train every client for `num_updates` batches from the server's model, and gather what they send."""
        server, number = self.server, self.server.state.round
        samples = {silo: float(len(one.batches)) for silo, one in enumerate(self.models_list)}
        current = Round(server, list(samples), samples, RoundRecord(number + 1), self._fatal)
        for silo, assignment in current.assignments.items():
            answer = self.models_list[silo].train(assignment, number)
            if self.bits_counting_function is not None:
                self.bits_counting_function([value.numpy() for value in answer.values()])
            current.take(silo, answer)
        current.close()
        for silo in current.refused:
            self.models_list[silo].client.forget_optimizers(silo)
        for client in self.models_list:
            client.load(server.travelling(server.state.model))

    def run(self) -> list[nn.Module]:
        """All rounds, then the fine-tuning where there is one: every client's model, in their order."""
        from tqdm import tqdm

        for _ in tqdm(range(self.nrounds)):
            self.perform_round()
        for client, steps in zip(self.models_list, self._fine_tuning, strict=True):
            if steps:
                client.personalise(steps)
        return [client.model for client in self.models_list]


def strategy_class(name: str) -> type[Strategy]:
    """The strategy of an algorithm, or of several joined by `+`, by its name: a class for `flamby.strategies`.

    Raises:
        ConfigError: there is no such algorithm.
    """
    return make_strategy(algorithm(name))


def make_strategy(algorithm: Algorithm, name: str | None = None) -> type[Strategy]:
    """An algorithm as a strategy, called `name`. Its options are named parameters: FLamby's configuration files know no
    others."""
    parameters = [p for p in inspect.signature(Strategy).parameters.values() if p.kind is not p.VAR_KEYWORD]
    for key in known_options(algorithm):
        default = Config.model_fields[key].default
        parameters.append(inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default))
    about = {"algorithm": algorithm, "__doc__": f"{algorithm.name} ({algorithm.source})."}
    made = type(name or algorithm.name, (Strategy,), about)
    made.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return made


def known_options(algorithm: Algorithm) -> tuple[str, ...]:
    """The options that an algorithm has in FLamby."""
    head = ("head",) if algorithm.needs_head else ()
    own = (key for key in algorithm.option_names if key in Config.model_fields)
    return (*head, "buffers", "nonfinite", *ReadingOptions.model_fields, *own)


def _always(optimizer: torch.optim.Optimizer) -> OptimizerClass:
    """Gives this optimizer whenever one is built: opacus has tied it to the model. It begins without moments."""

    def made(parameters: Any, lr: float) -> torch.optim.Optimizer:
        optimizer.state.clear()
        return optimizer

    return made
