"""Compiles, packs and signs android_demo with the tools of tests/helpers/android_tools.py, without Gradle."""

from __future__ import annotations

import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.android_tools import (
    DEMO,
    FRAMEWORK,
    JUNIT,
    LIB,
    STDLIB_DEX,
    TOOLS,
    call,
    d8,
    javac,
    joined,
    kotlinc,
)

MANIFEST = DEMO / "app/src/main/AndroidManifest.xml"
NAMESPACE = "edgellama.app"
APPLICATION = "org.edgellama.demo"


@dataclass(frozen=True)
class Core:
    """Classes of the core and of its tests."""

    classes: Path
    tests: Path

    @property
    def classpath(self) -> str:
        kotlin = [LIB / name for name in ("kotlin-stdlib.jar", "kotlin-test.jar", "kotlin-test-junit.jar")]
        return joined([self.classes, self.tests, *kotlin, *JUNIT])


@dataclass(frozen=True)
class App:
    """Classes of the app, its linked resources, and the stubs that it was compiled against."""

    classes: Path
    resources: Path
    stubs: Path


def build_core(work: Path) -> Core:
    """Compiles the Kotlin core and its tests."""
    core = Core(work / "core", work / "core-tests")
    kotlinc(DEMO / "core/src/main", core.classes)
    test_classpath = [core.classes, LIB / "kotlin-test.jar", LIB / "kotlin-test-junit.jar", JUNIT[0]]
    kotlinc(DEMO / "core/src/test", core.tests, classpath=test_classpath, friends=core.classes)
    return core


def build_app(work: Path, core: Core) -> App:
    """Links the resources of the app and compiles its code against the core."""
    app = App(work / "app", work / "resources.apk", work / "stubs")
    for directory in (app.classes, app.stubs, work / "generated"):
        directory.mkdir()
    android = TOOLS / "android-only.jar"
    javac(DEMO / "stubs", app.stubs, classpath=[android])
    call("aapt2", "compile", "--dir", str(DEMO / "app/src/main/res"), "-o", str(work / "res.zip"))
    manifest = work / "AndroidManifest.xml"
    manifest.write_text(with_package(MANIFEST.read_text(encoding="utf-8")), encoding="utf-8")
    call(
        *("aapt2", "link", "-I", str(FRAMEWORK), "--manifest", str(manifest)),
        *("--java", str(work / "generated"), "--custom-package", NAMESPACE),
        *("--min-sdk-version", "26", "--target-sdk-version", "35"),
        *("--version-code", "1", "--version-name", "0.1.0", "-o", str(app.resources), str(work / "res.zip")),
    )
    javac(work / "generated", app.classes)  # R
    kotlinc(DEMO / "app/src/main", app.classes, classpath=[app.stubs, android, app.classes, core.classes])
    return app


def with_package(manifest: str) -> str:
    """Adds the `package` attribute, which aapt2 needs and Gradle supplies, and writes class names in full."""
    text = manifest.replace("<manifest ", f'<manifest package="{APPLICATION}" ', 1)
    return re.sub(r'android:name="\.(\w+)"', rf'android:name="{NAMESPACE}.\1"', text)


def build_apk(work: Path, core: Core, app: App) -> Path:
    """An APK signed with a throw-away key. It holds no ExecuTorch, so it cannot run a model."""
    classes, dex, apk = work / "classes.jar", work / "dex", work / "demo.apk"
    with zipfile.ZipFile(classes, "w") as jar:
        for root in (app.classes, core.classes):
            for file in sorted(root.rglob("*.class")):
                jar.write(file, file.relative_to(root))
    dex.mkdir()
    d8(dex, [classes], classpath=[app.stubs, LIB / "kotlin-stdlib.jar"])
    unsigned, aligned = work / "unsigned.apk", work / "aligned.apk"
    shutil.copy(app.resources, unsigned)
    with zipfile.ZipFile(unsigned, "a") as archive, zipfile.ZipFile(STDLIB_DEX) as stdlib:
        archive.write(dex / "classes.dex", "classes.dex")
        archive.writestr("classes2.dex", stdlib.read("classes.dex"))
    call("zipalign", "-f", "-p", "4", str(unsigned), str(aligned))
    store = work / "debug.keystore"
    call(
        *("keytool", "-genkeypair", "-keystore", str(store), "-storepass", "android", "-keypass", "android"),
        *("-alias", "debug", "-keyalg", "RSA", "-keysize", "2048", "-validity", "10000"),
        *("-dname", "CN=debug"),
    )
    call(
        "apksigner", "sign", "--ks", str(store), "--ks-pass", "pass:android", "--out", str(apk), str(aligned)
    )
    return apk
