"""Opening of an adapter's directory: choice of the layout, and the checks common to both."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from edgellama.checkpoints.adapters.adapter import Adapter
from edgellama.checkpoints.adapters.mlx import mlx_adapter
from edgellama.checkpoints.adapters.peft import peft_adapter
from edgellama.checkpoints.hf_weights import stored_tensors
from edgellama.errors import CheckpointError
from edgellama.host.adapter_files import CONFIG, MLX, AdapterPlace


def open_adapter(path: str | Path) -> Adapter:
    """Opens the directory of an adapter, in PEFT's or MLX's layout.

    Raises CheckpointError, naming the cause, for anything that would be merged wrongly.
    """
    place = AdapterPlace(Path(path))
    file = place.weights_file()
    if not (place.path / CONFIG).is_file():
        raise CheckpointError(
            f"{place.path}: no {CONFIG} beside {file.name}",
            remedy="The factor of the adapter stands there; take both files from one training.",
        )
    stored, _, _ = stored_tensors([file])
    tensors: dict[str, Tensor] = {}
    for name, entry in stored.items():
        tensor = entry.read().float()
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{file}: {name} holds values that are NaN or infinite",
                remedy="The training diverged; take an earlier checkpoint of it.",
            )
        tensors[name] = tensor
    adapter = (mlx_adapter if file.name in MLX else peft_adapter)(place.path, tensors)
    if not adapter.saved and not any(bool(change.up.any()) for change in adapter.changes.values()):
        raise CheckpointError(
            f"{place.path}: the adapter changes nothing: lora_B is zero in all modules",
            remedy="It was saved before its training; take the result of the training.",
        )
    return adapter
