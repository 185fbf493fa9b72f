"""A client's training steps on a GPU: FedAvg and FedSQ, precision by precision, in turn in one process.

    python recipes/benchmarks/gpu.py [--model resnet18] [--size 32] [--batch 128] [--gpu 0] [--compile]

Prints the device's name, the median step, and the median ratio of paired steps to FedAvg in fp32 and to
FedAvg in the same precision, with the quartiles of the first. fp32 is torch's own: convolutions in TF32 where
the GPU has it; gates are computed in fp32 without TF32, or in bf16 where the row says so.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from fedsq_plugin import DualCopy, models
from fedsq_plugin.dualcopy import Compiled, GateCache
from fedsq_plugin.federation.training import LocalTraining

WARM_UP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--small-images", action="store_true")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    options = parser.parse_args()
    if not torch.cuda.is_available() or options.gpu >= torch.cuda.device_count():
        sys.exit(f"gpu.py: torch sees no GPU {options.gpu} on this machine; client_step.py measures on the CPU")
    device = torch.device("cuda", options.gpu)
    torch.cuda.set_device(device)
    if options.compile:
        from torch import _dynamo

        # One function serves all rows, and torch compiles it for eight models by default.
        _dynamo.config.cache_size_limit = 64
    torch.manual_seed(0)
    plain = models.create(options.model, 10, small_images=options.small_images).train()
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    labels = torch.randint(10, (options.batch,), device=device)
    steps = dict(rows(plain, device, images, labels, options.compile))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats + WARM_UP):
        for name, step in steps.items():
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            started.record()
            step()
            ended.record()
            torch.cuda.synchronize()
            if repeat >= WARM_UP:
                taken[name].append(started.elapsed_time(ended))
    how = f"batch {options.batch}, {options.repeats} paired steps{', compiled' if options.compile else ''}"
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"{options.model}, {options.size}x{options.size}, {how}")
    for name, values in taken.items():
        low, middle, high = statistics.quantiles(ratios(values, taken["FedAvg fp32"]), n=4)
        own = statistics.median(ratios(values, taken[f"FedAvg {name.split()[1]}"]))
        print(
            f"{name:<34} {statistics.median(values):8.2f} ms   / FedAvg fp32 {middle:.3f} "
            f"({low:.3f} to {high:.3f})   / FedAvg same {own:.3f}"
        )


def ratios(values: list[float], base: list[float]) -> list[float]:
    return [value / one for value, one in zip(values, base, strict=True)]


def rows(
    plain: nn.Module, device: torch.device, images: torch.Tensor, labels: torch.Tensor, compiled: bool
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every row's name, its second word a precision, and its training step."""
    for precision in ("fp32", "bf16", "fp16"):
        for last in (False, True):
            suffix = f"{precision} channels_last" if last else precision
            kinds = [("FedAvg", None), ("FedSQ", "fp32"), ("FedSQ gates kept", "fp32")]
            if precision != "fp32":
                kinds.append(("FedSQ gates bf16", "bf16"))
            for kind, gates in kinds:
                model = copy.deepcopy(plain)
                view = model if gates is None else DualCopy(model, structural_precision=gates)
                view.to(device=device, memory_format=torch.channels_last if last else torch.contiguous_format)
                forward = Compiled(view) if compiled else None
                if kind == "FedSQ gates kept":
                    forward = GateCache(view, passes=forward)
                name, *rest = kind.split(maxsplit=1)
                yield (" ".join([name, suffix, *rest]), stepper(view, forward or view, images, labels, precision))


def stepper(
    model: nn.Module, forward: Callable[..., object], images: torch.Tensor, labels: torch.Tensor, precision: str
) -> Callable[[], None]:
    """As `local_update` does it."""
    training = LocalTraining(momentum=0.9, precision=precision)
    optimizer = training.build(list(model.parameters()), 0)
    scaler = training.scaler(images.device)

    def step() -> None:
        optimizer.zero_grad()
        with training.forward(images.device):
            output = forward(images)
        scaler.scale(F.cross_entropy(output.float(), labels)).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


if __name__ == "__main__":
    main()
