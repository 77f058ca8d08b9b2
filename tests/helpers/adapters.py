"""LoRA directories of the tiny model, written by peft with random weights, and the logits that peft computes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor

from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.weights import load_llama

TOKENS = (1, 17, 200, 45, 99, 5, 311, 64)  # of any text; every one below the tiny model's vocabulary
ATTENTION = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Q0 = "model.layers.0.self_attn.q_proj"  # [128, 128]
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "models/model",
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["q_proj"],
    "layers_to_transform": [0],
    "bias": "none",
}
Rows = npt.NDArray[np.float32]


def matrices(module: str = Q0, rows: int = 128, columns: int = 128, seed: int = 0) -> dict[str, Tensor]:
    """Random matrices of rank 2 of a module, under peft's keys."""
    generator = torch.Generator().manual_seed(rows + columns + seed)
    return {
        f"base_model.model.{module}.lora_A.weight": torch.randn(2, columns, generator=generator),
        f"base_model.model.{module}.lora_B.weight": 0.1 * torch.randn(rows, 2, generator=generator),
    }


def write_adapter(
    path: Path, tensors: Mapping[str, Tensor] | None = None, *, seed: int = 0, **changes: Any
) -> Path:
    """Writes an adapter of one module by hand. changes: of adapter_config.json."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(dict(matrices(seed=seed) if tensors is None else tensors), path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}), encoding="utf-8")
    return path


RULE: dict[str, Any] = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"down_proj": 11}, "use_rslora": True}


def adapter_of_all(checkpoint: Checkpoint, path: Path, *, seed: int = 0, size: float = 0.03) -> Path:
    """Writes a rsLoRA adapter of every linear of the decoder, with another rank of v and another alpha of down.

    size: of the second matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in checkpoint.config.tensor_shapes().items():
        if name.removesuffix(".weight").rpartition(".")[2] in ALL:
            rank = 3 if "v_proj" in name else 2
            key = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, shape[1], generator=generator)
            tensors[f"{key}.lora_B.weight"] = size * torch.randn(shape[0], rank, generator=generator)
    return write_adapter(path, tensors, target_modules=list(ALL), layers_to_transform=None, **RULE)


@dataclass(frozen=True)
class Trained:
    """Directory of an adapter, and peft's own logits of TOKENS, float32 [tokens, vocab_size]."""

    path: Path
    logits: Rows


def train(
    base: Path,
    path: Path,
    *,
    seed: int = 0,
    rows: int | None = None,
    safe: bool = True,
    save_embedding_layers: Any = "auto",
    prepare: Callable[[Any], None] | None = None,
    **options: Any,
) -> Trained:
    """Writes an adapter with random weights, which stand for a training's.

    rows: number of the vocabulary's tokens after a resize; None to keep it. prepare: called with the base model.
    options: of peft's LoraConfig.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if rows is not None:
            model.resize_token_embeddings(rows)
        if prepare is not None:
            prepare(model)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": list(ATTENTION), "task_type": "CAUSAL_LM"}
        tuned = get_peft_model(model, LoraConfig(**{**settings, **options}))
        generator = torch.Generator().manual_seed(seed)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.1 * noise * parameter.data.std().clamp(min=0.1)
        tuned.eval()
        with torch.no_grad():
            logits = tuned(torch.tensor([TOKENS])).logits[0].numpy()
        tuned.save_pretrained(str(path), safe_serialization=safe, save_embedding_layers=save_embedding_layers)
    return Trained(path, logits)


def weighted_sum(base: Path, adapters: Sequence[tuple[Path, float]]) -> Rows:
    """peft's logits of TOKENS with several adapters, each with its weight, float32 [tokens, vocab_size]."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        names = [f"adapter{i}" for i in range(len(adapters))]
        model = PeftModel.from_pretrained(plain, adapters[0][0], adapter_name=names[0])
        for name, (path, _) in zip(names[1:], adapters[1:], strict=True):
            model.load_adapter(path, adapter_name=name)
        model.add_weighted_adapter(names, [w for _, w in adapters], "sum", combination_type="cat")
        model.set_adapter("sum")
        rows: Rows = model.eval()(torch.tensor([TOKENS])).logits[0].numpy()
    return rows


def logits_of(checkpoint: Checkpoint) -> Rows:
    """Logits of TOKENS by edgellama's own model, float32 [tokens, vocab_size]."""
    model = load_llama(checkpoint, 16)
    with torch.no_grad():
        rows: Rows = model(torch.tensor([TOKENS]))[0].numpy()
    return rows
