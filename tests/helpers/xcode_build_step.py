"""The build step of the Xcode project, run with a fake edgellama, and the defaults of its settings."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tests.helpers.swift_sources import DEMO

# Settings of the app that are none of the export.
TRUST = {"EDGELLAMA_PUBLIC_KEY", "EDGELLAMA_VERSION_MAY_NOT_FALL"}


def xcode_defaults() -> dict[str, str]:
    """Settings of Settings.xcconfig by name."""
    text = (DEMO / "Config/Settings.xcconfig").read_text(encoding="utf-8")
    return dict(re.findall(r"^(\w+) =[ ]?(.*)$", text, re.MULTILINE))


class XcodeBuildStep:
    """The build step with a fake edgellama, which writes its arguments to a file."""

    def __init__(self, directory: Path, exit_code: int = 0) -> None:
        self.model, self.arguments = directory / "Model", directory / "arguments"
        self.model.mkdir()
        fake = directory / "edgellama"
        fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{self.arguments}"\nexit {exit_code}\n')
        fake.chmod(0o755)
        self.environment = {
            "PATH": os.environ["PATH"],
            "TARGET_BUILD_DIR": f"{directory}/built products",
            "UNLOCALIZED_RESOURCES_FOLDER_PATH": "EdgeLlama.app",
            **xcode_defaults(),
            "EDGELLAMA_CHECKPOINT": str(self.model),
            "EDGELLAMA": str(fake),
        }

    def run(self) -> subprocess.CompletedProcess[str]:
        """Runs export-model.sh and captures its output. The exit code is not checked."""
        script = DEMO / "Config/export-model.sh"
        return subprocess.run([script], env=self.environment, check=False, capture_output=True, text=True)
