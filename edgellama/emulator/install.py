"""Installation of the Arm emulator into one directory, through apt and pip with their own mirrors.

The directory has qemu of Debian trixie, a user space of Debian bookworm for arm64 with Python 3.11, and the
aarch64 wheels of this environment's torch, ExecuTorch and ONNX Runtime. It appears under its name when a
program has run in it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edgellama.emulator import cuda_stub
from edgellama.emulator.counter import build_counter, counter
from edgellama.emulator.debian import Apt, check_tools, run
from edgellama.emulator.installed import (
    RECORD,
    SCHEMA,
    Emulator,
    find_emulator,
    refuse_other_machines,
)
from edgellama.emulator.processors import PROCESSORS
from edgellama.errors import MissingDependencyError, ResourceError
from edgellama.files import to_json
from edgellama.host.executorch_versions import PROVEN
from edgellama.host.progress import Progress

# The Python of the sysroot, whose ABI the wheels must have.
SYSROOT_SUITE, QEMU_SUITE = "bookworm", "trixie"  # qemu 7.2 of bookworm crashes in `import onnxruntime`
SYSROOT_PACKAGES = ("python3.11", "libpython3.11", "libstdc++6", "binutils")
QEMU_PROGRAM = "usr/bin/qemu-aarch64"
PLATFORMS = (*tuple(f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 26, 17)), "manylinux2014_aarch64")

# Wheels and their versions where this environment has none.
PACKAGES = {
    "torch": "2.13.0",
    "executorch": PROVEN[-1],
    "onnxruntime": "1.32.0",
    "numpy": "2.3.5",
    "filelock": "",
    "flatbuffers": "",
    "fsspec": "",
    "jinja2": "",
    "markupsafe": "",
    "mpmath": "",
    "networkx": "",
    "packaging": "",
    "protobuf": "",
    "pyyaml": "",
    "sympy": "",
    "typing_extensions": "",
}
DISK_BYTES = 3_500_000_000  # free space during the installation

# torch.distributed constructs objects of NCCL's classes when it is imported. Without these names, torch takes
# itself for a build without it.
_DISTRIBUTED = ("_c10d_init", "_rpc_init", "_dist_autograd_init", "_faulty_agent_init")
_WITHOUT_DISTRIBUTED = (
    "import torch._C as _edgellama_C; "
    f"[delattr(_edgellama_C, n) for n in {_DISTRIBUTED!r} if hasattr(_edgellama_C, n)]"
)
# oneDNN reads the processor's name here, and ends the process without it.
_MIDR, _CORTEX_A76 = "sys/devices/system/cpu/cpu{}/regs/identification/midr_el1", "0x00000000414fd0b1\n"
_TRIAL = "import torch, onnxruntime, executorch; print(torch.ones(2).sum().item())"


def install(directory: Path, progress: Progress, *, force: bool = False, counting: bool = False) -> Emulator:
    """Installs the emulator in `directory`, unless it is there with the versions of this environment.

    Args:
        directory: becomes the emulator's directory. Its parent must be on the disk that has the space.
        progress: reporter of stages.
        force: install again in any case.
        counting: also build the qemu that counts instructions, unless it is there.

    Raises UsageError on a machine that cannot emulate, MissingDependencyError without apt, ResourceError if
    a download fails or the disk is too small. After an error, `directory` is unchanged.
    """
    refuse_other_machines()
    emulator = _present(directory, force=force) or _installed(directory, progress)
    if counting:
        try:
            counter(emulator)
        except MissingDependencyError:
            with (
                progress.stage("counter of instructions"),
                tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as work,
            ):
                build_counter(emulator, Path(work))
    return emulator


def _present(directory: Path, *, force: bool) -> Emulator | None:
    try:
        return None if force else find_emulator(directory)
    except MissingDependencyError:
        return None


def _installed(directory: Path, progress: Progress) -> Emulator:
    check_tools()
    directory.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(directory.parent).free
    if free_bytes < DISK_BYTES:
        raise ResourceError(
            f"{free_bytes / 1e9:.1f} GB are free in {directory.parent}; the installation takes {DISK_BYTES / 1e9:.1f} GB",
            remedy="Free some space, or give another directory.",
        )
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
        work, partial = Path(temporary), Path(temporary) / "emulator"
        with progress.stage("qemu"):
            _install_qemu(work, partial)
        with progress.stage("Debian for arm64"):
            _install_sysroot(work, partial)
        with progress.stage("aarch64 wheels"):
            versions = _install_packages(partial)
        with progress.stage("stand-in for CUDA"):
            emulator = Emulator(partial, _qemu_version(partial), versions)
            _replace_cuda(emulator)
            _disable_distributed(partial / "packages/torch/__init__.py")
            _compile(emulator)
        with progress.stage("trial"):
            _try(emulator)
        record = {"schema": SCHEMA, "qemu": emulator.qemu, "versions": dict(versions)}
        (partial / RECORD).write_text(to_json(record), encoding="utf-8")
        _exchange(partial, directory, work / "old")
    return find_emulator(directory)


def _install_qemu(work: Path, partial: Path) -> None:
    unpacked = work / "qemu"
    Apt(work / "apt-qemu", "amd64", QEMU_SUITE).unpack(["qemu-user"], unpacked, dependencies=False)
    (partial / "qemu").mkdir(parents=True)
    shutil.copy2((unpacked / QEMU_PROGRAM).resolve(), partial / "qemu/qemu-aarch64")


def _install_sysroot(work: Path, partial: Path) -> None:
    sysroot = partial / "sysroot"
    Apt(work / "apt-arm64", "arm64", SYSROOT_SUITE).unpack(SYSROOT_PACKAGES, sysroot, dependencies=True)
    for number in range(os.cpu_count() or 1):
        file = sysroot / _MIDR.format(number)
        file.parent.mkdir(parents=True)
        file.write_text(_CORTEX_A76, encoding="ascii")


def _install_packages(partial: Path) -> dict[str, str]:
    """Unpacks the wheels with this environment's pip. Without dependencies: a resolver takes this machine's markers."""
    requirements = [name + (f"=={v}" if (v := _version(name)) else "") for name in PACKAGES]
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"),
            *("--python-version", "3.11", "--implementation", "cp", *platforms),
            *("--no-compile", "--target", str(partial / "packages"), *requirements),
        ]
    )
    names = (re.match(r"(.+?)-(.+?)\.dist-info$", p.name) for p in (partial / "packages").iterdir())
    return {m[1].lower(): m[2] for m in sorted(filter(None, names), key=lambda m: m[1])}


def _version(name: str) -> str:
    """Version of the package in this environment, else the proven one; empty for any version."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return PACKAGES[name]


def _qemu_version(partial: Path) -> str:
    text = run([str(partial / "qemu/qemu-aarch64"), "--version"])
    match = re.search(r"version (\S+)", text)
    return match[1] if match else "unknown"


def _replace_cuda(emulator: Emulator) -> None:
    partial, libraries = emulator.directory, emulator.directory / "packages/torch/lib"
    cuda_stub.remove_cuda(libraries)
    sysroot = partial / "sysroot"
    system = [
        *sysroot.glob("lib/aarch64-linux-gnu/*.so*"),
        *sysroot.glob("usr/lib/aarch64-linux-gnu/*.so*"),
        sysroot / "usr/bin/python3.11",
    ]
    names = cuda_stub.undefined_symbols(emulator, libraries, system)
    source, compiled = partial / "stub.s", partial / "stub.o"
    source.write_text(cuda_stub.assembly(names), encoding="ascii")
    processor = PROCESSORS["max"]
    run(emulator.command(processor, ["as", "-o", compiled, source]))
    standard_library = sysroot / "usr/lib/aarch64-linux-gnu/libstdc++.so.6"
    linked: list[str | Path] = ["-o", libraries / cuda_stub.STUB, compiled, standard_library]
    run(emulator.command(processor, ["ld", "-shared", "-z", "noexecstack", *linked]))
    for name in cuda_stub.REPLACED:
        (libraries / name).symlink_to(cuda_stub.STUB)
    source.unlink()
    compiled.unlink()


def _disable_distributed(file: Path) -> None:
    """Adds a line to torch/__init__.py after each import of all names of torch._C."""
    text = file.read_text(encoding="utf-8")
    changed = re.sub(
        r"^( *)from torch\._C import \*.*$", rf"\g<0>\n\1{_WITHOUT_DISTRIBUTED}", text, flags=re.MULTILINE
    )
    if changed == text:
        raise ResourceError(
            f"{file} has no import of torch._C where one is expected",
            remedy="Install the torch version that edgellama pins, and run the command again.",
        )
    file.write_text(changed, encoding="utf-8")


def _compile(emulator: Emulator) -> None:
    """Compiles the packages to bytecode, by this Python if it is 3.11. Emulated compilation takes minutes.

    Files in the syntax of a newer Python do not compile, and the exit code says so. Nothing imports them.
    """
    arguments = ["-m", "compileall", "-q", "-j", "0", str(emulator.directory / "packages")]
    own = sys.version_info[:2] == (3, 11)
    command = [sys.executable] if own else emulator.command(PROCESSORS["max"], ["python3.11"])
    subprocess.run([*command, *arguments], check=False, capture_output=True)


def _try(emulator: Emulator) -> None:
    """Imports the libraries on an emulated cortex-a76. Raises ResourceError if that fails."""
    run(emulator.command(PROCESSORS["cortex-a76"], ["python3.11", "-c", _TRIAL]))


def _exchange(partial: Path, directory: Path, old: Path) -> None:
    """Moves the finished emulator to its name, and an older one out of the way."""
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
