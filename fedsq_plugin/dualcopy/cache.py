"""Gates of inputs that come again: the structural copy never changes, so they are known.

One bit per activation with two regions, one byte or more for the others, per sample. Inputs are
recognised by content, so any loader and any order will do; only inputs that never repeat (augmented
ones) gain nothing.
"""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import GateError
from .activations import GateKind
from .passes import Gate
from .precision import to_device
from .wrapper import DualCopy

Row = npt.NDArray[np.uint8]
Layout = list[tuple[GateKind, tuple[int, ...], torch.dtype, torch.Size, bool, bool]]
"""Of every gate: kind, size, dtype, shape per sample, whether a bit is enough, whether channels come last."""


class Passes(Protocol):
    """The two passes of a DualCopy, its own or compiled."""

    def gates(self, x: Tensor) -> list[Gate]: ...

    def gated(self, gates: list[Gate], x: Tensor) -> Any: ...


class GateCache:
    """A DualCopy's forward for batches (N, ...) of samples that come again.

    The structural copy runs for the samples that are new. Gates agree with those of `dual(x)` up to the
    rounding of a forward with another batch size. `limit` is in bytes of main memory; beyond it nothing is
    added. `passes` runs the two passes in place of the DualCopy.
    """

    def __init__(self, dual: DualCopy, limit: int = 2**30, passes: Passes | None = None) -> None:
        self._dual, self._limit = dual, limit
        self._passes = dual if passes is None else passes
        self._rows: dict[tuple[Any, bytes], Row] = {}
        self._layouts: dict[Any, Layout] = {}
        """By the shape and dtype of a sample: other sizes have other gates."""
        self._version = dual.structural_version
        self.hits = self.misses = self.nbytes = 0

    def __call__(self, x: Tensor) -> Any:
        """The DualCopy's output for a batch."""
        if self._dual.unfrozen:
            return self._dual(x)
        return self._passes.gated(self.gates(x), x)

    def gates(self, x: Tensor) -> list[Gate]:
        """The structural copy's decisions for a batch, as `DualCopy.gates` gives them.

        Raises:
            GateError: a gated call of the model does not have one row per sample.
        """
        if self._version != self._dual.structural_version:
            self._rows, self.nbytes, self._version = {}, 0, self._dual.structural_version
        if not len(x):
            return self._passes.gates(x)
        form = (x.shape[1:], x.dtype, self._dual.gate_dtype)
        samples = x.detach().cpu().contiguous().view(len(x), -1).view(torch.uint8).numpy()
        keys = [(form, hashlib.blake2b(sample, digest_size=16).digest()) for sample in samples]
        new = [number for number, key in enumerate(keys) if key not in self._rows]
        fresh: dict[tuple[Any, bytes], Row] = {}
        if new:
            captured = self._passes.gates(x if len(new) == len(x) else x[new])
            self._layouts[form], packed = _pack(captured, len(new))
            fresh = {keys[number]: row for number, row in zip(new, packed, strict=True)}
        self.hits, self.misses = self.hits + len(x) - len(new), self.misses + len(new)
        rows = [fresh[key] if key in fresh else self._rows[key] for key in keys]
        gates = _unpack(rows, self._layouts[form], x.device)
        for key, row in fresh.items():
            if self.nbytes + row.nbytes <= self._limit:
                self._rows[key] = row.copy()  # not a view, which would keep the whole batch
                self.nbytes += row.nbytes
        return gates


def _pack(gates: list[Gate], samples: int) -> tuple[Layout, npt.NDArray[np.uint8]]:
    layout, parts = [], []
    for gate in gates:
        if not gate.region.dim() or gate.region.shape[0] != samples:
            raise GateError(
                "gates cannot be kept: a gated call of this model has not one row per sample "
                f"({tuple(gate.region.shape)} for {samples} samples); set keep_gates: false"
            )
        region, last = gate.region, _channels_last(gate.region)
        flat = (region.movedim(1, -1) if last else region).reshape(samples, -1)
        binary = gate.kind is GateKind.TWO_REGIONS
        layout.append((gate.kind, gate.size, region.dtype, region.shape[1:], binary, last))
        # Packed where it is: what leaves a GPU is an eighth.
        values = (_packed(flat) if binary and flat.is_cuda else flat).cpu().numpy()
        parts.append(np.packbits(values, axis=1) if binary and not flat.is_cuda else values.view(np.uint8))
    return layout, np.concatenate(parts, axis=1)


def _channels_last(region: Tensor) -> bool:
    return region.dim() == 4 and not region.is_contiguous() and region.movedim(1, -1).is_contiguous()


_SHIFTS = (7, 6, 5, 4, 3, 2, 1, 0)
"""Values of the bits of a byte, in numpy's order."""


def _packed(flat: Tensor) -> Tensor:
    """`np.packbits` along the second dimension, where the tensor is."""
    eights = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)).view(len(flat), -1, 8)
    packed = torch.zeros_like(eights[..., 0])
    for number, shift in enumerate(_SHIFTS):
        packed |= eights[..., number] << shift
    return packed


def _unpacked(packed: Tensor, count: int) -> Tensor:
    """`np.unpackbits` along the second dimension, where the tensor is."""
    bits = torch.stack([(packed >> shift) & 1 for shift in _SHIFTS], dim=-1)
    return bits.flatten(1)[:, :count].contiguous()


def _unpack(rows: list[Row], layout: Layout, device: torch.device) -> list[Gate]:
    whole, gates, start = to_device(torch.from_numpy(np.stack(rows)), device), [], 0
    for kind, size, dtype, shape, binary, last in layout:
        count = shape.numel()
        length = -(-count // 8) if binary else count * dtype.itemsize
        part = whole[:, start : start + length].contiguous()
        start += length
        if not binary:
            region = part.view(dtype)
        elif device.type == "cpu":
            region = torch.from_numpy(np.unpackbits(part.numpy(), axis=1, count=count))
        else:
            region = _unpacked(part, count)
        inner = (*shape[1:], shape[0]) if last else shape
        region = region.view(len(rows), *inner)
        gates.append(Gate(kind, region.movedim(-1, 1) if last else region, size))
    return gates
