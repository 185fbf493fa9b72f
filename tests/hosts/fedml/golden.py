"""The figures that every algorithm gave in version 0.1.0, which no later change of the code may move.

    python -m tests.hosts.fedml.golden      writes golden.json anew: only when a figure is meant to change

Sums of floats depend on the processor and on torch: there the digits are compared to `TOLERANCE` alone.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_suffix(".json")
TOLERANCE = 0.02
"""Of losses and accuracies on another kind of machine than the one that wrote the file."""


def machine() -> dict[str, str]:
    """What the last digits depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "torch": torch.__version__,
        "processor": model or platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    import fedsq_plugin

    from .cases import CASES
    from .several import script

    torch.set_num_threads(1)
    fedsq_plugin.register()
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {
            name: script(case, Path(folder), number=number) for number, (name, case) in enumerate(CASES.items())
        }
    FILE.write_text(json.dumps({"machine": machine(), "runs": found}, indent=0) + "\n")
    print(f"{FILE}: {len(found)} runs", file=sys.stderr)


if __name__ == "__main__":
    main()
