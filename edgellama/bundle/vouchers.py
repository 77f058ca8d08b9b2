"""Vouchers: a note in this machine's cache for every bundle that its exports wrote.

Hashes inside a bundle prove that its files belong together, not that an export made them: anyone can compute
them again after a change. A voucher is named by the hash of the manifest, which has the hashes of all files.
It lies outside the bundle, so a bundle cannot bring its own. Only a bundle with a voucher is up to date, and
only its parts are reused.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from edgellama.bundle.bundle import MANIFEST, Bundle
from edgellama.files import digest, file_sha256, read_json, to_json
from edgellama.host.cache import VARIABLE, cache_directory, touch, trim

SCHEMA, FOLDER = "edgellama.voucher/1", "bundles"
LIMIT = 10**6  # bytes; a voucher has about 200, so about 5,000 bundles


def vouch(bundle: Bundle, key: str) -> None:
    """Notes that an export of this machine wrote `bundle`. Does nothing if the cache is off or read-only.

    key: content key of the bundle (`reports/build.json`).
    """
    file = _file(bundle)
    if file is None:
        return
    content = to_json(_voucher(file, key))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, suffix=".partial", delete=False
        ) as partial:
            partial.write(content)
        Path(partial.name).replace(file)
    except OSError:
        return
    trim(file.parent, file, LIMIT)


def objection(bundle: Bundle, key: str) -> str | None:
    """Reason not to trust `bundle` to be the result of an export; None if this machine has its voucher.

    Files are not read: compare them with the manifest (`Bundle.problems`).

    key: content key of the bundle.
    """
    file = _file(bundle)
    if file is None:
        return f"no export is known to have written it, because the cache is off ({VARIABLE})"
    try:
        # A reader that keeps the first of two equal keys sees another manifest in a text with both.
        same_text = file_sha256(bundle.path / MANIFEST) == file.name
        data = read_json(file) if same_text else None
    except (OSError, ValueError, RecursionError):
        data = None
    if data != _voucher(file, key):
        return "no export on this machine is known to have written it"
    touch(file)
    return None


def _voucher(file: Path, key: str) -> dict[str, str]:
    return {"schema": SCHEMA, "manifest": file.name, "key": key}


def _file(bundle: Bundle) -> Path | None:
    """Place of the bundle's voucher: the hash of its manifest as `write_manifest` writes it."""
    root = cache_directory()
    return None if root is None else root / FOLDER / digest(bundle.manifest)
