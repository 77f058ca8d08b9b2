"""Entry point of `python -m edgellama`."""

from __future__ import annotations

import sys

from edgellama.cli.dispatch import main

if __name__ == "__main__":
    sys.exit(main())
