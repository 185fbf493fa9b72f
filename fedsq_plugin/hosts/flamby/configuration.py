"""A configuration of FLamby's benchmark, checked before its first strategy runs."""

from __future__ import annotations

import inspect
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...data.flamby.backbones import without_gates
from ...data.flamby.catalogue import BASELINE, CATALOGUE, FlambyData
from ...data.flamby.package import import_flamby
from ...dualcopy import DualCopy
from ...errors import PYTHON, ConfigError, FedSQError, Vocabulary, in_one_line, nearest, worded
from ...federation.task import Loss
from ...federation.training import OptimizerTraining
from ...run.samples import run_samples
from .dry_run import dry_run, two_batches
from .strategy import Strategy, known_options

UPDATES = 100
"""Of a round of FLamby's benchmark, which has no option for it."""
Given = Mapping[str, Any]
"""The options of a strategy, as the JSON has them."""
JSON: Vocabulary = {**PYTHON, "relu_ise": "", "gate_accept": "gate_accept: {}"}
"""What errors say to somebody who writes a configuration."""


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON: {error}") from None


@dataclass(frozen=True)
class Configuration:
    """The content of FLamby's JSON: data set, file for the results, strategies with their options."""

    file: Path
    about: FlambyData
    results: Path
    strategies: Mapping[str, Given]

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
        """The configuration with these strategies alone; with all where none is named."""
        for name in names:
            if name not in self.strategies:
                raise self._wrong(f"no strategy '{name}'{nearest(name, self.strategies)}")
        return replace(self, strategies={name: self.strategies[name] for name in names or self.strategies})

    def text(self) -> str:
        """The JSON that FLamby reads."""
        content = {"dataset": self.about.name, "results_file": str(self.results)}
        return json.dumps({**content, "strategies": self.strategies})

    def check(self, strategies: Any, model: nn.Module, inputs: Tensor, backbone: str, asked: Namespace) -> None:
        """Raise now what FLamby or a strategy would raise when its turn comes, perhaps after hours.

        Args:
            strategies: the module `flamby.strategies`, with ours.
            model: what all strategies train; its name is `backbone`.
            inputs: a batch for it.
            asked: FLamby's own arguments.
        """
        for name, given in self.strategies.items():
            self._check_options(name, self._class(strategies, name), given)
        trained = self.strategies
        if asked.single_centric_baseline is not None:
            trained = {}
        elif asked.strategy is not None:
            self._refuse_lost_options(strategies, asked)
            trained = {asked.strategy: {}}
        for name, given in trained.items():
            self._check_model(name, self._class(strategies, name), given, model, inputs, backbone)
        for name, given in self._read(asked, learning_rate=1.0).items():
            if "optimizer_class" in given and not inspect.isclass(given["optimizer_class"]):
                raise self._wrong(f"{name}: optimizer_class is no class of torch.optim")

    def try_batches(
        self, strategies: Any, model: nn.Module, loss: Loss, loaders: Sequence[Any], rate: float, rounds: int,
        asked: Namespace,
    ) -> None:  # fmt: skip
        """Let two batches pass every strategy of ours that is run, before the first of all is.

        It is done on the CPU: FLamby has not chosen its GPU yet.

        Args:
            loss: that all strategies train; `loaders` are those of the training data, `rate` is the learning rate.
            rounds: of FLamby's benchmark, 1 or more.

        Raises:
            FedSQError: a strategy would fail.
        """
        taken = two_batches(self.about.key, loaders, [UPDATES * rounds] * len(loaders))
        for name, given in self._read(asked, rate).items():
            cls = self._class(strategies, name)
            if not issubclass(cls, Strategy):
                continue
            optimizer = given.get("optimizer_class", torch.optim.SGD)
            training = OptimizerTraining(optimizer=optimizer, learning_rate=given["learning_rate"], comm_round=rounds)
            try:
                with worded(JSON):
                    viewed, chosen, _, reading = cls.viewed(model, _own(cls, given))
                    dry_run(
                        viewed, cls.algorithm, chosen, training, loss, reading, taken, rounds, torch.device("cpu")
                    )  # fmt: skip
            except FedSQError as error:
                raise error.after(f"configuration {self.file}: {name}: ") from None

    def _read(self, asked: Namespace, learning_rate: float) -> dict[str, dict[str, Any]]:
        """The strategies that are run, with their options, as FLamby reads them."""
        get_strategies = import_flamby("flamby.benchmarks.conf", "FLamby's benchmark").get_strategies
        try:
            found: dict[str, dict[str, Any]] = get_strategies(
                json.loads(self.text()), learning_rate=learning_rate, args=dict(vars(asked))
            )
        except Exception as error:
            raise self._wrong(in_one_line(error)) from None
        return found

    def _refuse_lost_options(self, strategies: Any, asked: Namespace) -> None:
        """With --strategy, FLamby takes all options from its command line, which has none of ours."""
        cls, given = self._class(strategies, asked.strategy), self.strategies.get(asked.strategy, {})
        ours = [key for key in given if key not in vars(asked)]
        if issubclass(cls, Strategy) and ours:
            raise self._wrong(
                f"--strategy {asked.strategy} would leave out {', '.join(ours)}, because FLamby then reads "
                f"its command line alone; use --only {asked.strategy}"
            )

    def _class(self, strategies: Any, name: str) -> Any:
        known = [key for key, value in vars(strategies).items() if inspect.isclass(value)]
        try:
            found = getattr(strategies, name)
        except AttributeError as error:
            why = str(error) if "+" in name else f"unknown strategy '{name}'{nearest(name, known)}"
            raise self._wrong(why) from None
        if not inspect.isclass(found):
            raise self._wrong(f"'{name}' is no strategy{nearest(name, known)}")
        return found

    def _check_options(self, name: str, cls: Any, given: Given) -> None:
        known = [*inspect.signature(cls).parameters, "learning_rate_scaler"]
        for key in given:
            if key not in known:
                raise self._wrong(f"{name} has no '{key}'{nearest(key, known)}")
        optimizer = given.get("optimizer_class", "torch.optim.SGD")
        if not isinstance(optimizer, str) or not optimizer.startswith("torch."):
            raise self._wrong(f"{name}: optimizer_class is {optimizer!r}, not as 'torch.optim.SGD'")

    def _check_model(self, name: str, cls: Any, given: Given, model: nn.Module, inputs: Tensor, backbone: str) -> None:
        if not issubclass(cls, Strategy):
            return
        if cls.algorithm.gated and backbone == "baseline":
            line = without_gates(BASELINE, self.about.key)
            if line is not None:
                raise self._wrong(f"{name}: {line}")
        private = {key: given[key] for key in inspect.signature(cls.privacy).parameters if key in given}
        try:
            privacy = cls.privacy(**private)
            with worded(JSON):
                viewed, *_ = cls.viewed(model, _own(cls, given))
                if privacy is not None:
                    privacy.refuse_model(cls.algorithm, viewed)
                if isinstance(viewed, DualCopy):
                    run_samples(viewed, inputs)  # finds the activations that are no modules
        except FedSQError as error:
            raise error.after(f"configuration {self.file}: {name}: ") from None

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"configuration {self.file}: {what}")


def _own(cls: type[Strategy], given: Given) -> dict[str, Any]:
    """What a strategy's algorithm has of the options."""
    return {key: given[key] for key in known_options(cls.algorithm) if key in given}
