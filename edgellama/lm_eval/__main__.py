"""Command line of lm-evaluation-harness with the model `edgellama`: `python -m edgellama.lm_eval`."""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
