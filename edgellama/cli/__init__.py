"""Command line: one file for each verb, with its options, its `main` and its printing."""

from __future__ import annotations

from edgellama.cli.dispatch import main

__all__ = ["main"]
