"""Licences of a checkpoint: the name in its model card, and the files with its terms."""

from __future__ import annotations

import re
from pathlib import Path

from edgellama.files import is_license_file, strange_file

MAX_BYTES = 2**20  # of one file; the terms of Llama have 8 kB, a notice of many parts some 100 kB
MAX_FILES = 16


def card_license(readme: Path) -> str | None:
    """License in the front matter of a model card, or None."""
    if not readme.is_file():
        return None
    front_matter = re.match(
        r"\s*---\s*\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL
    )
    licenses = (
        dict(re.findall(r"^(license|license_name):[ \t]*[\"']?([^\s\"'#]+)", front_matter[1], re.MULTILINE))
        if front_matter
        else {}
    )
    name: str | None = licenses.get("license")
    return licenses.get("license_name", name) if name == "other" else name


def license_files(path: Path) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Files with the terms of the checkpoint at `path`: content by name, and notes about those left out.

    They lie in the checkpoint's directory, or beside its file.
    """
    directory = path if path.is_dir() else path.parent
    files: dict[str, bytes] = {}
    notes = []
    for file in sorted(f for f in directory.iterdir() if is_license_file(f.name)):
        reason = strange_file(file)
        if reason is None and not file.is_file():
            continue  # a folder of that name
        if reason is None and file.stat().st_size > MAX_BYTES:
            reason = f"larger than {MAX_BYTES} bytes"
        if reason is None and len(files) == MAX_FILES:
            reason = f"one of more than {MAX_FILES} such files"
        if reason is None:
            files[file.name] = file.read_bytes()
        else:
            notes.append(f"{file.name} is {reason}: it is not copied into a bundle")
    return files, tuple(notes)
