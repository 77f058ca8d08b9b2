"""Copies: files of a bundle that are copied or computed from the checkpoint, compared byte for byte.

Text reaches neither every merge nor every rule of a tokenizer, and a template has branches that no probe
meets. Bytes leave nothing to reach. Without a checkpoint, the copies are compared with the bundle's own
tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST
from edgellama.checkpoints import Checkpoint
from edgellama.export.lower import client_files
from edgellama.export.manifest import LICENSES, NO_CHAT, chat_section
from edgellama.files import is_license_file
from edgellama.gate.differences import claim, differences
from edgellama.gate.own_tokenizer import check_entries
from edgellama.gate.subject import Section
from edgellama.model.llama import Llama
from edgellama.report import Check
from edgellama.targets import Target, find_target
from edgellama.text.tokenizer import SHIPPED, Tokenizer

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
# Folders of which every file is read by edgellama alone. Nothing in them changes an app's behaviour.
OWN_FOLDERS = ("golden/", "reports/")
# Parts of tokenizer.json whose names say less than these words.
PARTS = {"model": "vocabulary or merges", "added_tokens": "added tokens"}


def examine_copies(bundle: Bundle, target: Target, model: Llama, tokenizer: Tokenizer | None) -> Section:
    """Checks the tokenizer's files, the chat section and the files beside `target`'s artifact.

    Args:
        bundle: the bundle, its hashes verified.
        target: the examined target.
        model: a model of the artifact's shape. Its weights are not read.
        tokenizer: the checkpoint's; None without a checkpoint.
    """
    checks = []
    if tokenizer is not None:
        actual = _contents(bundle, "tokenizer")
        checks = [check_tokenizer(actual, tokenizer.files), check_tokenizer_files(actual, tokenizer.files)]
    source = tokenizer or bundle.tokenizer
    checks.append(check_chat(bundle, source))
    if target.artifact_files:
        checks.append(check_client_files(bundle, target, model, source.files))
    if target.holds_tokenizer:
        checks.append(check_entries(bundle, target, model, source))
    return Section((*checks, check_layout(bundle)))


def check_tokenizer(actual: Mapping[str, bytes], expected: Mapping[str, bytes]) -> Check:
    """Check that tokenizer.json has the checkpoint's bytes. The detail names the parts that differ.

    actual, expected: content by file name.
    """
    problems = _problems(TOKENIZER, actual.get(TOKENIZER), expected[TOKENIZER])
    return claim("structure.tokenizer", problems)


def check_tokenizer_files(actual: Mapping[str, bytes], expected: Mapping[str, bytes]) -> Check:
    """Check that tokenizer/ holds the checkpoint's other files, and no file that a client would prefer.

    actual, expected: content by file name.
    """
    names = sorted({*actual, *expected} - {TOKENIZER, TEMPLATE})
    return claim("structure.tokenizer_files", _all_problems(names, actual, expected))


def check_chat(bundle: Bundle, tokenizer: Tokenizer) -> Check:
    """Check of the chat template and of the manifest's section `chat`, which is derived from it."""
    actual = _contents(bundle, "tokenizer")
    problems = _all_problems([TEMPLATE], actual, tokenizer.files)
    chat = bundle.manifest["chat"]
    expected = NO_CHAT if bundle.config.is_classifier else chat_section(tokenizer, chat.get("date"))
    problems += differences(chat, expected, "chat")
    return claim("structure.chat", problems)


def check_client_files(
    bundle: Bundle, target: Target, model: Llama, tokenizer_files: Mapping[str, bytes]
) -> Check:
    """Check of the files beside the lowered ones in the artifact's directory.

    They are copies of the tokenizer and computed configurations.
    """
    provenance = target.provenance(bundle.manifest)
    expected = client_files(target, tokenizer_files, model, provenance)
    actual = {
        name: content
        for name, content in _contents(bundle, target.artifact).items()
        if name not in target.artifact_files
    }
    names = sorted({*actual, *expected})
    problems = [f"{target.artifact}/{problem}" for problem in _all_problems(names, actual, expected)]
    return claim("structure.client_files", problems)


def check_licenses(bundle: Bundle, checkpoint: Checkpoint) -> Check:
    """Check that licenses/ holds the checkpoint's licence files.

    A GGUF file may have been moved away from the licences beside it. It then says nothing about them.
    """
    actual, expected = _contents(bundle, LICENSES), checkpoint.license_files
    if checkpoint.format == "gguf" and not expected:
        return claim("structure.licenses", [], detail="no licence files beside the checkpoint")
    return claim("structure.licenses", _all_problems(sorted({*actual, *expected}), actual, expected))


def check_layout(bundle: Bundle) -> Check:
    """Check that every file of the bundle has a place: tokenizer, licences, artifact, prefix, golden vectors or reports."""
    known = {MANIFEST, *(f"tokenizer/{name}" for name in (*SHIPPED, TEMPLATE))}
    files = bundle.manifest["files"]
    known |= {n for n in files if n.startswith(f"{LICENSES}/") and is_license_file(n.partition("/")[2])}
    folders = list(OWN_FOLDERS)
    for name in bundle.targets:
        target = find_target(name)
        if target.artifact_files:
            folders.append(f"{target.artifact}/")  # structure.client_files knows its files
        else:
            known.add(target.artifact)
    known |= {path for entry in bundle.manifest.get("adapters", ()) for path in entry["files"].values()}
    known |= {*bundle.manifest.get("classifier", {}).get("prefix_files", {}).values()}
    unknown = [
        f"{name} belongs to no part of a bundle"
        for name in files
        if name not in known and not name.startswith(tuple(folders))
    ]
    return claim("structure.layout", unknown)


def _contents(bundle: Bundle, folder: str) -> dict[str, bytes]:
    """Content of the files below a folder of the bundle, by their path in it. Weights are left out."""
    prefix = f"{folder}/"
    heavy = {f"{find_target(t).artifact}/{n}" for t in bundle.targets for n in find_target(t).artifact_files}
    return {
        name.removeprefix(prefix): (bundle.path / name).read_bytes()
        for name in bundle.manifest["files"]
        if name.startswith(prefix) and name not in heavy
    }


def _all_problems(names: list[str], actual: Mapping[str, bytes], expected: Mapping[str, bytes]) -> list[str]:
    return [problem for name in names for problem in _problems(name, actual.get(name), expected.get(name))]


def _problems(name: str, actual: bytes | None, expected: bytes | None) -> list[str]:
    if actual == expected:
        return []
    if actual is None:
        return [f"{name} is missing"]
    if expected is None:
        return [f"{name} is not expected"]
    parts = _differing_parts(actual, expected)
    if parts:
        words = PARTS if name == TOKENIZER else {}
        return [f"{name} differs in {', '.join(words.get(part, part) for part in parts)}"]
    return [f"{name} differs" if parts is None else f"{name} has other bytes for the same content"]


def _differing_parts(actual: bytes, expected: bytes) -> list[str] | None:
    """Names of the differing parts of two JSON objects; None for anything else."""
    objects: list[Any] = []
    for content in (actual, expected):
        try:
            objects.append(json.loads(content))
        except (ValueError, RecursionError):
            return None
    one, other = objects
    if not isinstance(one, dict) or not isinstance(other, dict):
        return None
    missing = object()
    return sorted(n for n in {*one, *other} if one.get(n, missing) != other.get(n, missing))
