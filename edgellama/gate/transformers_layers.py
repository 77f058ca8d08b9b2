"""A large checkpoint in transformers' own layers, one of which is in memory at a time.

transformers loads a model as a whole, which takes four bytes a parameter. Here its own config, decoder layers, norm
and rotary angles run as they are, and each layer gets its weights when it is reached. None of edgellama's readers
takes part: the files are opened by safetensors, by the names that transformers' model has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

_HEAD_ROWS = 8192  # of the head that are float32 at a time
_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@torch.no_grad()
def logits_and_angles(
    path: Path, tokens: Sequence[int], positions: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Logits after each token, and cosines and sines of the rotary angles.

    Args:
        path: directory of the checkpoint.
        tokens: a text.
        positions: of the angles, int64 [positions].

    Returns float32 [tokens, vocab_size] and twice float32 [positions, head_dim], or None if the files do not hold
    exactly the weights that transformers' model has.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    files = _files(path)
    config: Any = LlamaConfig.from_pretrained(str(path), local_files_only=True)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).eval()
    expected = {name for name, _ in model.named_parameters()} | {_TABLE}
    if files is None or set(files) - {_HEAD} != expected - {_HEAD}:
        return None
    head = _TABLE if config.tie_word_embeddings else _HEAD
    if head not in files:
        return None
    body = model.model
    body.rotary_emb = LlamaRotaryEmbedding(config)
    _load(body.norm, (), files=files, prefix="model.norm.")
    for index, layer in enumerate(body.layers):
        prefix = f"model.layers.{index}."
        layer.register_forward_pre_hook(partial(_load, files=files, prefix=prefix))
        layer.register_forward_hook(_release)
    embedded = _read(files, _TABLE)[torch.tensor(tokens)].float()
    hidden = body(inputs_embeds=embedded[None], use_cache=False).last_hidden_state[0]
    pieces = (F.linear(hidden, rows.float()) for rows in _read(files, head).split(_HEAD_ROWS))
    cosines, sines = body.rotary_emb(torch.zeros(1, 1, 1), positions[None])
    return torch.cat(list(pieces), -1), cosines[0], sines[0]


def _files(path: Path) -> Mapping[str, Path] | None:
    """File of each weight, as transformers chooses them; None for a directory without safetensors."""
    if (path / _SINGLE).is_file():
        with safe_open(path / _SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), path / _SINGLE)
    if (path / _INDEX).is_file():
        names: dict[str, str] = json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: path / file for name, file in names.items()}
    return None


def _read(files: Mapping[str, Path], name: str) -> Tensor:
    with safe_open(files[name], framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _load(module: nn.Module, _: object, *, files: Mapping[str, Path], prefix: str) -> None:
    names = [name for name, _ in module.named_parameters()]
    module.load_state_dict({name: _read(files, prefix + name).float() for name in names}, assign=True)


def _release(module: nn.Module, *_: object) -> None:
    module.load_state_dict({n: p.to("meta") for n, p in module.named_parameters()}, assign=True)
