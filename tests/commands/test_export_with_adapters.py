"""Exports of a checkpoint with merged adapters: identity, claims, and the gate against the merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST
from edgellama.checkpoints import open_checkpoint
from edgellama.checkpoints.adapters import with_adapters
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.errors import InputError, UsageError
from edgellama.files import to_json
from tests.helpers.adapters import write_adapter
from tests.helpers.paths import TINY
from tests.helpers.tiny_models import write_hf

pytestmark = pytest.mark.slow

OPTIONS = {"recipe": "int4-fast", "context": 64, "max_kl": 1.0, "validation_tokens": 256}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(open_checkpoint(TINY).first_layers(1), tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "ours")


@pytest.fixture(scope="module")
def bundle(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The merged model, exported and validated. Read-only."""
    output = tmp_path_factory.mktemp("bundle") / "b.edgellama"
    return export(base, output, adapters=[adapter], **OPTIONS)  # type: ignore[arg-type]


def test_the_manifest_names_base_and_adapters(bundle: Bundle, base: Path, adapter: Path) -> None:
    merged = with_adapters(open_checkpoint(base), [adapter])
    source = bundle.manifest["source"]
    assert source["sha256"] == merged.sha256() != source["base_sha256"]
    assert source["base_sha256"] == open_checkpoint(base).sha256()
    assert source["adapters"] == [merged.adapters[0].to_dict()]
    assert str(adapter) not in json.dumps(bundle.manifest) and adapter.name not in json.dumps(source)


def test_the_gate_judges_against_the_merged_model(bundle: Bundle, base: Path, adapter: Path) -> None:
    reference = open_checkpoint(base, adapters=[adapter])
    report = validate(bundle, reference=reference, tokens=256, max_kl=1.0)
    assert report.passed and report.quality["kl_mean"] < 0.1


@pytest.mark.parametrize("adapters", [[], ["{}:0.5"], ["{}", "other"]], ids=["none", "half", "one more"])
def test_a_reference_with_other_adapters_is_refused(
    bundle: Bundle, base: Path, adapter: Path, adapters: list[str], tmp_path: Path
) -> None:
    other = write_adapter(tmp_path / "other", seed=9)
    places = [str(other) if place == "other" else place.format(adapter) for place in adapters]
    with pytest.raises(InputError, match="with 1 adapters, and the reference has") as caught:
        validate(bundle, reference=open_checkpoint(base, adapters=places))
    assert "--adapter" in str(caught.value.remedy)


def test_an_export_with_other_adapters_is_another_bundle(bundle: Bundle, base: Path, adapter: Path) -> None:
    for adapters in ([], [f"{adapter}:0.5"]):
        with pytest.raises(UsageError, match="other adapters"):
            export(base, bundle.path, adapters=adapters, **OPTIONS)  # type: ignore[arg-type]


@pytest.mark.parametrize("claimed", ["a weight", "no adapter", "another base"])
def test_the_adapters_of_the_manifest_are_no_claim_of_its_own(
    claimed: str, bundle: Bundle, base: Path, adapter: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "b.edgellama"
    shutil.copytree(bundle.path, copy)
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    source = manifest["source"]
    if claimed == "a weight":
        source["adapters"][0]["weight"] = 0.5
    elif claimed == "no adapter":
        del source["adapters"]
    else:
        source["base_sha256"] = source["sha256"]
    (copy / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    report = validate(copy, reference=open_checkpoint(base, adapters=[adapter]), tokens=256, max_kl=1.0)
    assert {"claims.manifest"} <= {c.name for c in report.checks if c.verdict == "fail"}
