"""Files of a checkpoint by their names: which of them edgellama reads, and which still lack."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from edgellama.errors import CheckpointError
from edgellama.files import is_license_file

# Everything but weights and licences that a reader opens.
DESCRIBING = (
    *("config.json", "generation_config.json", "params.json", "README.md", "adapter_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "chat_template.jinja"),
)
# Forms of weights in the order of preference: (index, pattern of the files without one).
INDEX, PICKLE_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
FORMS: tuple[tuple[str | None, str], ...] = (
    (INDEX, r"model\.safetensors"),
    (None, r"model-\d{5}-of-\d{5}\.safetensors"),
    (PICKLE_INDEX, r"pytorch_model\.bin"),
    (None, r"pytorch_model-\d{5}-of-\d{5}\.bin"),
    (None, r"(hf_)?model[_-]\d{4,5}([_-]\w+)?(-of-\d{5})?\.(safetensors|pt|bin)"),
    (None, r"consolidated\.\d+\.pth"),
)
_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)


def describing_files(names: Iterable[str]) -> list[str]:
    """The files besides weights, of a repository's files by name."""
    return sorted(name for name in names if name in DESCRIBING or is_license_file(name))


def weight_files(names: Iterable[str], read: Callable[[str], bytes]) -> list[str]:
    """The weights in one form, of a repository's or a directory's files by name; empty without any.

    read: returns the content of an index, which names its shards.
    """
    names = sorted(names)
    for index, pattern in FORMS:
        if index in names:
            named = shards(read(str(index)))
            if set(named) & set(names):  # an index may name the files of another save
                return [str(index), *named]
        chosen = [name for name in names if re.fullmatch(pattern, name)]
        if chosen:
            return chosen
    return []


def names_weights(names: Iterable[str]) -> bool:
    """True if one of the names is that of weights other than GGUF, or of their index."""
    return any(name == index or re.fullmatch(pattern, name) for name in names for index, pattern in FORMS)


def shards(index: bytes) -> list[str]:
    """Names of the files in an index; empty for one that cannot be read, which the reader will refuse."""
    try:
        weight_map: Any = json.loads(index)["weight_map"]
        files = {str(file) for file in weight_map.values()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
    return sorted(file for file in files if re.fullmatch(r"[\w.-]+", file) and file.strip("."))


def gguf_models(names: Iterable[str]) -> list[list[str]]:
    """The .gguf files, each model as the list of its parts."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.lower().endswith(".gguf"):
            part = _PART.fullmatch(name)
            models.setdefault(f"{part[1]} {part[2]}" if part else name, []).append(name)
    return list(models.values())


def the_gguf(names: Iterable[str], where: str, remedy: str) -> list[str]:
    """Parts of the only GGUF model; empty without any. Raises CheckpointError, with a list, for several."""
    models = gguf_models(names)
    if len(models) > 1:
        listing = ", ".join(parts[0] for parts in models)
        raise CheckpointError(
            f"{where}: {len(models)} GGUF models, and one is needed: {listing}", remedy=remedy
        )
    return models[0] if models else []


def missing_weights(directory: Path) -> str | None:
    """Weights that lack in a snapshot of the cache, in words; None if all are there."""
    names = [f.name for f in directory.iterdir() if f.exists()]
    needed = weight_files(names, lambda index: (directory / index).read_bytes())
    lacking = [name for name in needed if name not in names]
    if lacking:
        return f"{len(lacking)} of its files are not there ({', '.join(lacking[:3])})"
    if not needed and not _other_weights(names):
        return "its weights are not there"
    return None


def _other_weights(names: Sequence[str]) -> bool:
    return any(name.lower().endswith((".gguf", ".safetensors", ".bin", ".pt", ".pth")) for name in names)


def has_no_weights(directory: Path) -> bool:
    """True for a directory that describes a model, and holds no file of weights."""
    names = [f.name for f in directory.iterdir()]
    return "config.json" in names and not _other_weights(names)
