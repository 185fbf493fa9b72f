"""States on disk: safetensors for the tensors, JSON beside them for everything else."""

from __future__ import annotations

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

    contiguous = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    atomic_write(path, encode(contiguous))
    described = {**about, "sha256": fingerprint(contiguous)}
    atomic_write(path.with_suffix(".json"), (json.dumps(described, indent=1) + "\n").encode())


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote. Raises WeightsError when a file is missing, damaged or foreign."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        about = json.loads(path.with_suffix(".json").read_text())
        expected = about.pop("sha256")
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path}: not a whole checkpoint ({error})") from None
    # safetensors keeps no order of its own; the fingerprint was taken in the order written.
    if fingerprint(tensors) != expected and fingerprint(dict(sorted(tensors.items()))) != expected:
        raise WeightsError(f"{path}: its content is not what {path.stem}.json says")
    return tensors, about
