"""Reads weights files without running code in them, and loads all tensors of a file or none."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..dualcopy import DualCopy
from ..errors import Part, WeightsError, Word

PICKLED = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLED)
_SAVE = "save it with torch.save(model.state_dict(), file), or as safetensors"
_SHOWN = 3
"""Number of keys that a message names. It gives only the number of the others."""


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the state dict in a .safetensors, .pt, .pth or .bin file, as plain tensors on the CPU.

    The state dict may be nested under `state_dict` or `model`. If all keys start with `module.` (DataParallel),
    this prefix is removed. Pickles are read with `weights_only`: code in them never runs.

    Raises:
        WeightsError: the file does not exist, is of another kind, is damaged, or holds more than tensors.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise _error(f"weights file {path} does not exist; ", Word("weights"), f" ({', '.join(SUFFIXES)})")
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise _error(f"weights file {path} must end in {', '.join(SUFFIXES)}")
    content = _unpickle(file) if suffix in PICKLED else _read_safetensors(file)
    if isinstance(content, Mapping):
        nested = (content.get(key) for key in ("state_dict", "model"))
        content = next((inner for inner in nested if isinstance(inner, Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        what = "an empty dict" if isinstance(content, Mapping) else type(content).__name__
        raise _error(f"weights file {path} holds {what}, not a state dict; {_SAVE}")
    for key, value in content.items():
        if not isinstance(key, str):
            raise _error(f"weights file {path} has the key {key!r}, not a name; {_SAVE}")
        if fault := _find_fault(value):
            raise _error(f"weights file {path}: {key} is {fault}, not a dense tensor; {_SAVE}")
    if any(key.startswith("quantitative.") for key in content):
        raise _error(
            f"weights file {path} holds both copies of a DualCopy; "
            "load it by DualCopy(model).load_full_state_dict(safetensors.torch.load_file(path))"
        )
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return {key[len(prefix) :]: value.detach() for key, value in content.items()}


def load_weights(model: nn.Module, state: Mapping[str, Tensor], head: str | None) -> list[str]:
    """Load `state` into a plain model in place. After an error the model is unchanged.

    Values are cast to the model's dtypes; counters that are floats (FedML averages them) are rounded. A head of
    another shape is not loaded. BatchNorm counters may be missing in the file.

    Args:
        model: a plain model, not a DualCopy: its structural copy would stay old.
        state: the result of `read_state`.
        head: module path of the model's head, such as "fc"; None: all shapes must be equal.

    Returns:
        One line if the head was not loaded, else an empty list.

    Raises:
        WeightsError: keys or shapes differ outside the head, a value is not finite, a dtype cannot be cast, or
            the model has no such head.
    """
    if isinstance(model, DualCopy):
        raise _error("weights are loaded before the DualCopy is made, not into it; load, then wrap")
    own = model.state_dict()
    in_head = [key for key in own if key.startswith(f"{head}.")] if head is not None else []
    if head is not None and not in_head:
        raise _error(Word("no head", head), "; name the module of its last layer")
    counters = {
        f"{path}.num_batches_tracked".lstrip(".")
        for path, module in model.named_modules()
        if isinstance(module, _NormBase)
    }
    left_out = any(key in state and state[key].shape != own[key].shape for key in in_head)
    kept = set(in_head) if left_out else set()
    _compare(state, own, may_differ=kept, may_lack=counters)
    # A head that is not loaded is checked too: a file with one broken tensor cannot be trusted.
    values = {k: _convert(k, v, own[k].dtype) for k, v in state.items()}
    model.load_state_dict({k: own[k] if k in kept else values.get(k, own[k]) for k in own})
    return [_describe_head(str(head), state, own)] if left_out else []


def _compare(state: Mapping[str, Tensor], own: Mapping[str, Tensor], may_differ: set[str], may_lack: set[str]) -> None:
    missing = [f"{k} {_size(own[k])}" for k in own if k not in state and k not in may_lack]
    unexpected = [f"{k} {_size(state[k])}" for k in state if k not in own]
    differing = [k for k in own if k in state and state[k].shape != own[k].shape and k not in may_differ]
    shapes = [f"{k}: file {_size(state[k])}, model {_size(own[k])}" for k in differing]
    found = [
        f"{len(lines)} {what} ({_some(lines)})"
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
        raise _error(f"the file's tensors do not fit: {', '.join(found)}; ", *remedy)


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


def _convert(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.is_floating_point() and not dtype.is_floating_point:
        value = value.double().round()
        result = value.to(dtype)
        fits = bool((result.double() == value).all())
    elif value.is_floating_point() == dtype.is_floating_point and not value.is_complex():
        result = value.to(dtype)
        fits = bool(torch.isfinite(result).all())
    else:
        raise _error(f"{key} is {_name(value.dtype)} in the file, {_name(dtype)} in the model")
    if not fits:
        raise _error(
            f"{key} has values in the file that are not finite in {_name(dtype)}; "
            "use a file from before the training diverged"
        )
    return result


def _describe_head(head: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    differing = [(state[k], own[k]) for k in own if k.startswith(f"{head}.") and state[k].shape != own[k].shape]
    theirs, ours = differing[0]
    if theirs.shape[1:] == ours.shape[1:] and theirs.dim() == ours.dim():
        sizes = f"the file has {theirs.shape[0]} outputs, the model {ours.shape[0]}"
    else:
        sizes = f"the file has {_size(theirs)}, the model {_size(ours)}"
    return f"head {head}: {sizes}; newly initialised"


def _read_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except OSError as error:
        raise _error(f"weights file {file} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError, RuntimeError):
        raise _error(f"weights file {file} is damaged or no safetensors file; {_SAVE}") from None


def _unpickle(file: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # Torch warns about unusual pickles; the error below says the same in one line.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _error(f"weights file {file} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle can raise nearly any exception
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise _error(f"weights file {file} holds {found[1]}, which is code, not a tensor; {_SAVE}") from None
        raise _error(f"weights file {file} is damaged or holds something else than tensors; {_SAVE}") from None


def _find_fault(value: Any) -> str | None:
    """Describe what `value` is; None if it is a dense tensor with all its numbers in memory."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}"
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return "sparse, quantized or without values"
    # With strides of zero, a tensor of a few bytes can have terabytes of entries to check.
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return "expanded"
    return None


def _some(lines: Sequence[str]) -> str:
    more = len(lines) - _SHOWN
    return "; ".join(lines[:_SHOWN]) + (f"; {more} more" if more > 0 else "")


def _size(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a single number"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _error(*parts: Part) -> WeightsError:
    """Make a WeightsError. Names from a file may have control characters; its line has none."""
    return WeightsError(*(_one_line(part) if isinstance(part, str) else part for part in parts))


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in re.sub(r"\s+", " ", text))
