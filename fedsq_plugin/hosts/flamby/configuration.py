"""A configuration of FLamby's benchmark, checked before its first strategy runs."""

from __future__ import annotations

import copy
import inspect
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...dualcopy import DualCopy
from ...errors import ConfigError, FedSQError, in_one_line, nearest
from .backbones import without_gates
from .catalogue import BASELINE, CATALOGUE, FlambyData
from .package import imported
from .strategy import Strategy, known_options

Options = Mapping[str, Any]
PRIVACY = ("dp_target_epsilon", "dp_target_delta", "dp_max_grad_norm", "num_fine_tuning_steps")


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON: {error}") from None


@dataclass(frozen=True)
class Configuration:
    """FLamby's JSON: a data set, the file of the results, the strategies with their options."""

    file: Path
    about: FlambyData
    results: Path
    strategies: Mapping[str, Options]

    @classmethod
    def read(cls, file: Path) -> Configuration:
        """Raises ConfigError where FLamby would end with a traceback."""
        content = read_json(file)
        for key, kind in (("dataset", str), ("results_file", str), ("strategies", dict)):
            if not isinstance(content, dict) or not isinstance(content.get(key), kind):
                raise ConfigError(f"configuration {file}: '{key}' is missing or wrong; see recipes/flamby")
        known = {about.name: about for about in CATALOGUE.values()}
        if content["dataset"] not in known:
            hint = nearest(content["dataset"], known)
            raise ConfigError(f"configuration {file}: unknown dataset '{content['dataset']}'{hint}")
        for name, options in content["strategies"].items():
            if not isinstance(options, dict):
                raise ConfigError(f"configuration {file}: the options of {name} are no object, as {{}}")
        about = known[content["dataset"]]
        return cls(file, about, Path(content["results_file"]), content["strategies"])

    def only(self, names: Sequence[str]) -> Configuration:
        """With these of its strategies, or all where none is named."""
        for name in names:
            if name not in self.strategies:
                raise self._wrong(f"no strategy '{name}'{nearest(name, self.strategies)}")
        return replace(self, strategies={name: self.strategies[name] for name in names or self.strategies})

    def text(self) -> str:
        """As FLamby reads it."""
        content = {"dataset": self.about.name, "results_file": str(self.results)}
        return json.dumps({**content, "strategies": self.strategies})

    def check(
        self, strategies: Any, model: nn.Module, inputs: Tensor, backbone: str, asked: Namespace
    ) -> None:
        """Raise what FLamby or a strategy would raise when its turn comes, after hours perhaps.

        Args:
            strategies: the module `flamby.strategies`, with ours.
            model: what all of them train, by the name `backbone`.
            inputs: a batch for it.
            asked: FLamby's own arguments.
        """
        if asked.single_centric_baseline is not None:
            return
        wanted = self.strategies
        if asked.strategy is not None:
            self._refuse_lost_options(strategies, asked)
            wanted = {asked.strategy: {}}
        for name, options in wanted.items():
            self._check(name, self._class(strategies, name), options, model, inputs, backbone)
        get_strategies = imported("flamby.benchmarks.conf", "FLamby's benchmark").get_strategies
        content = json.loads(self.text())
        try:
            found = get_strategies(content, learning_rate=1.0, args=copy.deepcopy(vars(asked)))
        except Exception as error:
            raise self._wrong(in_one_line(error)) from None
        for name, options in found.items():
            if not callable(options.get("optimizer_class", dict)):
                raise self._wrong(f"{name}: optimizer_class is no class of torch.optim")

    def _refuse_lost_options(self, strategies: Any, asked: Namespace) -> None:
        """With --strategy, FLamby takes all options from its command line, which has none of ours."""
        cls, options = self._class(strategies, asked.strategy), self.strategies.get(asked.strategy, {})
        ours = [key for key in options if key not in vars(asked)]
        if issubclass(cls, Strategy) and ours:
            raise self._wrong(
                f"--strategy {asked.strategy} would leave out {', '.join(ours)}, because FLamby then reads "
                f"its command line alone; use --only {asked.strategy}"
            )

    def _class(self, strategies: Any, name: str) -> Any:
        try:
            return getattr(strategies, name)
        except AttributeError:
            known = [key for key, value in vars(strategies).items() if inspect.isclass(value)]
            raise self._wrong(f"unknown strategy '{name}'{nearest(name, known)}") from None

    def _check(
        self, name: str, cls: Any, options: Options, model: nn.Module, inputs: Tensor, backbone: str
    ) -> None:
        known = [*inspect.signature(cls).parameters, "learning_rate_scaler"]
        for key in options:
            if key not in known:
                raise self._wrong(f"{name} has no '{key}'{nearest(key, known)}")
        if not issubclass(cls, Strategy):
            return
        if cls.row.view == "dualcopy" and backbone == "baseline":
            line = without_gates(BASELINE, self.about.key)
            if line is not None:
                raise self._wrong(f"{name}: {line}, by --backbone")
        try:
            cls.privacy(**{key: options[key] for key in PRIVACY if key in options})
            own = {key: options[key] for key in known_options(cls.row) if key in options}
            viewed, *_ = cls.viewed(model, own)
            if isinstance(viewed, DualCopy):
                with torch.no_grad():
                    viewed.eval()(inputs)  # finds the activations that are no modules
        except FedSQError as error:
            line = str(error) if str(error).startswith(name) else f"{name}: {error}"
            line = line.replace("by name: accept=[", "by name: gate_accept: [")
            raise type(error)(f"configuration {self.file}: {line}") from None

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"configuration {self.file}: {what}")
