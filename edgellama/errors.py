"""Errors as one tree of classes. The library raises; only the command line prints and exits.

Classes with their exit code, which subclasses inherit:

EdgellamaError, 2: root of the tree
    InputError: input that cannot be used
        UsageError: options that contradict each other, or an unknown name
        CheckpointError: not a checkpoint, damaged, or not the supported Llama architecture
        TokenizerError: tokenizer files, special tokens, chat template
        RecipeError: malformed recipe, or one that cannot be applied to this model
        BundleError: not a bundle, or files that differ from the manifest
        ResourceError: memory or disk that certainly do not suffice
        TextError: calibration or evaluation text
    MissingDependencyError: optional package that is not installed
    ContextLengthError: more tokens than the context holds
    CheckFailed, 1: everything ran, and the result is not good enough to ship
        LoweringError: lowered file that does not follow the recipe
        SignatureError: bundle that its owner did not sign like this
        Inconclusive, 3: the interval straddles the limit, and the text ran out
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Start of a remedy for an unknown name: the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}? " if close else ""


LONGEST = 1500  # characters of a message; a name in a hostile file may be longer


def readable(text: str) -> str:
    """One line for a terminal: unprintable characters are escaped, and a very long text loses its middle.

    Messages quote names and values from untrusted files, which could move the cursor.
    """
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 + 3 :]}"


class EdgellamaError(Exception):
    """Root of the tree: `message` gives problem and cause, `remedy` the action. Both are `readable`."""

    exit_code = 2

    def __init__(self, message: str, *, remedy: str) -> None:
        self.message, self.remedy = readable(message), readable(remedy)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\n  {self.remedy}"


class InputError(EdgellamaError):
    """Input that cannot be used."""


class UsageError(InputError):
    """Options that contradict each other, or a name that does not exist."""


class CheckpointError(InputError):
    """Not a checkpoint, a damaged one, or not the Llama architecture that edgellama supports."""


class TokenizerError(InputError):
    """Tokenizer files, special tokens or a chat template that cannot be used."""


class RecipeError(InputError):
    """A recipe that is malformed or cannot be applied to this model."""


class BundleError(InputError):
    """Not a bundle, or files in it that differ from its manifest."""


class ResourceError(InputError):
    """Memory or disk that certainly do not suffice for the request."""


class TextError(InputError):
    """Calibration or evaluation text that cannot be used."""


class MissingDependencyError(EdgellamaError):
    """Optional package that is needed and not installed."""


class ContextLengthError(EdgellamaError):
    """More tokens than the context holds."""


class CheckFailed(EdgellamaError):
    """Result that is not good enough to ship, although everything ran."""

    exit_code = 1


class LoweringError(CheckFailed):
    """Lowered file that does not follow the recipe."""


class SignatureError(CheckFailed):
    """Bundle without the signature that was asked for, or altered after it was signed."""


class Inconclusive(CheckFailed):
    """Interval that still straddles the limit after all text was used."""

    exit_code = 3
