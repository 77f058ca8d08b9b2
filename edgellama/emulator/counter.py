"""A qemu that counts executed instructions, built from Debian's source with its plugin interface.

Debian's static qemu-user has no plugins. The build takes a C compiler and ten minutes of processor time. The
libraries that it needs are unpacked from Debian beside it, so nothing is installed in the system.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

from edgellama.emulator.debian import Apt, run
from edgellama.emulator.installed import Emulator
from edgellama.errors import MissingDependencyError

QEMU, PLUGIN = "qemu/counting/qemu-aarch64", "qemu/counting/instructions.so"
SOURCE = Path(__file__).with_name("instructions.c")
INSTALL = "edgellama emulator install --counter"
_SUITE, _LIBRARY_SUITE = "trixie", "bookworm"
_PROGRAMS = ("cc", "c++", "pkg-config")
_MESON = ("meson==1.5.0", "ninja==1.11.1.1", "distlib", "setuptools", "pycotap")
_LIBRARIES = ("libglib-2.0.so.0", "libgmodule-2.0.so.0", "libpcre2-8.so.0")
_OPTIONS = (
    *("--target-list=aarch64-linux-user", "--disable-system", "--disable-tools", "--disable-docs"),
    *("--enable-plugins", "--disable-download", "--without-default-features", "--enable-tcg"),
    *("--disable-install-blobs", "--extra-ldflags=-Wl,-rpath,$ORIGIN"),
)


def counter(emulator: Emulator) -> tuple[Path, Path]:
    """(qemu, its plugin). Raises MissingDependencyError if they were not built."""
    qemu, plugin = emulator.directory / QEMU, emulator.directory / PLUGIN
    if not qemu.is_file() or not plugin.is_file():
        raise MissingDependencyError(
            f"the Arm emulator in {emulator.directory} cannot count instructions",
            remedy=f"Build its counter with `{INSTALL}`. It takes a C compiler and ten minutes of processor time.",
        )
    return qemu, plugin


def build_counter(emulator: Emulator, work: Path) -> None:
    """Builds qemu with plugins, and the plugin, in the emulator's directory.

    work: an empty directory for the build, 1 GB. Raises MissingDependencyError without a C compiler,
    ResourceError if a download or the build fails.
    """
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        raise MissingDependencyError(
            f"the counter of instructions is compiled here, and {', '.join(missing)} is missing",
            remedy="Install a C and C++ compiler and pkg-config: apt install build-essential pkg-config.",
        )
    build, libraries = work / "build", work / "libraries"
    Apt(work / "apt", "amd64", _LIBRARY_SUITE).unpack(["libglib2.0-dev"], libraries, dependencies=True)
    source = _source(work)
    run([sys.executable, "-m", "venv", str(work / "venv")])
    python = work / "venv/bin/python"
    run([str(python), "-m", "pip", "install", "--quiet", *_MESON])
    build.mkdir()
    here = libraries / "usr/lib/x86_64-linux-gnu"
    environment = {
        **os.environ,
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "PKG_CONFIG_LIBDIR": f"{here / 'pkgconfig'}:{libraries / 'usr/share/pkgconfig'}",
        "PKG_CONFIG_SYSROOT_DIR": str(libraries),
        "LD_LIBRARY_PATH": f"{here}:{libraries / 'lib/x86_64-linux-gnu'}",
        # Libraries of libraries, which the linker does not find through pkg-config.
        "LDFLAGS": f"-Wl,-rpath-link,{here} -Wl,-rpath-link,{libraries / 'lib/x86_64-linux-gnu'}",
    }
    configure = [str(source / "configure"), *_OPTIONS, f"--python={python}"]
    run(configure, environment=environment, directory=build)
    run(["ninja", "qemu-aarch64"], environment=environment, directory=build)
    finished = work / "counting"
    finished.mkdir()
    shutil.copy2(build / "qemu-aarch64", finished)
    run(["cc", "-O2", "-shared", "-fPIC", "-o", str(finished / Path(PLUGIN).name), str(SOURCE)])
    for name in _LIBRARIES:
        file = next(
            path for path in (here / name, libraries / "lib/x86_64-linux-gnu" / name) if path.exists()
        )
        shutil.copy2(file.resolve(), finished / name)
    run([str(finished / "qemu-aarch64"), "--version"])
    destination = (emulator.directory / QEMU).parent
    shutil.rmtree(destination, ignore_errors=True)
    finished.rename(destination)


def _source(work: Path) -> Path:
    """Debian's source of qemu, unpacked."""
    apt = Apt(work / "apt-source", "amd64", _SUITE, source=True)
    archive = apt.download_source("qemu")
    with tarfile.open(archive) as content:
        content.extractall(work / "source", filter="tar")
    (directory,) = (work / "source").iterdir()
    return directory


def counts(messages: bytes) -> list[int]:
    """Instructions of each call, from the plugin's messages: every second one is of a call."""
    found = [int(number) for number in re.findall(rb"^instructions (\d+)$", messages, re.MULTILINE)]
    return found[1::2]
