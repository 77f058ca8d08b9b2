"""Tests that both apps open bundles in one place, which asks for the signature when the app has a public key."""

from __future__ import annotations

import plistlib
import re
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.xcode_build_step import TRUST, xcode_defaults

ANDROID = ROOT / "android_demo/app/src/main"
IOS = ROOT / "ios_demo"


@pytest.mark.parametrize(
    ("folder", "suffix", "opened", "place"),
    [
        (ANDROID / "kotlin", "kt", r"\bBundle\.open\(.*", "Bundle.open(directory, trust)"),
        (IOS / "App", "swift", r"\bModelBundle\(.*", "ModelBundle(directory, trust: try trust())"),
    ],
)
def test_bundles_are_opened_with_trust_in_one_place(
    folder: Path, suffix: str, opened: str, place: str
) -> None:
    found = {
        (file.name, match)
        for file in folder.rglob(f"*.{suffix}")
        for match in re.findall(opened, file.read_text(encoding="utf-8"))
    }
    assert found == {(f"Storage.{suffix}", place)}


def test_both_apps_take_any_bundle_until_a_key_is_set() -> None:
    values = (ANDROID / "res/values/trust.xml").read_text(encoding="utf-8")
    assert '<string name="bundle_public_key" translatable="false"></string>' in values
    assert '<bool name="bundle_version_may_not_fall">false</bool>' in values
    settings = xcode_defaults()
    assert {name: settings[name] for name in TRUST} == {
        "EDGELLAMA_PUBLIC_KEY": "",
        "EDGELLAMA_VERSION_MAY_NOT_FALL": "NO",
    }
    info = plistlib.loads((IOS / "Config/Info.plist").read_bytes())
    storage = (IOS / "App/Storage.swift").read_text(encoding="utf-8")
    names = re.findall(r'setting\("(\w+)"\)', storage)
    assert [info[name] for name in names] == ["$(EDGELLAMA_PUBLIC_KEY)", "$(EDGELLAMA_VERSION_MAY_NOT_FALL)"]
