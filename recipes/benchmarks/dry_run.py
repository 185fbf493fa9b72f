"""What the dry run before a run costs, beside one round of training, in turn in one process.

    OMP_NUM_THREADS=1 python recipes/benchmarks/dry_run.py [--model resnet18] [--silos 4] [--samples 64]

Prints, per algorithm, the samples that passed the model, the median seconds of both, and the quartiles of their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch.utils.data import TensorDataset

from fedsq_plugin import models
from fedsq_plugin.data.loaders import make_loader
from fedsq_plugin.data.silos import SilosData
from fedsq_plugin.federation.client import Client
from fedsq_plugin.run.dry_run import dry_run
from fedsq_plugin.run.plan import build_view, plan_of
from fedsq_plugin.settings.config import OPTIONS, Config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--silos", type=int, default=4)
    parser.add_argument("--samples", type=int, default=64, help="of a silo")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--algorithms", nargs="+", default=["FedAvg", "FedSQ", "FedRep", "LP-FT"])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    data = made(asked)
    print(
        f"{asked.model}, {asked.silos} silos of {asked.samples} images {asked.size}x{asked.size}, batch {asked.batch}, "
        f"{torch.get_num_threads()} thread(s), {asked.repeats} paired repeats"
    )
    for name in asked.algorithms:
        measure(name, asked, data)


def made(asked: Any) -> SilosData:
    loaders = {}
    for silo in range(asked.silos):
        images = torch.randn(asked.samples, 3, asked.size, asked.size)
        labels = torch.randint(10, (asked.samples,))
        loaders[silo] = make_loader(TensorDataset(images, labels), asked.batch, shuffle=True)
    return SilosData(loaders, loaders, dict.fromkeys(loaders, asked.samples), 10, global_test=loaders[0])


def measure(name: str, asked: Any, data: SilosData) -> None:
    options = {key: option.default for key, option in OPTIONS.items() if not option.required}
    options |= {"federated_optimizer": name, "model": asked.model, "dataset": "digits", "comm_round": 1}
    options |= {"client_num_in_total": asked.silos, "client_num_per_round": asked.silos, "batch_size": asked.batch}
    config = Config(**options)
    model = models.create(asked.model, 10)
    plan = plan_of(config, model, data.task, data.outputs)
    view = build_view(models.create(asked.model, 10), plan)
    client = Client(view, plan.algorithm, plan.options, plan.training, 0, config.keep_gates)
    ratios, seconds = [], []
    for _ in range(asked.repeats):
        started = time.perf_counter()
        dry_run(model, plan, data)
        tried = time.perf_counter() - started
        started = time.perf_counter()
        for silo, loader in data.train.items():
            client.train(silo, loader, 0)
        trained = time.perf_counter() - started
        ratios.append(tried / trained)
        seconds.append((tried, trained))
    passed = 2 * min(asked.batch, 32, asked.samples)
    low, middle, high = statistics.quantiles(ratios, n=4)
    dry, whole = (statistics.median(column) for column in zip(*seconds, strict=True))
    print(
        f"{name}: dry run {dry:.3f} s on {passed} samples, one round {whole:.3f} s; ratio {middle:.2f} "
        f"(quartiles {low:.2f} to {high:.2f}); the two batches are "
        f"{passed / (asked.silos * asked.samples):.2f} of the round"
    )


if __name__ == "__main__":
    main()
