"""`fedsq check`: everything wrong with a recipe, found without training, downloads or FedML.

Every check runs where the options that it reads are valid, whatever else is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, FedSQError, nearest, worded
from ..settings.config import OPTIONS, Config, family_of, validated
from ..settings.recipe import Families, flat, misplaced, problems
from .host import host

if TYPE_CHECKING:
    from torch import nn

    from ..data.silos import SilosData

MODEL = ("model", "small_images", "model_seed", "random_seed", "head", "gate_accept", "gate_pooling")
"""What building a model of ours reads."""
DATA = (
    *("dataset", "data_cache_dir", "partition_method", "partition_alpha", "client_num_in_total"),
    *("min_client_samples", "batch_size", "image_size", "data_seed", "random_seed"),
    *("warm_start", "warm_start_public", "warm_start_batch_size", "relu_ise"),
)
"""What loading a data set of ours reads."""
FLAMBY = ("data_cache_dir", "client_num_in_total", "batch_size", "using_gpu", "data_seed", "random_seed")
"""What loading a data set of FLamby's reads."""
ONE_SILO = {
    **{"client_num_in_total": 1, "partition_method": "homo", "partition_alpha": 1.0},
    **{"min_client_samples": 0, "batch_size": 32, "warm_start": "none", "relu_ise": False},
}
"""In place of a partition that cannot be had, so that the model still meets the images."""


def check(families: Families) -> list[str]:
    """One line per problem; empty when `fedsq run` may start."""
    wrong = problems(families, host().brings_silos, host().options)[1]
    found = [str(finding) for finding in wrong if not finding.is_note]
    misspelt = [str(finding) for finding in wrong if finding.is_note]
    values = flat(families)
    valid = validated(values)[0]
    found += _names(valid)
    found += host().problems(values, valid)
    found += _trial(valid)
    # A misspelling alone is a note; beside other problems it is perhaps their cause.
    return list(dict.fromkeys([*misspelt, *found] if found else []))


def notes(families: Families) -> list[str]:
    """One line per key that looks misspelt, and per option that would silently do nothing. Recipes for `compare` have
    such options: some algorithms read them, others do not."""
    from ..algorithms import known
    from ..settings.idle import unused
    from .facts import facts_of

    values = flat(families)
    valid = validated(values)[0]
    misspelt = [str(finding) for finding in misplaced(families, host().options) if finding.is_note]
    idle = unused(valid, facts_of(valid))
    said = {line.split()[0] for line in idle}
    native = [line for line in host().ignored(values) if line.split()[0] not in said]
    name = values.get("federated_optimizer")
    way_out = f"; fedsq_args.own_algorithms: true runs the plugin's {name} there, too" if known(str(name)) else ""
    return [*misspelt, *idle, *(f"in a script of your own, {line}{way_out}" for line in native)]


def _names(valid: dict[str, Any]) -> Iterator[str]:
    from .. import models
    from ..algorithms import algorithm, algorithms, known
    from ..data.flamby.backbones import MODELS
    from ..data.partition import METHODS
    from ..data.registry import NAMES, OURS
    from ..models.backbones import PREFIX

    lists = {
        "federated_optimizer": [*algorithms()],
        "dataset": [*NAMES, *host().datasets],
        "model": [*models.names(), *MODELS, *host().models],
    }
    for key, names in lists.items():
        if key not in valid or valid[key] in names:
            continue
        if key == "federated_optimizer" and (known(valid[key]) or "+" in valid[key]):
            try:
                algorithm(valid[key])
            except ConfigError as error:
                yield f"{family_of(key)}.{key}: {error}"
            continue
        what = f"is unknown{nearest(valid[key], names)}"
        if key == "model" and valid[key].startswith(PREFIX):
            try:
                models.find_backbone(valid[key])
            except ConfigError as error:
                what = f"is no model of ours: {error}"
        if key == "federated_optimizer" and valid[key] in host().algorithms:
            ours = ", ".join(algorithms())
            what = f"is FedML's own: run it by `python -m fedsq_plugin main.py`, or use {ours}"
        yield f"{family_of(key)}.{key} '{valid[key]}' {what}"
    method = valid.get("partition_method", "homo")
    if valid.get("dataset") in OURS and method not in METHODS:
        yield f"data_args.partition_method '{method}' is unknown; {' or '.join(METHODS)}"


@contextmanager
def _noting(found: list[str], beginning: str = "") -> Iterator[None]:
    """Take down the error of a block."""
    try:
        yield
    except FedSQError as error:
        found.append(f"{beginning}{error}")


def _trial(valid: dict[str, Any]) -> list[str]:
    """Load the data, build the model, read the weights, and run a batch through what is there."""
    from .. import models
    from ..algorithms import find
    from ..data.flamby.backbones import MODELS, downloads_weights
    from ..data.flamby.catalogue import CATALOGUE
    from ..data.registry import OURS, load
    from .plan import create_model
    from .reluise import replace_smooth
    from .warm_start import refuse_warm_start, with_public_split

    config = Config.model_construct(**valid)
    data = None
    model: nn.Module | None = None
    found = list(_missing_folders(config)) if _all_in(valid, "dataset", "data_cache_dir") else []
    if valid.get("dataset") in OURS and not found:
        for options in ({}, ONE_SILO):
            if data is None and _all_in({**valid, **options}, *DATA):
                with _noting(found):
                    data = load(config.model_copy(update=options))
                    if not options and config.has_public_split:
                        with_public_split(data, config)
    if valid.get("dataset") in CATALOGUE and _all_in(valid, *FLAMBY):
        with _noting(found):
            data = load(config)
    # Without the data set, nothing can be said of a model that is made for it.
    buildable = valid.get("model") in models.names()
    if valid.get("model") in MODELS:
        algorithm = find(valid.get("federated_optimizer", ""))
        # A model that would download its weights is built only to say that it has no gate.
        gated = algorithm is not None and algorithm.gated
        buildable = data is not None and (gated or not downloads_weights(config.model, config.dataset))
    if buildable and _all_in(valid, *MODEL):
        with _noting(found):
            model = create_model(config, 10 if data is None else data.outputs)
    if _all_in(valid, "warm_start", "dataset", "model", "small_images"):
        with _noting(found):
            refuse_warm_start(config)
    if config.warm_start == "file" and valid.get("warm_start_file"):
        with _noting(found):
            _read_weights(config, model)
    if model is not None and config.relu_ise:
        with _noting(found, "warm_start_args.relu_ise: "):
            replace_smooth(model)
    if model is not None:
        found += _forward(config, valid, model, data)
    return found


def _all_in(valid: dict[str, Any], *keys: str) -> bool:
    return all(key in valid for key in keys)


def _missing_folders(config: Config) -> Iterator[str]:
    if config.dataset != "image_folder":
        return
    if not config.data_cache_dir:
        yield "data_args.data_cache_dir is missing; image_folder reads train/<class>/ and test/<class>/ in it"
        return
    for split in ("train", "test"):
        folder = Path(config.data_cache_dir).expanduser() / split
        if not folder.is_dir():
            yield f"data_args.data_cache_dir: no folder {folder}"


def _read_weights(config: Config, model: nn.Module | None) -> None:
    from ..dualcopy import DualCopy
    from ..models import open_weights
    from .plan import RECIPE
    from .warm_start import load_pretrained

    file = str(config.warm_start_file)
    if not Path(file).expanduser().is_file():
        raise ConfigError(f"warm_start_args.warm_start_file: no file {file}")
    if model is None:
        with worded(RECIPE):
            open_weights(file)
    else:
        load_pretrained(model.quantitative if isinstance(model, DualCopy) else model, config)


def _forward(config: Config, valid: dict[str, Any], model: nn.Module, data: SilosData | None) -> list[str]:
    """The algorithm's view of the model, and two batches through it: the dry run of every run."""
    from ..algorithms import find
    from ..dualcopy import DualCopy
    from ..federation.roles import roles
    from .dry_run import dry_run
    from .plan import RECIPE, build_view, head_of, plan_of

    found: list[str] = []
    with _noting(found), worded(RECIPE):
        roles(model, head_of(config, model))
    known = find(valid.get("federated_optimizer", "")) is not None and _all_in(valid, "comm_round", "dataset")
    if not known and data is None:
        return found
    options = {key: option.default for key, option in OPTIONS.items() if not option.required}
    # An algorithm of others, or a wrong name, trains the model as it is. Smooth activations are replaced already.
    options |= {"comm_round": 1, **valid, "relu_ise": False, "batch_size": config.batch_size}
    if found:  # without the head that the model has not
        known, options["head"] = False, None
    if not known:
        options["federated_optimizer"] = "FedSQ" if isinstance(model, DualCopy) else "FedAvg"
    with _noting(found):
        plan = plan_of(Config.model_construct(**options), model, *(() if data is None else (data.task, data.outputs)))
        if data is None:
            build_view(model, plan)
        else:
            dry_run(model, plan, data)
    return list(dict.fromkeys(found))
