"""Model states: what travels between silos and server, its size, and its fingerprint."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

State = OrderedDict[str, Tensor]
"""A state dict that owns its tensors (FedML tells one model from a dict of models by this type)."""


def state_of(model: nn.Module) -> State:
    """The model's state on the CPU, as an independent copy."""
    return OrderedDict((k, v.detach().to("cpu", copy=True)) for k, v in model.state_dict().items())


def clone(state: Mapping[str, Tensor]) -> State:
    """An independent copy, on the same devices."""
    return OrderedDict((key, value.detach().clone()) for key, value in state.items())


def nbytes(state: Mapping[str, Tensor]) -> int:
    """Number of bytes of the tensors of a state."""
    return sum(value.numel() * value.element_size() for value in state.values())


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, in hex: two states have the same one only if they are equal."""
    digest = hashlib.sha256()
    for key, value in state.items():
        digest.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        # As bytes: numpy has no bfloat16.
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
