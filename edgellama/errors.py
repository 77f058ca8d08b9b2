"""What can go wrong, as one tree. The library raises; only the command line prints and exits.

EdgellamaError                 exit code
├── InputError                     2   what was given cannot be used
│   ├── UsageError                     options that contradict each other, an unknown name
│   ├── CheckpointError                not a checkpoint, damaged, or not the Llama that we know
│   ├── TokenizerError                 tokenizer files, special tokens, chat template
│   ├── RecipeError                    a recipe that cannot be applied to this model
│   ├── BundleError                    not a bundle, or files that are not what the manifest says
│   ├── ResourceError                  memory or disk that surely do not suffice
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


LONGEST = 1500  # characters of a message; what a hostile file has for a name may be longer


def readable(text: str) -> str:
    """One line for a terminal: escapes for what would move its cursor, and the middle of a very long text left out.

    Messages quote names and values out of files that come from strangers.
    """
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 + 3 :]}"


class EdgellamaError(Exception):
    """The root of the tree: `message` says what and why, `remedy` says what to do about it. Both are `readable`."""

    exit_code = 2

    def __init__(self, message: str, *, remedy: str) -> None:
        self.message, self.remedy = readable(message), readable(remedy)
        super().__init__(self.message)

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


class ResourceError(InputError):
    """Memory or disk that surely do not suffice for what was asked."""


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
