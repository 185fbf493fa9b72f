"""One training step of a client: FedSQ against FedAvg, in turn in one process.

    OMP_NUM_THREADS=1 python recipes/benchmarks/client_step.py [--model resnet18] [--size 32]

Prints the median ratio of paired steps, without and with the gates of known inputs kept, and the
quartiles of the ratios: a busy machine shows in them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fedsq_plugin import DualCopy, models
from fedsq_plugin.dualcopy import GateCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--small-images", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    plain = models.create(options.model, 10, small_images=options.small_images).train()
    dual = DualCopy(copy.deepcopy(plain)).train()
    kept = DualCopy(copy.deepcopy(plain)).train()
    images = torch.randn(options.batch, 3, options.size, options.size)
    labels = torch.randint(10, (options.batch,))
    cache = GateCache(kept)
    steps = {
        "FedAvg": stepper(plain, lambda: plain(images), labels),
        "FedSQ": stepper(dual, lambda: dual(images), labels),
        "FedSQ, gates kept": stepper(kept, lambda: cache(images), labels),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats + 3):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if repeat >= 3:
                seconds[name].append(time.perf_counter() - started)
    size = f"{options.size}x{options.size}, batch {options.batch}"
    print(f"{options.model}, {size}, {torch.get_num_threads()} thread(s), {options.repeats} paired steps")
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds["FedAvg"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        median = 1e3 * statistics.median(values)
        print(f"{name:<18} {median:8.1f} ms   / FedAvg {middle:.3f}   (quartiles {low:.3f} to {high:.3f})")


def stepper(model: nn.Module, forward: Callable[[], torch.Tensor], labels: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(), labels).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
