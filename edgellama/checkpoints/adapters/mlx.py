"""Reader of MLX's layout: adapter_config.json beside adapters.safetensors, as `mlx_lm.lora` writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from edgellama.checkpoints.adapters.adapter import Adapter, LowRank, is_factor
from edgellama.checkpoints.hf_weights import read_object
from edgellama.errors import CheckpointError
from edgellama.host.adapter_files import CONFIG

_KEY = re.compile(r"(.+)\.(lora_a|lora_b|m)")
_KINDS = ("lora", "dora")


def mlx_adapter(path: Path, tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter of a directory. tensors: those of its weights file, by key.

    MLX keeps `lora_a` as [columns, rank] and `lora_b` as [rank, rows], and its `scale` is the whole factor.
    """
    data = read_object(path / CONFIG)
    kind, settings = data.get("fine_tune_type", "lora"), data.get("lora_parameters")
    if kind not in _KINDS:
        raise CheckpointError(
            f"{path / CONFIG}: fine_tune_type is {kind!r:.40}, and edgellama merges {' and '.join(_KINDS)}",
            remedy="Merge it with `mlx_lm.fuse`, and export the result.",
        )
    scale = settings.get("scale") if isinstance(settings, dict) else None
    if not is_factor(scale):
        raise CheckpointError(
            f"{path / CONFIG}: lora_parameters.scale is {scale!r:.40} and must be a number up to 1e18",
            remedy="Take the file from the training's output again.",
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(
                f"{path}: the adapter holds {key!r:.120}, which edgellama does not merge",
                remedy="Merge it with `mlx_lm.fuse`, and export the result.",
            )
        parts.setdefault(match[1], {})[match[2]] = tensor
    base = data.get("model")
    changes = {f"{m}.weight": _change(path, m, named, float(scale), kind) for m, named in parts.items()}
    leaves = {_leaf(module) for module in parts}
    count = data.get("num_layers")

    def adapts(module: str, layers: int) -> bool:
        """The same modules of the last `num_layers` layers, as mlx_lm adapts them; of all for -1."""
        match = re.match(r"model\.layers\.(\d+)\.", module)
        first = max(layers - count, 0) if isinstance(count, int) and count > 0 else 0
        return match is not None and int(match[1]) >= first and _leaf(module) in leaves

    return Adapter(path, "mlx", base if isinstance(base, str) and base else None, changes, adapts=adapts)


def _leaf(module: str) -> str:
    """Name of a module in its layer."""
    return re.sub(r"^model\.layers\.\d+\.", "", module)


def _change(path: Path, module: str, named: Mapping[str, Tensor], scale: float, kind: str) -> LowRank:
    needed = {"lora_a", "lora_b", *(("m",) if kind == "dora" else ())}
    if named.keys() != needed:
        raise CheckpointError(
            f"{path}: {module} has {', '.join(sorted(named))}, and {kind} needs {', '.join(sorted(needed))}",
            remedy="Take both files from one training.",
        )
    down, up = named["lora_a"].T, named["lora_b"].T
    if down.dim() != 2 or up.dim() != 2 or len(down) != up.shape[1]:
        raise CheckpointError(
            f"{path}: {module} has matrices {list(named['lora_a'].shape)} and {list(named['lora_b'].shape)}",
            remedy="Take the file from the training again.",
        )
    magnitude = named["m"].float().flatten() if kind == "dora" else None
    return LowRank(down.float().contiguous(), up.float().contiguous(), scale, magnitude)
