"""Micro-kernels that ran on an emulated processor, read from qemu's log of translated code.

qemu logs every block of instructions once, when it is executed for the first time. Blocks inside the
library are named by its dynamic symbols. Functions without a symbol are known by their products alone.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellama.emulator.debian import run
from edgellama.emulator.installed import Emulator
from edgellama.emulator.processors import PROCESSORS

# Products of int8, and of float32, by their mnemonics.
INTEGER_PRODUCTS = ("sdot", "udot", "usdot", "smmla", "ummla", "usmmla", "smopa", "umopa", "usmopa")
FLOAT_PRODUCTS = ("fmla", "fmopa", "bfmmla", "bfdot")
KERNEL = re.compile(r"^(kai_run_matmul\w*|kai_kernel_matmul\w*|xnn_\w*ukernel\w*)$")
_INSTRUCTION = re.compile(r"^0x([0-9a-f]+):\s+[0-9a-f]{8}\s+([a-z0-9]+)")


@dataclass(frozen=True)
class Kernels:
    """Kernels that ran.

    Attributes:
        names: names of the matrix products' micro-kernels, sorted. Empty for a library without symbols.
        products: number of executed instructions in the code, by mnemonic. Each place counts once.
    """

    names: tuple[str, ...]
    products: dict[str, int]

    @property
    def integer(self) -> tuple[str, ...]:
        """Mnemonics of the products of int8 that ran."""
        return tuple(name for name in INTEGER_PRODUCTS if name in self.products)


def executed_kernels(emulator: Emulator, log: Path, mapped: Sequence[Sequence[Any]]) -> Kernels:
    """Kernels of the library at `mapped` that ran.

    log: qemu's log of translated code. mapped: see `runtimes/emulated_worker.mapped`.
    """
    if not mapped:
        return Kernels((), {})
    base, end = min(part[0] - part[2] for part in mapped), max(part[1] for part in mapped)
    symbols = _functions(emulator, Path(mapped[0][3]))
    starts = [start for start, _, _ in symbols]
    names, products = set(), Counter[str]()
    with log.open(encoding="utf-8", errors="replace") as lines:
        for address, mnemonic in _instructions(lines, base, end):
            if mnemonic in INTEGER_PRODUCTS or mnemonic in FLOAT_PRODUCTS:
                products[mnemonic] += 1
            number = bisect_right(starts, address - base) - 1
            if number >= 0:
                start, size, name = symbols[number]
                if address - base < start + size and KERNEL.match(name):
                    names.add(name)
    return Kernels(tuple(sorted(names)), dict(sorted(products.items())))


def _instructions(lines: Iterable[str], base: int, end: int) -> Iterable[tuple[int, str]]:
    """(address, mnemonic) of the logged instructions in [base, end)."""
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match and base <= (address := int(match[1], 16)) < end:
            yield address, match[2]


def _functions(emulator: Emulator, library: Path) -> list[tuple[int, int, str]]:
    """(start, size, name) of the library's exported functions, sorted."""
    program: list[str | Path] = ["nm", "-D", "--defined-only", "-S", library]
    lines = run(emulator.command(PROCESSORS["max"], program)).splitlines()
    rows = (line.split() for line in lines)
    return sorted((int(w[0], 16), int(w[1], 16), w[3].partition("@")[0]) for w in rows if len(w) == 4)
