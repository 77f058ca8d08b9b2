"""Weights of the quantized model against the checkpoint, in one pass, layer by layer.

Artifact, quantized model and parity share one quantizer, so a fault in it shows in none of them. For a
calibrated bundle even the codes come from the bundle. This pass knows the recipe's rules and none of the
quantizer's code:

- Plain rounding (RTN) is computed again: every scale, and every code that is nearest to its weight.
- Calibrated weights keep direction and size of the checkpoint's at five levels (`weight_errors`).
- Weights that stay float are equal to the checkpoint's, or differ by their fold alone.
- A rotated checkpoint predicts what the checkpoint predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.given import Given
from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.export.quantization.rotation import rotated
from edgellama.gate.given_codes import check_given, taken_modules
from edgellama.gate.limits import (
    BIAS_SLACK,
    FOLD_RATIO,
    ROTATION_KL,
    ROTATION_ROUNDING,
    TUNED_NORM,
    TUNED_SLACK,
)
from edgellama.gate.subject import Section, Unloaded
from edgellama.gate.weight_errors import (
    Finding,
    Fold,
    Stored,
    direction,
    levels,
    size,
    undone,
    worst,
)
from edgellama.host.threads import side_by_side
from edgellama.model.layerwise import layer_of
from edgellama.model.llama import Llama
from edgellama.model.quantized import SMALLEST_SCALE, Codes, codes_of
from edgellama.recipe import BUDGETED, GIVEN, Recipe
from edgellama.report import Check, check
from edgellama.report.checks import listed

_VALUES = 1 << 18  # of a weight, compared by a work item: they stay in the processor's cache
_TOKENS = 48  # of the forward pass that judges a rotation
_NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_LINEARS = (
    *_NORMS["input_layernorm"],
    "self_attn.o_proj",
    *_NORMS["post_attention_layernorm"],
    "mlp.down_proj",
)
_UNFOLDED = ("round", "scales", GIVEN)  # algorithms that scale no weights before they round
_FOLDED_ROWS = ("self_attn.v_proj", "mlp.up_proj")

Read = Callable[[str], Tensor]


@dataclass
class _Found:
    """Results of the pass so far.

    Attributes:
        scales, codes, floats: names of the weights that differ.
        directions, sizes, folds: the worst part of each weight.
        slack: relative difference that counts as equal. A rotation may round otherwise on another processor.
        skip: modules that are judged elsewhere.
    """

    scales: list[str] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)
    floats: list[str] = field(default_factory=list)
    directions: list[Finding] = field(default_factory=list)
    sizes: list[Finding] = field(default_factory=list)
    folds: list[Finding] = field(default_factory=list)
    slack: float = 0.0
    skip: frozenset[str] = frozenset()


def examine_weights(subject: Unloaded) -> Section:
    """Checks every weight of the quantized model against the checkpoint."""
    recipe, checkpoint = subject.bundle.recipe, subject.checkpoint
    if recipe.algorithm == GIVEN and checkpoint.given is not None:
        given = _check_given(subject.quantized, recipe, checkpoint.given, subject.full.tensor)
        return Section(tuple(given))
    if recipe.rotation == "none":
        checks = check_weights(subject.quantized, recipe, subject.full.stored)
        return Section(tuple(checks))
    source = rotated(checkpoint, recipe.rotation)
    checks = check_weights(subject.quantized, recipe, source.tensor)
    tokens = subject.bundle.tokenizer.encode("The same function in another basis. " * 8)[:_TOKENS]
    tokens = tokens[: subject.bundle.context_length]
    return Section((*checks, check_rotation(subject.full, source, tokens)))


@torch.no_grad()
def _check_given(model: Llama, recipe: Recipe, given: Given, read: Read) -> list[Check]:
    """Checks of a model with given codes: its codes by their bytes, and what was rounded here as for RTN."""
    taken = taken_modules(model, given)
    codes, scales, reference = check_given(model, given, taken, read)
    rounded = {check.name: check for check in check_weights(model, recipe, read, skip=frozenset(taken))}
    # One check of each name: the given ones, unless they pass and the rounded ones do not.
    return [rounded[c.name] if c.verdict == "pass" and c.name in rounded else c for c in (codes, scales)] + [
        reference,
        rounded["weights.floats"],
    ]


@torch.no_grad()
def check_weights(
    model: Llama, recipe: Recipe, read: Read, *, skip: frozenset[str] = frozenset()
) -> list[Check]:
    """Checks every weight of a quantized model.

    Args:
        model: the quantized model.
        recipe: its recipe.
        read: function from a tensor's name to the checkpoint's tensor, rotated if the recipe says so. In any float
            dtype.
        skip: modules whose codes are judged elsewhere.
    """
    config, found = model.config, _Found(skip=skip)
    algorithm = BUDGETED.get(recipe.algorithm, recipe.algorithm)
    found.slack = 0.0 if recipe.rotation == "none" else ROTATION_ROUNDING
    tuned = algorithm == "recover"
    _compare_rounded(model, "model.embed_tokens", read("model.embed_tokens.weight"), found)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    _compare_rounded(model, "lm_head", read(head), found)

    def exact(name: str) -> Tensor:
        return read(name).float()

    _compare_norm(model, "model.norm", exact, found, tuned=tuned)
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        if algorithm in _UNFOLDED:
            for name in _LINEARS:
                weight = read(f"{prefix}{name}.weight")
                _compare_rounded(model, prefix + name, weight, found, searched=algorithm == "scales")
                _compare_float(model, f"{prefix}{name}.bias", exact, found)
            for name in _NORMS:
                _compare_norm(model, prefix + name, exact, found, tuned=False)
        else:
            _compare_layer(model, index, exact, found, tuned=tuned)
    return list(_checks(found, calibrated=algorithm not in _UNFOLDED))


def _checks(found: _Found, *, calibrated: bool) -> Iterator[Check]:
    for name, differing, words in (
        ("weights.scales", found.scales, "not the scales of plain rounding:"),
        ("weights.codes", found.codes, "not the codes nearest to the checkpoint's weights:"),
        ("weights.floats", found.floats, "not the checkpoint's:"),
    ):
        yield check(name, not differing, value=len(differing), limit=0, detail=listed(words, differing))
    if not calibrated:
        return
    for name, findings in (
        ("weights.direction", found.directions),
        ("weights.size", found.sizes),
        ("weights.folds", found.folds),
    ):
        finding = worst(findings)
        yield check(
            name, finding.excess <= 1, value=round(finding.excess, 4), limit=1.0, detail=finding.place
        )


def _compare_rounded(
    model: Llama, module: str, weight: Tensor, found: _Found, *, searched: bool = False
) -> None:
    """Compares a module that is rounded to nearest, or float, with the checkpoint's weight.

    searched: scales were searched on activations, so any scale between bounds is right.
    """
    codes = codes_of(model.get_submodule(module))
    name = f"{module}.weight"
    if module in found.skip:
        return
    if codes is None:
        if not _equal(model.get_parameter(name), weight.float(), found.slack):
            found.floats.append(name)
        return
    count = max(1, _VALUES // weight.shape[1])
    pieces = [slice(start, start + count) for start in range(0, len(weight), count)]
    expected = torch.cat(side_by_side(lambda rows: _least_scales(weight[rows].float(), codes), pieces))
    if float(expected.max()) >= 16 * SMALLEST_SCALE:
        expected = torch.where(expected > 0, expected.clamp_min(SMALLEST_SCALE), expected)
    judged = expected > 0  # a group of zeros fits any scale
    ratio = codes.scales[judged] / expected[judged]
    # The search tries 0.7 to 1.25 times the largest weight over 8, and a bound is rounded to bfloat16.
    right = ((ratio > 0.6) & (ratio < 1.5)) if searched else (ratio - 1).abs() <= 2**-7 * bool(found.slack)
    if not bool(right.all()):
        found.scales.append(name)
    slack = 1e-5 + found.slack * codes.scheme.code_range[1]
    if not all(side_by_side(lambda rows: _nearest(weight[rows].float(), codes, rows, slack), pieces)):
        found.codes.append(name)


def _least_scales(weight: Tensor, codes: Codes) -> Tensor:
    """Smallest scale of each group that clips no weight, in bfloat16: [rows, groups]."""
    low, high = codes.scheme.code_range
    groups = weight.reshape(len(weight), codes.scales.shape[1], -1)
    least = torch.maximum(groups.amin(2) / low, groups.amax(2) / high)
    return least.to(torch.bfloat16).float()


def _nearest(weight: Tensor, codes: Codes, rows: slice, slack: float) -> bool:
    """Whether no code is further than half a scale from its weight, except where the range of codes ends."""
    low, high = codes.scheme.code_range
    scales, values = codes.scales[rows], codes.values[rows]
    groups = scales.shape[1]
    exact = weight.reshape(len(weight), groups, -1) / scales[..., None]
    stored = values.reshape(exact.shape).float()
    return bool(((stored - exact.clamp(low, high)).abs() <= 0.5 + slack).all())


def _equal(actual: Tensor, expected: Tensor, slack: float) -> bool:
    """Whether a float tensor is the checkpoint's. slack: of the largest value."""
    if not slack:
        return torch.equal(actual, expected)
    return bool(((actual - expected).abs() <= slack * expected.abs().max()).all())


def _compare_float(model: Llama, name: str, read: Read, found: _Found) -> None:
    """Compares a float tensor, if the model has it, with the checkpoint's."""
    module, _, attribute = name.rpartition(".")
    present = getattr(model.get_submodule(module), attribute, None) is not None
    if present and not _equal(model.get_parameter(name), read(name), found.slack):
        found.floats.append(name)


def _compare_norm(model: Llama, module: str, read: Read, found: _Found, *, tuned: bool) -> None:
    """Compares a norm without a fold. tuned: its weight was trained, so it may differ a little."""
    name = f"{module}.weight"
    actual, expected = model.get_parameter(name), read(name)
    slack = TUNED_NORM * expected.abs() if tuned else torch.zeros_like(expected)
    if not bool(((actual - expected).abs() <= slack).all()):
        found.floats.append(name)


def _compare_layer(model: Llama, index: int, read: Read, found: _Found, *, tuned: bool) -> None:
    """Compares a calibrated layer: its folds are estimated and undone."""
    config, layer, prefix = model.config, layer_of(model, index), f"model.layers.{index}."
    slack = TUNED_SLACK if tuned else 0.0
    weights = {name: read(f"{prefix}{name}.weight") for name in _LINEARS}
    for norm, linears in _NORMS.items():
        actual, expected = layer.get_parameter(f"{norm}.weight"), read(f"{prefix}{norm}.weight")
        scales = torch.where(expected == 0, torch.ones_like(expected), expected / actual)
        if not bool((torch.isfinite(scales) & (scales > 0)).all()) or bool(
            ((expected == 0) != (actual == 0)).any()
        ):
            found.floats.append(f"{prefix}{norm}.weight")
            scales = torch.ones_like(scales)
        for name in linears:
            weights[name] = weights[name] * scales
    stored = {name: Stored.of(layer.get_submodule(name)) for name in _LINEARS}
    heads = config.num_attention_heads // config.num_key_value_heads
    expected_weights, folds = undone(weights, stored, heads, config.head_dim)
    for name in _LINEARS:
        for level, match, judged in levels(stored[name].weight, expected_weights[name], stored[name].scheme):
            found.directions.append(direction(match, judged, level, prefix + name))
            found.sizes.append(size(match, judged, level, slack, prefix + name))
        if name in folds:
            found.folds.append(_fold_finding(folds[name], prefix + name))
        bias = f"{prefix}{name}.bias"
        if name in folds and model.get_submodule(prefix + name).bias is not None:
            _compare_folded_bias(model.get_parameter(bias), read(bias), folds[name], bias, found)
        else:
            _compare_float(model, bias, read, found)


def _fold_finding(fold: Fold, module: str) -> Finding:
    """Channel whose rows and columns disagree most about the fold between them."""
    products, known = fold.products
    if not bool(known.any()):
        return Finding(0.0, "")
    logarithms = torch.where(known, products.clamp_min(1e-6).log().abs(), torch.zeros_like(products))
    channel = int(logarithms.argmax())
    excess = float(logarithms[channel]) / float(torch.tensor(FOLD_RATIO).log())
    return Finding(
        excess, f"row {channel} of {module} and its columns are scaled by {float(products[channel]):.3f}"
    )


def _compare_folded_bias(actual: Tensor, expected: Tensor, fold: Fold, name: str, found: _Found) -> None:
    """Compares a bias that was divided by the scales of a fold."""
    restored = actual * fold.scales[0]
    if float((restored - expected).norm()) > BIAS_SLACK * float(expected.norm()):
        found.floats.append(name)


def check_rotation(full: StreamedLlama, source: Checkpoint, tokens: list[int]) -> Check:
    """Check that a rotated checkpoint predicts what the checkpoint predicts."""
    actual = StreamedLlama(source).logits(tokens).double().log_softmax(-1)
    expected = full.logits(tokens).double().log_softmax(-1)
    kl = float(F.kl_div(actual, expected, reduction="none", log_target=True).sum(-1).max())
    return check(
        "weights.rotation",
        kl <= ROTATION_KL,
        value=kl,
        limit=ROTATION_KL,
        detail="largest KL of the rotated checkpoint to the checkpoint, before quantization",
    )
