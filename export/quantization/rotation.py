"""Rotation: the same function in another basis, in which weights and activations have fewer outliers.

The rotations are those of QuaRot (Ashkboos et al. 2024), and R1 and R2 of SpinQuant (Liu et al. 2024).

`values` rotates the output of v_proj, which o_proj reads, in each head (R2). `hidden` also rotates the
residual stream (R1). Modules that write to the stream are multiplied by an orthogonal matrix, and modules
that read it by its inverse. RMSNorm commutes with the rotation, once its weight is folded into the linears
after it.

No mean is subtracted: that is for LayerNorm, and would change the function of a Llama. The lm_head absorbs
the final norm's weight, so it differs from the embedding, and a tied table is untied.
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
_HIDDEN = 0  # seed of the residual stream's matrix; the seed of a layer's values is its index + 1
_ROWS = 4096  # rotated at a time: a float64 copy of a whole table would take gigabytes
_NORM_BEFORE = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm"),
    **dict.fromkeys(("gate_proj", "up_proj"), "post_attention_layernorm"),
}
_FACTOR = 64  # largest size of one Hadamard factor


def rotated_config(config: LlamaConfig, rotation: str) -> LlamaConfig:
    """Config of a checkpoint after a recipe's `rotation`: `hidden` unties the lm_head."""
    return replace(config, tie_word_embeddings=False) if rotation == "hidden" else config


def rotated(checkpoint: Checkpoint, rotation: str) -> Checkpoint:
    """Checkpoint with the same function, up to rounding. Its tensors are rotated when they are read."""
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
    """Orthogonal matrix [size, size]: a Kronecker product of small matrices, with a sign for each column.

    factors: float64 [n, n] each. signs: 1 or -1, float64 [size].
    """

    factors: tuple[Tensor, ...]
    signs: Tensor

    @classmethod
    def of(cls, size: int, seed: int) -> Rotation:
        """Random rotation: Hadamard factors for the power of two in `size`, a random factor for its odd part.

        The signs are random too.
        """
        generator = torch.Generator().manual_seed(seed)
        odd = size // (size & -size)
        factors = [torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64)).Q]
        remaining = size // odd
        while remaining > 1:
            factors.append(_hadamard(min(remaining, _FACTOR)))
            remaining //= len(factors[-1])
        return cls(tuple(factors), (torch.randint(0, 2, (size,), generator=generator) * 2 - 1).double())

    def __call__(self, x: Tensor) -> Tensor:
        """Multiplies float32 [rows, size] by the matrix. Sums are in float64."""
        return torch.cat([self._times(rows.double()).float() for rows in x.split(_ROWS)])

    def _times(self, x: Tensor) -> Tensor:
        y: Tensor = x.reshape(-1, *map(len, self.factors))
        for axis, factor in enumerate(self.factors, 1):
            y = (y.movedim(axis, -1) @ factor).movedim(-1, axis)
        return y.reshape(x.shape) * self.signs

    def heads(self, x: Tensor) -> Tensor:
        """Multiplies each head of float32 [rows, heads * size] by the matrix."""
        return self(x.reshape(-1, len(self.signs))).reshape(x.shape)


def _hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix with columns of norm 1, float64 [size, size]. size: a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(pair, matrix)
    scaled: Tensor = matrix / size**0.5
    return scaled


def _reader(checkpoint: Checkpoint, *, hidden: bool) -> Callable[[str], Tensor]:
    """Function from a tensor's name to the rotated tensor."""
    tied = checkpoint.config.tie_word_embeddings
    sides = Sides(checkpoint, hidden=hidden)

    @one_thread()
    def read(name: str) -> Tensor:
        module, attribute = name.split(".")[-2:]
        if hidden and module.endswith("norm"):
            return torch.ones_like(checkpoint.tensor(name))
        weight = checkpoint.tensor(EMBEDDING if name == HEAD and tied else name)
        if module == "v_proj":  # this order decides the last bits
            weight = sides.rows(name, weight)
        if attribute == "weight":
            weight = sides.columns(name, weight)
        if module != "v_proj":
            weight = sides.rows(name, weight)
        return weight.contiguous()

    return read


class Sides:
    """The two sides of the weights of a checkpoint, each brought to the rotated basis on its own.

    A product of two matrices in place of a weight, such as an adapter's, is rotated factor by factor.

    Args:
        checkpoint: the checkpoint, not rotated.
        hidden: True for rotation `hidden`, False for `values`.
    """

    def __init__(self, checkpoint: Checkpoint, *, hidden: bool) -> None:
        self.checkpoint, self.hidden = checkpoint, hidden
        self._rotation = cache(Rotation.of)

    def columns(self, name: str, factor: Tensor) -> Tensor:
        """Rows that multiply the input of weight `name`: float32 [n, columns] -> the same shape."""
        *layer, module, _ = name.split(".")
        if module == "o_proj":
            factor = self._values(layer)(factor)
        if self.hidden and name == EMBEDDING:
            return self._stream()(factor)
        if self.hidden and module not in ("o_proj", "down_proj"):
            norm = NORM if name == HEAD else f"{'.'.join(layer[:3])}.{_NORM_BEFORE[module]}.weight"
            factor = self._stream()(factor * self.checkpoint.tensor(norm))
        return factor

    def rows(self, name: str, factor: Tensor) -> Tensor:
        """Output of weight `name`, float32 [rows, n], or its bias [rows] -> the same shape."""
        *layer, module, _ = name.split(".")
        if module == "v_proj":
            factor = _written(factor, self._values(layer))
        if self.hidden and module in ("o_proj", "down_proj"):
            factor = _written(factor, self._stream())
        return factor

    def _values(self, layer: list[str]) -> Callable[[Tensor], Tensor]:
        return self._rotation(self.checkpoint.config.head_dim, int(layer[2]) + 1).heads

    def _stream(self) -> Rotation:
        return self._rotation(self.checkpoint.config.hidden_size, _HIDDEN)


def _written(weight: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies `turn` to the output side of a weight [rows, columns] or a bias [rows]."""
    return turn(weight.T).T if weight.dim() == 2 else turn(weight[None])[0]
