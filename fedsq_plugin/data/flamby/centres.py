"""FLamby's data sets: a centre is a silo."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ...errors import ConfigError
from ..loaders import count_samples, make_loader
from ..options import DataOptions
from ..silos import SilosData
from .package import FlambyPackage


def load_centres(options: DataOptions, silos: Sequence[int] | None = None, pooled: bool = True) -> SilosData:
    """The data of one of FLamby's data sets, with its loss and metric.

    Args:
        silos: the centres that this process serves; None: all. The data of other centres are not loaded,
            except for Synthetic, where the data say how many centres there are.
        pooled: whether the test data of all centres together are wanted.

    Raises:
        ConfigError: the data cannot be had, or `client_num_in_total` is not the number of centres.
    """
    package = FlambyPackage(options.dataset, options.data_cache_dir)
    about, seed = package.about, options.seed("data")
    package.require_device(options.using_gpu)
    centres = package.centres()
    if options.client_num_in_total != centres:
        raise ConfigError(
            f"train_args.client_num_in_total is {options.client_num_in_total}, and {options.dataset} has "
            f"{centres} centres; set it to {centres}"
        )
    mine = range(centres) if silos is None else silos
    size = package.batch_size if options.batch_size is None else options.batch_size

    def batches(samples: Dataset[Any], train: bool) -> DataLoader[Any]:
        # Test batches have FLamby's size, whatever the recipe says: its Dice is a mean over batches.
        wanted = size if train else about.test_batch or package.batch_size
        begin = partial(setattr, samples, about.alternating, 0) if about.alternating else None
        return make_loader(samples, wanted, shuffle=train, collate=package.collate, begin=begin)

    def centre(silo: int, train: bool) -> DataLoader[Any]:
        return batches(package.samples(train, silo, seed=seed), train)

    train = {silo: centre(silo, train=True) for silo in mine}
    tests = {silo: centre(silo, train=False) for silo in mine}
    sizes = {silo: count_samples(part.dataset) for silo, part in train.items()}
    if sizes and not any(sizes.values()):
        raise ConfigError(f"data_args.dataset {options.dataset}: no training sample of centre {min(sizes)} is there")
    whole = batches(package.samples(True, pooled=True, seed=seed), True) if silos is None else None
    test = batches(package.samples(False, pooled=True, seed=seed), False) if pooled else None
    return SilosData(
        train=train,
        test=tests,
        sizes=sizes,
        outputs=about.outputs,
        global_train=whole,
        global_test=test,
        global_test_size=0 if test is None else count_samples(test.dataset),
        task=package.task(),
    )
