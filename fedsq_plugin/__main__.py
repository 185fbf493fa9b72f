"""`python -m fedsq_plugin main.py --cf x.yaml`: a FedML script, unchanged, with the plugin on."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from .cli import fail
from .errors import FedSQError


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: python -m fedsq_plugin SCRIPT.py [arguments of the script, as --cf recipe.yaml]")
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    script = Path(sys.argv[1])
    if not script.is_file():
        fail(f"no script {script}")
    from . import register

    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)
    try:
        register()
        runpy.run_path(str(script), run_name="__main__")
    except FedSQError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted", status=130)


if __name__ == "__main__":
    main()
