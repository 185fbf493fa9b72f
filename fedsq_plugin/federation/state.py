"""Model states: what travels between silos and server, its size, and its fingerprint."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..dualcopy import DualCopy
from ..errors import ConfigError

State = OrderedDict[str, Tensor]
"""A state dict that owns its tensors (FedML tells one model from a dict of models by this type)."""

EXTRA = "_extra_state"
"""Last part of the key under which torch puts what a module's `get_extra_state` gives. It may be anything, and its
shape may change from step to step, so it is no part of a state here: it stays with the model, as it was before the
first round."""


def tensors_of(model: nn.Module) -> State:
    """`model.state_dict()` without what `get_extra_state` gives. The tensors are the model's own."""
    return OrderedDict((k, v) for k, v in model.state_dict().items() if k.rpartition(".")[2] != EXTRA)


def state_of(model: nn.Module) -> State:
    """The model's state on the CPU, as an independent copy."""
    return OrderedDict((k, v.detach().to("cpu", copy=True)) for k, v in tensors_of(model).items())


def with_extras(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """A state as `model.load_state_dict` wants it: with the model's own extra state, which so stays as it is."""
    return {**{key: module.get_extra_state() for key, module in _with_extra_state(model)}, **state}


def extras_of(model: nn.Module) -> dict[str, Any]:
    """An independent copy of the extra state of the model's modules."""
    return {key: copy.deepcopy(module.get_extra_state()) for key, module in _with_extra_state(model)}


def put_extras(model: nn.Module, extras: Mapping[str, Any]) -> None:
    """Put back what `extras_of` gave."""
    for key, module in _with_extra_state(model) if extras else ():
        module.set_extra_state(copy.deepcopy(extras[key]))


def _with_extra_state(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose extra state can be read and written, with its key."""
    plain = model.quantitative if isinstance(model, DualCopy) else model
    for path, module in plain.named_modules():
        kind = type(module)
        read, write = kind.get_extra_state, kind.set_extra_state
        if read is not nn.Module.get_extra_state and write is not nn.Module.set_extra_state:
            yield (f"{path}.{EXTRA}" if path else EXTRA), module


def form_of(model: nn.Module) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Dtype and shape of every entry of the model's state."""
    return {key: (value.dtype, value.shape) for key, value in tensors_of(model).items()}


def refuse_reformed(model: nn.Module, form: Mapping[str, tuple[torch.dtype, torch.Size]]) -> None:
    """Raise ConfigError where the model's state has not the form that it had: silos must send entries that fit."""
    now = form_of(model)
    for key in [*now, *form]:
        if now.get(key) == form.get(key):
            continue
        if key not in form or key not in now:
            what = "comes into being" if key in now else "disappears"
        else:
            (dtype, shape), (other, size) = form[key], now[key]
            what = f"turns from {tuple(shape)} {dtype} into {tuple(size)} {other}"
        raise ConfigError(
            f"the state's entry '{key}' {what} while the model trains, and what silos send must fit together: register "
            "it in its final form, or with persistent=False"
        )


def clone(state: Mapping[str, Tensor]) -> State:
    """An independent copy, on the same devices."""
    return OrderedDict((key, value.detach().clone()) for key, value in state.items())


def nbytes(state: Mapping[str, Tensor]) -> int:
    """Number of bytes of the tensors of a state."""
    return sum(value.numel() * value.element_size() for value in state.values())


def no_less_finite(value: Tensor, sent: Tensor) -> bool:
    """Whether every entry is finite, or is what was sent: an attention mask has infinite entries that never change.

    Args:
        sent: of the same shape and dtype.
    """
    if not (value.is_floating_point() or value.is_complex()) or check_finite(value):
        return True
    found, before = (torch.view_as_real(one) if one.is_complex() else one for one in (value, sent.to(value.device)))
    return bool((found.isfinite() | _same(found, before)).all())


def check_finite(value: Tensor) -> bool:
    """Whether all entries are finite. A finite sum shows it in one pass. Finite entries can overflow the sum, so where
    it is not finite the entries are looked at."""
    if value.dtype.itemsize == 1:  # torch cannot add up numbers of 8 bits
        value = value.float()
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype have the same values; NaN is the same as NaN."""
    if torch.equal(one, other):
        return True
    floating = one.is_floating_point() and one.shape == other.shape
    return floating and bool(_same(one, other).all())


def _same(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors have the same value; NaN is the same as NaN."""
    return (one == other) | (one.isnan() & other.isnan())


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, in hex: two states have the same one only if they are equal."""
    digest = hashlib.sha256()
    for key, value in state.items():
        digest.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        # As bytes: numpy has no bfloat16.
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
