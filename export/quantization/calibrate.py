"""Calibrated quantization, one decoder layer after the other, as the model will run.

Two streams of hidden states pass through the layers: the full-precision model's, by which scalings are folded, and the
quantized model's own, in which everything before is quantized already; what a linear reads in it decides its codes.
Of the layers' float weights only one layer's are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.weights import OUTSIDE, load_weights
from edgellama.errors import RecipeError
from edgellama.export.quantization.awq import choose_fold, fold, shared_channels
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.gptq import Inputs, damped, gptq
from edgellama.export.quantization.scale_search import weighted_scales
from edgellama.export.quantization.tensors import TensorRow, apply_recorded, in_order, round_modules
from edgellama.host.progress import Progress
from edgellama.host.threads import Workers, workers
from edgellama.model.layerwise import SHARED_INPUTS, SharedInput, layer_of, run_layer
from edgellama.model.llama import DecoderLayer, Llama
from edgellama.model.quantized import Codes
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import Recipe, Scheme
from edgellama.text.calibration import Calibration


@dataclass(frozen=True)
class CodeChooser:
    """How a calibrated algorithm chooses the codes of a weight, and whether it folds."""

    choose: Callable[[Tensor, Inputs, Scheme], Codes]
    folds: bool


METHODS: dict[str, CodeChooser] = {
    "scales": CodeChooser(
        lambda weight, inputs, scheme: weighted_scales(weight, inputs.hessian.diag(), scheme), folds=False
    ),
    "gptq": CodeChooser(gptq, folds=True),
    "recover": CodeChooser(gptq, folds=True),  # and `recovery` afterwards
}


@dataclass
class _Streams:
    """Hidden states, float32 [T, hidden_size], one a window: of the full-precision model and of the quantized one."""

    full: list[Tensor]
    quantized: list[Tensor]


@torch.no_grad()
def calibrated_llama(
    checkpoint: Checkpoint,
    recipe: Recipe,
    context_length: int,
    calibration: Calibration,
    *,
    store: LayerStore,
    progress: Progress,
) -> tuple[Llama, list[TensorRow]]:
    """The model quantized by `recipe.algorithm` on `calibration`, and a row for every tensor in it.

    Layers that `store` holds are taken from there; the others are added to it as they are done.
    """
    if recipe.algorithm not in METHODS:
        raise RecipeError(
            f"recipe {recipe.name!r} chooses schemes to a budget first",
            remedy="Export it with --max-bytes or --max-kl.",
        )
    config, method = checkpoint.config, METHODS[recipe.algorithm]
    schemes = check_recipe(recipe, module_shapes(config.tensor_shapes(), config.tie_word_embeddings))
    with torch.device("meta"):
        model = Llama(config, context_length)
    load_weights(model, checkpoint, OUTSIDE)
    tokens = [torch.tensor(window) for window in calibration.windows]
    full = [model.model.embed_tokens(window) for window in tokens]
    rows = round_modules(model, {n: s for n, s in schemes.items() if not n.startswith("model.layers.")})
    streams = _Streams(full, [model.model.embed_tokens(window) for window in tokens])
    count = config.num_hidden_layers
    done = _stored(model, store)
    if done is not None:
        return model.eval(), in_order(model, schemes, [*rows, *done])
    with workers() as pool, progress.bar("calibrate", count, "layer") as bar:
        for index in range(count):
            prefix = f"model.layers.{index}."
            own = {n.removeprefix(prefix): scheme for n, scheme in schemes.items() if n.startswith(prefix)}
            load_weights(model, checkpoint, prefix, copy=True)  # they will be scaled in place
            moments = _advance_full(model, index, streams, pool)
            kept = store.load(index, model)
            if kept is None:
                if method.folds:
                    _fold(layer_of(model, index), own, moments, model)
                kept = _quantize_layer(model, index, own, streams, method, pool)
                store.save(index, model, kept)
            else:
                streams.quantized = run_layer(
                    layer_of(model, index), streams.quantized, config, own, pool, lambda *_: None
                )
            rows += kept
            bar.update(1)
            progress.tick(f"calibrated {index + 1} of {count} layers")
    return model.eval(), in_order(model, schemes, rows)


def _stored(model: Llama, store: LayerStore) -> list[TensorRow] | None:
    """The rows of all layers, given to `model`, if `store` holds every one: then no text need be read."""
    rows: list[TensorRow] = []
    for index in range(model.config.num_hidden_layers):
        kept = store.load(index, model)
        if kept is None:
            return None
        rows += kept
    return rows


def _advance_full(model: Llama, index: int, streams: _Streams, pool: Workers) -> dict[SharedInput, Tensor]:
    """Pass the full stream through a layer that is still in float: the second moments of all that is read in it."""
    moments: dict[SharedInput, Tensor] = {}

    def visit(reading: SharedInput, inputs: list[Tensor]) -> None:
        moments[reading] = second_moment(pool, inputs)

    streams.full = run_layer(layer_of(model, index), streams.full, model.config, {}, pool, visit)
    return moments


def _fold(
    layer: DecoderLayer,
    schemes: Mapping[str, Scheme | None],
    moments: Mapping[SharedInput, Tensor],
    model: Llama,
) -> None:
    """Fold a scaling before every reading whose linears become integers."""
    for reading in reversed(
        SHARED_INPUTS
    ):  # from the back: a fold changes the rows of its source, not their inputs
        chosen = next((s for s in map(schemes.get, reading.linears) if s is not None), None)
        if chosen is not None:
            weight = torch.cat(
                [layer.get_submodule(name).get_parameter("weight") for name in reading.linears]
            )
            shared = shared_channels(reading, model.config)
            fold(layer, reading, choose_fold(weight, moments[reading], chosen, shared), shared)


def _quantize_layer(
    model: Llama,
    index: int,
    schemes: Mapping[str, Scheme | None],
    streams: _Streams,
    method: CodeChooser,
    pool: Workers,
) -> list[TensorRow]:
    """Quantize a layer's linears as the quantized stream reaches them: rows of their tensors."""
    layer = layer_of(model, index)
    rows: list[TensorRow] = []

    def visit(reading: SharedInput, read: list[Tensor]) -> None:
        inputs = Inputs(damped(second_moment(pool, read)))
        for scheme in dict.fromkeys(schemes[name] for name in reading.linears):
            names = [name for name in reading.linears if schemes[name] == scheme]
            weights = [layer.get_submodule(name).get_parameter("weight") for name in names]
            found = [None] * len(names) if scheme is None else _chosen(weights, inputs, scheme, method, pool)
            for name, weight, codes in zip(names, weights, found, strict=True):
                rows.extend(apply_recorded(model, f"model.layers.{index}.{name}", weight, codes))

    streams.quantized = run_layer(layer, streams.quantized, model.config, schemes, pool, visit)
    return rows


def _chosen(
    weights: Sequence[Tensor], inputs: Inputs, scheme: Scheme, method: CodeChooser, pool: Workers
) -> list[Codes]:
    """Codes of weights that read the same inputs. Rows do not depend on each other, so two threads share them."""
    stacked = torch.cat(list(weights))
    _ = inputs.upper  # computed once, here
    halves = stacked.split(-(-len(stacked) // 2))
    done = list(pool.map(lambda half: method.choose(half, inputs, scheme), halves))
    sizes = [len(weight) for weight in weights]
    values = torch.cat([codes.values for codes in done]).split(sizes)
    scales = torch.cat([codes.scales for codes in done]).split(sizes)
    return [Codes(v.contiguous(), s.contiguous(), scheme) for v, s in zip(values, scales, strict=True)]


def second_moment(pool: Workers, inputs: Iterable[Tensor]) -> Tensor:
    """E[x x'] over all tokens: inputs float32 [T, n], one a window -> float64 [n, n]."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for product, tokens in pool.map(lambda x: (x.T @ x, len(x)), inputs):
        total, count = total + product.double(), count + tokens
    return total / count
