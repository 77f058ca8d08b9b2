"""Calibrated quantization, one decoder layer after the other, on the quantized model's own inputs.

One stream of hidden states passes through the layers. All modules before it are quantized already, and its
inputs to each linear decide that linear's codes. The AWQ folds of a layer are decided before any code of it,
by a part of the stream that passes through the float layer. The float weights of only one decoder layer are
in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from edgellama.export.quantization.second_moments import second_moment
from edgellama.export.quantization.tensors import TensorRow, apply_recorded, in_order, round_modules
from edgellama.host.progress import Pace, Progress
from edgellama.host.threads import Workers, workers
from edgellama.model.activations import INT8_PER_TOKEN
from edgellama.model.layer_pass import pass_layer
from edgellama.model.layerwise import SHARED_INPUTS, SharedInput, layer_of, run_layer
from edgellama.model.llama import Llama
from edgellama.model.quantized import Codes
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import Recipe, Scheme
from edgellama.text.calibration import Calibration


@dataclass(frozen=True)
class CodeChooser:
    """Calibrated algorithm: its function to choose codes, and if it reads the whole second moment.

    AWQ folds come before an algorithm that does.
    """

    choose: Callable[[Tensor, Inputs, Scheme], Codes]
    whole: bool


METHODS: dict[str, CodeChooser] = {
    "scales": CodeChooser(
        lambda weight, inputs, scheme: weighted_scales(weight, inputs.hessian.diag(), scheme), whole=False
    ),
    "gptq": CodeChooser(gptq, whole=True),
    "recover": CodeChooser(gptq, whole=True),  # followed by `distillation.recover`
}

FOLD_TOKENS = 2048  # on which folds are decided; each is one of six exponents of the inputs' rms
# Weights of a work item. Fewer make more items for many threads, and each has a cost of its own.
PIECE = 2**20
FEWEST_ROWS = 256


Moments = dict[SharedInput, Tensor]  # float32 [columns, columns] each


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
    rows = round_modules(model, {n: s for n, s in schemes.items() if not n.startswith("model.layers.")})
    states = [model.model.embed_tokens(torch.tensor(window)) for window in calibration.windows]
    count = config.num_hidden_layers
    stored_rows = _stored(model, store, progress)
    if stored_rows is not None:
        return model.eval(), in_order(model, schemes, [*rows, *stored_rows])
    pace = Pace(count)
    with workers() as pool, progress.bar("calibrate", count, "layer") as bar:
        for index in range(count):
            prefix = f"model.layers.{index}."
            own_schemes = {
                n.removeprefix(prefix): scheme for n, scheme in schemes.items() if n.startswith(prefix)
            }
            layer_rows = store.load(index, model, progress)
            stored = layer_rows is not None
            if layer_rows is None:
                load_weights(model, checkpoint, prefix, copy=True)  # folds scale them in place
                if method.whole:
                    _fold(index, own_schemes, _sampled(model, index, states, pool), model, pool)
                layer_rows, states = _quantize_layer(model, index, own_schemes, states, method, pool)
                store.save(index, model, layer_rows)
            else:
                layer = layer_of(model, index)
                states = pass_layer(layer, states, config, pool, own_schemes, INT8_PER_TOKEN)
            rows += layer_rows
            bar.update(1)
            progress.tick(f"calibrated layer {pace.step(worked=not stored)}")
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


def _sampled(model: Llama, index: int, states: list[Tensor], pool: Workers) -> Moments:
    """Second moment of each input of a float layer, on windows with about FOLD_TOKENS tokens."""
    moments: Moments = {}
    stride = max(1, sum(map(len, states)) // FOLD_TOKENS)

    def visit(reading: SharedInput, inputs: list[Tensor]) -> None:
        moments[reading] = second_moment(inputs, pool)

    run_layer(layer_of(model, index), states[::stride], model.config, {}, pool, visit)
    return moments


def _fold(
    index: int, schemes: Mapping[str, Scheme | None], moments: Moments, model: Llama, pool: Workers
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
            scale = choose_fold(weight, moments[reading], scheme, shared, pool)
            fold(layer, reading, scale, shared)
            if not reading.source.endswith("norm"):
                model.folds[f"model.layers.{index}.{reading.source}"] = scale


def _quantize_layer(
    model: Llama,
    index: int,
    schemes: Mapping[str, Scheme | None],
    states: list[Tensor],
    method: CodeChooser,
    pool: Workers,
) -> tuple[list[TensorRow], list[Tensor]]:
    """Quantizes each linear of a layer when the stream reaches it.

    Returns their rows and the hidden states after the layer.
    """
    layer = layer_of(model, index)
    rows: list[TensorRow] = []

    def visit(reading: SharedInput, read: list[Tensor]) -> None:
        inputs = Inputs(damped(second_moment(read, pool)))
        for scheme in dict.fromkeys(schemes[name] for name in reading.linears):
            names = [name for name in reading.linears if schemes[name] == scheme]
            weights = [layer.get_submodule(name).get_parameter("weight") for name in names]
            all_codes = (
                [None] * len(names) if scheme is None else _chosen(weights, inputs, scheme, method, pool)
            )
            for name, weight, codes in zip(names, weights, all_codes, strict=True):
                rows.extend(apply_recorded(model, f"model.layers.{index}.{name}", weight, codes))

    return rows, run_layer(layer, states, model.config, schemes, pool, visit)


def _chosen(
    weights: Sequence[Tensor], inputs: Inputs, scheme: Scheme, method: CodeChooser, pool: Workers
) -> list[Codes]:
    """Codes of weights that read the same inputs. Rows are independent, so each piece is one work item."""
    stacked = torch.cat(list(weights))
    if method.whole:
        _ = inputs.feedback  # filled here, or several threads would compute it
    pieces = stacked.split(max(FEWEST_ROWS, PIECE // stacked.shape[1]))
    chosen = list(pool.map(lambda piece: method.choose(piece, inputs, scheme), pieces))
    sizes = [len(weight) for weight in weights]
    values = torch.cat([codes.values for codes in chosen]).split(sizes)
    scales = torch.cat([codes.scales for codes in chosen]).split(sizes)
    return [Codes(v.contiguous(), s.contiguous(), scheme) for v, s in zip(values, scales, strict=True)]
