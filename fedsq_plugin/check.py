"""`fedsq check`: everything wrong with a recipe, found without training, downloads or FedML."""

from __future__ import annotations

from pathlib import Path

from .config import OPTIONS, Config
from .errors import FedSQError, nearest
from .recipe import Families, flat, problems


def check(families: Families) -> list[str]:
    """One line per problem; empty when `fedsq run` may start."""
    config, found = problems(families)
    # Names are checked even when another option is wrong, so that all is said at once.
    values = {key: value for key, value in flat(families).items() if key in OPTIONS}
    found += _names(values)
    if config is not None:
        found += _files(config)
        if not found:
            found += _model(config)
    return list(dict.fromkeys(found))


def _names(values: dict[str, object]) -> list[str]:
    from . import models
    from .algorithms import ALGORITHMS
    from .hosts.fedml.data import DATASETS, FEDML_DATASETS

    known = {
        "federated_optimizer": list(ALGORITHMS),
        "dataset": [*DATASETS, *FEDML_DATASETS],
        "model": [*models.names(), *FEDML_MODELS],
    }
    found = []
    for key, names in known.items():
        value = values.get(key)
        if isinstance(value, str) and value not in names:
            family = {"federated_optimizer": "train_args", "dataset": "data_args", "model": "model_args"}[key]
            found.append(f"{family}.{key} '{value}' is unknown{nearest(str(value), names)}")
    if str(values.get("dataset")) in DATASETS and values.get("partition_method", "hetero") not in (
        "homo",
        "hetero",
    ):
        found.append(f"data_args.partition_method '{values['partition_method']}' is unknown; homo or hetero")
    if (backend := values.get("backend", "sp")) != "sp" or values.get(
        "training_type", "simulation"
    ) != "simulation":
        found.append(f"comm_args.backend {backend}: this version runs training_type simulation, backend sp")
    return found


FEDML_MODELS = (
    *("lr", "cnn_web", "cnn", "resnet18_gn", "rnn", "resnet56", "mobilenet", "mobilenet_v3"),
    *("efficientnet", "darts"),
)
"""What fedml.model.create knows by name (some for certain data sets only)."""


def _files(config: Config) -> list[str]:
    found = []
    if config.warm_start == "file" and not Path(str(config.warm_start_file)).expanduser().is_file():
        found.append(f"warm_start_args.warm_start_file: no file {config.warm_start_file}")
    if config.dataset == "image_folder":
        root = Path(config.data_cache_dir).expanduser()
        for split in ("train", "test"):
            if not config.data_cache_dir or not (root / split).is_dir():
                found.append(f"data_args.data_cache_dir: no folder {root / split}")
    if config.warm_start == "public" and config.dataset not in ("digits", "image_folder"):
        found.append(f"warm_start_args.warm_start 'public': {config.dataset} has no public split")
    return found


def _model(config: Config) -> list[str]:
    """Build one of our backbones and see whether the algorithm can take it."""
    from . import models

    if config.model not in models.names():
        return []
    from .federation.roles import roles
    from .hosts.fedml.plan import created, plan_of, viewed

    try:
        model = created(config, 10)
        plan = plan_of(config, model)
        roles(viewed(model, plan), plan.head)
    except FedSQError as error:
        return [str(error)]
    return []
