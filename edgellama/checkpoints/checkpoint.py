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
from torch import Tensor, nn

from edgellama.errors import CheckpointError
from edgellama.model.config import LlamaConfig
from edgellama.model.llama import CacheFactory, KVCache, Llama
from edgellama.plain_files import strange_files
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


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: a Hugging Face directory, a .gguf file, or Meta's consolidated.*.pth directory.

    Raises CheckpointError or TokenizerError for anything that is not the plain Llama, by name.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or directory", remedy="Check the path of the checkpoint."
        )
    if path.is_dir():
        _check_files(path)
    checkpoint = _reader(path)(path)
    _check_tensors(checkpoint)
    checkpoint.tokenizer.check_fits(checkpoint.config)
    object.__setattr__(
        checkpoint, "as_opened", True
    )  # not an argument, so that `replace` does not carry it over
    return checkpoint


OUTSIDE = ("model.embed_tokens.", "model.norm.", "lm_head.")  # what is in no layer, by prefix


def layer_prefixes(checkpoint: Checkpoint) -> list[str]:
    """How the names of each layer's tensors begin."""
    return [f"model.layers.{index}." for index in range(checkpoint.config.num_hidden_layers)]


def load_llama(checkpoint: Checkpoint, context_length: int, cache: CacheFactory = KVCache) -> Llama:
    """The checkpoint's model in float32, ready to run; tensors are read one by one, a tied lm_head shared."""
    with torch.device("meta"):
        model = Llama(checkpoint.config, context_length, cache)
    load_weights(model, checkpoint)
    return model.eval()


def load_weights(
    model: Llama, checkpoint: Checkpoint, prefix: str | tuple[str, ...] = "", *, copy: bool = False
) -> None:
    """Give `model` those of the checkpoint's weights whose names begin with `prefix`, or with one of several.

    copy: in memory of their own, to be changed; otherwise a weight may be a view of the mapped file.
    """
    for name in checkpoint.config.tensor_shapes():
        if name.startswith(prefix):
            module_name, _, attribute = name.rpartition(".")
            tensor = checkpoint.tensor(name)
            weight = nn.Parameter(tensor.clone() if copy else tensor, requires_grad=False)
            setattr(model.get_submodule(module_name), attribute, weight)
    if checkpoint.config.tie_word_embeddings and "model.embed_tokens.weight".startswith(prefix):
        model.lm_head.weight = model.model.embed_tokens.weight


def _reader(path: Path) -> Callable[[Path], Checkpoint]:
    # Imported here: the readers import this module for Checkpoint, and each needs its format's library.
    from edgellama.checkpoints.gguf import open_gguf
    from edgellama.checkpoints.huggingface import open_hf
    from edgellama.checkpoints.meta import open_meta

    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return open_gguf
        raise CheckpointError(
            f"{path}: not a checkpoint that edgellama reads",
            remedy="Give a Hugging Face model directory, a .gguf file, or Meta's directory with params.json.",
        )
    if (path / "config.json").is_file():
        return open_hf
    if (path / "params.json").is_file():
        return open_meta
    raise CheckpointError(
        f"{path}: no config.json (Hugging Face) and no params.json (Meta) in this directory",
        remedy="Give a Hugging Face model directory, a .gguf file, or Meta's directory with params.json.",
    )


def _check_files(path: Path) -> None:
    """No file of the directory leads out of it, and none is a pipe or a device."""
    try:
        strange = strange_files(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}", remedy="Check that the directory can be read."
        ) from error
    for name, why in strange.items():
        raise CheckpointError(
            f"{path}: {name} is {why}",
            remedy="Put the file itself into the directory, or give the directory that it lies in.",
        )


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Every tensor that the config asks for, with its shape, and no other."""
    expected = checkpoint.config.tensor_shapes()
    missing = sorted(expected.keys() - checkpoint.infos.keys())
    extra = sorted(checkpoint.infos.keys() - expected.keys())
    if missing or extra:
        parts = [
            f"{kind}: {_some(names)}"
            for kind, names in (("missing", missing), ("not expected", extra))
            if names
        ]
        raise CheckpointError(
            f"{checkpoint.path}: the tensors are not those of the config ({'; '.join(parts)})",
            remedy="Check that all shards are there and that the config belongs to these weights "
            "(num_hidden_layers, tie_word_embeddings, attention_bias, mlp_bias decide which tensors exist).",
        )
    for name, shape in expected.items():
        found = checkpoint.infos[name].shape
        if found != shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {list(found)}, expected {list(shape)}",
                remedy="The config does not belong to these weights; take both from the same model.",
            )


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
