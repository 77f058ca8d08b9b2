"""Reader of Meta's checkpoints: consolidated.*.pth, params.json and tokenizer.model.

Names, shapes and the row order for RoPE become those of Hugging Face. Model-parallel shards stay in their
mapped files and are joined one tensor at a time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from edgellama.checkpoints.checkpoint import Checkpoint, TensorInfo
from edgellama.checkpoints.meta_params import meta_config, positive_int, read_params
from edgellama.checkpoints.pickles import DTYPES, load_pickle
from edgellama.errors import CheckpointError
from edgellama.text.stop_tokens import find_stop_tokens, stop_notes
from edgellama.text.tokenizer import Tokenizer

# Meta's name -> (Hugging Face name, dimension along which shards are joined). None: every shard holds the
# full tensor. "embedding": Llama 2 splits it by columns and Llama 3 by rows; the shape decides.
NAMES: dict[str, tuple[str, int | str | None]] = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", "embedding"),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}
LAYER_NAMES: dict[str, tuple[str, int | str | None]] = {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}

_REMEDY = (
    "Give the directory as Meta distributes it: params.json, consolidated.00.pth and on, tokenizer.model."
)


@dataclass(frozen=True)
class _Sharded:
    """Parts of one tensor, one from each shard.

    dimension: Dimension along which the parts are joined; None if each part is the full tensor.
    """

    name: str
    parts: tuple[Tensor, ...]
    dimension: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        if self.dimension is not None:
            shape[self.dimension] *= len(self.parts)
        return tuple(shape)

    def join(self) -> Tensor:
        """The full tensor; with a single shard, a view of the mapped file.

        Raises CheckpointError if the shards hold different copies of a tensor that is not split.
        """
        if self.dimension is not None:
            return torch.cat(self.parts, dim=self.dimension)
        first, *others = self.parts
        if not all(torch.equal(first, other) for other in others):
            raise CheckpointError(
                f"{self.name} differs between the shards, and every shard should hold the same",
                remedy="The shards are not of one model; take them all from the same download.",
            )
        return first


def open_meta(path: Path) -> Checkpoint:
    """Opens Meta's directory at `path`. The context length is `max_seq_len`, or else the released model's.

    Raises CheckpointError if a part is damaged, missing, quantized or not the plain Llama. Raises
    TokenizerError for the tokenizer.
    """
    params = read_params(path / "params.json")
    dim = positive_int(params, "dim")
    files = _shard_files(path)
    tensors = _sharded([_load(file) for file in files], files, dim=dim)
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{path}: no tok_embeddings.weight, a matrix, in {files[0].name}", remedy=_REMEDY
        )
    notes: tuple[str, ...] = ()
    tied = _tied(tensors)
    if tied:
        del tensors["lm_head.weight"]
        notes = ("output.weight equals tok_embeddings.weight: the embedding is tied",)
    tokenizer = Tokenizer.from_directory(path)
    config = meta_config(params, tokenizer, rows=embedding.shape[0], tied=tied)
    stops = find_stop_tokens({"Meta's model code": config.eos_token_ids}, tokenizer, ask_tokenizer=False)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def read(name: str) -> Tensor:
        weight = tensors[name].join()
        projection = name.split(".")[-2]
        return half_split(weight, heads[projection]) if projection in heads else weight

    return Checkpoint(
        path=path,
        format="meta",
        config=config,
        infos={name: _info(tensor) for name, tensor in tensors.items()},
        read=read,
        tokenizer=tokenizer,
        files=files,
        notes=(*notes, *stop_notes(stops, tokenizer, asked=1)),
        stop_tokens=stops,
    )


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of wq or wk in Hugging Face order: [heads * D, columns], the same shape.

    RoPE rotates neighbours (2i, 2i + 1) of a head in Meta's code, and pairs (i, i + D / 2) in Hugging Face.
    """
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _shard_files(path: Path) -> tuple[Path, ...]:
    """Shards from consolidated.00.pth on. Raises CheckpointError for a gap, or if there are none."""
    files = sorted(path.glob("consolidated.*.pth"))
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(files))]
    if not files or [file.name for file in files] != expected:
        raise CheckpointError(
            f"{path}: found {[file.name for file in files] or 'no consolidated.*.pth'}, "
            f"expected consolidated.00.pth and on, without a gap",
            remedy=_REMEDY,
        )
    return tuple(files)


def _load(file: Path) -> dict[str, Tensor]:
    """Tensors of one shard by Meta's names, mapped but not read."""
    shard = load_pickle(file)
    tensors: dict[str, Tensor] = {}
    for name, tensor in shard.items():
        if name == "rope.freqs":
            continue  # follows from params.json
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{file}: {name} has dtype {tensor.dtype}, expected float32, float16 or bfloat16",
                remedy="Give the full-precision checkpoint: edgellama quantizes it itself, and needs it as the reference.",
            )
        tensors[name] = tensor
    return tensors


def _sharded(shards: list[dict[str, Tensor]], files: tuple[Path, ...], *, dim: int) -> dict[str, _Sharded]:
    """All tensors by Hugging Face name. Unknown names stay as they are; the check in open.py refuses them."""
    tensors: dict[str, _Sharded] = {}
    for name in dict.fromkeys(name for shard in shards for name in shard):
        lacking = [file.name for file, shard in zip(files, shards, strict=True) if name not in shard]
        if lacking:
            raise CheckpointError(f"{files[0].parent}: {name} is missing from {lacking[0]}", remedy=_REMEDY)
        parts = tuple(shard[name] for shard in shards)
        hf_name, rule = _hf_name(name)
        if rule == "embedding":
            rule = 1 if parts[0].shape[-1:] == (dim // len(parts),) else 0
        dimension = rule if isinstance(rule, int) and len(parts) > 1 else None
        shapes = [shape for shape, _ in groupby(tuple(part.shape) for part in parts)]
        if len(shapes) > 1 or (dimension is not None and len(shapes[0]) != 2):
            raise CheckpointError(
                f"{files[0].parent}: the shards hold {name} as {shapes}, expected matrices of one shape",
                remedy="The shards are not of one model; take them all from the same download.",
            )
        tensors[hf_name] = _Sharded(name, parts, dimension)
    return tensors


def _hf_name(name: str) -> tuple[str, int | str | None]:
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if layer and layer[2] in LAYER_NAMES:
        hf_name, rule = LAYER_NAMES[layer[2]]
        return f"model.layers.{layer[1]}.{hf_name}", rule
    return NAMES.get(name, (name, None))


def _tied(tensors: Mapping[str, _Sharded]) -> bool:
    """True if output.weight equals the embedding, as in the files of Llama 3.2 1B and 3B."""
    if "lm_head.weight" not in tensors:
        return False
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    if embedding.shape != head.shape:
        return False
    if embedding.dimension == head.dimension and not torch.equal(embedding.parts[0][0], head.parts[0][0]):
        return False  # one row identifies most untied models without reading the files
    return torch.equal(embedding.join(), head.join())


def _info(tensor: _Sharded) -> TensorInfo:
    parts = tensor.parts if tensor.dimension is not None else tensor.parts[:1]
    return TensorInfo(DTYPES[tensor.parts[0].dtype], tensor.shape, sum(part.nbytes for part in parts))
