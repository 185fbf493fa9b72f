"""Reads weights files without running code in them, and loads all tensors of a file or none."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence, Set

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..dualcopy import DualCopy
from ..errors import Part, WeightsError, Word
from .weights_file import Fit, WeightsFile, error, one_line, open_weights, some


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the state dict in a weights file, as plain tensors on the CPU, whatever model it is for.

    The state dict may be nested under a usual name. If all keys start with `module.` (DataParallel), this prefix is
    removed. `load_weights` on an opened file finds other names and prefixes, too.

    Raises:
        WeightsError: the file does not exist, is of another kind, is damaged, or holds more than tensors.
    """
    return open_weights(path).state()


def load_weights(model: nn.Module, weights: WeightsFile | Mapping[str, Tensor], head: str | None) -> list[str]:
    """Load weights into a plain model in place. After an error the model is unchanged.

    A file may have the state dict under a name, and its keys under a prefix: that state dict and that prefix are taken
    with which the keys are the model's. Of the two copies of a DualCopy this is the quantitative one.

    Values are cast to the model's dtypes; counters that are floats (FedML averages them) are rounded. A head of
    another shape is not loaded. BatchNorm counters may be missing in the file.

    Args:
        model: a plain model, not a DualCopy: its structural copy would stay old.
        weights: the result of `open_weights`, or a state dict.
        head: module path of the model's head, such as "fc"; None: all shapes must be equal.

    Returns:
        A line if the state dict has a name or a prefix in the file, and a line if the head was not loaded.

    Raises:
        WeightsError: keys or shapes differ outside the head, several state dicts fit, a value is not finite, a dtype
            cannot be cast, or the model has no such head.
    """
    if isinstance(model, DualCopy):
        raise error("weights are loaded before the DualCopy is made, not into it; load, then wrap")
    whole = model.state_dict()
    own = {key: value for key, value in whole.items() if isinstance(value, Tensor)}  # not get_extra_state's
    in_head = [key for key in own if key.startswith(f"{head}.")] if head is not None else []
    if head is not None and not in_head:
        raise error(Word("no head", head), "; name the module of its last layer")
    counters = {
        f"{path}.num_batches_tracked".lstrip(".")
        for path, module in model.named_modules()
        if isinstance(module, _NormBase)
    }
    state, lines = _choose(weights, own, counters, in_head)
    left_out = any(key in state and state[key].shape != own[key].shape for key in in_head)
    kept = set(in_head) if left_out else set()
    _compare(state, own, may_differ=kept, may_lack=counters)
    # A head that is not loaded is checked too: a file with one broken tensor cannot be trusted.
    values = {k: _convert(k, v, own[k]) for k, v in state.items()}
    model.load_state_dict({**whole, **{k: own[k] if k in kept else values.get(k, own[k]) for k in own}})
    return [*lines, _describe_head(str(head), state, own)] if left_out else lines


def _choose(
    weights: WeightsFile | Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    may_lack: Set[str],
    may_differ: Collection[str],
) -> tuple[Mapping[str, Tensor], list[str]]:
    """The state dict for a model, by the model's keys, and a line where it had a name or a prefix.

    Raises:
        WeightsError: none fits, or several do.
    """
    file = weights if isinstance(weights, WeightsFile) else WeightsFile("the state dict", weights)
    fit = file.fit(own, may_lack, may_differ)
    if fit is not None:
        line = _describe_fit(fit, file.others(fit, own, may_lack))
        return {key: value.detach() for key, value in fit.state.items()}, [line] if line else []
    near = file.nearest(own)
    if near is None:
        return file.state(), []
    try:
        _compare(near.state, own, set(may_differ), set(may_lack))
    except WeightsError as fault:
        raise fault.after(f"without {one_line(near.where)}, ") from None
    return near.state, []


def _describe_fit(fit: Fit, others: Sequence[str]) -> str:
    """One line that says how the keys of a file became the model's; empty where they are the model's."""
    said = []
    if fit.nest:
        said.append(f"the state dict under '{fit.nest}' is taken")
    if fit.prefix:
        copy = " (the quantitative copy of a DualCopy)" if fit.prefix.endswith("quantitative.") else ""
        said.append(f"the prefix '{fit.prefix}'{copy} is taken off the keys")
    if fit.unwrapped:
        said.append("the names of wrappers ('module.', '_orig_mod.') are taken out of the keys")
    if others:
        said.append(f"fitting too, not taken: {some(others)}")
    elif fit.left:
        said.append(f"left, because they are not the model's: {some(fit.left)}")
    return one_line("; ".join(said))


def _compare(state: Mapping[str, Tensor], own: Mapping[str, Tensor], may_differ: set[str], may_lack: set[str]) -> None:
    missing = [f"{k} {_size(own[k])}" for k in own if k not in state and k not in may_lack]
    unexpected = [f"{k} {_size(state[k])}" for k in state if k not in own]
    differing = [k for k in own if k in state and state[k].shape != own[k].shape and k not in may_differ]
    shapes = [f"{k}: file {_size(state[k])}, model {_size(own[k])}" for k in differing]
    found = [
        f"{len(lines)} {what} ({some(lines)})"
        for what, lines in (
            ("of another shape", shapes),
            ("missing in the file", missing),
            ("unknown to the model", unexpected),
        )
        if lines
    ]
    if found:
        remedy: Sequence[Part] = ("use the model that the file was made with",)
        if len(differing) == 1 and not missing and not unexpected:
            remedy = _suggest_options(differing[0], state, own) or remedy
        raise error(f"the file's tensors do not fit: {', '.join(found)}; ", *remedy)


def _suggest_options(key: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[Part]:
    """Name the options of `create` with which the stem fits. Empty if the tensor `key` is not the stem."""
    theirs, ours = state[key].shape, own[key].shape
    first = next((k for k, v in own.items() if v.dim() == 4), None)
    if key != first or len(theirs) != 4 or theirs[0] != ours[0]:
        return []
    options = []
    if theirs[2:] != ours[2:]:
        options.append(Word("small_images", "true" if theirs[2:] == (3, 3) else "false"))
    if theirs[1] != ours[1]:
        options.append(Word("in_channels", str(theirs[1])))
    first_option, *more = options
    return ["this file needs ", first_option, *(part for option in more for part in (" and ", option))]


def _convert(key: str, value: Tensor, own: Tensor) -> Tensor:
    dtype = own.dtype
    if value.is_floating_point() and not dtype.is_floating_point:
        value = value.double().round()
        result = value.to(dtype)
        fits = bool((result.double() == value).all())
    elif value.is_floating_point() == dtype.is_floating_point and not value.is_complex():
        result = value.to(dtype)
        fits = bool(torch.isfinite(result).all()) or _is_as_finite(result, own)
    else:
        raise error(f"{key} is {_name(value.dtype)} in the file, {_name(dtype)} in the model")
    if not fits:
        raise error(
            f"{key} has values in the file that are not finite in {_name(dtype)}; "
            "use a file from before the training diverged"
        )
    return result


def _is_as_finite(value: Tensor, own: Tensor) -> bool:
    """Whether `value` is not finite only where the model has the same: in a mask of infinities, for example."""
    same = value.shape == own.shape and torch.isfinite(value) | (value == own.to(value.device))
    return bool(torch.as_tensor(same).all())


def _describe_head(head: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    differing = [(state[k], own[k]) for k in own if k.startswith(f"{head}.") and state[k].shape != own[k].shape]
    theirs, ours = differing[0]
    if theirs.shape[1:] == ours.shape[1:] and theirs.dim() == ours.dim():
        sizes = f"the file has {theirs.shape[0]} outputs, the model {ours.shape[0]}"
    else:
        sizes = f"the file has {_size(theirs)}, the model {_size(ours)}"
    return f"head {head}: {sizes}; newly initialised"


def _size(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a single number"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
