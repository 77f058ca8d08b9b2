"""Parity of parts: every layer of the file on its own, at hidden states that the file itself computes.

Parity of the whole model has a noise floor that grows with depth. Here the input of each layer comes from a
run of the file, and torch computes this one layer from it. The noise of one layer is about 1e-7 of its
change. Attention with a scale 1 % off changes it by 1e-2.

The file's parts are not lowered again. A .pte or an ONNX graph gets the hidden states as further outputs,
and the interpreter of Core ML keeps them, without rounding results to float16. The last layer is compared
together with the head, in logits.

One flipped rounding of an int8 activation changes a token by 1e-3, and a flipped key or value changes the
later tokens too. So each position counts with the best of several windows, because flips do not repeat. No
token repeats in a window: among equal keys and values, a wrong attention computes the right sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgellama.errors import BundleError
from edgellama.gate.limits import NOISE_FACTOR, PART_ERROR
from edgellama.gate.subject import Section
from edgellama.model.held import holding
from edgellama.model.llama import Llama
from edgellama.recipe import Recipe
from edgellama.report import Check, below, check
from edgellama.runtimes.load import open_parts
from edgellama.runtimes.parts import PartsRuntime, States
from edgellama.targets import Target

PREFILL, STEPS = 12, 6  # tokens of the first call, and calls of one token after it
TOKENS = PREFILL + STEPS  # of a window
FEWEST, MOST = 2, 6  # windows; more than FEWEST only if a part is above its limit
POSITIONS = 0.75  # share of the positions that must keep to the limit
NOISE = 1e-7  # relative, of a layer's input

Errors = npt.NDArray[np.float64]  # [parts, positions]; NaN for positions that have no value


def examine_parts(
    target: Target, path: Path, quantized: Llama, recipe: Recipe, tokens: Sequence[int]
) -> Section:
    """The check `parity.parts` of the artifact at `path`, and its figures. tokens: of a text."""
    if not target.has_parts():
        return Section()
    try:
        errors, floors, count = _best_of(target, path, quantized, recipe, distinct_windows(tokens, quantized))
    except BundleError as error:
        return Section((check("parity.parts", False, detail=error.message),))
    verdict = judged(errors, floors)
    return Section((verdict,), {"parity": {"parts_error": verdict.value, "parts_windows": count}})


def _best_of(
    target: Target, path: Path, quantized: Llama, recipe: Recipe, windows: Sequence[Sequence[int]]
) -> tuple[Errors, Errors, int]:
    """(errors, floors, number of windows). At each position the smallest of the windows."""
    runtime = open_parts(target, path, quantized.config)
    measured: list[tuple[Errors, Errors]] = []
    try:
        for seed, window in enumerate(windows):
            runtime.reset()
            calls = calls_of(window)
            measured.append(measure_parts(runtime, quantized, target, recipe, calls, seed=seed))
            errors, floors = (np.fmin.reduce(arrays) for arrays in zip(*measured, strict=True))
            if len(measured) >= FEWEST and judged(errors, floors).verdict == "pass":
                break
    finally:
        runtime.close()
    return errors, floors, len(measured)


def distinct_windows(tokens: Sequence[int], model: Llama) -> list[list[int]]:
    """Windows of tokens that do not repeat: those of a text in order, then the rest of the vocabulary."""
    count, length = model.config.vocab_size, min(TOKENS, model.context_length)
    pool = list(dict.fromkeys((*tokens, *range(count))))[: MOST * TOKENS]
    return [
        [pool[(start + i) % len(pool)] for i in range(length)] for start in range(0, MOST * length, length)
    ]


def calls_of(tokens: Sequence[int]) -> list[Sequence[int]]:
    """The tokens of each call: a prompt, then single tokens."""
    steps = max(0, min(STEPS, len(tokens) - PREFILL))
    return [tokens[:PREFILL], *([token] for token in tokens[PREFILL : PREFILL + steps])]


def judged(errors: Errors, floors: Errors) -> Check:
    """The check of the worst part, relative to its limit. Prompt and single tokens are judged apart."""
    worst: tuple[float, float, float, str] | None = None
    prompt = slice(0, PREFILL), slice(PREFILL, None)
    for part in range(len(errors)):
        for positions, kind in zip(prompt, ("prefill", "decode"), strict=True):
            error, floor = _quantile(errors[part, positions]), _quantile(floors[part, positions])
            limit = max(PART_ERROR, NOISE_FACTOR * floor) if np.isfinite(floor) else PART_ERROR
            if worst is None or not error / limit <= worst[0]:
                worst = error / limit, error, limit, f"{_name(part)} in {kind}, noise floor {floor:.1e}"
    assert worst is not None
    return below("parity.parts", worst[1], worst[2], detail=worst[3])


def measure_parts(
    runtime: PartsRuntime,
    quantized: Llama,
    target: Target,
    recipe: Recipe,
    calls: Sequence[Sequence[int]],
    *,
    seed: int,
) -> tuple[Errors, Errors]:
    """Relative errors of each part at each position, and the same of torch with noise on the part's input.

    The parts are the embedding and every layer. An error is relative to the change that the layer makes, so
    that a large residual hides nothing.
    """
    made, position = [], 0
    for tokens in calls:
        remaining = list(tokens)
        while remaining:
            states = runtime.states(remaining)
            taken, remaining = remaining[: states.count], remaining[states.count :]
            made.append(_Call(states, taken, position))
            position += states.count
    return _errors_of(made, quantized, target, recipe, torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class _Call:
    """A call of the file: its values, its tokens, and the position of the first."""

    states: States
    tokens: Sequence[int]
    position: int


@torch.inference_mode()
def _errors_of(
    calls: Sequence[_Call], quantized: Llama, target: Target, recipe: Recipe, generator: torch.Generator
) -> tuple[Errors, Errors]:
    """`measure_parts` of calls in order. All pass through one layer, whose weights are converted once."""
    for call in calls:
        shapes = {tuple(x.shape) for x in call.states.inputs}
        if shapes != {(len(call.tokens), quantized.config.hidden_size)}:
            raise BundleError(f"hidden states of shapes {sorted(shapes)}", remedy="Export the bundle again.")
    noisy = [[_with_noise(x, generator) for x in call.states.inputs] for call in calls]
    with target.exact_arithmetic(quantized, recipe):
        decoder = quantized.model
        rows = [
            _embedding_errors(call, decoder.embed_tokens(torch.tensor(list(call.tokens)))) for call in calls
        ]
        ends = []
        for index, layer in enumerate(decoder.layers):
            with holding():
                for number, call in enumerate(calls):
                    x, here = (
                        call.states.inputs[index],
                        slice(call.position, call.position + call.states.count),
                    )
                    # The noise first, because both write the layer's cache.
                    disturbed, expected = (
                        layer(value[None], decoder.cos[here], decoder.sin[here], call.position)[0]
                        for value in (noisy[number][index], x)
                    )
                    if index + 1 < len(decoder.layers):
                        actual = call.states.inputs[index + 1]
                        rows[number].append(
                            (_relative(actual, expected, x), _relative(disturbed, expected, x))
                        )
                    else:
                        ends += [expected[-1], disturbed[-1]]
        logits = quantized.lm_head(decoder.norm(torch.stack(ends)))
    for call, row, expected, disturbed in zip(calls, rows, logits[::2], logits[1::2], strict=True):
        pair = (_relative(_centered(y), _centered(expected)) for y in (call.states.logits, disturbed))
        error, floor = (_at_the_end(value, len(call.tokens)) for value in pair)
        row.append((error, floor))
    return _table(rows, 0), _table(rows, 1)


def _table(rows: Sequence[Sequence[tuple[Tensor, Tensor]]], kind: int) -> Errors:
    """Values of all parts at all positions, float64 [parts, positions]. rows: those of each call."""
    table: Errors = torch.cat([torch.stack([part[kind] for part in row]) for row in rows], 1).double().numpy()
    return table


def _with_noise(x: Tensor, generator: torch.Generator) -> Tensor:
    return x * (1 + NOISE * torch.randn(x.shape, generator=generator))


def _embedding_errors(call: _Call, embedded: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(_relative(call.states.inputs[0], embedded), torch.zeros(len(call.tokens)))]


def _relative(actual: Tensor, expected: Tensor, base: Tensor | float = 0.0) -> Tensor:
    """Distance of each row, in units of the distance that the expected row has from `base`."""
    change = (expected - base).norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    error: Tensor = (actual - expected).norm(dim=-1) / change
    return error.nan_to_num(torch.inf)


def _centered(logits: Tensor) -> Tensor:
    """Logits without their mean, which no probability depends on."""
    return logits - logits.mean()


def _at_the_end(value: Tensor, count: int) -> Tensor:
    column = torch.full((count,), torch.nan)
    column[-1] = value
    return column


def _quantile(values: Errors) -> float:
    known = np.sort(values[~np.isnan(values)])
    return float(known[int(np.ceil(POSITIONS * len(known))) - 1]) if len(known) else 0.0


def _name(part: int) -> str:
    return "the embedding" if part == 0 else f"layer {part - 1}"
