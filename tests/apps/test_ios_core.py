"""Tests of ios_demo with a Swift compiler: tests of the core, and type checks of the app.

Apple's frameworks exist on Apple's systems only. Elsewhere tests/apps/ios_stubs declares the calls of Core ML, CryptoKit and
ExecuTorch, so that names and types are checked. SwiftUI views are parsed only (test_ios_sources).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgellama.bundle import Bundle
from edgellama.bundle.golden import read_golden
from edgellama.gate.challenge import read_response
from edgellama.gate.device import judge, read_device_logs
from tests.helpers.paths import ROOT, VECTORS
from tests.helpers.swift_sources import CORE, DEMO

pytestmark = pytest.mark.skipif(shutil.which("swift") is None, reason="no Swift toolchain on the PATH")
STUBS = ROOT / "tests/apps/ios_stubs"
STRICT = ["-swift-version", "5", "-strict-concurrency=complete", "-parse-as-library"]


def call(*arguments: str, **environment: str) -> str:
    """Standard output and error of a command that must succeed."""
    done = subprocess.run(
        arguments, cwd=ROOT, env={**os.environ, **environment}, check=False, capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


def test_the_core_passes_its_tests_and_its_log_is_accepted(tmp_path: Path, tiny_bundle: Bundle) -> None:
    log, response = tmp_path / "device.json", tmp_path / "response.json"
    output = call(
        *("swift", "test", "--package-path", str(DEMO / "EdgeLlamaCore")),
        *("--scratch-path", str(tmp_path / "build")),
        EDGELLAMA_DEVICE_LOG=str(log),
        EDGELLAMA_RESPONSE=str(response),
        EDGELLAMA_BUNDLE=str(tiny_bundle.path),
    )
    assert "with 0 failures" in output and "warning: " not in output and "skipped" not in output, output
    bundle = Bundle.open(VECTORS / "bundle")
    (read,) = read_device_logs([log], ["xnnpack"])
    assert {c.verdict for c in judge(bundle, read_golden(bundle), read)} == {"pass"}
    assert len(read_response(response)["sequences"]) == 6


@pytest.mark.skipif(sys.platform == "darwin", reason="Xcode has the frameworks themselves")
def test_the_runtimes_and_screens_have_the_right_types(tmp_path: Path) -> None:
    for name in ("CoreML", "CryptoKit", "ExecuTorch"):
        module = str(tmp_path / f"{name}.swiftmodule")
        emit = ("swiftc", "-parse-as-library", "-emit-module", "-module-name", name)
        call(*emit, str(STUBS / f"{name}.swift"), "-o", module)
    core = [str(path) for path in sorted(CORE.glob("*.swift"))]
    module = str(tmp_path / "EdgeLlamaCore.swiftmodule")
    search_path = ["-I", str(tmp_path)]
    emit_core = ("-warnings-as-errors", "-emit-module", "-module-name", "EdgeLlamaCore")
    call("swiftc", *STRICT, *emit_core, *search_path, *core, "-o", module)
    app = [
        str(path)
        for path in sorted((DEMO / "App").rglob("*.swift"))
        if "import SwiftUI" not in path.read_text(encoding="utf-8")
    ]
    assert len(app) > 8
    check_types = ("-warnings-as-errors", "-typecheck", "-module-name", "EdgeLlama")
    call("swiftc", *STRICT, *check_types, *search_path, *app)
