"""FLamby's data sets as FedML's 8-tuple: a centre is a silo."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ...errors import ConfigError
from ...settings.config import Config
from ..ours import SiloData, loader
from .package import FlambyPackage


def load_centres(
    config: Config, silos: Sequence[int] | None = None, pooled: bool = True
) -> tuple[SiloData, int]:
    """FedML's 8-tuple of one of FLamby's data sets, and the number of a model's outputs.

    Args:
        silos: the centres that this process serves; None: all of them. Of others nothing is loaded, but
            of Synthetic, whose centres are counted.
        pooled: whether the test data of all centres together are wanted.

    Raises:
        ConfigError: the data cannot be had, or `client_num_in_total` is not the number of centres.
    """
    package = FlambyPackage(config.dataset, config.data_cache_dir)
    about, seed = package.about, config.seed("data")
    package.require_device(config.using_gpu)
    centres = package.centres()
    if config.client_num_in_total != centres:
        raise ConfigError(
            f"train_args.client_num_in_total is {config.client_num_in_total}, and {config.dataset} has "
            f"{centres} centres; set it to {centres}"
        )
    mine = range(centres) if silos is None else silos
    size = package.batch_size if config.batch_size is None else config.batch_size

    def batches(samples: Dataset[Any], train: bool) -> DataLoader[Any]:
        # The test batches are FLamby's whatever the recipe says: its Dice is a mean over them.
        wanted = size if train else about.test_batch or package.batch_size
        begin = partial(setattr, samples, about.alternating, 0) if about.alternating else None
        return loader(samples, wanted, shuffle=train, collate=package.collate, begin=begin)

    def centre(silo: int, train: bool) -> DataLoader[Any]:
        return batches(package.samples(train, silo, seed=seed), train)

    train = {silo: centre(silo, train=True) for silo in mine}
    tests = {silo: centre(silo, train=False) for silo in mine}
    sizes = {silo: _samples(part) for silo, part in train.items()}
    if sizes and not any(sizes.values()):
        raise ConfigError(
            f"data_args.dataset {config.dataset}: no training sample of centre {min(sizes)} is there"
        )
    whole = batches(package.samples(True, pooled=True, seed=seed), True) if silos is None else None
    test = batches(package.samples(False, pooled=True, seed=seed), False) if pooled else None
    data = SiloData(
        [
            sum(sizes.values()),
            0 if test is None else _samples(test),
            whole,
            test,
            sizes,
            train,
            tests,
            about.outputs,
        ]
    )
    data.task = package.task()
    return data, about.outputs


def _samples(batches: DataLoader[Any]) -> int:
    return len(batches.dataset)  # type: ignore[arg-type]
