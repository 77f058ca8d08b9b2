"""Recipes `auto` and `auto-best`: schemes chosen to a budget, by what each part's quantization was measured to cost.

The base model (int4 in groups of 32) is calibrated first. On calibration text that it has not read, each attention and
each MLP is then put into the full-precision model alone: with its codes, and with int8 activations only. What its
weights cost scales with the noise power of a scheme, so the other schemes' KL follows from their rounding error on the
same activations. All expectations are multiplied by one number, the base model's whole KL over the sum of its parts'.
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
from edgellama.model.layerwise import SHARED_INPUTS, LayerwiseModel, SharedInput, States, layer_of, run_layer
from edgellama.model.llama import DecoderLayer, Llama
from edgellama.model.schemes import module_shapes
from edgellama.recipe import BUDGETED, PerChannel, PerGroup, Recipe, Rule, Scheme
from edgellama.targets import Target
from edgellama.targets.sizes import planned_bytes
from edgellama.text.calibration import Calibration

TOKENS = 64  # of each held-out window
AIM = 0.9  # of --max-kl: what is expected to leave room for the artifact's interval
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
    """What can be chosen. points: from the fewest bytes to the least KL, by expectation."""

    recipe: Recipe  # whose algorithm is one of BUDGETED
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
    """Refuse, before anything slow, a budget that is none or that the coarsest schemes do not meet."""
    if max_bytes is None and max_kl is None:
        raise UsageError(
            f"recipe {plan.recipe.name!r} chooses schemes to a budget, and none was given",
            remedy="Give --max-bytes, --max-kl or both; --plan shows what there is to choose from.",
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
        found = planned_bytes(config, smallest, target.storage, plan.context_length)
        if max_bytes is not None and found > max_bytes:
            raise CheckFailed(
                f"budget: the smallest {target.name} artifact has {found} bytes, the limit is {max_bytes}",
                remedy=f"Nothing was written. Allow {found} bytes, or a shorter --context.",
            )


def base_recipe(recipe: Recipe) -> Recipe:
    """What is calibrated and measured before schemes are chosen: it is not tuned, since the choice is tuned again."""
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
    """Calibrate the base model, measure its parts, and lay out the choices."""
    base = base_recipe(recipe)
    turned = rotated(checkpoint, recipe.rotation)
    target = max(targets, key=lambda t: planned_bytes(turned.config, base, t.storage, context_length))
    quantized, _ = quantized_llama(
        checkpoint, base, context_length, progress, calibrated_on=calibration, store=store
    )
    full = load_llama(turned, context_length)
    windows = [torch.tensor(window[:TOKENS]) for window in calibration.held_out]
    with progress.stage("measure parts"), workers() as pool:
        parts = _measured(full, quantized, base, windows, target, pool, progress)
    check_parts(parts)
    fixed = planned_bytes(turned.config, base, target.storage, context_length) - sum(
        next(o.bytes for o in part.options if o.scheme == BASE) for part in parts
    )
    fixed += target.storage.program_bytes(turned.config.num_hidden_layers)
    return Frontier(recipe, tuple(parts), tuple(frontier(parts, fixed)))


def _measured(
    full: Llama,
    quantized: Llama,
    base: Recipe,
    windows: list[Tensor],
    target: Target,
    pool: Workers,
    progress: Progress,
) -> list[Part]:
    config = full.config
    rounding = target.rounding(base)
    float_side, whole_side = (
        LayerwiseModel(full, {}, pool),
        LayerwiseModel.as_target(quantized, base, rounding, pool),
    )
    schemes, rounding = whole_side.schemes, whole_side.rounding
    reference = [full.model.embed_tokens(w) for w in windows]
    whole = [quantized.model.embed_tokens(w) for w in windows]
    with_codes: list[States] = []  # by part: its codes alone in the float model
    with_int8: list[States] = []  # by part: int8 activations alone
    noise: list[dict[Scheme | None, float]] = []  # by part: error power of each scheme on the activations
    sizes: list[dict[Scheme | None, int]] = []
    names: list[str] = []
    with progress.bar("measure", config.num_hidden_layers, "layer") as bar:
        for index in range(config.num_hidden_layers):
            layer = layer_of(full, index)
            importance: dict[SharedInput, Tensor] = {}

            def visit(
                reading: SharedInput, read: list[Tensor], into: dict[SharedInput, Tensor] = importance
            ) -> None:
                into[reading] = torch.stack([x.square().mean(0) for x in read]).mean(0)

            after = run_layer(layer, reference, config, {}, pool, visit)
            with_codes, with_int8 = float_side.layer(index, with_codes), float_side.layer(index, with_int8)
            for half in HALVES:
                prefix = f"model.layers.{index}.{half}."
                own = {
                    n.removeprefix(f"model.layers.{index}."): s
                    for n, s in schemes.items()
                    if n.startswith(prefix)
                }
                mixed = _with_half(layer, layer_of(quantized, index), half)
                with_codes.append(run_layer(mixed, reference, config, own, pool, _nothing, rounding))
                with_int8.append(run_layer(layer, reference, config, own, pool, _nothing, rounding))
                power, size = _options(layer, half, importance, target, pool)
                noise.append(power)
                sizes.append(size)
                names.append(f"{prefix}*")
            (whole,) = whole_side.layer(index, [whole])
            reference = after
            bar.update(1)
        logs = [full.lm_head(full.model.norm(x)).log_softmax(-1) for x in reference]
        (whole_kl,) = whole_side.kl([whole], logs)
        costs = [_mean(kl) for kl in float_side.kl(with_codes, logs)]
        floors = [_mean(kl) for kl in float_side.kl(with_int8, logs)]
    total = _mean(whole_kl)
    interaction = total / sum(costs) if sum(costs) > 0 else 1.0
    progress.say(
        f"base model: KL {total:.4f} on held-out calibration text, {interaction:.2f} x the sum of its parts"
    )
    parts = []
    for name, power, size, cost, floor in zip(names, noise, sizes, costs, floors, strict=True):
        weights = max(cost - floor, 0.0)
        options = [
            Option(
                scheme,
                size[scheme],
                0.0
                if scheme is None
                else interaction * (floor + weights * power[scheme] / max(power[BASE], 1e-30)),
            )
            for scheme in power
        ]
        parts.append(Part(name, tuple(options)))
    return parts


def _options(
    layer: DecoderLayer, half: str, importance: Mapping[SharedInput, Tensor], target: Target, pool: Workers
) -> tuple[dict[Scheme | None, float], dict[Scheme | None, int]]:
    """(error power, bytes) of half a layer by scheme, for the schemes that fit its rows."""
    weights = [
        (layer.get_submodule(name).get_parameter("weight"), importance[reading])
        for reading in SHARED_INPUTS
        for name in reading.linears
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


def _nothing(reading: SharedInput, read: list[Tensor]) -> None:
    """Nothing is looked at."""
