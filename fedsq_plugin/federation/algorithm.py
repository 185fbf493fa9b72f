"""What an algorithm is: five choices, the options that they read, and a source.

A choice is a value of one of the classes below. FedAvg's choices are the defaults of `Algorithm`, so an algorithm
says only in what it differs from FedAvg, and two algorithms go together where they differ in other choices.
"""

from __future__ import annotations

import functools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from pydantic import create_model
from torch import Tensor, nn

from ..dualcopy import DualCopy
from ..errors import ConfigError, Word
from .local import Part, Phase, Term
from .options import Options, option, runs_rounds
from .roles import Role, refuse_parted
from .roles import roles as find_roles
from .server_state import ServerState
from .state import State
from .trainable import refuse_untrainable

EVERYTHING = frozenset(Role)
HEAD = frozenset({Role.HEAD, Role.HEAD_NORM_PARAMETER})
BODY = EVERYTHING - HEAD


def _unknown_head(native: str | None, warm_start: str) -> str | None:
    return f"{native} knows no head" if native and warm_start not in ("file", "imagenet") else None


class FederationOptions(Options):
    """The options that the choices of several algorithms read."""

    epochs: int = option(1, "train_args", "local epochs per round", agree=True, ge=0)
    head: str | None = option(
        None, "fedsq_args", "module path of the head; known for our own backbones", agree=True, idle=_unknown_head
    )
    buffers: Literal["average", "keep"] = option(
        "average",
        "fedsq_args",
        "BatchNorm's statistics: average the silos', or keep the server's",
        agree=True,
        idle=runs_rounds,
    )


class ExtraOptions(Options):
    """Options of another package's algorithm, which it names by `options=ExtraOptions`."""

    extra: dict[str, Any] = option({}, "fedsq_args", "options of third-party algorithms", agree=True)


Fits = Callable[["Algorithm", nn.Module, Any], None]
"""(algorithm, model, options): raises ConfigError where a choice makes no sense for the model."""


def fits_any(algorithm: Algorithm, model: nn.Module, options: Any) -> None:
    """Every model will do."""


@dataclass(frozen=True)
class View:
    """What a silo trains."""

    name: str
    make: Callable[[nn.Module, Any], nn.Module]
    """(model, options) -> the model as it is trained."""
    gated: bool = False
    """Whether that is a DualCopy, whose structural copy the server announces."""
    next_structural: Callable[[State, Mapping[str, Tensor], int, Any], State | None] = (
        lambda structural, model, round, options: structural
    )
    """(structural copy, global model, finished rounds, options) -> the structural copy of the next round: the same
    object where it does not change, None from the round on in which it is dropped."""
    fits: Fits = fits_any


@dataclass(frozen=True)
class Objective:
    """What is added to the loss."""

    name: str
    make: Callable[[Any], Term | None]
    """options -> the added term; None: nothing is added."""
    fits: Fits = fits_any


@dataclass(frozen=True)
class Phases:
    """Which part of the model trains when."""

    name: str
    parts: Callable[[Any, int], Sequence[Part]]
    """(options, 0-based round) -> what happens in that round, in order; the same at the server and the silos."""
    needs_head: bool = False
    finetune_epochs: int = 0
    """Epochs of the fine-tuning at every silo that ends the algorithm, unless the recipe says otherwise."""
    fits: Fits = fits_any


@dataclass(frozen=True)
class Exchange:
    """What travels between the server and the silos. The rest of the model stays with each silo."""

    name: str
    travels: frozenset[Role]
    fits: Fits = fits_any


@dataclass(frozen=True)
class ServerRule:
    """How the updates of a round become the next model or models."""

    name: str
    step: Callable[[ServerState, Any, Mapping[str, Role], Any, int], ServerState]
    """(server's state, what was gathered, roles, options, the run's seed) -> the next state."""
    separate: bool = False
    """What is gathered. False: the sample-weighted mean of the updates, which are added one at a time. True:
    {position in the round: update's state}, all at once."""
    fits: Fits = fits_any


def plain(model: nn.Module, options: Any) -> nn.Module:
    """The model as it is.

    Raises:
        ConfigError: it is a DualCopy; training it would be FedSQ under another name.
    """
    if isinstance(model, DualCopy):
        raise ConfigError(
            "the model is a DualCopy, which this algorithm would train as FedSQ does; "
            "use the plain model (`model: resnet18`, not `dualcopy_resnet18`)"
        )
    return model


def everything(options: FederationOptions, round: int) -> Sequence[Part]:
    """All parameters, for the round's local epochs."""
    return (Phase(options.epochs, EVERYTHING),)


def average(
    server: ServerState, mean: Mapping[str, Tensor], roles: Mapping[str, Role], options: Any, seed: int
) -> ServerState:
    """The sample-weighted mean of the updates (McMahan et al. 2017, arXiv 1602.05629)."""
    return replace(server, model=OrderedDict(server.model, **mean))


PLAIN = View("plain", plain)
NOTHING = Objective("none", lambda options: None)
ALL_PARTS = Phases("all", everything)
ALL_TRAVELS = Exchange("all", EVERYTHING)
AVERAGE = ServerRule("average", average)


@dataclass(frozen=True)
class Algorithm:
    """Five choices; their defaults are FedAvg's.

    Raises:
        ConfigError: the name cannot name a file, or a choice is no value of its class.
    """

    name: str
    source: str
    view: View = PLAIN
    objective: Objective = NOTHING
    phases: Phases = ALL_PARTS
    exchange: Exchange = ALL_TRAVELS
    server: ServerRule = AVERAGE
    options: type[Options] = Options
    """The group of the options that only this algorithm reads."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.+-]+", self.name):
            raise ConfigError(f"algorithm '{self.name}': a name has letters, digits, '-', '_' and '.'")
        for choice, value in self.choices.items():
            kind = type(_DEFAULTS[choice])
            if not isinstance(value, kind):
                raise ConfigError(
                    f"algorithm '{self.name}': {choice} is {type(value).__name__}, not a value of {kind.__name__}"
                )
        if not (isinstance(self.options, type) and issubclass(self.options, Options)):
            raise ConfigError(f"algorithm '{self.name}': options is no subclass of Options, as ExtraOptions is")

    @property
    def gated(self) -> bool:
        """Whether silos train under the gates of a structural copy."""
        return self.view.gated

    @property
    def needs_head(self) -> bool:
        """Whether the head must be told from the body."""
        return self.phases.needs_head or Role.HEAD not in self.exchange.travels

    @property
    def personal(self) -> bool:
        """Whether silos have models of their own: a part of the model stays with each silo."""
        return self.exchange.travels != EVERYTHING

    @property
    def finetune_epochs(self) -> int:
        """Epochs of the fine-tuning that ends the algorithm."""
        return self.phases.finetune_epochs

    @property
    def option_names(self) -> tuple[str, ...]:
        """The options that only this algorithm reads, by their keys in a recipe."""
        return tuple(self.options.model_fields)

    @property
    def choices(self) -> dict[str, Any]:
        """The five choices, by what is chosen."""
        return {choice: getattr(self, choice) for choice in CHOICES}

    def refuse_misfit(self, model: nn.Module, options: Any) -> None:
        """Raise ConfigError where the algorithm would do nothing of its own on this model, parts keys of one tensor,
        or lacks an option that only the user can give; and where no algorithm can train the model."""
        refuse_untrainable(model)
        if self.needs_head and options.head is None:
            linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
            raise ConfigError(
                f"{self.name} treats the head apart from the body: set ",
                Word("head"),
                f" to the module path of the model's last layer (linear layers: {', '.join(linear) or 'none'})",
            )
        find_roles(model, options.head)
        if self.needs_head:
            refuse_parted(self.name, "the head", model, options.head, lambda role: role in HEAD)
        for choice in self.choices.values():
            choice.fits(self, model, options)
        refuse_parted(self.name, "what travels", model, options.head, lambda role: role in self.exchange.travels)

    def differences(self) -> dict[str, Any]:
        """The choices that are not FedAvg's, by what is chosen."""
        return {key: value for key, value in self.choices.items() if value != _DEFAULTS[key]}

    def described(self) -> dict[str, Any]:
        """The algorithm for a JSON file: choices and options by their names."""
        names = {choice: value.name for choice, value in self.choices.items()}
        return {"name": self.name, "source": self.source, **names, "options": list(self.option_names)}

    def settings(self, **values: Any) -> Any:
        """All options that the algorithm reads, with these values and the defaults of the others."""
        return options_together(FederationOptions, self.options)(**values)


CHOICES = ("view", "objective", "phases", "exchange", "server")
"""What an algorithm chooses."""
_DEFAULTS = {field.name: field.default for field in fields(Algorithm)}


def compose(one: Algorithm, other: Algorithm) -> Algorithm:
    """Both algorithms together.

    Raises:
        ConfigError: both make one choice in different ways.
    """
    chosen = dict(one.choices)
    for choice, value in other.differences().items():
        if choice in one.differences() and chosen[choice] != value:
            raise ConfigError(
                f"{one.name} and {other.name} do not go together: both choose {choice} "
                f"({chosen[choice].name}; {value.name})"
            )
        chosen[choice] = value
    return Algorithm(
        f"{one.name}+{other.name}",
        f"{one.source}; {other.source}",
        **chosen,
        options=options_together(one.options, other.options),
    )


@functools.cache
def options_together(*groups: type[Options]) -> type[Options]:
    """One group with the options of all of these."""
    # A group that another one extends is in it already, and would break Python's order of base classes.
    extended = {one for one in groups if any(other is not one and issubclass(other, one) for other in groups)}
    unique = [one for one in dict.fromkeys(groups) if one not in extended]
    if len(unique) < 2:
        return unique[0] if unique else Options
    # Pydantic takes the fields of the last base first.
    return create_model("Together", __base__=tuple(reversed(unique)))
