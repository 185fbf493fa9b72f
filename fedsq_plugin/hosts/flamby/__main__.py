"""`python -m fedsq_plugin.hosts.flamby fed_benchmark --config config.json`: as `fedsq flamby …`."""

from __future__ import annotations

import sys

from ...cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "flamby")
    main()
