"""Reader of PEFT's layout: adapter_config.json beside adapter_model.safetensors or adapter_model.bin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from edgellama.checkpoints.adapters.adapter import Adapter, LowRank
from edgellama.checkpoints.adapters.peft_config import MERGE, PeftConfig, is_named, peft_config
from edgellama.checkpoints.hf_weights import read_object
from edgellama.errors import CheckpointError
from edgellama.host.adapter_files import CONFIG

PREFIX = "base_model.model."
# Parts of a module's adapter by the end of its key. Some trainers keep the adapter's name `default`.
_PARTS = {
    "lora_A": re.compile(r"(.+)\.lora_A(?:\.default)?\.weight"),
    "lora_B": re.compile(r"(.+)\.lora_B(?:\.default)?\.weight"),
    "lora_embedding_A": re.compile(r"(.+)\.lora_embedding_A(?:\.default)?(?:\.weight)?"),
    "lora_embedding_B": re.compile(r"(.+)\.lora_embedding_B(?:\.default)?(?:\.weight)?"),
    "lora_magnitude_vector": re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?"),
    "base_layer": re.compile(r"(.+)\.base_layer\.weight"),
    "original": re.compile(r"(.+)\.original_module\.weight"),  # the base's, beside the trained one
    "whole": re.compile(r"(.+?)(?:\.modules_to_save(?:\.default)?)?\.weight"),
    "bias": re.compile(r"(.+?)(?:\.base_layer)?\.bias"),
}
_TABLES = ("model.embed_tokens", "lm_head")


def peft_adapter(path: Path, tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter of a directory. tensors: those of its weights file, by key.

    Raises CheckpointError, naming the key, for anything that is not understood.
    """
    config = peft_config(read_object(path / CONFIG), path / CONFIG)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, part = _parsed(path, key)
        parts.setdefault(module, {})[part] = tensor
    _check_targets(path, config, parts)
    changes: dict[str, LowRank] = {}
    saved: dict[str, Tensor] = {}
    tables: dict[str, Tensor] = {}
    for module, named in parts.items():
        if "bias" in named:
            saved[f"{module}.bias"] = named["bias"]
        for part in ("whole", "base_layer"):
            if part in named:
                trained = part == "whole" and is_named(module, config.whole)
                (saved if trained else tables)[f"{module}.weight"] = named[part]
        if any(part.startswith("lora_") for part in named):
            changes[f"{module}.weight"] = _change(path, config, module, named)
    foreign = sorted(name for name in tables if name.removesuffix(".weight") not in _TABLES)
    if foreign:
        raise CheckpointError(
            f"{path}: the adapter holds {foreign[0]} whole, and modules_to_save does not name it",
            remedy="Take both files from one training.",
        )
    return Adapter(
        path,
        "peft",
        config.base,
        changes,
        saved,
        tables,
        config.keeps_tie,
        adapts=lambda module, layers: config.adapts(module),
    )


def _parsed(path: Path, key: str) -> tuple[str, str]:
    """(name of the module, part) of a key."""
    name = key.removeprefix(PREFIX)
    for part, pattern in _PARTS.items():
        match = pattern.fullmatch(name)
        if match and not re.search(r"\.(lora_|token_adapter|ia3_)", match[1]):
            return match[1], part
    raise CheckpointError(
        f"{path}: the adapter holds {key!r:.120}, which edgellama does not merge", remedy=MERGE
    )


def _change(path: Path, config: PeftConfig, module: str, named: Mapping[str, Tensor]) -> LowRank:
    embedding = "lora_embedding_A" in named or "lora_embedding_B" in named
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if first not in named or second not in named:
        missing = first if first not in named else second
        raise CheckpointError(
            f"{path}: {module} has no {missing}", remedy="Take the file from the training again."
        )
    # PEFT's embedding computes x @ (B @ A).T, so the two change places.
    down, up = (named[second].T, named[first].T) if embedding else (named[first], named[second])
    rank = config.rank_of(module)
    if down.dim() != 2 or up.dim() != 2 or not len(down) == up.shape[1] == rank:
        raise CheckpointError(
            f"{path}: {module} has matrices {list(named[first].shape)} and {list(named[second].shape)}, and rank {rank} "
            f"by {CONFIG}",
            remedy="Take both files from one training.",
        )
    magnitude = named.get("lora_magnitude_vector")
    if (magnitude is not None) != config.dora or (magnitude is not None and embedding):
        what = (
            "DoRA on an embedding"
            if embedding
            else "use_dora and lora_magnitude_vector contradict each other"
        )
        raise CheckpointError(f"{path}: {module}: {what}", remedy=MERGE)
    return LowRank(
        down.float().contiguous(),
        up.float().contiguous(),
        config.scale_of(module),
        None if magnitude is None else magnitude.float().flatten(),
    )


def _check_targets(path: Path, config: PeftConfig, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raises CheckpointError for a target or a whole module of the config that the file holds nothing of."""
    changed = [m for m, named in parts.items() if any(part.startswith("lora_") for part in named)]
    if not isinstance(config.targets, str):
        for name in config.targets:
            if not any(is_named(module, (name,)) for module in changed):
                raise _incomplete(path, "target_modules", name)
    for name in config.whole:
        if not any(is_named(m, (name,)) for m, named in parts.items() if {"whole", "bias"} & named.keys()):
            raise _incomplete(path, "modules_to_save", name)


def _incomplete(path: Path, key: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {key} names {name!r:.80}, and the weights hold nothing for it",
        remedy="Take both files from one training; the weights may be cut off.",
    )
