"""Quantizes a checkpoint into a Llama, by the recipe's algorithm."""

from __future__ import annotations

from edgellama.checkpoints import Checkpoint
from edgellama.export.plan import calibration
from edgellama.export.quantization.calibrate import calibrated_llama
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.distillation import recover
from edgellama.export.quantization.given import given_llama
from edgellama.export.quantization.rotation import rotated
from edgellama.export.quantization.tensors import TensorRow, quantized_by_parts, round_modules
from edgellama.host.progress import Progress
from edgellama.host.threads import one_thread
from edgellama.model.llama import Llama
from edgellama.recipe import GIVEN, Recipe
from edgellama.text.calibration import Calibration


def quantized_llama(
    checkpoint: Checkpoint,
    recipe: Recipe,
    context_length: int,
    progress: Progress | None = None,
    *,
    calibrated_on: Calibration | None = None,
    store: LayerStore | None = None,
) -> tuple[Llama, list[TensorRow]]:
    """Returns the quantized torch model from which all artifacts are lowered, and a row for every tensor.

    Args:
        checkpoint: the full-precision checkpoint, not rotated.
        recipe: schemes, rotation and algorithm.
        context_length: positions of the KV cache.
        progress: reports to the user; None for no reports.
        calibrated_on: calibration windows. None for the texts that ship with edgellama.
        store: cache of calibrated layers. None for no cache.
    """
    progress = progress or Progress()
    if recipe.algorithm == GIVEN:
        with progress.stage("take codes"):
            return given_llama(checkpoint, recipe, context_length)
    checkpoint = rotated(checkpoint, recipe.rotation)
    if recipe.calibration_tokens:
        windows = calibrated_on or calibration(checkpoint, recipe, context_length)
        assert windows is not None
        store = store or LayerStore()
        with progress.stage("calibrate"):
            model, rows = calibrated_llama(
                checkpoint, recipe, context_length, windows, store=store, progress=progress
            )
        if recipe.algorithm == "recover":
            with progress.stage("recover"):
                recover(model, checkpoint, windows, store=store, progress=progress)
        return model, rows
    with progress.stage("quantize"):
        return rounded_llama(checkpoint, recipe, context_length)


@one_thread()  # pieces of a weight are too small to be shared by threads
def rounded_llama(
    checkpoint: Checkpoint, recipe: Recipe, context_length: int
) -> tuple[Llama, list[TensorRow]]:
    """Returns the model quantized by RTN, and a row for every tensor.

    The checkpoint is read as it is, without the recipe's rotation.
    """
    return quantized_by_parts(checkpoint, recipe, context_length, round_modules)
