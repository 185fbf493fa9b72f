"""FLamby's own benchmark with our strategies in it. FLamby's sources are not changed."""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...data.flamby.backbones import factory
from ...data.flamby.package import FlambyPackage, import_flamby
from ...errors import ConfigError
from ...federation.files import atomic_write
from ...federation.seeding import isolated
from .configuration import UPDATES, Configuration, read_json
from .hook import register
from .privacy import Privacy

FLAGS = ("debug", "hard_debug", "use_ssl_features")
"""The arguments of FLamby that make the results another run's."""
SCRIPT = "flamby.benchmarks.fed_benchmark"
WHO = "FLamby's benchmark"


def fed_benchmark(
    config: Path,
    arguments: Sequence[str],
    backbone: str,
    weights: str | None,
    seeds: Sequence[int],
    results: Path | None = None,
    only: Sequence[str] = (),
) -> None:
    """Run `flamby/benchmarks/fed_benchmark.py` once per seed, with its own arguments.

    It writes its own CSV: `results`, or the file that its configuration names. What is in that file already is not run
    again.

    Args:
        arguments: FLamby's own, without the configuration, the results and the seed.
        only: names of the configuration's strategies that are run; empty: all of them.

    Raises:
        ConfigError: FLamby or the data are missing, or the configuration or the backbone is wrong.
        GateError: a strategy of the configuration cannot gate the backbone.
    """
    configuration = Configuration.read(config).only(only)
    register()
    strategies = import_flamby("flamby.strategies", WHO)
    main = import_flamby(SCRIPT, WHO).main
    _refuse_pandas()
    asked = _parsed(arguments)
    package = FlambyPackage(configuration.about.key)
    _refuse_arguments(asked, package.module.NUM_CLIENTS)
    package.require_device(gpu=torch.cuda.is_available() and not asked.cpu_only)
    package.require_all()
    make = factory(configuration.about, backbone, weights, package.baseline)
    with isolated(0):
        # As FLamby makes it.
        phikon = asked.use_ssl_features and configuration.about.name == "fed_camelyon16"
        model = make(*([768] if phikon else []))
        configuration.check(strategies, model, package.inputs(), backbone, asked)
        _try_batches(configuration, strategies, model, package, asked)
    results = results or configuration.results
    results.parent.mkdir(parents=True, exist_ok=True)
    flags = {key: getattr(asked, key) for key in FLAGS}
    _one_model_per_file(results, {"backbone": backbone, "weights": weights, **flags})
    with tempfile.TemporaryDirectory() as folder:
        asked.config_file_path = str(Path(folder, config.name))
        Path(asked.config_file_path).write_text(configuration.text())
        asked.results_file_path = str(results)
        package.module.Baseline, own = make, package.module.Baseline
        try:
            for seed in seeds:
                asked.seed = seed
                main(asked)
        finally:
            package.module.Baseline = own


def _try_batches(
    configuration: Configuration, strategies: Any, model: Any, package: FlambyPackage, asked: Namespace
) -> None:
    """Try two batches on every strategy that is run. Where FLamby's loss needs a GPU, each strategy does so itself."""
    rounds = 1 if asked.debug else int(package.module.get_nb_max_rounds(UPDATES))
    if asked.hard_debug or asked.single_centric_baseline is not None or package.about.needs_gpu or rounds < 1:
        return
    loss, loaders, rate = package.task().loss, package.loaders(), float(package.module.LR)
    configuration.try_batches(strategies, model, loss, loaders, rate, rounds, asked)


class _Parsed(Exception):
    """Stops FLamby's script when it has read its command line."""


def _parsed(arguments: Sequence[str]) -> Namespace:
    """The arguments as FLamby's own parser reads them. It would refuse the names of our strategies."""
    parser: Any = ArgumentParser
    add_argument, parse_args, argv = parser.add_argument, parser.parse_args, sys.argv

    def any_strategy(self: ArgumentParser, *flags: Any, **options: Any) -> Any:
        if "--strategy" in flags:
            del options["choices"]
        return add_argument(self, *flags, **options)

    def stop(self: ArgumentParser) -> None:
        raise _Parsed(parse_args(self, list(arguments)))

    parser.add_argument, parser.parse_args, sys.argv = any_strategy, stop, ["fedsq flamby fed_benchmark"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # it may have been imported before
            runpy.run_module(SCRIPT, run_name="__main__")
    except _Parsed as parsed:
        found: Namespace = parsed.args[0]
        return found
    finally:
        parser.add_argument, parser.parse_args, sys.argv = add_argument, parse_args, argv
    raise ConfigError(f"{WHO} has no command line: is this FLamby's own?")


def _refuse_arguments(asked: Namespace, centres: int) -> None:
    """Raise ConfigError for what FLamby's own rules answer with a traceback."""
    numbers = ("learning_rate", "server_learning_rate", "mu")
    given = [key for key in numbers if getattr(asked, key) is not None]
    given += ["optimizer-class"] if asked.optimizer_class != "torch.optim.SGD" else []
    given += ["deterministic"] if asked.deterministic else []
    if given and asked.strategy is None:
        raise ConfigError(
            f"--{given[0]} is for one strategy: give --strategy as well, or write it into the configuration"
        )
    Privacy.of(asked.dp_target_epsilon, asked.dp_target_delta, asked.dp_max_grad_norm)
    if asked.single_centric_baseline == "Local" and not 0 <= asked.nlocal < centres:
        raise ConfigError(f"--nlocal {asked.nlocal}: the centres are 0 to {centres - 1}")


def _refuse_pandas() -> None:
    import pandas

    if int(pandas.__version__.partition(".")[0]) >= 3:
        raise ConfigError(
            f"pandas is {pandas.__version__}: with pandas 3 FLamby's benchmark does not find its own results "
            "and writes them twice; pip install 'pandas<3'"
        )


def _one_model_per_file(results: Path, asked: dict[str, Any]) -> None:
    """Refuse a CSV with results of another model or number of rounds, which FLamby would take for these.

    FLamby's CSV does not name the model. A note beside the file does; without one, the results are those of FLamby's
    own baseline, for all rounds."""
    beside = results.with_name(f"{results.name}.model.json")
    own = {"backbone": "baseline", "weights": None, **dict.fromkeys(FLAGS, False)}
    if results.exists():
        found = {**own, **(read_json(beside) if beside.exists() else {})}
        if found != asked:
            flags = [f"--{key.replace('_', '-')}" for key in FLAGS if found[key]]
            values = [f"--{key} {found[key]}" for key in ("backbone", "weights") if found[key]]
            said = " ".join(values + flags)
            raise ConfigError(f"{results} has results with {said}: name another file by --results-file-path")
    if asked != own:
        atomic_write(beside, json.dumps(asked).encode())
    else:
        beside.unlink(missing_ok=True)
