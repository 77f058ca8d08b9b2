"""Recipes `auto` and `auto-best`: schemes chosen to a budget, by the measured cost of quantizing each part.

The base model (int4 in groups of 32) is calibrated first. Each attention and each MLP is then put into the
full-precision model alone, on held-out calibration text: with its codes, and with int8 activations only. The loss of
the weights scales with a scheme's noise power. So the KL of other schemes follows from their rounding error on the same
activations. All expectations are multiplied by one number: the base model's KL over the sum of its parts' KL.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.errors import CheckFailed, UsageError
from edgellama.export.plan import Plan
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.mixed_precision import (
    Option,
    Part,
    Point,
    check_parts,
    frontier,
    mixed_recipe,
    pick,
)
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.quantization.rotation import rotated
from edgellama.export.quantization.scale_search import FEW_FACTORS, weighted_scales
from edgellama.host.progress import Progress
from edgellama.host.threads import Workers, workers
from edgellama.model.layer_pass import States, pass_layer
from edgellama.model.layerwise import SHARED_INPUTS, LayerwiseModel, SharedInput, layer_of, run_layer
from edgellama.model.llama import DecoderLayer, Llama
from edgellama.model.schemes import module_shapes
from edgellama.recipe import BUDGETED, PerChannel, PerGroup, Recipe, Rule, Scheme
from edgellama.targets import Target
from edgellama.targets.sizes import planned_bytes
from edgellama.text.calibration import Calibration

TOKENS = 64  # of each held-out window
AIM = 0.9  # share of --max-kl that is aimed at; the rest is room for the artifact's interval
ALPHABET: tuple[Scheme | None, ...] = (
    Scheme(4, PerGroup(128)),
    Scheme(4, PerGroup(64)),
    Scheme(4, PerGroup(32)),
    Scheme(8, PerChannel()),
    None,
)
BASE = Scheme(4, PerGroup(32))
HALVES = ("self_attn", "mlp")  # of a decoder layer; each with the norm before it
_NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}


@dataclass(frozen=True)
class Frontier:
    """The choices. points: from the fewest bytes to the lowest expected KL."""

    recipe: Recipe  # its algorithm is one of BUDGETED
    parts: tuple[Part, ...]
    points: tuple[Point, ...]

    def choose(self, max_bytes: int | None, max_kl: float | None) -> Recipe:
        """The recipe that meets the budget. Raises CheckFailed with the nearest points when there is none."""
        point = pick(self.points, max_bytes, None if max_kl is None else AIM * max_kl)
        final = replace(self.recipe, algorithm=BUDGETED[self.recipe.algorithm])
        return mixed_recipe(final, self.parts, point)

    def to_dict(self) -> dict[str, Any]:
        names = [part.modules for part in self.parts]
        return {
            "schema": "edgellama.plan/1",
            "points": [
                {
                    "bytes": point.bytes,
                    "kl": point.kl,
                    "schemes": {
                        name: option.scheme.describe() if option.scheme else "float32"
                        for name, option in zip(names, point.chosen, strict=True)
                    },
                }
                for point in self.points
            ],
        }


def check_budget(plan: Plan, max_bytes: int | None, max_kl: float | None) -> None:
    """Raise before calibration if no budget is given or the smallest schemes exceed it."""
    if max_bytes is None and max_kl is None:
        raise UsageError(
            f"recipe {plan.recipe.name!r} chooses schemes to a budget, and none was given",
            remedy="Give --max-bytes, --max-kl or both; --plan shows the choices.",
        )
    config = plan.config
    shapes = module_shapes(config.tensor_shapes(), config.tie_word_embeddings)
    rules = []
    for index in range(config.num_hidden_layers):
        for half in HALVES:
            pattern = f"model.layers.{index}.{half}.*"
            columns = [shape[1] for name, shape in shapes.items() if name.startswith(pattern[:-1])]
            scheme = next(s for s in ALPHABET if fits(s, columns))
            rules.append(Rule(pattern, scheme))
    outside = [rule for rule in plan.recipe.rules if rule.modules != "model.layers.*"]
    smallest = replace(plan.recipe, rules=(*rules, *outside))
    for target in plan.targets:
        least = planned_bytes(config, smallest, target.storage, plan.context_length)
        if max_bytes is not None and least > max_bytes:
            raise CheckFailed(
                f"budget: the smallest {target.name} artifact has {least} bytes, the limit is {max_bytes}",
                remedy=f"Nothing was written. Allow {least} bytes, or a shorter --context.",
            )


def base_recipe(recipe: Recipe) -> Recipe:
    """Recipe of the base model, calibrated and measured before schemes are chosen. The choice is tuned, not the base."""
    return replace(recipe, algorithm="gptq")


@torch.no_grad()
def measure_frontier(
    checkpoint: Checkpoint,
    recipe: Recipe,
    targets: Sequence[Target],
    context_length: int,
    calibration: Calibration,
    *,
    store: LayerStore,
    progress: Progress,
) -> Frontier:
    """Calibrate the base model, measure its parts, and lay out the choices.

    Args:
        checkpoint: the full-precision source.
        recipe: a budgeted recipe.
        targets: the targets of the export; the largest artifact decides.
        context_length: tokens of the KV cache.
        calibration: texts; the held-out windows are measured on.
        store: cache of calibrated layers.
        progress: reporter of stages.
    """
    base = base_recipe(recipe)
    source = rotated(checkpoint, recipe.rotation)
    target = max(targets, key=lambda t: planned_bytes(source.config, base, t.storage, context_length))
    quantized, _ = quantized_llama(
        checkpoint, base, context_length, progress, calibrated_on=calibration, store=store
    )
    full = load_llama(source, context_length)
    windows = [torch.tensor(window[:TOKENS]) for window in calibration.held_out]
    with progress.stage("measure parts"), workers() as pool:
        costs, base_kl = measure_parts(full, quantized, base, windows, target, pool, progress)
        parts = scale_to_model(costs, base_kl, progress)
    check_parts(parts)
    fixed = planned_bytes(source.config, base, target.storage, context_length) - sum(
        next(o.bytes for o in part.options if o.scheme == BASE) for part in parts
    )
    fixed += target.storage.program_bytes(source.config.num_hidden_layers)
    return Frontier(recipe, tuple(parts), tuple(frontier(parts, fixed)))


@dataclass(frozen=True)
class PartCost:
    """Measured costs of one part, an attention or an MLP.

    Attributes:
        modules: pattern of its module names.
        codes_kl: KL with the base model's codes and int8 activations in this part alone, nats per token.
        int8_kl: KL with int8 activations alone.
        error_power: power of the rounding error on the part's own activations, by scheme.
        bytes: stored size by scheme.
    """

    modules: str
    codes_kl: float
    int8_kl: float
    error_power: Mapping[Scheme | None, float]
    bytes: Mapping[Scheme | None, int]


@dataclass
class _Variant:
    """Hidden states of the float model with one part changed: with its codes, and with int8 activations alone."""

    modules: str
    with_codes: States
    with_int8: States
    error_power: Mapping[Scheme | None, float]
    bytes: Mapping[Scheme | None, int]


def measure_parts(
    full: Llama,
    quantized: Llama,
    base: Recipe,
    windows: list[Tensor],
    target: Target,
    pool: Workers,
    progress: Progress,
) -> tuple[list[PartCost], float]:
    """Costs of all parts, and the KL of the whole base model, on held-out windows.

    Args:
        full: the full-precision model.
        quantized: the calibrated base model.
        base: its recipe.
        windows: token ids [T] of each window.
        target: the target whose activations are followed.
        pool: workers; no figure depends on their number.
        progress: reporter of the bar.
    """
    config = full.config
    float_side = LayerwiseModel(full, {}, pool)
    # The first family on every machine, so that equal inputs give equal choices.
    family = next(iter(target.families(base)), None)
    base_side = LayerwiseModel.as_target(quantized, base, target.rounding_of(base, family), pool)
    reference = [full.model.embed_tokens(w) for w in windows]
    base_states = [quantized.model.embed_tokens(w) for w in windows]
    variants: list[_Variant] = []
    with progress.bar("measure", config.num_hidden_layers, "layer") as bar:
        for index in range(config.num_hidden_layers):
            importance: dict[SharedInput, Tensor] = {}

            def visit(
                shared: SharedInput, inputs: list[Tensor], into: dict[SharedInput, Tensor] = importance
            ) -> None:
                into[shared] = torch.stack([x.square().mean(0) for x in inputs]).mean(0)

            after = run_layer(layer_of(full, index), reference, config, {}, pool, visit)
            codes = float_side.layer(index, [variant.with_codes for variant in variants])
            int8 = float_side.layer(index, [variant.with_int8 for variant in variants])
            for variant, with_codes, with_int8 in zip(variants, codes, int8, strict=True):
                variant.with_codes, variant.with_int8 = with_codes, with_int8
            variants += [
                _variant(index, half, full, quantized, base_side, reference, importance, target)
                for half in HALVES
            ]
            (base_states,) = base_side.layer(index, [base_states])
            reference = after
            bar.update(1)
        logs = [full.lm_head(full.model.norm(x)).log_softmax(-1) for x in reference]
        (base_kl,) = base_side.kl([base_states], logs)
        codes_kl = float_side.kl([variant.with_codes for variant in variants], logs)
        int8_kl = float_side.kl([variant.with_int8 for variant in variants], logs)
    costs = [
        PartCost(v.modules, _mean(with_codes), _mean(with_int8), v.error_power, v.bytes)
        for v, with_codes, with_int8 in zip(variants, codes_kl, int8_kl, strict=True)
    ]
    return costs, _mean(base_kl)


def scale_to_model(costs: Sequence[PartCost], base_kl: float, progress: Progress) -> list[Part]:
    """Expected KL of every scheme of every part, scaled so that the base schemes together give the base model's KL."""
    total = sum(cost.codes_kl for cost in costs)
    interaction = base_kl / total if total > 0 else 1.0
    progress.say(
        f"base model: KL {base_kl:.4f} on held-out calibration text, {interaction:.2f} x the sum of its parts"
    )
    return [_part(cost, interaction) for cost in costs]


def _part(cost: PartCost, interaction: float) -> Part:
    weights_kl = max(cost.codes_kl - cost.int8_kl, 0.0)
    base_power = max(cost.error_power[BASE], 1e-30)
    options = [
        Option(
            scheme,
            cost.bytes[scheme],
            0.0 if scheme is None else interaction * (cost.int8_kl + weights_kl * power / base_power),
        )
        for scheme, power in cost.error_power.items()
    ]
    return Part(cost.modules, tuple(options))


def _variant(
    index: int,
    half: str,
    full: Llama,
    quantized: Llama,
    base_side: LayerwiseModel,
    reference: States,
    importance: Mapping[SharedInput, Tensor],
    target: Target,
) -> _Variant:
    """One half of layer `index` put into the full-precision model alone; states after that layer."""
    layer, config, pool, rounding = layer_of(full, index), full.config, base_side.pool, base_side.rounding
    prefix = f"model.layers.{index}."
    schemes = {
        name.removeprefix(prefix): scheme
        for name, scheme in base_side.schemes.items()
        if name.startswith(f"{prefix}{half}.")
    }
    mixed = _with_half(layer, layer_of(quantized, index), half)
    with_codes = pass_layer(mixed, reference, config, pool, schemes, rounding)
    with_int8 = pass_layer(layer, reference, config, pool, schemes, rounding)
    error_power, sizes = _options(layer, half, importance, target, pool)
    return _Variant(f"{prefix}{half}.*", with_codes, with_int8, error_power, sizes)


def _options(
    layer: DecoderLayer, half: str, importance: Mapping[SharedInput, Tensor], target: Target, pool: Workers
) -> tuple[dict[Scheme | None, float], dict[Scheme | None, int]]:
    """(error power, bytes) of half a layer by scheme, for the schemes that fit its rows."""
    weights = [
        (layer.get_submodule(name).get_parameter("weight"), importance[shared])
        for shared in SHARED_INPUTS
        for name in shared.linears
        if name.startswith(half)
    ]
    fitting = [s for s in ALPHABET if fits(s, [w.shape[1] for w, _ in weights])]

    def power(scheme: Scheme | None) -> float:
        if scheme is None:
            return 0.0
        errors = (
            ((weighted_scales(w, squares, scheme, FEW_FACTORS).dequantize() - w).square() * squares).sum()
            for w, squares in weights
        )
        return float(sum(errors))

    sizes = {
        scheme: sum(target.storage.weight_bytes(tuple(w.shape), scheme) for w, _ in weights)
        for scheme in fitting
    }
    return dict(zip(fitting, pool.map(power, fitting), strict=True)), sizes


def fits(scheme: Scheme | None, columns: Sequence[int]) -> bool:
    """Whether rows of all these lengths hold several of the scheme's groups."""
    group = scheme.group_size if scheme else None
    return group is None or all(c % group == 0 and c > group for c in columns)


def _with_half(layer: DecoderLayer, other: DecoderLayer, half: str) -> DecoderLayer:
    """`layer` with the attention or the MLP of `other`, and the norm before it, which holds its scaling."""
    mixed = copy.copy(layer)
    mixed._modules = {
        name: getattr(other if name in (half, _NORMS[half]) else layer, name) for name in layer._modules
    }
    return mixed


def _mean(windows: Sequence[Any]) -> float:
    return float(sum(w.sum() for w in windows) / sum(len(w) for w in windows))
