"""Reads weights files without running code in them, and finds the state dict in them that fits a model.

Users' files have state dicts under names (`state_dict`), and keys under prefixes (`module.`, `_orig_mod.`, `model.`).
One rule serves all of them: the state dict, and the prefix, with which the keys are the model's.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import Part, WeightsError, Word

PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".tar")
SUFFIXES = (".safetensors", *PICKLED)
NESTS = ("state_dict", "model_state_dict", "model")
"""Names under which a state dict is looked for where there is no model to compare it with."""
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")
"""What torch and its trainers put into keys, in any place: where only a part of the model was wrapped."""
SHOWN = 3
"""Number of keys that a message names. It gives only the number of the others."""
_SECONDARY = re.compile(r"(^|[._/ ])(ema|averaged?|swa|structural/?|memory .*|slot .*)($|[._/ ])", re.IGNORECASE)
"""State dicts that stand beside the one that is meant: averages over the training, and what FedSQ saves beside the
model."""
_SAVE = "save it with torch.save(model.state_dict(), file), or as safetensors"
_DEPTH = 4


class Fit(NamedTuple):
    """A state dict of a file, and the prefix with which its keys are the model's."""

    nest: str
    """The name under which it stands; empty for the file itself."""
    prefix: str
    state: dict[str, Tensor]
    """The values by the model's keys."""
    left: list[str]
    """Keys of the same state dict that do not have the prefix."""
    unwrapped: bool
    """Whether names of wrappers were taken out of the keys."""

    @property
    def where(self) -> str:
        """The place in the file, in words."""
        return " and ".join(
            words
            for words in (self.nest and f"the nest '{self.nest}'", self.prefix and f"the prefix '{self.prefix}'")
            if words
        )

    @property
    def secondary(self) -> bool:
        """Whether it stands beside the state dict that is meant."""
        return bool(_SECONDARY.search(f"{self.nest} {self.prefix}"))


@dataclass(frozen=True)
class WeightsFile:
    """What a weights file holds."""

    name: str
    """For messages: `weights file w.pt`."""
    content: Any

    def state(self) -> dict[str, Tensor]:
        """The state dict that stands in the file itself, or under a usual name, whatever the model. `module.` is taken
        off where all keys have it, and of the two copies of a DualCopy this is the quantitative one.

        Raises:
            WeightsError: there is none, or it holds more than tensors.
        """
        content = self.content
        while isinstance(content, Mapping):
            inner = next((key for key in NESTS if isinstance(content.get(key), Mapping)), None)
            if inner is None:
                break
            content = content[inner]
        if not isinstance(content, Mapping) or not content:
            what = "an empty dict" if isinstance(content, Mapping) else type(content).__name__
            raise error(f"{self.name} holds {what}, not a state dict; {_SAVE}")
        self._refuse_faults(content)
        if {key.partition(".")[0] for key in content} == {"quantitative", "structural"}:
            content = {key.partition(".")[2]: v for key, v in content.items() if key.startswith("quantitative.")}
        prefix = "module." if all(key.startswith("module.") for key in content) else ""
        return {key[len(prefix) :]: value.detach() for key, value in content.items()}

    def fit(self, own: Mapping[str, Tensor], may_lack: Set[str], may_differ: Collection[str]) -> Fit | None:
        """The state dict in the file, and the prefix, with which the keys are the model's; None: there is none.

        Args:
            own: the model's state.
            may_lack: keys that the file may lack.
            may_differ: keys that may have another shape.

        Raises:
            WeightsError: there are several, with different values, or what was found holds more than tensors.
        """
        found = [fit for nest, state in _state_dicts(self.content) for fit in _fits(nest, state, own, may_lack)]
        # Keys alone do not tell small models apart.
        same = [fit for fit in found if _has_shapes(fit.state, own, may_differ)] or found
        first = [fit for fit in same if not fit.secondary] or same
        if not first:
            return None
        for other in first[1:]:
            if not _equal(first[0].state, other.state):
                names = " and ".join(fit.where or "the file's own keys" for fit in first[:SHOWN])
                raise error(
                    f"{self.name} is ambiguous: {names} fit the model alike; save the one that is meant by itself"
                )
        self._refuse_faults(first[0].state)
        return first[0]

    def nearest(self, own: Mapping[str, Tensor]) -> Fit | None:
        """The state dict, and the prefix, with which most keys are the model's; None where no key is, or where these
        are the file's own keys.

        Raises:
            WeightsError: it holds more than tensors.
        """
        best: tuple[int, Fit | None] = (0, None)
        for nest, state in _state_dicts(self.content):
            for prefix, count in _count_prefixes(state, own).items():
                if count > best[0]:
                    values = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
                    best = count, Fit(nest, prefix, values, [], False)
        found = best[1]
        if found is None or not found.where:
            return None
        self._refuse_faults(found.state)
        return found

    def others(self, chosen: Fit, own: Mapping[str, Tensor], may_lack: Set[str]) -> list[str]:
        """The places of the other state dicts that would fit, in words."""
        found = (fit for nest, state in _state_dicts(self.content) for fit in _fits(nest, state, own, may_lack))
        return [fit.where for fit in found if (fit.nest, fit.prefix) != (chosen.nest, chosen.prefix)]

    def _refuse_faults(self, state: Mapping[Any, Any]) -> None:
        for key, value in state.items():
            if not isinstance(key, str):
                raise error(f"{self.name} has the key {key!r}, not a name; {_SAVE}")
            if fault := _find_fault(value):
                raise error(f"{self.name}: {key} is {fault}, not a dense tensor; {_SAVE}")


def open_weights(path: str | os.PathLike[str]) -> WeightsFile:
    """Read a .safetensors, .pt, .pth, .bin, .ckpt or .tar file onto the CPU. Pickles are read with `weights_only`: code
    in them never runs.

    Raises:
        WeightsError: the file does not exist, is of another kind, is damaged, or has no state dict.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise error(f"weights file {path} does not exist; ", Word("weights"), f" ({', '.join(SUFFIXES)})")
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise error(f"weights file {path} must end in {', '.join(SUFFIXES)}")
    found = WeightsFile(f"weights file {path}", _unpickle(file) if suffix in PICKLED else _read_safetensors(file))
    if next(_state_dicts(found.content), None) is None:
        found.state()  # says what there is instead
    return found


def _state_dicts(content: Any, name: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The mappings with tensors in a file, outermost first, each with its name."""
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        return
    if any(isinstance(value, Tensor) for value in content.values()):
        yield name, content
    for key, value in content.items():
        if depth > 1 and isinstance(value, Mapping):
            yield from _state_dicts(value, f"{name}.{key}" if name else key, depth - 1)


def _fits(nest: str, state: Mapping[str, Any], own: Mapping[str, Tensor], may_lack: Set[str]) -> list[Fit]:
    """The prefixes with which the keys of a state dict are the model's: all of these, and no other."""
    found = []
    for unwrapped, one in ((False, state), (True, _unwrap(state))):
        required = own.keys() - may_lack
        for prefix, count in _count_prefixes(one, own).items():
            if count < len(required):
                continue
            values = {key[len(prefix) :]: value for key, value in one.items() if key.startswith(prefix)}
            if required <= values.keys() <= own.keys():
                left = [key for key in one if not key.startswith(prefix)]
                found.append(Fit(nest, prefix, values, left, unwrapped))
        if found:
            break
    return found


def _unwrap(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state without the names of wrappers in its keys; the state itself where two keys would be one."""
    pattern = re.compile(rf"(?<![^.])({'|'.join(map(re.escape, WRAPPERS))})")
    found = {pattern.sub("", key): value for key, value in state.items()}
    return found if len(found) == len(state) else dict(state)


def _count_prefixes(state: Mapping[str, Any], own: Mapping[str, Tensor]) -> Counter[str]:
    """How many keys are the model's with each prefix. A prefix ends at a dot, or at a slash."""
    counts: Counter[str] = Counter()
    for key in state:
        starts = [0, *(match.end() for match in re.finditer(r"[./]", key))]
        counts.update(key[:start] for start in starts if key[start:] in own)
    return counts


def _has_shapes(state: Mapping[str, Any], own: Mapping[str, Tensor], may_differ: Collection[str]) -> bool:
    return all(key in may_differ or getattr(value, "shape", None) == own[key].shape for key, value in state.items())


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        value is other[key]
        or (
            isinstance(value, Tensor)
            and isinstance(other[key], Tensor)
            and _find_fault(value) is None
            and _find_fault(other[key]) is None
            and value.dtype == other[key].dtype
            and torch.equal(value, other[key])
        )
        for key, value in one.items()
    )


def _read_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except OSError as fault:
        raise error(f"weights file {file} cannot be read: {fault.strerror or fault}") from None
    except (SafetensorError, ValueError, KeyError, RuntimeError):
        raise error(f"weights file {file} is damaged or no safetensors file; {_SAVE}") from None


def _unpickle(file: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # Torch warns about unusual pickles; the error below says the same in one line.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as fault:
        raise error(f"weights file {file} cannot be read: {fault.strerror or fault}") from None
    except Exception as fault:  # a damaged pickle can raise nearly any exception
        if found := re.search(r"GLOBAL ([\w.]+)", str(fault)):
            raise error(f"weights file {file} holds {found[1]}, which is code, not a tensor; {_SAVE}") from None
        raise error(f"weights file {file} is damaged or holds something else than tensors; {_SAVE}") from None


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


def some(lines: Sequence[str]) -> str:
    """The first lines, and the number of the others."""
    more = len(lines) - SHOWN
    return "; ".join(lines[:SHOWN]) + (f"; {more} more" if more > 0 else "")


def error(*parts: Part) -> WeightsError:
    """Make a WeightsError. Names from a file may have control characters; its line has none."""
    return WeightsError(*(one_line(part) if isinstance(part, str) else part for part in parts))


def one_line(text: str) -> str:
    """A text with one space for each white space, and ? for what cannot be printed."""
    return "".join(c if c.isprintable() else "?" for c in re.sub(r"\s+", " ", text))
