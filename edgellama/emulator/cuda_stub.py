"""Stand-in for CUDA's libraries, without which PyPI's torch for aarch64 cannot be loaded.

That torch is a CUDA build, and its libraries are gigabytes that no processor here could use. One library
replaces them all. Its functions return 0 ("no device"), and its types have names. None of them is called.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from edgellama.emulator.debian import run
from edgellama.emulator.installed import Emulator
from edgellama.emulator.processors import PROCESSORS

STUB = "libtorch_cuda.so"
# The libraries that torch 2.13.0's own ones name as needed.
REPLACED = (
    "libc10_cuda.so",
    "libcudart.so.13",
    "libcupti.so.13",
    "libcudnn.so.9",
    "libcufile.so.0",
    "libnccl.so.2",
)
_CUDA = ("_cuda", "nvshmem", "nvrtc")  # in the names of torch's own CUDA libraries

# A function that returns a reference must return the address of something.
_HEAD = [
    *(".text", "nothing: mov x0, #0", "ret"),
    *("somewhere: adrp x0, room", "add x0, x0, :lo12:room", "ret"),
]
_DATA = [".data", ".balign 8", "room: .zero 64"]


def remove_cuda(torch_libraries: Path) -> None:
    """Removes torch's CUDA libraries, 700 MB, from the directory of its libraries."""
    for file in torch_libraries.glob("*.so*"):
        if file.is_symlink() or any(part in file.name for part in _CUDA):
            file.unlink()


def undefined_symbols(emulator: Emulator, torch_libraries: Path, system: Iterable[Path]) -> list[str]:
    """Names that torch's libraries need and that neither they nor the files of `system` define, sorted."""
    own = [file for file in torch_libraries.glob("*.so*") if file.is_file()]
    listed = {file: _symbols(emulator, file) for file in (*own, *system) if file.is_file()}
    needed = {name for file in own for kind, name in listed[file] if kind == "U"}
    defined = {name for symbols in listed.values() for kind, name in symbols if kind not in "Uw"}
    return sorted(needed - defined)


def assembly(names: Iterable[str]) -> str:
    """Source of the library for GNU as: a function or an object for each name."""
    text, data = list(_HEAD), list(_DATA)
    for number, name in enumerate(names):
        if name.startswith("_ZTI"):  # std::type_info of a class without bases
            data += _declaration(name, "object")
            data += [".balign 8", f"{name}: .quad _ZTVN10__cxxabiv117__class_type_infoE + 16, name{number}"]
            data += [f".size {name}, 16", f'name{number}: .asciz "{name[4:]}"']
        elif name.startswith(("_ZTV", "_ZTS")) or name.endswith("allocatorE"):
            data += [*_declaration(name, "object"), ".balign 8", f"{name}: .zero 512", f".size {name}, 512"]
        else:
            target = "somewhere" if "get_gil_checker" in name else "nothing"
            text += [*_declaration(name, "function"), f"{name}: b {target}"]
    return "\n".join([*text, *data, ""])


def _declaration(name: str, kind: str) -> list[str]:
    return [f".globl {name}", f".type {name}, %{kind}"]


def _symbols(emulator: Emulator, file: Path) -> list[tuple[str, str]]:
    """(kind, name) of each dynamic symbol, without its version."""
    lines = run(emulator.command(PROCESSORS["max"], ["nm", "-D", file])).splitlines()
    parts = (re.split(r"\s+", line.strip()) for line in lines if line.strip())
    return [(words[-2], words[-1].partition("@")[0]) for words in parts if len(words) > 1]
