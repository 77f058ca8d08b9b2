"""Command line of lm-evaluation-harness with the model `edgellama`: `python -m edgellama.lm_eval`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

EXTRA = "pip install 'edgellama[lm-eval]'"

if __name__ == "__main__":
    if find_spec("lm_eval") is None:
        print(f"edgellama: error: lm-evaluation-harness is not installed\n  {EXTRA}", file=sys.stderr)
        sys.exit(2)
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
