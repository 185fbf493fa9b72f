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

from ...errors import ConfigError, nearest
from ...federation.files import atomic_write
from .backbones import factory
from .hook import register

SCRIPT = "flamby.benchmarks.fed_benchmark"
INSTALL = (
    "git clone https://github.com/owkin/FLamby, put the folder on PYTHONPATH, and install what it needs: "
    "pip install 'fedsq-plugin[flamby]'"
)


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
        ConfigError: FLamby is missing, or the configuration or the backbone is wrong.
    """
    strategies, dataset = _imported(), _checked(config)
    _refuse_pandas()
    module: Any = importlib.import_module(f"flamby.datasets.{dataset}")
    _check_strategies(config, strategies)
    own = module.Baseline
    made = factory(dataset, backbone, weights, own)
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
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, ValueError) and "was not downloaded" not in str(error):
            raise
        raise ConfigError(
            f"{dataset}: its data are not there ({error}); FLamby's own script gets them: "
            f"flamby/datasets/{dataset}/dataset_creation_scripts, see the README of the data set"
        ) from None
    finally:
        sys.argv, module.Baseline = argv, own


def _imported() -> Any:
    if importlib.util.find_spec("flamby") is None:
        raise ConfigError(f"FLamby is not installed: {INSTALL}")
    register()
    try:
        return importlib.import_module("flamby.strategies")
    except ImportError as error:
        raise ConfigError(
            f"FLamby cannot be imported ({error}): pip install 'fedsq-plugin[flamby]'"
        ) from None


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
    spec = importlib.util.find_spec("flamby.datasets")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    known = sorted({path.parent.name for folder in folders for path in folder.glob("fed_*/__init__.py")})
    if content["dataset"] not in known:
        hint = nearest(content["dataset"], known)
        raise ConfigError(f"configuration {config}: unknown dataset '{content['dataset']}'{hint}")
    return str(content["dataset"])


def _check_strategies(config: Path, strategies: Any) -> None:
    for name, options in _read(config)["strategies"].items():
        try:
            cls = getattr(strategies, name)
        except AttributeError:
            hint = nearest(name, names(strategies))
            raise ConfigError(f"configuration {config}: unknown strategy '{name}'{hint}") from None
        known = [*inspect.signature(cls).parameters, "learning_rate_scaler"]
        for key in options:
            if key not in known:
                raise ConfigError(f"configuration {config}: {name} has no '{key}'{nearest(key, known)}")


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
