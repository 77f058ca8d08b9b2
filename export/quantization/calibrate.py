"""Calibrated quantization, one decoder layer after the other, on the quantized model's own inputs.

Two streams of hidden states pass through the layers. The full-precision stream decides the AWQ folds. The
quantized stream, in which all earlier modules are quantized already, supplies the inputs that decide each
linear's codes. The float weights of only one decoder layer are in memory at a time.
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
from edgellama.model.llama import Llama
from edgellama.model.quantized import Codes
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import Recipe, Scheme
from edgellama.text.calibration import Calibration


@dataclass(frozen=True)
class CodeChooser:
    """Calibrated algorithm: its function to choose codes, and if AWQ folds come before it."""

    choose: Callable[[Tensor, Inputs, Scheme], Codes]
    folds: bool


METHODS: dict[str, CodeChooser] = {
    "scales": CodeChooser(
        lambda weight, inputs, scheme: weighted_scales(weight, inputs.hessian.diag(), scheme), folds=False
    ),
    "gptq": CodeChooser(gptq, folds=True),
    "recover": CodeChooser(gptq, folds=True),  # followed by `distillation.recover`
}


@dataclass
class _Streams:
    """Hidden states of both models, float32 [T, hidden_size] for each window."""

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
    """Returns the model quantized by `recipe.algorithm`, and a row for every tensor in it.

    Args:
        checkpoint: the full-precision checkpoint, rotated if the recipe says so.
        recipe: schemes and algorithm.
        context_length: positions of the KV cache.
        calibration: windows of token ids.
        store: cache of quantized layers. Layers in it are loaded; finished ones are added.
        progress: reports to the user.

    Raises RecipeError for an algorithm that is not calibrated, and for schemes that do not fit the model.
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
    stored_rows = _stored(model, store, progress)
    if stored_rows is not None:
        return model.eval(), in_order(model, schemes, [*rows, *stored_rows])
    with workers() as pool, progress.bar("calibrate", count, "layer") as bar:
        for index in range(count):
            prefix = f"model.layers.{index}."
            own_schemes = {
                n.removeprefix(prefix): scheme for n, scheme in schemes.items() if n.startswith(prefix)
            }
            load_weights(model, checkpoint, prefix, copy=True)  # folds scale them in place
            moments = _advance_full(model, index, streams, pool)
            layer_rows = store.load(index, model, progress)
            if layer_rows is None:
                if method.folds:
                    _fold(index, own_schemes, moments, model)
                layer_rows = _quantize_layer(model, index, own_schemes, streams, method, pool)
                store.save(index, model, layer_rows)
            else:
                streams.quantized = run_layer(
                    layer_of(model, index), streams.quantized, config, own_schemes, pool, lambda *_: None
                )
            rows += layer_rows
            bar.update(1)
            progress.tick(f"calibrated {index + 1} of {count} layers")
    return model.eval(), in_order(model, schemes, rows)


def _stored(model: Llama, store: LayerStore, progress: Progress) -> list[TensorRow] | None:
    """Loads all layers into `model` and returns their rows. None if `store` lacks a layer.

    With all layers stored, no calibration text need be read.
    """
    rows: list[TensorRow] = []
    for index in range(model.config.num_hidden_layers):
        layer_rows = store.load(index, model, progress)
        if layer_rows is None:
            return None
        rows += layer_rows
    return rows


def _advance_full(model: Llama, index: int, streams: _Streams, pool: Workers) -> dict[SharedInput, Tensor]:
    """Passes the full-precision stream through a float layer; returns the second moment of each input."""
    moments: dict[SharedInput, Tensor] = {}

    def visit(reading: SharedInput, inputs: list[Tensor]) -> None:
        moments[reading] = second_moment(pool, inputs)

    streams.full = run_layer(layer_of(model, index), streams.full, model.config, {}, pool, visit)
    return moments


def _fold(
    index: int,
    schemes: Mapping[str, Scheme | None],
    moments: Mapping[SharedInput, Tensor],
    model: Llama,
) -> None:
    """Folds AWQ scales into the source of every shared input that quantized linears read.

    `model.folds` keeps those between two linears. Those of norms follow from the norms' weights.
    """
    layer = layer_of(model, index)
    # Back to front: a fold changes the rows of its source, but not the inputs of these rows.
    for reading in reversed(SHARED_INPUTS):
        scheme = next((s for s in map(schemes.get, reading.linears) if s is not None), None)
        if scheme is not None:
            weight = torch.cat(
                [layer.get_submodule(name).get_parameter("weight") for name in reading.linears]
            )
            shared = shared_channels(reading, model.config)
            scale = choose_fold(weight, moments[reading], scheme, shared)
            fold(layer, reading, scale, shared)
            if not reading.source.endswith("norm"):
                model.folds[f"model.layers.{index}.{reading.source}"] = scale


def _quantize_layer(
    model: Llama,
    index: int,
    schemes: Mapping[str, Scheme | None],
    streams: _Streams,
    method: CodeChooser,
    pool: Workers,
) -> list[TensorRow]:
    """Quantizes each linear of a layer when the quantized stream reaches it; returns their rows."""
    layer = layer_of(model, index)
    rows: list[TensorRow] = []

    def visit(reading: SharedInput, read: list[Tensor]) -> None:
        inputs = Inputs(damped(second_moment(pool, read)))
        for scheme in dict.fromkeys(schemes[name] for name in reading.linears):
            names = [name for name in reading.linears if schemes[name] == scheme]
            weights = [layer.get_submodule(name).get_parameter("weight") for name in names]
            all_codes = (
                [None] * len(names) if scheme is None else _chosen(weights, inputs, scheme, method, pool)
            )
            for name, weight, codes in zip(names, weights, all_codes, strict=True):
                rows.extend(apply_recorded(model, f"model.layers.{index}.{name}", weight, codes))

    streams.quantized = run_layer(layer, streams.quantized, model.config, schemes, pool, visit)
    return rows


def _chosen(
    weights: Sequence[Tensor], inputs: Inputs, scheme: Scheme, method: CodeChooser, pool: Workers
) -> list[Codes]:
    """Codes of weights that read the same inputs. Rows are independent, so two threads share them."""
    stacked = torch.cat(list(weights))
    _ = inputs.upper  # filled here, or both threads would compute it
    halves = stacked.split(-(-len(stacked) // 2))
    half_codes = list(pool.map(lambda half: method.choose(half, inputs, scheme), halves))
    sizes = [len(weight) for weight in weights]
    values = torch.cat([codes.values for codes in half_codes]).split(sizes)
    scales = torch.cat([codes.scales for codes in half_codes]).split(sizes)
    return [Codes(v.contiguous(), s.contiguous(), scheme) for v, s in zip(values, scales, strict=True)]


def second_moment(pool: Workers, inputs: Iterable[Tensor]) -> Tensor:
    """E[x x'] over all tokens: float32 [T, n] for each window -> float64 [n, n]."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for product, tokens in pool.map(lambda x: (x.T @ x, len(x)), inputs):
        total, count = total + product.double(), count + tokens
    return total / count
