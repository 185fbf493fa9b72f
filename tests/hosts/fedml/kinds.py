"""Runs over several processes on data of several kinds: one process of one run, `kinds.py FOLDER KIND RANK`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.hosts.fedml.cases import Case
from tests.hosts.fedml.naive import KINDS, eight, net, points, three
from tests.hosts.fedml.several import script

NOTHING: tuple[Any, ...] = (0, 0, None, None, {}, {}, {})
"""The data of a server that has none, without the number of outputs."""


class Counting(nn.Module):
    """Has, beside weights, what is no float: a number too large for one, a mask, and a word."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.net = net(outputs)
        self.register_buffer("salt", torch.tensor([2**62 + 1, -(2**61) - 3]))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.inf]))

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def get_extra_state(self) -> Any:
        return {"step": 3}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"step": 3}


def real(outputs: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x[:, :outputs] if outputs > 1 else KINDS["real values"].label(x)


def idle() -> list[Any]:
    """Silo 0 has four samples, and its loader leaves batches of fewer than eight out."""
    return eight(points(three, (4, 24, 40)), 3, drop_last=True)


def data_of(kind: str, rank: int) -> tuple[list[Any], nn.Module]:
    """What each process brings."""
    if kind == "an idle silo":
        return idle(), Counting()
    outputs = 2 if kind == "silos of different tasks" else 1
    if rank == 0 and kind != "real values":
        return [*NOTHING, outputs], net(outputs)
    label = (lambda x: (x[:, 0] > 0).long()) if outputs == 2 and rank == 2 else real(outputs)
    return eight(points(label), outputs), net(outputs)


def main(folder: Path, kind: str, rank: int) -> None:
    torch.set_num_threads(1)
    data, model = data_of(kind, rank)
    case = Case({"federated_optimizer": "FedAvg", "head": None, "round_timeout_s": 60})
    found = script(case, folder, "GRPC", rank=rank, data=data, model=model)
    if not rank:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
