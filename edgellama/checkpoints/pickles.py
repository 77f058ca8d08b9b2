"""Files of torch.save, read as tensors only: a pickle that would run code is refused by torch's safe loader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgellama.errors import CheckpointError
from edgellama.files import is_lfs_pointer

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

_NESTED = ("state_dict", "model", "module")  # keys under which trainers put the weights


def load_pickle(file: Path, *, foreign: bool = False) -> dict[str, Tensor]:
    """Tensors by name, mapped but not read.

    foreign: the file may be any trainer's. Entries that are no tensors are left out, and a file from before
    torch 1.6, which cannot be mapped, is read into memory.
    Raises CheckpointError for anything but a file of plain tensors.
    """
    content: Any
    try:
        with file.open("rb") as stream:
            if is_lfs_pointer(stream.read(64)):
                raise CheckpointError(
                    f"{file}: a Git LFS pointer and not the weights", remedy="Run `git lfs pull`."
                )
        try:
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if not foreign or "mmap can only be used" not in str(error):
                raise
            content = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # damaged archives and pickles raise many exception types
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(
            f"{file}: not a file of plain tensors that can be mapped: {reason[0]}",
            remedy="Download it again; if it holds more than tensors, load the model in its own program and save it as "
            "safetensors (transformers: save_pretrained). A file from before torch 1.6 must be saved again with torch.save.",
        ) from error
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{file}: holds {type(content).__name__}, expected tensors by name",
            remedy="Save the model's state_dict.",
        )
    tensors = {
        name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)
    }
    for name, tensor in content.items():
        if name not in tensors and foreign:
            continue
        if name not in tensors or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{file}: {name!r} is not a plain tensor", remedy="Save it with dense tensors only."
            )
    return {name: tensor.detach() for name, tensor in tensors.items()}
