"""Tests of licences: what a checkpoint brings along, and links, which could bring private files along."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgellama.bundle.record import checkpoint_files
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.licenses import MAX_BYTES, card_license
from edgellama.errors import CheckpointError
from edgellama.files import is_license_file
from tests.helpers.paths import TINY

TERMS = {"LICENSE": b"terms", "Notice.txt": b"notice", "USE_POLICY.md": b"policy", "LICENSE-llama3.txt": b"3"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = shutil.copytree(TINY, tmp_path / "model")
    for name, content in TERMS.items():
        (folder / name).write_bytes(content)
    return folder


def test_names_of_licences() -> None:
    assert all(map(is_license_file, (*TERMS, "LICENCE.rst", "COPYING", "license", "use-policy.txt")))
    others = ("README.md", "licensed.txt", "license.json", "NOTICEBOARD", "my-LICENSE", "LICENSE\n")
    assert not any(map(is_license_file, others))


def test_licences_are_read_and_recorded(model: Path, tiny_checkpoint: Checkpoint) -> None:
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.2\n---\n")
    checkpoint = open_checkpoint(model)
    assert checkpoint.license_files == TERMS and checkpoint.license == "llama3.2"
    assert set(TERMS) <= checkpoint_files(model).keys()
    assert checkpoint.sha256() == tiny_checkpoint.sha256() and checkpoint.hub is None
    assert checkpoint.first_layers(1).license_files == TERMS


def test_a_card_without_a_licence(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A model\nlicense: mit\n")
    assert card_license(tmp_path / "README.md") is None and card_license(tmp_path / "none") is None


def test_what_is_no_licence_is_left_out_with_a_note(model: Path) -> None:
    (model / "LICENSE").write_bytes(b"x" * (MAX_BYTES + 1))
    (model / "license.d").mkdir()
    checkpoint = open_checkpoint(model)
    assert sorted(checkpoint.license_files) == ["LICENSE-llama3.txt", "Notice.txt", "USE_POLICY.md"]
    assert [n for n in checkpoint.notes if "LICENSE" in n] == [
        f"LICENSE is larger than {MAX_BYTES} bytes: it is not copied into a bundle"
    ]


@pytest.mark.parametrize("name", ["LICENSE", "chat_template.jinja"])
def test_a_link_brings_no_private_file_along(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("secret")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "id_rsa")
    with pytest.raises(CheckpointError, match=f"{name} is a symbolic link out of its directory"):
        open_checkpoint(model)


def test_a_directory_of_links_is_the_directory_of_the_files(model: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for file in model.iterdir():
        (links / file.name).symlink_to(file)
    assert open_checkpoint(links).license_files == TERMS
    assert checkpoint_files(links) == checkpoint_files(model)
