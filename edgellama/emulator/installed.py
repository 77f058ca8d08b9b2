"""The installed emulator: its directory, its versions, and the command that starts a program in it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellama.emulator.processors import Processor
from edgellama.errors import MissingDependencyError, UsageError
from edgellama.files import read_json
from edgellama.host.cache import user_caches
from edgellama.host.versions import installed_versions

VARIABLE = "EDGELLAMA_EMULATOR"
RECORD = "installed.json"
SCHEMA = "edgellama.emulator/1"
INSTALL = "edgellama emulator install"

# Distributions of which Arm and this machine must have the same version: they decide the numbers.
DECIDING = ("torch", "executorch", "onnxruntime")


@dataclass(frozen=True)
class Emulator:
    """An emulator on disk.

    Attributes:
        directory: has `qemu/`, `sysroot/` (Debian for arm64) and `packages/` (aarch64 wheels).
        qemu: version of qemu.
        versions: versions of the aarch64 packages, by name.
    """

    directory: Path
    qemu: str
    versions: Mapping[str, str]

    @property
    def summary(self) -> str:
        """One line for people: versions of qemu and of the packages that decide the numbers."""
        versions = (f"{name} {self.versions[name]}" for name in DECIDING)
        return ", ".join((f"qemu {self.qemu}", *versions))

    def command(
        self,
        processor: Processor,
        program: Sequence[str | Path],
        *,
        options: Sequence[str] = (),
        qemu: Path | None = None,
    ) -> list[str]:
        """The command that runs a program of the sysroot on `processor`.

        program: name of the program in the sysroot's /usr/bin, and its arguments. options: qemu's own. qemu: None
        for the emulator's ordinary one.
        """
        name, *arguments = map(str, program)
        return [
            str(qemu or self.directory / "qemu" / "qemu-aarch64"),
            *("-cpu", processor.name, "-L", str(self.directory / "sysroot")),
            *("-E", f"PYTHONPATH={self.directory / 'packages'}", "-E", "PYTHONDONTWRITEBYTECODE=1"),
            *("-E", "ORT_DISABLE_TELEMETRY=1", "-U", "LD_LIBRARY_PATH", "-U", "PYTHONHOME"),
            *options,
            str(self.directory / "sysroot/usr/bin" / name),
            *arguments,
        ]


def default_directory() -> Path:
    """Directory of the emulator: $EDGELLAMA_EMULATOR, or a folder of edgellama's in the user's cache."""
    setting = os.environ.get(VARIABLE)
    if setting:
        return Path(setting)
    return user_caches() / "edgellama-emulator"


def refuse_other_machines() -> None:
    """Raises UsageError unless this machine is x86-64 Linux."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise UsageError(
            f"Arm is emulated on x86-64 Linux only; this is {platform.system()} on {platform.machine()}",
            remedy="On an Arm machine, `edgellama validate` runs the real kernels without emulation.",
        )


def find_emulator(directory: Path | None = None) -> Emulator:
    """The installed emulator.

    directory: None for `default_directory()`. Raises UsageError on a machine that cannot emulate,
    MissingDependencyError if no emulator is installed or its packages have other versions than this machine's.
    """
    refuse_other_machines()
    directory = directory or default_directory()
    try:
        record: dict[str, Any] = read_json(directory / RECORD)
    except (OSError, ValueError):
        record = {}
    if record.get("schema") != SCHEMA:
        raise MissingDependencyError(
            f"no Arm emulator in {directory}",
            remedy=f"Install it with `{INSTALL}`; it downloads 0.6 GB and takes about 1.5 GB of disk.",
        )
    versions, here = record["versions"], installed_versions(DECIDING)
    differing = [f"{n} {versions[n]}" for n, v in here.items() if v is not None and versions.get(n, v) != v]
    if differing:
        raise MissingDependencyError(
            f"the Arm emulator in {directory} has {', '.join(differing)}; this machine has other versions",
            remedy=f"Install it again with `{INSTALL} --force`.",
        )
    return Emulator(directory, record["qemu"], versions)
