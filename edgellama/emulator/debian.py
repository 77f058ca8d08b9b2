"""Packages of Debian, unpacked into a directory: no root, no chroot, no foreign architecture in the system's dpkg.

A private apt with its own lists and an empty status resolves dependencies and checks signatures. `dpkg -x`
unpacks the packages, and nothing is configured.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from edgellama.errors import MissingDependencyError, ResourceError

MIRROR = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_PROGRAMS = ("apt-get", "dpkg")

_CONFIGURATION = """\
Dir::State "{root}";
Dir::State::lists "{root}/lists";
Dir::State::status "{root}/status";
Dir::Cache "{root}";
Dir::Cache::archives "{root}/archives";
Dir::Etc::sourcelist "{root}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::Retries "3";
"""


def check_tools() -> None:
    """Raises MissingDependencyError if apt, dpkg or Debian's keys are missing."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing or not KEYRING.is_file():
        raise MissingDependencyError(
            f"the Arm emulator is made of Debian packages, and {', '.join(missing) or KEYRING} is missing",
            remedy="Use Debian or Ubuntu with `apt install debian-archive-keyring`, or a debian:bookworm container.",
        )


def mirror() -> str:
    """Address of the Debian mirror that this machine uses; MIRROR if it uses none."""
    listed = run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]).split()
    return next((uri for uri in listed if uri.rstrip("/").endswith("/debian")), MIRROR)


class Apt:
    """A private apt for one architecture and one suite, below `root`.

    architecture: Debian's name (`arm64`, `amd64`). suite: Debian's name (`bookworm`). source: list sources too.
    """

    def __init__(self, root: Path, architecture: str, suite: str, *, source: bool = False) -> None:
        self._archives = root / "archives"
        for folder in (root / "lists/partial", self._archives / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
        (root / "status").touch()
        place = f"[signed-by={KEYRING} arch={architecture}] {mirror()} {suite} main\n"
        lines = [f"{kind} {place}" for kind in ("deb", *(["deb-src"] if source else []))]
        (root / "sources.list").write_text("".join(lines), encoding="utf-8")
        configuration = root / "apt.conf"
        content = _CONFIGURATION.format(root=root, architecture=architecture)
        configuration.write_text(content, encoding="utf-8")
        self._environment = {**os.environ, "APT_CONFIG": str(configuration), "LC_ALL": "C"}
        run(["apt-get", "-qq", "update"], environment=self._environment)

    def unpack(self, packages: Sequence[str], destination: Path, *, dependencies: bool) -> None:
        """Downloads packages, and unpacks them below `destination`. dependencies: take those as well."""
        if dependencies:
            command = ["apt-get", "-qq", "-y", "--download-only", "install", *packages]
        else:
            command = ["apt-get", "-qq", "download", *packages]
        run(command, environment=self._environment, directory=self._archives)
        destination.mkdir(parents=True, exist_ok=True)
        for archive in sorted(self._archives.glob("*.deb")):
            run(["dpkg", "-x", str(archive), str(destination)])

    def download_source(self, package: str) -> Path:
        """Downloads the original source of a package, without Debian's changes. Returns its archive."""
        command = ["apt-get", "-qq", "--download-only", "source", package]
        run(command, environment=self._environment, directory=self._archives)
        (archive,) = self._archives.glob("*.orig.tar.*[!c]")
        return archive


def run(
    command: Sequence[str], *, environment: dict[str, str] | None = None, directory: Path | None = None
) -> str:
    """Standard output of a command.

    Raises ResourceError with the end of its messages if it fails. The usual causes are the network and a full disk.
    """
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, cwd=directory
    )
    if done.returncode:
        messages = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise ResourceError(
            f"`{' '.join(command[:4])} …` failed: {' '.join(messages)}",
            remedy="Check the network and the free disk space, and run the command again.",
        )
    return done.stdout
