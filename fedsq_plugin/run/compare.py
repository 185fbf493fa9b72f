"""`fedsq compare`: several algorithms and seeds of a recipe, all else equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..algorithms import algorithm
from ..errors import ConfigError
from ..settings.recipe import Families, flat, overridden
from .run import Variant, refuse_several_processes, run_all


def compare(
    families: Families,
    algorithms: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    console: Console,
    resume: bool = False,
) -> None:
    """Run every algorithm with every seed. `resume` goes on with the runs in `out` that are not finished.

    An algorithm may have options of its own, as in FedSQ:structural_copy=refresh:structural_rounds=3.
    """
    refuse_several_processes(families)
    names = {label: label.split(":")[0] for label in algorithms}
    shared = _shared_settings(families, list(names.values()))  # which refuses unknown algorithms
    repeated = sorted(label for label in names if list(algorithms).count(label) > 1)
    if repeated or len(set(seeds)) < len(seeds):
        raise ConfigError(f"compare: {repeated[0] if repeated else 'a seed'} is given twice")
    families = overridden(families, shared)
    variants = []
    for seed in seeds:
        for label, name in names.items():
            own = [f"federated_optimizer={name}", f"random_seed={seed}", *label.split(":")[1:]]
            variants.append(Variant(label, overridden(families, own)))
    about = {"algorithms_compared": list(algorithms), "seeds": list(seeds)}
    if shared:
        console.print(f"for every algorithm: {', '.join(shared)}", highlight=False)
    # The first seed's runs are checked: a seed changes nothing that can be wrong.
    run_all(variants, families, out, console, checked=len(algorithms), about=about, resume=resume)


def _shared_settings(families: Families, algorithms: Sequence[str]) -> list[str]:
    """Settings that one of the algorithms has by itself, and that a fair comparison gives to all: the test of
    silos on their own data, the final fine-tuning. What the recipe says is left as it is."""
    given, found = flat(families), [algorithm(name) for name in algorithms]
    epochs = max(one.finetune_epochs for one in found)
    settings = []
    if given.get("silo_evaluation") is None and any(one.personal for one in found):
        settings.append("silo_evaluation=true")
    if given.get("finetune_epochs") is None and epochs:
        settings.append(f"finetune_epochs={epochs}")
    return settings


def parse_seeds(text: str) -> list[int]:
    """The numbers in `0,1,2`. Raises ConfigError where they are none."""
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text}: write whole numbers separated by commas, as 0,1,2") from None
