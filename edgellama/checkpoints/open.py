"""Opening of a checkpoint: choice of the reader, and the checks common to all formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from edgellama.checkpoints.checkpoint import Checkpoint
from edgellama.checkpoints.licenses import license_files
from edgellama.errors import CheckpointError
from edgellama.files import is_lfs_pointer, strange_files
from edgellama.host.find_checkpoint import find_checkpoint, without_weights

CHECKPOINT_FORMS = "a Hugging Face model directory, a GGUF file (any part of one in parts), or Meta's directory with params.json"
HF_FILES = ("config.json", "params.json", "tokenizer.json", "model.safetensors.index.json")


def open_checkpoint(
    path: str | Path,
    *,
    download: bool = False,
    weights: bool = True,
    adapters: Sequence[str | Path] = (),
) -> Checkpoint:
    """Opens a Hugging Face directory, a .gguf file, or Meta's directory with consolidated.*.pth.

    path: where it lies, or OWNER/NAME of a model in the Hugging Face cache (`edgellama.host.find_checkpoint`).
    download: fetch from the hub what the cache lacks. Without it, no connection is opened.
    weights: False to accept a Hugging Face directory without its weights, which can be described only.
    adapters: directories of LoRA adapters to merge (`edgellama.checkpoints.adapters`), as paths or DIR:WEIGHT.

    Raises CheckpointError or TokenizerError, naming the cause, for anything other than the plain Llama.

    >>> import edgellama
    >>> checkpoint = edgellama.open_checkpoint(model)
    >>> checkpoint.format, checkpoint.config.num_hidden_layers
    ('safetensors', 4)
    >>> checkpoint.tensor("model.norm.weight").dtype
    torch.float32
    """
    path = find_checkpoint(path, download=download, weights=weights)
    if path.is_dir():
        _check_files(path)
    checkpoint = _reader(path, weights=weights)(path)
    _check_tensors(checkpoint)
    tokenizer = checkpoint.tokenizer.fitted(checkpoint.config)
    licenses, notes = license_files(path)
    notes = (*checkpoint.notes, *tokenizer.notes, *notes)
    checkpoint = replace(checkpoint, tokenizer=tokenizer, notes=notes, license_files=licenses)
    # Not a constructor argument, so that `replace` resets it to False.
    object.__setattr__(checkpoint, "as_opened", True)
    if not adapters:
        return checkpoint
    from edgellama.checkpoints.adapters import with_adapters

    return with_adapters(checkpoint, adapters)


def _reader(path: Path, *, weights: bool) -> Callable[[Path], Checkpoint]:
    # Imported here because each reader needs the library of its format.
    from edgellama.checkpoints.gguf import open_gguf
    from edgellama.checkpoints.hf_weights import adapter_alone, adapter_files
    from edgellama.checkpoints.huggingface import open_hf
    from edgellama.checkpoints.meta import open_meta
    from edgellama.formats.gguf import is_gguf

    if path.is_file():
        if is_gguf(path) or path.suffix.lower() == ".gguf":
            return open_gguf
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".model") or path.name in HF_FILES:
            raise CheckpointError(
                f"{path}: one file of a checkpoint, which needs those beside it",
                remedy=f"Give the directory: {path.parent}",
            )
        with path.open("rb") as file:
            if is_lfs_pointer(file.read(64)):
                raise CheckpointError(
                    f"{path}: a Git LFS pointer and not the model", remedy="Run `git lfs pull`."
                )
        raise CheckpointError(
            f"{path}: not a checkpoint that edgellama reads", remedy=f"Give {CHECKPOINT_FORMS}."
        )
    if (path / "config.json").is_file():
        return open_hf if weights or not without_weights(path) else partial(open_hf, weights=False)
    if (path / "params.json").is_file():
        return open_meta
    if adapter_files(path):
        raise adapter_alone(path)
    raise CheckpointError(
        f"{path}: no config.json (Hugging Face) and no params.json (Meta) in this directory",
        remedy=f"Give {CHECKPOINT_FORMS}.",
    )


def _check_files(path: Path) -> None:
    """Raises CheckpointError for a pipe, a device, or a link that leads out (the hub's cache excepted)."""
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
    """Raises CheckpointError unless the tensors are exactly those of the config, with its shapes."""
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
        actual_shape = checkpoint.infos[name].shape
        if actual_shape != shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {list(actual_shape)}, expected {list(shape)}",
                remedy="The config does not belong to these weights; take both from the same model.",
            )


def _some(names: list[str], limit: int = 4) -> str:
    listing = ", ".join(names[:limit])
    return listing if len(names) <= limit else f"{listing} and {len(names) - limit} more"
