"""Texts that ship with edgellama, so that nothing is downloaded, and two programs.

NOTICE gives the sources and licences of the texts. `edgellama.targets.xnnpack.functions` runs the programs.

Evaluation and calibration texts are disjoint (different books, different chapters). Never calibrate or tune
on the evaluation texts.
"""

from __future__ import annotations

from importlib.resources import files

EVALUATION = ("evaluation_persuasion.txt", "evaluation_python_tutorial.rst")
CALIBRATION = ("calibration_emma.txt", "calibration_python_tutorial.rst")


def read_text(name: str) -> str:
    """Content of a text, by file name."""
    return (files(__name__) / name).read_text(encoding="utf-8")


def read_bytes(name: str) -> bytes:
    """Content of a file that is not text."""
    return (files(__name__) / name).read_bytes()
