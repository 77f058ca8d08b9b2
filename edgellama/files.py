"""Files: JSON with equal bytes for equal data, hashes, and reading of untrusted paths."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellama.errors import InputError

MAX_PARTS = 1000  # of one file; more is no model that fits a phone


def to_json(data: Any) -> str:
    """JSON with sorted keys and a final newline: equal data, equal bytes. NaN and infinity become null."""
    text = json.dumps(_finite_or_null(data), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text + "\n"


def _finite_or_null(data: Any) -> Any:
    """Replaces infinity and NaN, which JSON lacks, by None.

    The interval of one window is infinite, and a broken artifact's KL is NaN.
    """
    if isinstance(data, Mapping):
        return {key: _finite_or_null(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite_or_null(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def numbered_parts(path: Path) -> list[Path]:
    """All parts of `NAME-00001-of-00003.gguf`, in order; [path] for any other name. Some may not exist."""
    match = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})(\.\w+)", path.name)
    if match is None or not 1 <= int(match[3]) <= MAX_PARTS:
        return [path]
    return [path.with_name(f"{match[1]}{i:05d}-of-{match[3]}{match[4]}") for i in range(1, int(match[3]) + 1)]


def is_lfs_pointer(data: bytes) -> bool:
    """True for the text that stands in place of a file that Git LFS has not fetched."""
    return data.startswith(b"version https://git-lfs")


def raise_error(error: OSError) -> None:
    """Handler for `os.walk`: raises if a directory cannot be read, instead of skipping it."""
    raise error


def read_json(file: Path) -> Any:
    """Reads JSON.

    Raises ValueError for NaN, infinity and unpaired surrogates, which no other reader would accept.
    """
    return read_json_bytes(file.read_bytes())


def read_json_bytes(content: bytes) -> Any:
    """Reads JSON from the bytes of a file, as `read_json` does."""
    data = json.loads(content.decode("utf-8"), parse_float=_finite_number, parse_constant=_finite_number)
    json.dumps(data, ensure_ascii=False).encode()
    return data


def read_named_json(file: Path, what: str, *, remedy: str) -> Any:
    """Reads the JSON file that the user gave as `what`, such as "report".

    Raises InputError. `remedy` is for a file that is not JSON.
    """
    try:
        return read_json(file)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}", remedy=f"Check the path of the {what}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable as JSON ({error})", remedy=remedy) from error


def _finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8, with escapes for names that are not Unicode."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def is_unicode(text: str) -> bool:
    """False for a text with an unpaired surrogate, which JSON can spell and UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def digest(data: Any) -> str:
    """sha256 of data as sorted JSON."""
    return hashlib.sha256(to_json(data).encode()).hexdigest()


# Suffixes of the files that checkpoint readers open.
_READ = (".json", ".jinja", ".safetensors", ".pth", ".model", ".md")
# Names of files that state the terms of a model: LICENSE, LICENSE.txt, NOTICE, USE_POLICY.md and the like.
_LICENSE = re.compile(r"(licen[cs]e|copying|notice|use[_-]policy)([._-][\w.-]*)?", re.ASCII | re.IGNORECASE)


def is_license_file(name: str) -> bool:
    """True for the name of a licence, a notice or a use policy."""
    return _LICENSE.fullmatch(name) is not None and not name.lower().endswith((".json", ".py", ".gguf"))


def strange_file(path: Path, *, links: bool = True) -> str | None:
    """Reason not to read the file at `path`; None for a plain file, a directory, or a missing file.

    links: allows a link to another file of the same directory, to a file of the same name elsewhere, or into
    the cache of the Hugging Face hub. The cache keeps the files of a model as links. A name that changes could
    make a private file part of a bundle.
    """
    if path.is_symlink():
        try:
            target = path.resolve()
        except (OSError, RuntimeError):
            return "a symbolic link that leads nowhere"
        if not links:
            return "a symbolic link"
        inside = target.is_relative_to(path.parent.resolve())
        if not inside and target.name != path.name and not _is_hub_blob(target):
            return f"a symbolic link out of its directory to a file of another name ({target.name})"
    if path.exists() and not path.is_file() and not path.is_dir():
        return "not a plain file"
    return None


def is_left_by_a_file_manager(file: Path) -> bool:
    """True for the plain files that macOS and Windows put into folders that somebody looks at.

    >>> is_left_by_a_file_manager(Path("model.pte"))
    False
    """
    known = file.name in (".DS_Store", "Thumbs.db", "desktop.ini") or file.name.startswith("._")
    return known and file.is_file() and not file.is_symlink()


def strange_files(directory: Path) -> dict[str, str]:
    """Files of a checkpoint's directory that readers would open but must not: name -> reason."""
    reasons = {
        f.name: strange_file(f)
        for f in sorted(directory.iterdir())
        if f.suffix.lower() in _READ or is_license_file(f.name)
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _is_hub_blob(target: Path) -> bool:
    """True if a path is `models--OWNER--NAME/blobs/HASH`, as in the cache of huggingface_hub."""
    folder = target.parent
    return folder.name == "blobs" and folder.parent.name.startswith("models--")
