"""Paths inside the checkout: the root, the tiny model, the vectors and the packaged texts."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests/tiny_llama/model"
VECTORS = ROOT / "tests/vectors"
DATA = ROOT / "edgellama/data"
