"""Families of processors: those on which the kernels of a target round an artifact alike."""

from __future__ import annotations

from dataclasses import dataclass

# Kinds of processors by the instructions that choose a kernel. Apps name theirs so.
X86 = "x86-64"
ARM_DOTPROD = "arm64-dotprod"  # Arm with products of int8 (FEAT_DotProd)
ARM = "arm64"  # Arm without them
PROCESSORS = (X86, ARM_DOTPROD, ARM)


@dataclass(frozen=True)
class Family:
    """Processors on which an artifact is rounded alike.

    Attributes:
        name: of the rounding, such as `per-block`. Golden vectors and device logs write it.
        processors: members of PROCESSORS.
    """

    name: str
    processors: tuple[str, ...]
