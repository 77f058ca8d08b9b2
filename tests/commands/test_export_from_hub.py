"""Tests of exports by name: the same bytes from the cache as from a directory, and the licences in the bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.cli.dispatch import main
from edgellama.commands.export import export, forecast
from edgellama.commands.inspect import inspect
from edgellama.errors import CheckpointError, UsageError
from edgellama.host.find_checkpoint import find_checkpoint
from edgellama.runtimes.load import load_reference
from tests.helpers.altered_bundles import Alter, altered, write
from tests.helpers.hub_cache import COMMIT, OTHER, cache_model
from tests.helpers.one_layer_bundle import failures
from tests.helpers.tiny_models import write_hf

pytestmark = pytest.mark.slow

TERMS = {"LICENSE": b"terms\n", "USE_POLICY.md": b"policy\n"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module", autouse=True)
def own_cache(home: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(home / "cache"))
        yield


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Checkpoint, home: Path, own_cache: None) -> Path:
    """A directory, and the same files in the cache as org/tiny."""
    folder = write_hf(tiny_checkpoint.first_layers(1), home / "plain")
    for name, content in TERMS.items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    cache_model("org/tiny", {f.name: f.read_bytes() for f in folder.iterdir()})
    return folder


def exported(checkpoint: str | Path, directory: Path) -> Bundle:
    directory.mkdir(exist_ok=True)
    return export(
        checkpoint,
        directory / "x.edgellama",
        recipe="int4-fast",
        targets=["xnnpack", "onnx"],
        context=32,
        validation_tokens=256,
    )


@pytest.fixture(scope="module")
def bundles(plain: Path, home: Path) -> tuple[Bundle, Bundle]:
    """The bundle of the directory, and the bundle of the name."""
    return exported(plain, home / "a"), exported("org/tiny", home / "b")


def test_only_the_manifest_knows_the_place(bundles: tuple[Bundle, Bundle]) -> None:
    manifests = [json.loads((bundle.path / MANIFEST).read_text()) for bundle in bundles]
    assert manifests[1]["source"].pop("hub") == {"repository": "org/tiny", "revision": COMMIT}
    assert manifests[0] == manifests[1], "all other files have equal hashes"


def test_licences_are_in_the_bundle(bundles: tuple[Bundle, Bundle]) -> None:
    for bundle in bundles:
        for name, content in TERMS.items():
            assert (bundle.path / "licenses" / name).read_bytes() == content
        assert bundle.manifest["source"]["license"] == "llama3.2"
        assert {f"licenses/{name}" for name in TERMS} <= bundle.manifest["files"].keys()


def test_either_is_valid_against_either(bundles: tuple[Bundle, Bundle], plain: Path) -> None:
    for bundle in bundles:
        for reference in (plain, "org/tiny"):
            assert failures(bundle, open_checkpoint(reference)) == {}
        assert failures(bundle, None) == {}


@pytest.mark.parametrize(
    ("alter", "check", "detail"),
    [
        (write("licenses/LICENSE", "other"), "structure.licenses", "LICENSE differs"),
        (lambda copy: (copy / "licenses/USE_POLICY.md").unlink(), "structure.licenses", "is missing"),
        (write("licenses/NOTICE", ""), "structure.licenses", "NOTICE is not expected"),
        (write("licenses/run.sh", ""), "structure.layout", "licenses/run.sh belongs to no part"),
    ],
    ids=["other terms", "a lost policy", "an invented notice", "a script among the licences"],
)  # fmt: skip
def test_a_fault(
    alter: Alter, check: str, detail: str, bundles: tuple[Bundle, Bundle], plain: Path, tmp_path: Path
) -> None:
    found = failures(altered(bundles[1], tmp_path, alter), open_checkpoint(plain))
    assert detail in found.get(check, ""), found
    assert set(found) <= {check, "structure.licenses"}, "nothing else finds it"


def test_another_place_is_another_bundle(bundles: tuple[Bundle, Bundle]) -> None:
    with pytest.raises(UsageError, match="other repository or revision of the checkpoint"):
        exported("org/tiny", bundles[0].path.parent)


def test_other_verbs_take_names(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_reference("org/tiny", 32).context_length == 32
    data = inspect("org/tiny")
    assert data["hub"] == {"repository": "org/tiny", "revision": COMMIT}
    assert data["license_files"] == sorted(TERMS) and data["license"] == "llama3.2"
    assert forecast("org/tiny", recipe="int4-fast", context=32)["artifacts"][0]["bytes"] > 0
    assert main(["inspect", "org/none"]) == 2
    assert "add --download" in capsys.readouterr().err


def test_a_model_without_weights_is_described(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`inspect` and `export --plan` give the same figures without the weights."""
    files = {f.name: f.read_bytes() for f in plain.iterdir() if f.suffix != ".safetensors"}
    cache_model("org/outline", files, commit=OTHER)
    outline, whole = inspect("org/outline"), inspect("org/tiny")
    assert (outline["parameters"], outline["files"]) == (whole["parameters"], [])
    assert any("the weights are not here" in note for note in outline["notes"])
    plan = ["export", "org/outline", "--plan", "-r", "int4-fast", "--context", "32", "--json", "-"]
    assert main(plan) == 0
    bytes_planned = json.loads(capsys.readouterr().out)["artifacts"][0]["bytes"]
    assert bytes_planned == forecast(plain, recipe="int4-fast", context=32)["artifacts"][0]["bytes"]
    assert main([word for word in plan if word != "--plan"] + ["-o", "x"]) == 2
    assert "its weights are not there" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        open_checkpoint(find_checkpoint("org/outline", weights=False), weights=False).tensor(
            "model.norm.weight"
        )
