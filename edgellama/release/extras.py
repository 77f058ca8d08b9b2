"""Packages of optional extras, imported when a command needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edgellama.errors import MissingDependencyError


@contextmanager
def extra(name: str, *, purpose: str) -> Iterator[None]:
    """Imports in the block are of an extra. Raises MissingDependencyError with the command that installs it.

    purpose: subject of the message, such as "signing".

    >>> with extra("sign", purpose="signing"):
    ...     import json
    """
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs a package that cannot be imported ({error})",
            remedy=f"pip install 'edgellama[{name}]'",
        ) from error
