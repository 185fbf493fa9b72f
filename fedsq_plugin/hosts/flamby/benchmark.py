"""FLamby's own benchmark, its sources untouched, with our strategies in it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import runpy
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import ConfigError, FedSQError, nearest
from ...federation.files import atomic_write
from ...federation.seeding import isolated
from .backbones import factory
from .catalogue import CATALOGUE, PREFIX
from .hook import register
from .package import NO_FLAMBY, PINS, FlambyPackage
from .strategy import Strategy, known_options

SCRIPT = "flamby.benchmarks.fed_benchmark"


def fed_benchmark(
    config: Path,
    arguments: Sequence[str],
    backbone: str,
    weights: str | None,
    seeds: Sequence[int],
    results: Path | None = None,
) -> None:
    """Run `flamby/benchmarks/fed_benchmark.py` once per seed, with its own arguments.

    It writes its own CSV, `results` or the file that its configuration names, and leaves out what stands
    there already.

    Raises:
        ConfigError: FLamby or the data are missing, or the configuration or the backbone is wrong.
        GateError: a row of the configuration cannot gate the backbone.
    """
    strategies, dataset = _imported(), _checked(config)
    _refuse_pandas()
    package = FlambyPackage(f"{PREFIX}{dataset}")
    package.require_data()
    module, own = package.module, package.module.Baseline
    made = factory(dataset, backbone, weights, own)
    with isolated(0):
        _check_strategies(config, strategies, made(), _chosen(arguments))
    results = results or Path(_read(config)["results_file"])
    _one_model_per_file(results, backbone, weights)
    module.Baseline = made
    argv = sys.argv
    try:
        with _any_strategy(strategies):
            for seed in seeds:
                paths = ["--config-file-path", str(config), "--results-file-path", str(results)]
                sys.argv = [SCRIPT, *paths, "--seed", str(seed), *arguments]
                runpy.run_module(SCRIPT, run_name="__main__", alter_sys=True)
    finally:
        sys.argv, module.Baseline = argv, own


def _imported() -> Any:
    if importlib.util.find_spec("flamby") is None:
        raise ConfigError(NO_FLAMBY)
    register()
    try:
        return importlib.import_module("flamby.strategies")
    except ImportError as error:
        raise ConfigError(f"FLamby's strategies cannot be imported ({error}); {PINS}") from None


def _refuse_pandas() -> None:
    import pandas

    if int(pandas.__version__.partition(".")[0]) >= 3:
        raise ConfigError(
            f"pandas is {pandas.__version__}: with pandas 3 FLamby's benchmark does not find its own results "
            "and writes them twice; pip install 'pandas<3'"
        )


def _read(config: Path) -> Any:
    try:
        return json.loads(config.read_text())
    except OSError as error:
        raise ConfigError(f"configuration {config}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"configuration {config} is no JSON: {error}") from None


def _one_model_per_file(results: Path, backbone: str, weights: str | None) -> None:
    """Its CSV does not say what model it is about: results of another would be taken for these. A note
    beside it says so; without one, it is about the data set's own baseline."""
    beside = results.with_name(f"{results.name}.model.json")
    asked = {"backbone": backbone, "weights": weights}
    own = {"backbone": "baseline", "weights": None}
    found = _read(beside) if beside.exists() else own if results.exists() else asked
    if found != asked:
        said = " ".join(f"--{key} {value}" for key, value in found.items() if value is not None)
        raise ConfigError(f"{results} has results with {said}: name another file by --results-file-path")
    if not beside.exists() and asked != own:
        results.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(beside, json.dumps(asked).encode())


def _checked(config: Path) -> str:
    """The data set of a configuration. Raises ConfigError where FLamby would end with a traceback."""
    content = _read(config)
    for key, kind in (("dataset", str), ("results_file", str), ("strategies", dict)):
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise ConfigError(f"configuration {config}: '{key}' is missing or wrong; see recipes/flamby")
    known = [row.name for row in CATALOGUE.values()]
    if content["dataset"] not in known:
        hint = nearest(content["dataset"], known)
        raise ConfigError(f"configuration {config}: unknown dataset '{content['dataset']}'{hint}")
    return str(content["dataset"])


def _chosen(arguments: Sequence[str]) -> str | None:
    """The one strategy that is to run."""
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--strategy", "-s")
    name: str | None = parser.parse_known_args(arguments)[0].strategy
    return name


def _check_strategies(config: Path, strategies: Any, model: nn.Module, chosen: str | None) -> None:
    """Before hours of other strategies: what a strategy would say when its turn comes."""
    found = _read(config)["strategies"]
    for name, options in (found if chosen is None else {chosen: found.get(chosen, {})}).items():
        try:
            cls = getattr(strategies, name)
        except AttributeError:
            hint = nearest(name, names(strategies))
            raise ConfigError(f"configuration {config}: unknown strategy '{name}'{hint}") from None
        known = [*inspect.signature(cls).parameters, "learning_rate_scaler"]
        for key in options:
            if key not in known:
                raise ConfigError(f"configuration {config}: {name} has no '{key}'{nearest(key, known)}")
        if issubclass(cls, Strategy):
            own = {key: value for key, value in options.items() if key in known_options(cls.row)}
            try:
                cls.viewed(model, own)
            except FedSQError as error:
                raise type(error)(f"configuration {config}: {name}: {error}") from None


def names(strategies: Any) -> list[str]:
    """Names of the strategies in FLamby, its own and ours."""
    found = {name for name, value in vars(strategies).items() if inspect.isclass(value) and name[0] != "_"}
    return sorted(found)


@contextmanager
def _any_strategy(strategies: Any) -> Iterator[None]:
    """`--strategy` knows only FLamby's own."""
    parser: Any = ArgumentParser
    original = parser.add_argument

    def add_argument(self: ArgumentParser, *flags: Any, **options: Any) -> Any:
        if "--strategy" in flags:
            options["choices"] = [None, *names(strategies)]
        return original(self, *flags, **options)

    parser.add_argument = add_argument
    try:
        yield
    finally:
        parser.add_argument = original
