"""Rotation: the same function in another basis, in which weights and activations have fewer outliers.

`values` turns what a head passes from v_proj to o_proj. `hidden` also turns the residual stream: everything that writes to
it is multiplied by an orthogonal matrix, everything that reads it by the inverse, and RMSNorm does not notice, once its
weight is in the linears that follow (Ashkboos et al. 2024, QuaRot; R1 and R2 of Liu et al. 2024, SpinQuant). No mean is
subtracted from anything: that is for LayerNorm, and would be another function here.

The output layer then holds the final norm's weight, so that it is no longer the embedding: a tied table is untied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from edgellama.checkpoints import Checkpoint
from edgellama.host.threads import one_thread
from edgellama.model.config import LlamaConfig

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_HIDDEN = 0  # seed of the residual stream's matrix; those of values have the layer's index and one
_ROWS = 4096  # turned at a time: a float64 copy of a whole table would be gigabytes
_NORM_BEFORE = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm"),
    **dict.fromkeys(("gate_proj", "up_proj"), "post_attention_layernorm"),
}
_FACTOR = 64  # the largest Hadamard matrix that is multiplied by


def rotated_config(config: LlamaConfig, rotation: str) -> LlamaConfig:
    """The config of a checkpoint that was rotated by a recipe's `rotation`."""
    return replace(config, tie_word_embeddings=False) if rotation == "hidden" else config


def rotated(checkpoint: Checkpoint, rotation: str) -> Checkpoint:
    """A checkpoint that computes the same, to rounding, and whose tensors are rotated as they are read."""
    if rotation == "none":
        return checkpoint
    config = rotated_config(checkpoint.config, rotation)
    infos = dict(checkpoint.infos)
    if HEAD in config.tensor_shapes():
        infos.setdefault(HEAD, infos[EMBEDDING])
    read = _reader(checkpoint, hidden=rotation == "hidden")
    return replace(checkpoint, config=config, infos=infos, read=read)


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix [size, size] as the Kronecker product of small ones, its columns with signs of their own."""

    factors: tuple[Tensor, ...]
    signs: Tensor

    @classmethod
    def of(cls, size: int, seed: int) -> Rotation:
        """Hadamard matrices, as far as `size` is a power of two, and a random matrix for its odd part; random signs."""
        generator = torch.Generator().manual_seed(seed)
        odd = size // (size & -size)
        factors = [torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64)).Q]
        left = size // odd
        while left > 1:
            factors.append(_hadamard(min(left, _FACTOR)))
            left //= len(factors[-1])
        return cls(tuple(factors), (torch.randint(0, 2, (size,), generator=generator) * 2 - 1).double())

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [rows, size] times the matrix, summed in float64."""
        return torch.cat([self._times(rows.double()).float() for rows in x.split(_ROWS)])

    def _times(self, x: Tensor) -> Tensor:
        y: Tensor = x.reshape(-1, *map(len, self.factors))
        for axis, factor in enumerate(self.factors, 1):
            y = (y.movedim(axis, -1) @ factor).movedim(-1, axis)
        return y.reshape(x.shape) * self.signs

    def heads(self, x: Tensor) -> Tensor:
        """float32 [rows, heads * size], each head times the matrix."""
        return self(x.reshape(-1, len(self.signs))).reshape(x.shape)


def _hadamard(size: int) -> Tensor:
    """Sylvester's, with columns of length one, float64 [size, size]; size is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(pair, matrix)
    scaled: Tensor = matrix / size**0.5
    return scaled


def _reader(checkpoint: Checkpoint, *, hidden: bool) -> Callable[[str], Tensor]:
    config, rotation = checkpoint.config, cache(Rotation.of)

    @one_thread()
    def read(name: str) -> Tensor:
        *layer, module, attribute = name.split(".")
        if hidden and module.endswith("norm"):
            return torch.ones_like(checkpoint.tensor(name))
        weight = checkpoint.tensor(EMBEDDING if name == HEAD and config.tie_word_embeddings else name)
        if module in ("v_proj", "o_proj"):
            values = rotation(config.head_dim, int(layer[2]) + 1).heads
            if module == "v_proj":
                weight = _written(weight, values)
            elif attribute == "weight":
                weight = values(weight)
        if hidden:
            stream = rotation(config.hidden_size, _HIDDEN)
            if module in ("o_proj", "down_proj"):
                weight = _written(weight, stream)
            elif name == EMBEDDING:
                weight = stream(weight)
            elif attribute == "weight":
                norm = NORM if name == HEAD else f"{'.'.join(layer[:3])}.{_NORM_BEFORE[module]}.weight"
                weight = stream(weight * checkpoint.tensor(norm))
        return weight.contiguous()

    return read


def _written(weight: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """A weight [rows, columns] or a bias [rows] whose results are turned."""
    return turn(weight.T).T if weight.dim() == 2 else turn(weight[None])[0]
