"""Checkpoint: a full-precision Llama on disk, in any format, with tensors under their Hugging Face names.

`open_checkpoint` calls the reader of the format: huggingface.py, gguf.py or meta.py. It then checks the
result: no tensor missing or extra, shapes as in the config, and a tokenizer that fits the vocabulary. Weights
stay in the file until `tensor` reads one, so memory never holds two full copies.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgellama.errors import CheckpointError
from edgellama.files import digest
from edgellama.host.hub import HubOrigin, origin_of
from edgellama.model.config import LlamaConfig
from edgellama.model.labels import Classifier
from edgellama.text.stop_tokens import OPTION, StopToken
from edgellama.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgellama.checkpoints.given.weights import Given

_PIECE = 1 << 18  # values whose range is taken at a time


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the file stores it: dtype by the format's own name (`BF16`, `Q4_1`), shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter that is merged into a checkpoint.

    Attributes:
        layout: `peft` or `mlx`.
        weight: factor of its changes.
        sha256: over the files of its directory (edgellama.host.adapter_files).
        parameters: number of its values.
    """

    layout: str
    weight: float
    sha256: str
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """The adapter as a manifest records it."""
        return asdict(self)


@dataclass(frozen=True)
class Checkpoint:
    """A full-precision model on disk.

    Attributes:
        infos: Tensors as stored, by Hugging Face name.
        read: Returns the tensor of a name, in the layout of Hugging Face weights.
        files: Weight files; none for a checkpoint that was opened without its weights.
        license_files: Files with the terms of the model, by name.
        stop_tokens: Tokens that end an answer, with the places that name each. Their ids are the config's
            `eos_token_ids`.
        notes: Sentences for the user about the way that the files were read.
        adapters: Adapters that `read` merges into the base's weights.
        classifier: Labels of the output layer's rows; None for a model of the next token.
        given: Weights that are codes already. `read` returns their dequantized values.
        as_opened: True while the model equals the files at `path`; False after a replacement in memory.
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
    license_files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    stop_tokens: tuple[StopToken, ...] = ()
    adapters: tuple[MergedAdapter, ...] = ()
    given: Given | None = field(default=None, repr=False)
    classifier: Classifier | None = None
    as_opened: bool = field(default=False, init=False, repr=False, compare=False)

    def tensor(self, name: str) -> Tensor:
        """One weight as float32. A weight stored as float32 may be a view of the mapped file.

        Raises CheckpointError for NaN or infinite values.
        """
        return self.stored(name).float()

    def stored(self, name: str) -> Tensor:
        """One weight in the dtype of the file, of which it may be a view. It is finite as float32.

        Raises CheckpointError for NaN or infinite values.
        """
        weight = self.read(name)
        pieces = weight.reshape(-1).split(_PIECE)
        # The range of numbers that are not all finite has an end that is not.
        if not all(math.isfinite(end) for piece in pieces for end in piece.float().aminmax()):
            bad_count = sum(int((~torch.isfinite(piece.float())).sum()) for piece in pieces)
            raise CheckpointError(
                f"{self.path}: tensor {name} holds {bad_count} values that are NaN or infinite",
                remedy="The file is damaged or training diverged; export a checkpoint from before that.",
            )
        return weight

    def first_layers(self, count: int) -> Checkpoint:
        """The same checkpoint with its first `count` layers, for parity tests: depth adds only noise."""
        config = replace(self.config, num_hidden_layers=count)
        names = config.tensor_shapes()
        return replace(self, config=config, infos={n: i for n, i in self.infos.items() if n in names})

    def with_stop_tokens(self, texts: Sequence[str]) -> Checkpoint:
        """The same checkpoint, which also stops at the tokens of these texts.

        Raises CheckpointError for a text that is not one token.
        """
        if not texts:
            return self
        ids = [(text, self.tokenizer.token_id(text)) for text in texts]
        for text, token in ids:
            if token is None or token >= self.config.vocab_size:
                raise CheckpointError(
                    f"stop token {text!r} is no token of the tokenizer",
                    remedy="Give the text of one token, for example one that `edgellama inspect` lists under special_tokens.",
                )
        stops = {stop.id: stop for stop in self.stop_tokens}
        for text, token in ids:
            assert token is not None
            sources = stops[token].sources if token in stops else ()
            if OPTION not in sources:
                stops[token] = StopToken(token, text, (*sources, OPTION))
        return self.with_options(
            config=replace(self.config, eos_token_ids=tuple(stops)), stop_tokens=tuple(stops.values())
        )

    def with_options(self, **changes: Any) -> Checkpoint:
        """The checkpoint with other fields, which follow from its files and from options of the user."""
        changed = replace(self, **changes)
        # Not a constructor argument, so that `replace` resets it to False.
        object.__setattr__(changed, "as_opened", self.as_opened)
        return changed

    @property
    def hub(self) -> HubOrigin | None:
        """Repository and commit on the Hugging Face hub; None for other places and after a change in memory."""
        return origin_of(self.path) if self.as_opened else None

    def sha256(self) -> str:
        """SHA-256 of the weight files' contents in order of file name, independent of the directory.

        With adapters, their hashes and weights count too.
        """
        if not self.adapters:
            return self._sha256
        return digest([self._sha256, *([a.sha256, a.weight] for a in self.adapters)])

    def base_sha256(self) -> str:
        """SHA-256 of the weight files alone, without adapters."""
        return self._sha256

    def config_sha256(self) -> str:
        """SHA-256 of the config in one form for all formats: everything but the weights that the model computes with.

        Stop tokens that only an option names do not count, because the checkpoint does not hold them.
        """
        own = [stop.id for stop in self.stop_tokens if stop.sources != (OPTION,)]
        named = {stop.id for stop in self.stop_tokens}
        ids = [token for token in self.config.eos_token_ids if token in own or token not in named]
        return digest({**self.config.to_dict(), "eos_token_ids": ids})

    @cached_property
    def _sha256(self) -> str:
        total = hashlib.sha256()
        for file in sorted(self.files, key=lambda f: f.name):
            with file.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()
