"""Texts that ship with edgellama, so that nothing is fetched: see NOTICE for their sources and licences. And two programs
(`edgellama.targets.xnnpack.functions`).

Evaluation and calibration texts are disjoint (different books, different chapters). Never calibrate or tune on
the evaluation texts.
"""

from __future__ import annotations

from importlib.resources import files

EVALUATION = ("evaluation_persuasion.txt", "evaluation_python_tutorial.rst")
CALIBRATION = ("calibration_emma.txt", "calibration_python_tutorial.rst")


def read_text(name: str) -> str:
    """One of the texts above, by file name."""
    return (files(__name__) / name).read_text(encoding="utf-8")


def read_bytes(name: str) -> bytes:
    """A file that is no text."""
    return (files(__name__) / name).read_bytes()
