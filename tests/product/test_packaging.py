"""The directory mapping and the data in pyproject.toml, checked against the directories themselves."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import edgellama
from edgellama import data
from edgellama.host.executorch_versions import PROVEN
from tests.helpers.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def package_directories() -> dict[str, Path]:
    """Directory of each package, by dotted name; edgellama/export and edgellama/runtimes are links to two of them."""
    directories = {}
    for package, directory in SETUPTOOLS["package-dir"].items():
        base = ROOT / directory
        for init in base.rglob("__init__.py"):
            parts = init.parent.relative_to(base).parts
            if not (parts and (base / parts[0]).is_symlink()):
                directories[".".join((package, *parts))] = init.parent
    return directories


def test_every_package_is_listed() -> None:
    """An unlisted subpackage would be missing from the wheel without a warning."""
    assert set(package_directories()) == set(SETUPTOOLS["packages"])


def test_every_data_file_is_listed() -> None:
    for package, base in package_directories().items():
        listed = {f for pattern in SETUPTOOLS["package-data"].get(package, ()) for f in base.glob(pattern)}
        files = {
            f
            for f in base.iterdir()
            if f.is_file() and f.suffix not in (".py", ".pyc") and f.name != "README.md"
        }
        assert files == listed, package


@pytest.mark.parametrize("name", ["export", "runtimes"])
def test_checkout_symlink(name: str) -> None:
    link = ROOT / "edgellama" / name
    assert link.is_dir(), f"{link} is not a symlink: git config core.symlinks true, then check out again"
    assert link.samefile(ROOT / name)


@pytest.mark.parametrize(
    "module", ["edgellama", "edgellama.cli", "edgellama.model.config", "edgellama.recipe"]
)
def test_import_does_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
def test_public_names_exist() -> None:
    """In a process that has imported nothing else: a name must not depend on another test's imports."""
    code = (
        "import edgellama as e; e.validate; [getattr(e, n) for n in e.__all__]; assert callable(e.validate)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError):
        _ = edgellama.nonsense


def test_the_texts_are_in_the_package() -> None:
    for name in (*data.EVALUATION, *data.CALIBRATION):
        assert len(data.read_text(name)) > 50_000
        assert name in data.read_text("NOTICE")


def test_the_script_and_the_version_are_those_of_the_package() -> None:
    assert PROJECT["project"]["scripts"] == {"edgellama": "edgellama.cli:main"}
    assert PROJECT["project"]["version"] == edgellama.__version__


def test_versions_that_were_tested_together_are_pinned() -> None:
    dependencies = PROJECT["project"]["dependencies"]
    pins = {d for d in dependencies if "==" in d}
    assert pins == {"torch==2.13.0", "torchao==0.18.0", "coremltools==9.0"}
    assert f"executorch>={PROVEN[0]},<={PROVEN[-1]}" in dependencies
