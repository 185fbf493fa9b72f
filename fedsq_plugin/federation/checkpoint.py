"""States on disk: safetensors for the tensors, JSON beside them for everything else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import WeightsError
from .files import atomic_write
from .state import fingerprint


def save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write `path` (.safetensors) and, last, `path` with the suffix .json, which names the content."""
    from safetensors.torch import save as encode

    with contextlib.suppress(OSError):  # atomic_write says what is wrong with the place
        path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    atomic_write(path, encode(contiguous))
    # safetensors keeps no order of its own, and a fingerprint depends on it.
    described = {**about, "keys": list(contiguous), "sha256": fingerprint(contiguous)}
    atomic_write(path.with_suffix(".json"), (json.dumps(described, indent=1) + "\n").encode())


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote. Raises WeightsError when a file is missing, damaged or foreign."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    about = described(path)
    try:
        tensors = load_file(path)
        ordered = {key: tensors[key] for key in about.pop("keys")}
        expected = about.pop("sha256")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: not a whole checkpoint ({error})") from None
    if len(ordered) != len(tensors) or fingerprint(ordered) != expected:
        raise WeightsError(f"{path}: its content is not what {path.stem}.json says")
    return ordered, about


def described(path: Path) -> dict[str, Any]:
    """The JSON beside a state: `about`, keys and content. Raises WeightsError as `load` does."""
    try:
        about = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not a whole checkpoint ({error})") from None
    if not isinstance(about, dict):
        raise WeightsError(f"{path}: not a whole checkpoint ({path.stem}.json holds no object)")
    return about
