"""Checkpoint: a full-precision Llama on disk, whatever its format, under the names of Hugging Face.

`open_checkpoint` looks at a path, asks the reader of its format (one file each: from_hf, from_gguf, from_meta)
and checks what came back: every tensor there, none too many, shapes as the config says, a tokenizer that fits
the vocabulary. Weights stay in the file until `tensor` reads one, so there are never two full copies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from edgellama.errors import CheckpointError
from edgellama.model.config import LlamaConfig
from edgellama.text.tokenizer import Tokenizer

_PIECE = 1 << 22  # values looked at together


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the file stores it: dtype by the format's own name (`BF16`, `Q4_1`), shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A full-precision model on disk. `read(name)` gives one tensor in the layout of Hugging Face weights.

    as_opened: it is what the files at `path` say; False as soon as something was replaced in memory.
    """

    path: Path
    format: str
    config: LlamaConfig
    infos: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor] = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    files: tuple[Path, ...]
    license: str | None = None
    notes: tuple[str, ...] = ()
    as_opened: bool = field(default=False, init=False, repr=False, compare=False)

    def tensor(self, name: str) -> Tensor:
        """One weight as float32, checked to be finite. A float32 tensor may be a view of the mapped file."""
        weight = self.read(name).float()
        # In pieces, because isfinite makes a copy of what it is given.
        bad = sum(int((~torch.isfinite(piece)).sum()) for piece in weight.reshape(-1).split(_PIECE))
        if bad:
            raise CheckpointError(
                f"{self.path}: tensor {name} holds {bad} values that are NaN or infinite",
                remedy="The file is damaged or training diverged; export a checkpoint from before that.",
            )
        return weight

    def first_layers(self, count: int) -> Checkpoint:
        """The same checkpoint cut to its first `count` layers: for parity tests, where depth adds only noise."""
        config = replace(self.config, num_hidden_layers=count)
        names = config.tensor_shapes()
        return replace(self, config=config, infos={n: i for n, i in self.infos.items() if n in names})

    def sha256(self) -> str:
        """Hash of the weight files' contents, in order of their names; independent of where they lie."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        total = hashlib.sha256()
        for file in sorted(self.files, key=lambda f: f.name):
            with file.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()
