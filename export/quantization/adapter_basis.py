"""Adapters in the basis of a quantized model.

A quantized model computes the function of its checkpoint with other weights: rotated, with norms folded into
linears, with columns of one linear scaled and rows of the one before divided (AWQ), with norms that recovery
trained. An adapter was trained on the checkpoint's own weights, so its two matrices go the same way:

- The columns of `down` read the input of the linear. They take what the columns of its weight take.
- The rows of `up` write its output. They take what the rows of its weight take.

A foreign adapter on the quantized weights would be silently wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.errors import LoweringError
from edgellama.export.quantization.awq import of_source, shared_channels
from edgellama.export.quantization.rotation import Sides, rotated
from edgellama.model.adapted import Pair, Pairs
from edgellama.model.layerwise import SHARED_INPUTS, SharedInput
from edgellama.model.llama import Llama, RMSNorm

_READ_BY = {linear: reading for reading in SHARED_INPUTS for linear in reading.linears}
_WRITTEN_BY = {reading.source: reading for reading in SHARED_INPUTS if not reading.source.endswith("norm")}


class AdapterBasis:
    """Change of basis from a checkpoint's linears to those of the model that was quantized from it.

    Args:
        checkpoint: the full-precision checkpoint, not rotated.
        rotation: the recipe's rotation.
        model: the quantized model. Its norms and its `folds` are read.
    """

    def __init__(self, checkpoint: Checkpoint, rotation: str, model: Llama) -> None:
        self._sides = None if rotation == "none" else Sides(checkpoint, hidden=rotation == "hidden")
        self._rotated, self._model = rotated(checkpoint, rotation), model

    def moved(self, pairs: Pairs) -> dict[str, Pair]:
        """The adapter that changes the quantized model as `pairs` change the checkpoint.

        Raises LoweringError if a norm became zero.
        """
        return {name: self._moved(name, pair) for name, pair in pairs.items()}

    def _moved(self, name: str, pair: Pair) -> Pair:
        down, up = pair.down, pair.up
        if self._sides is not None:
            down = self._sides.columns(f"{name}.weight", down)
            up = self._sides.rows(f"{name}.weight", up)
        return Pair(
            (down * self.column_scale(name)).contiguous(), (up / self.row_scale(name)[:, None]).contiguous()
        )

    def column_scale(self, name: str) -> Tensor:
        """Factor of each input column of linear `name` beyond the rotation, float32 [columns]."""
        layer, reading = _split(name, _READ_BY)
        assert reading is not None
        source = f"{layer}{reading.source}"
        if not reading.source.endswith("norm"):
            columns = self._model.get_submodule(name).get_parameter("weight").shape[1]
            return self._model.folds.get(source, torch.ones(columns))
        before = self._rotated.tensor(f"{source}.weight")
        after = self._model.get_submodule(source).get_parameter("weight").detach()
        # A channel whose norm is zero reads zeros on both sides.
        scale = torch.where(before == after, 1.0, before / after)
        if not bool(torch.isfinite(scale).all()):
            raise LoweringError(
                f"{source} has a weight of zero after quantization, so no adapter can be moved to it",
                remedy="Merge the adapter (--adapter), or use a recipe without calibration (int4-fast).",
            )
        return scale

    def row_scale(self, name: str) -> Tensor:
        """Divisor of each output row of linear `name` beyond the rotation, float32 [rows]."""
        layer, reading = _split(name, _WRITTEN_BY)
        scale = None if reading is None else self._model.folds.get(f"{layer}{reading.source}")
        if reading is None or scale is None:
            return torch.ones(self._model.get_submodule(name).get_parameter("weight").shape[0])
        return of_source(scale, shared_channels(reading, self._model.config))


def _split(name: str, readings: dict[str, SharedInput]) -> tuple[str, SharedInput | None]:
    """(prefix of the layer, entry of the linear) of a name such as `model.layers.0.mlp.up_proj`."""
    index = name.split(".")[2]
    prefix = f"model.layers.{index}."
    return prefix, readings.get(name.removeprefix(prefix))


def float_model(checkpoint: Checkpoint, rotation: str, model: Llama) -> Llama:
    """The checkpoint in float32, in the basis of the quantized `model`: the same function as the checkpoint's."""
    basis = AdapterBasis(checkpoint, rotation, model)
    floats = load_llama(rotated(checkpoint, rotation), model.context_length)
    for name, module in floats.named_modules():
        if isinstance(module, RMSNorm) and name != "model.norm":
            module.weight = nn.Parameter(
                model.get_submodule(name).get_parameter("weight").detach(), requires_grad=False
            )
        elif isinstance(module, nn.Linear) and module is not floats.lm_head:
            rows = basis.row_scale(name)
            weight = module.weight.detach() * basis.column_scale(name) / rows[:, None]
            module.weight = nn.Parameter(weight, requires_grad=False)
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.detach() / rows, requires_grad=False)
    return floats
