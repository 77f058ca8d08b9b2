"""Files of an adapter (LoRA), and the places that a user gives for adapters. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellama.errors import CheckpointError, UsageError
from edgellama.files import file_sha256

CONFIG = "adapter_config.json"
PEFT = ("adapter_model.safetensors", "adapter_model.bin")
MLX = ("adapters.safetensors",)
TUNED = re.compile(r"adapter_\d+\.(pt|bin)")  # torchtune's own layout
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")  # of a swappable adapter: equal on file systems of any kind
# Files that a reader opens in an adapter's directory besides the weights.
_BESIDE = (
    *(CONFIG, "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json"),
)


@dataclass(frozen=True)
class AdapterPlace:
    """Directory of an adapter, and the weight with which it is merged."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str | Path) -> AdapterPlace:
        """Reads DIR or DIR:WEIGHT. A directory whose name ends like a weight comes first.

        Raises UsageError for a weight that is no finite number, or zero.
        """
        if isinstance(text, Path) or Path(text).is_dir():
            return cls(Path(text))
        directory, colon, number = text.rpartition(":")
        if not colon or "/" in number or "\\" in number:
            return cls(Path(text))
        try:
            weight = float(number)
        except ValueError:
            return cls(Path(text))
        if not math.isfinite(weight) or weight == 0:
            raise UsageError(
                f"--adapter {text}: the weight must be a finite number other than 0",
                remedy="Leave the adapter out, or give a weight such as 0.5.",
            )
        return cls(Path(directory), weight)

    def weights_file(self) -> Path:
        """The file with the adapter's weights. Raises CheckpointError if there is none, or two."""
        if not self.path.is_dir():
            raise CheckpointError(
                f"{self.path}: no such adapter directory",
                remedy=f"Give the directory that holds {CONFIG} and {PEFT[0]}.",
            )
        files = [self.path / name for name in (*PEFT, *MLX) if (self.path / name).is_file()]
        if len(files) == 1:
            return files[0]
        if len(files) > 1:
            raise CheckpointError(
                f"{self.path}: holds {files[0].name} and {files[1].name}, two adapters",
                remedy="Remove the file that is left over from another training.",
            )
        if any(TUNED.fullmatch(file.name) for file in self.path.iterdir()):
            raise CheckpointError(
                f"{self.path}: an adapter in torchtune's own layout",
                remedy=f"Let torchtune save it for PEFT, as {CONFIG} and {PEFT[0]} (save_adapter_weights_only).",
            )
        raise CheckpointError(
            f"{self.path}: no adapter in this directory: neither {' nor '.join((*PEFT, *MLX))}",
            remedy="Give the directory that PEFT's save_pretrained or MLX's lora wrote.",
        )

    def sha256(self) -> str:
        """SHA-256 over the hashes of the files that are read, by name. It covers everything but the directory's name.

        Raises CheckpointError without an adapter, and OSError.
        """
        files = [self.weights_file(), *(self.path / name for name in _BESIDE if (self.path / name).is_file())]
        total = hashlib.sha256()
        for file in sorted(files):
            total.update(f"{file.name} {file_sha256(file)}\n".encode())
        return total.hexdigest()


def swappable_places(places: Mapping[str, str | Path] | Sequence[str]) -> dict[str, Path]:
    """Directories of adapters that are switched at run time, by name: a mapping, or texts NAME=DIR.

    Raises UsageError for a text of another form, a name that no file can have everywhere, and one given twice.
    """
    pairs = list(places.items()) if isinstance(places, Mapping) else [_named(text) for text in places]
    seen: set[str] = set()
    for name, _ in pairs:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"--adapters: {name!r:.60} is no name for an adapter",
                remedy="Use up to 64 letters a-z, digits, dashes and underscores, such as style=path/to/lora.",
            )
        if name in seen:
            raise UsageError(
                f"--adapters: the name {name!r} is given twice", remedy="Give each adapter its own."
            )
        seen.add(name)
    return {name: Path(path) for name, path in pairs}


def _named(text: str) -> tuple[str, str]:
    name, equals, directory = text.partition("=")
    if not equals or not directory:
        raise UsageError(
            f"--adapters {text}: expected NAME=DIR",
            remedy="Give a name, such as --adapters style=path/to/lora.",
        )
    return name, directory


def adapter_places(places: Sequence[str | Path | AdapterPlace]) -> tuple[AdapterPlace, ...]:
    """The places of several adapters, in the given order. Raises UsageError for one that is given twice."""
    parsed = tuple(p if isinstance(p, AdapterPlace) else AdapterPlace.parse(p) for p in places)
    paths = [place.path.resolve() for place in parsed]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise UsageError(f"the adapter {twice} is given twice", remedy="Give it once, with its whole weight.")
    return parsed
