"""Our rows as strategies of FLamby: its constructor, `perform_round()` and `run()`, around the core."""

from __future__ import annotations

import copy
import inspect
import secrets
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...algorithms import Algorithm
from ...algorithms.fits import refuse_misfit
from ...algorithms.options import Options
from ...algorithms.view import VIEWS
from ...dualcopy import DualCopy
from ...errors import ConfigError, nearest
from ...federation.client import Worker
from ...federation.local import LocalTraining, OptimizerClass, trains
from ...federation.mean import MeanOfDifferences
from ...federation.messages import Assignment, Update
from ...federation.roles import roles
from ...federation.server import Coordinator
from ...federation.state import State, state_of
from ...settings.config import Config, family_of, validated
from .batches import EndlessBatches, Updates
from .privacy import Privacy
from .steplog import StepLog

Loss = Callable[[Tensor, Tensor], Tensor]


class Client:
    """One client: its model, its batches, its optimizer. `model` is where it is evaluated."""

    def __init__(
        self,
        worker: Worker,
        number: int,
        batches: EndlessBatches,
        updates: int,
        device: torch.device,
        on_step: Callable[[Tensor], None] | None,
    ) -> None:
        self._worker, self._number, self._device, self._on_step = worker, number, device, on_step
        self._batches, self._updates = batches, updates

    @property
    def model(self) -> nn.Module:
        return self._worker.model

    def train(self, assignment: Assignment, round: int, travelling: Callable[[State], State]) -> Update:
        """One round from what the server assigns."""
        self.load(assignment.state)
        if assignment.structural is not None:
            self._worker.follow(assignment.structural)
        result = self._worker.train(
            self._number,
            Updates(self._batches, self._updates),
            round,
            self._device,
            data=self._batches.loader,
            on_step=self._on_step,
        )
        state = travelling(state_of(self.model)) if trains(self._worker.parts(round)) else {}
        return Update(self._number, len(self._batches), state, result.sums)

    def load(self, state: State) -> None:
        """Take over the part of the model that travels, beside the part that stays here."""
        self.model.load_state_dict({**self.model.state_dict(), **state})
        self._worker.states.load(self._number, self.model)

    def personalise(self, steps: int) -> None:
        """Fine-tune for so many updates, after the last round."""
        self._worker.personalise(
            self._number,
            Updates(self._batches, steps),
            epochs=1,
            head_only=False,
            device=self._device,
            on_step=self._on_step,
        )


class Strategy:
    """A row of the table in FLamby. Use the classes that `strategy_class` makes.

    Arguments up to `seed` are those of FLamby's FedAvg; `seed` is that of torch's generator where it is not
    given, and differential privacy then has noise that nobody can repeat. As there, optimizers and their
    moments live through all rounds, clients are weighted by their samples, and GPU 0 is used where there is
    one. Unlike there, running statistics are averaged (`buffers`), and `bits_counting_function` is given the
    state that a client sends, which holds them.

    Args:
        num_fine_tuning_steps: updates of every client's model after the last round, as FedAvgFineTuning has
            them; None: what the row's method says, none for most.
        options: the row's, checked as in a recipe.

    Raises:
        ConfigError: an argument is wrong, or does not go with the row or the model.
        GateError: FedSQ's model cannot be gated.
    """

    row: ClassVar[Algorithm]

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
        row = self.row
        for number, loader in enumerate(training_dataloaders):
            if loader is None or not len(loader.dataset):
                raise ConfigError(f"{row.name}: training_dataloaders[{number}] has no samples: leave it out")
        self.nrounds, self.num_updates = nrounds, num_updates
        self.bits_counting_function = bits_counting_function
        privacy = self.privacy(dp_target_epsilon, dp_target_delta, dp_max_grad_norm, num_fine_tuning_steps)
        viewed, chosen, keep_gates = self.viewed(model, options)
        self.training_dataloaders_with_memory = [EndlessBatches(loader) for loader in training_dataloaders]
        self._fine_tuning = [self._steps(loader, num_fine_tuning_steps) for loader in training_dataloaders]
        if privacy is not None:
            privacy.warn(training_dataloaders, num_updates)
        device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        self.models_list: list[Client] = []
        for number, batches in enumerate(self.training_dataloaders_with_memory):
            own: nn.Module = copy.deepcopy(viewed).to(device)
            optimizer = optimizer_class
            if privacy is not None:
                # Whoever knows the seed of the noise can take it away.
                noise_seed = secrets.randbits(63) if seed is None else seed
                made = privacy.optimizer(
                    own, optimizer_class, learning_rate, batches.loader, nrounds, noise_seed, device
                )
                optimizer = _always(made)
            training = LocalTraining(optimizer=optimizer, learning_rate=learning_rate, rounds=max(nrounds, 1))
            worker = Worker(
                own,
                row,
                chosen,
                training,
                seed=None,  # as FLamby: what the process's generators give, in the order of the clients
                keep_gates=keep_gates,
                loss=copy.deepcopy(loss),
                keep_optimizers=True,
            )
            on_step = None
            if log:
                name = row.name if log_basename is None else log_basename
                on_step = StepLog(own, number, len(batches.loader), num_updates, log_period, logdir, name)
            self.models_list.append(Client(worker, number, batches, num_updates, device, on_step))
        self.coordinator = Coordinator(
            row,
            chosen,
            state_of(viewed),
            roles(viewed, chosen.head),
            torch.initial_seed() if seed is None else seed,
            structural=isinstance(viewed, DualCopy),
            mean=MeanOfDifferences,
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
            steps = cls.row.finetune_epochs if num_fine_tuning_steps is None else num_fine_tuning_steps
            found.refuse(cls.row, steps)
        return found

    @classmethod
    def viewed(cls, model: nn.Module, options: dict[str, Any]) -> tuple[nn.Module, Options, bool]:
        """A copy of the model as the row trains it, the row's options, and whether gates are kept; the errors
        are those of the constructor."""
        chosen, keep_gates = _options(cls.row, options)
        refuse_misfit(cls.row, chosen, model)
        return VIEWS[cls.row.view](copy.deepcopy(model), chosen), chosen, keep_gates

    def perform_round(self) -> None:
        """Train every client for `num_updates` batches from the server's model, and gather what they send."""
        server, clients = self.coordinator, range(len(self.models_list))
        server.next_round()
        assignments = server.assign(clients)
        gathering = server.begin(clients)
        for client, assignment in zip(self.models_list, assignments, strict=True):
            update = client.train(assignment, server.state.round, server.travelling)
            if self.bits_counting_function is not None:
                sent = [*update.state.values(), *update.sums.values()]
                self.bits_counting_function([value.numpy() for value in sent])
            gathering.add(update)
        server.state = gathering.finish()
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

    def _steps(self, loader: Any, given: int | None) -> int:
        return self.row.finetune_epochs * len(loader) if given is None else given


def strategy_class(row: Algorithm, name: str | None = None) -> type[Strategy]:
    """A row as a strategy. Its options are named parameters: FLamby's configuration files know no others."""
    known = {**_signature(Strategy), **{key: _parameter(key) for key in known_options(row)}}
    made = type(name or row.name, (Strategy,), {"row": row, "__doc__": f"{row.name} ({row.source})."})
    made.__signature__ = inspect.Signature(list(known.values()))  # type: ignore[attr-defined]
    return made


def known_options(row: Algorithm) -> tuple[str, ...]:
    """The options that a row has in FLamby."""
    head = ("head",) if row.needs_head else ()
    return (*head, "buffers", *(key for key in row.options if key in Config.model_fields))


def _options(row: Algorithm, given: dict[str, Any]) -> tuple[Options, bool]:
    for key in given:
        if key not in known_options(row):
            raise ConfigError(f"{row.name} has no option '{key}'{nearest(key, known_options(row))}")
    valid, found = validated(given)
    if wrong := [f.line.removeprefix(f"{family_of(f.key)}.") for f in found if f.key in given]:
        raise ConfigError(f"{row.name}: {'; '.join(wrong)}")
    chosen = {key: valid[key] for key in given}
    keep_gates = bool(chosen.pop("keep_gates", False))
    own = {field.name for field in fields(Options)}
    options = {key: value for key, value in chosen.items() if key in own}
    accepted = tuple(options.pop("gate_accept", ()))
    return Options(**options, gate_accept=accepted), keep_gates


def _always(optimizer: torch.optim.Optimizer) -> OptimizerClass:
    def made(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return optimizer

    return made


def _signature(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters
    return {name: p for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}


def _parameter(key: str) -> Any:
    default = Config.model_fields[key].default
    return inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
