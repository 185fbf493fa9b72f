"""What the commands ask of a host: the framework that runs the rounds. A host is loaded by its name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from ..errors import ConfigError

if TYPE_CHECKING:
    import click
    from torch import Tensor, nn

    from ..federation.evaluate import Metrics
    from ..federation.record import RoundRecord
    from ..settings.recipe import Families
    from .reluise import Reluised

    OnStart = Callable[["Start"], None]
    OnRound = Callable[[RoundRecord], None]


@dataclass
class Start:
    """What is known before the first round."""

    device: str
    counts: Sequence[Sequence[int]] | None
    classes: Sequence[str] | None
    metrics: Metrics
    """The global model before the next round, on the global test set."""
    reluised: Reluised | None
    """What ReLU-isation did, where it was asked for."""
    notes: list[str]
    """Lines for the user, such as where the weights came from."""
    finished: int = 0
    """Rounds that were finished before, in a run that is resumed."""
    metric: str = "accuracy"
    """The name of what `Metrics.accuracy` holds."""


@dataclass
class Outcome:
    """The result of a run."""

    model: nn.Module
    structural_fingerprint: str | None
    head: str | None
    silos: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that stayed with the silos, as <silo>/<key>; empty where there are none."""


class Host(Protocol):
    """A framework that runs the rounds of a recipe. Its module imports the framework only when it runs."""

    name: str
    """Its name for users, as "FedML"."""
    datasets: Collection[str]
    """The names of its own data sets."""
    brings_silos: Collection[str]
    """The names of those that set the number of silos themselves, whatever the recipe says."""
    models: Collection[str]
    """The names of its own models."""
    algorithms: Collection[str]
    """The names of the algorithms that it runs by itself."""
    algorithm_options: Mapping[str, Collection[str]]
    """What of our options some of those read, and the others ignore, by algorithm."""
    options: Mapping[str, str]
    """Families of the options that it knows beside ours, by key."""
    partitions: Mapping[str, Collection[str]]
    """The partition methods that its data sets take, by data set; those that are missing take none."""

    def require(self) -> None:
        """Raise ConfigError where the framework cannot work on this machine."""

    def problems(self, values: Mapping[str, Any], valid: Mapping[str, Any]) -> Iterable[str]:
        """One line per thing that the host is known to refuse.

        Args:
            values: all options of a recipe, flat.
            valid: those options of ours that are valid by themselves, with their defaults.
        """

    def ignored(self, values: Mapping[str, Any]) -> Iterable[str]:
        """One line per option that the host's own loop ignores, where it is what a user's own script would run.

        Args:
            values: all options of a recipe, flat.
        """

    def needs_several_processes(self, values: Mapping[str, Any]) -> bool:
        """Whether a recipe with these options runs in several processes."""

    def local_recipe(self, families: Families, clients: int, folder: Path) -> Families:
        """The recipe for a server and so many client processes on this machine. Files that it needs are
        written to `folder`, such as a table of addresses.

        Raises:
            ConfigError: a process has no device.
        """

    def rank(self) -> int:
        """The rank of this process in an MPI run."""

    def execute(self, families: Families, log_file: Path, on_start: OnStart, on_round: OnRound) -> Outcome:
        """Run a checked recipe: all of it, or its server where it has several processes. What the framework
        logs and prints goes to `log_file`."""

    def serve(self, families: Families, log_file: Path, rank: int) -> None:
        """Run a client process until the server ends it."""

    def end_processes(self, status: int) -> None:
        """End all processes of an MPI run, where this process is one of them; otherwise do nothing."""


def host(name: str = "fedml") -> Host:
    """The host of this name. Raises ConfigError where there is none."""
    return cast(Host, _module(name, "host").HOST)


def command(name: str) -> click.Command:
    """The command of a host that has one of its own. Raises ConfigError where it has none."""
    return cast("click.Command", _module(name, "command").command)


def _module(name: str, part: str) -> Any:
    package = __package__.rpartition(".")[0]
    try:
        return importlib.import_module(f"{package}.hosts.{name}.{part}")
    except ModuleNotFoundError as error:
        raise ConfigError(f"the host {name} cannot be loaded: {error}") from None
