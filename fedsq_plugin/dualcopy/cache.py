"""A cache of gates. The structural copy is fixed, so an input that is seen again has the same gates.

Per sample the cache stores one bit per activation with two regions, and one byte or more for the others.
It recognises an input by its content, so the order and the loader do not matter. It does not help if
inputs never repeat, as with random augmentation.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import GateError
from .activations import GateKind
from .independence import find_dependent
from .passes import Gate
from .places import Place
from .precision import to_device
from .wrapper import DualCopy

log = logging.getLogger(__name__)

Row = npt.NDArray[np.uint8]
Layout = list[tuple[GateKind, tuple[int, ...], torch.dtype, torch.Size, bool, bool, Place | None]]
"""For each gate: kind, size, dtype, shape per sample, whether one bit is enough, whether channels are last, place."""


class Passes(Protocol):
    """The two passes of a DualCopy, plain or compiled."""

    def gates(self, x: Tensor) -> list[Gate]: ...

    def gated(self, gates: list[Gate], x: Tensor) -> Any: ...


class GateCache:
    """Run a DualCopy on batches (N, ...) and keep the gates of each sample.

    The structural copy runs only on new samples. Gates equal those of `dual(x)`, except for rounding: the
    batch of new samples can have another size. Gates are kept only where those of a sample depend on the sample
    alone. The first batch of each form shows this; if they do not, a warning says so, and nothing is kept.

    Args:
        limit: bytes of main memory. When they are used, no more gates are stored.
        passes: runs the two passes instead of `dual`, for example a `Compiled`.
    """

    def __init__(self, dual: DualCopy, limit: int = 2**30, passes: Passes | None = None) -> None:
        self._dual, self._limit = dual, limit
        self._passes = dual if passes is None else passes
        self._rows: dict[tuple[Any, bytes], Row] = {}
        self._layouts: dict[Any, Layout] = {}
        """Key: shape and dtype of a sample, and the dtype of the gates' computation."""
        self._version = dual.structural_version
        self._given_up = False
        self.hits = self.misses = self.nbytes = 0

    def __call__(self, x: Tensor) -> Any:
        """Return the DualCopy's output for a batch."""
        if self._dual.unfrozen or self._dual.draws((x,)):
            return self._dual(x)
        return self._passes.gated(self.gates(x), x)

    def gates(self, x: Tensor) -> list[Gate]:
        """Return the gates of a batch, like `DualCopy.gates`.

        Raises:
            GateError: a gated tensor of the model does not have one entry per sample in its first dimension.
        """
        if self._version != self._dual.structural_version:
            self._rows, self._layouts, self.nbytes, self._version = {}, {}, 0, self._dual.structural_version
        if not len(x) or self._given_up:
            return self._passes.gates(x)
        form = (x.shape[1:], x.dtype, self._dual.gate_dtype)
        if form not in self._layouts and self._gives_up(x):
            return self._passes.gates(x)
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
                self._rows[key] = row.copy()  # a view would keep the whole batch in memory
                self.nbytes += row.nbytes
        return gates

    def _gives_up(self, x: Tensor) -> bool:
        """Return whether gates cannot be kept, as those of a sample depend on its batch."""
        path = self._dual.find_dependent(find_dependent, x)
        if path is not None:
            self._given_up = True
            log.warning(
                "keep_gates is given up: the gates of a sample in '%s' depend on the other samples of its batch "
                "(BatchNorm without running statistics, for example); gates are computed for every batch",
                path,
            )
        return self._given_up


def _pack(gates: list[Gate], samples: int) -> tuple[Layout, npt.NDArray[np.uint8]]:
    layout, parts = [], []
    for gate in gates:
        if not gate.region.dim() or gate.region.shape[0] != samples:
            raise GateError(
                "gates cannot be kept: a gated call of this model has not one row per sample "
                f"({tuple(gate.region.shape)} for {samples} samples); set keep_gates: false"
            )
        region, last = gate.region, _is_channels_last(gate.region)
        flat = (region.movedim(1, -1) if last else region).reshape(samples, -1)
        binary = gate.kind is GateKind.TWO_REGIONS
        layout.append((gate.kind, gate.size, region.dtype, region.shape[1:], binary, last, gate.place))
        # Bits are packed on the GPU, so that only one eighth of the bytes leaves it.
        values = (_pack_bits(flat) if binary and flat.is_cuda else flat).cpu().numpy()
        parts.append(np.packbits(values, axis=1) if binary and not flat.is_cuda else values.view(np.uint8))
    return layout, np.concatenate(parts, axis=1)


def _is_channels_last(region: Tensor) -> bool:
    return region.dim() == 4 and not region.is_contiguous() and region.movedim(1, -1).is_contiguous()


_SHIFTS = (7, 6, 5, 4, 3, 2, 1, 0)
"""Positions of the bits of a byte, in numpy's order."""


def _pack_bits(flat: Tensor) -> Tensor:
    """Do what `np.packbits(flat, axis=1)` does, on the tensor's device."""
    eights = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)).view(len(flat), -1, 8)
    packed = torch.zeros_like(eights[..., 0])
    for number, shift in enumerate(_SHIFTS):
        packed |= eights[..., number] << shift
    return packed


def _unpack_bits(packed: Tensor, count: int) -> Tensor:
    bits = torch.stack([(packed >> shift) & 1 for shift in _SHIFTS], dim=-1)
    return bits.flatten(1)[:, :count].contiguous()


def _unpack(rows: list[Row], layout: Layout, device: torch.device) -> list[Gate]:
    whole, gates, start = to_device(torch.from_numpy(np.stack(rows)), device), [], 0
    for kind, size, dtype, shape, binary, last, place in layout:
        count = shape.numel()
        length = -(-count // 8) if binary else count * dtype.itemsize
        part = whole[:, start : start + length].contiguous()
        start += length
        if not binary:
            region = part.view(dtype)
        elif device.type == "cpu":
            region = torch.from_numpy(np.unpackbits(part.numpy(), axis=1, count=count))
        else:
            region = _unpack_bits(part, count)
        inner = (*shape[1:], shape[0]) if last else shape
        region = region.view(len(rows), *inner)
        gates.append(Gate(kind, region.movedim(-1, 1) if last else region, size, place))
    return gates
