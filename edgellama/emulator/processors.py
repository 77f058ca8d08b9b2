"""Arm processors by the names that qemu gives them, with the instructions that choose a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from edgellama.errors import UsageError, did_you_mean

ARCHITECTURE = "arm64"
DEFAULT = "cortex-a76"


@dataclass(frozen=True)
class Processor:
    """An Arm processor.

    Attributes:
        name: qemu's name of it.
        products: instruction sets for products of int8, from the oldest: `dotprod`, `i8mm`, `sme`.
        atomics: it has the atomic instructions of Armv8.1 (LSE).
        phones: examples of phones, for people.
    """

    name: str
    products: tuple[str, ...]
    atomics: bool
    phones: str

    @property
    def label(self) -> str:
        """The processor with its newest instruction set, for people."""
        return f"{self.name} ({self.products[-1] if self.products else 'no dotprod'})"


PROCESSORS = {
    processor.name: processor
    for processor in (
        Processor("cortex-a53", (), False, "low-cost phones of 2014 to 2021"),
        Processor("cortex-a55", ("dotprod",), True, "the small cores of most phones since 2018"),
        Processor("cortex-a76", ("dotprod",), True, "Pixel 5, Galaxy S10, Kirin 980"),
        Processor("cortex-a710", ("dotprod", "i8mm"), True, "Snapdragon 8 Gen 1, Pixel 8's middle cores"),
        Processor("neoverse-n1", ("dotprod",), True, "servers: the cortex-a76 of Graviton 2"),
        Processor("neoverse-v1", ("dotprod", "i8mm"), True, "servers: the cortex-x1 with i8mm and SVE"),
        Processor("max", ("dotprod", "i8mm", "sme"), True, "none: everything that qemu knows, with SME"),
    )
}


def find_processor(specification: str) -> Processor:
    """The processor of `arm64` or `arm64:NAME`, as the command line takes it.

    Raises UsageError for another architecture or an unknown processor.

    >>> find_processor("arm64").name, find_processor("arm64:neoverse-v1").products
    ('cortex-a76', ('dotprod', 'i8mm'))
    """
    architecture, _, name = specification.partition(":")
    if architecture != ARCHITECTURE:
        raise UsageError(
            f"{specification!r} is not a processor that can be emulated",
            remedy=f"Write {ARCHITECTURE} or {ARCHITECTURE}:NAME, for example {ARCHITECTURE}:{DEFAULT}.",
        )
    if (name or DEFAULT) not in PROCESSORS:
        raise UsageError(
            f"no processor {name!r}",
            remedy=f"{did_you_mean(name, PROCESSORS)}Known are {', '.join(PROCESSORS)}.",
        )
    return PROCESSORS[name or DEFAULT]
