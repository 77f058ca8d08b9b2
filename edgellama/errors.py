"""What can go wrong, as one tree. The library raises; only the command line prints and exits.

EdgellamaError                 exit code
├── InputError                     2   what was given cannot be used
│   ├── UsageError                     options that contradict each other, an unknown name
│   ├── CheckpointError                not a checkpoint, damaged, or not the Llama that we know
│   ├── TokenizerError                 tokenizer files, special tokens, chat template
│   ├── RecipeError                    a recipe that cannot be applied to this model
│   ├── BundleError                    not a bundle, or files that are not what the manifest says
│   └── TextError                      calibration or evaluation text
├── MissingDependencyError         2   an optional package is not installed
├── ContextLengthError             2   more tokens than the context holds
└── CheckFailed                    1   everything ran, and the result is not good enough to ship
    ├── LoweringError                  the lowered file is not what the recipe asked for
    └── Inconclusive               3   the interval straddles the limit, and the text ran out
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The start of a remedy for an unknown name: the known one that is closest, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}? " if close else ""


class EdgellamaError(Exception):
    """The root of the tree: `message` says what and why, `remedy` says what to do about it."""

    exit_code = 2

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  {self.remedy}"


class InputError(EdgellamaError):
    """What was given cannot be used."""


class UsageError(InputError):
    """Options that contradict each other, or a name that does not exist."""


class CheckpointError(InputError):
    """Not a checkpoint, a damaged one, or not the Llama architecture that edgellama knows."""


class TokenizerError(InputError):
    """Tokenizer files, special tokens or a chat template that cannot be used."""


class RecipeError(InputError):
    """A recipe that is malformed or cannot be applied to this model."""


class BundleError(InputError):
    """Not a bundle, or files in it that are not what its manifest says."""


class TextError(InputError):
    """Calibration or evaluation text that cannot be used."""


class MissingDependencyError(EdgellamaError):
    """An optional package is needed and not installed."""


class ContextLengthError(EdgellamaError):
    """More tokens than the context holds."""


class CheckFailed(EdgellamaError):
    """Everything ran, and the result is not good enough to ship."""

    exit_code = 1


class LoweringError(CheckFailed):
    """The lowered file is not what the recipe asked for."""


class Inconclusive(CheckFailed):
    """The interval straddles the limit, and the text ran out."""

    exit_code = 3
