"""Result of one run of `edgellama demo`, shared by the tests of SmolLM2."""

from __future__ import annotations

from dataclasses import dataclass

from edgellama.bundle import Bundle


@dataclass(frozen=True)
class Demo:
    """The bundle that the command wrote, its standard output, and its peak of resident memory in bytes."""

    bundle: Bundle
    output: str
    peak_bytes: int
