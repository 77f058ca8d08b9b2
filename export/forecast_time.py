"""Forecast of an export's time: processor seconds of its stages, from the model's shape and this machine's speed.

The sizes of matrices, texts and files give the operations of a stage, and a measurement gives their speed. The
factors were fitted to two exports on two x86-64 cores beside other work: SmolLM2-135M, and two layers of the 1B
shape. The share of a stage that all cores work on turns processor time into wall time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from edgellama.bundle.record import SHORT_TOKENS
from edgellama.export.quantization.distillation import TUNING
from edgellama.host.machine_speed import Speed
from edgellama.model.config import LlamaConfig
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import BUDGETED, GIVEN, Recipe
from edgellama.targets import Target
from edgellama.targets.sizes import planned_bytes
from edgellama.text.calibration import LENGTH

LONGEST = 4096  # tokens of the long window at most
GOLDEN_TOKENS = 830  # of all golden sequences but the longest
PARITY_TOKENS = 256  # compared with the quantized model, with and without noise
STEPS, CALL_TOKENS = 400, 4500  # single tokens of `consistency`, and tokens of its calls
LAST_STEPS = 64  # single tokens at the end of the long window
GREEDY_STEPS = 24
DISTILLED = 15  # operations of distillation for each parameter and token
HELD_OUT = 512  # tokens that a budgeted recipe measures parts with
SLOW = 0.6e-9  # seconds for a token and parameter, where a runtime is slow


@dataclass(frozen=True)
class Stage:
    """Forecast of one stage, or of several that it stands for.

    Attributes:
        name: in most cases that of `Progress`.
        processor_seconds: of all threads together.
        parallel: share that all cores work on. The rest uses one.
    """

    name: str
    processor_seconds: float
    parallel: float

    def seconds(self, cores: int) -> float:
        """Wall time on so many idle cores."""
        return self.processor_seconds * (1 - self.parallel + self.parallel / cores)


@dataclass(frozen=True)
class Work:
    """Processor seconds of kinds of work, for one model on one machine."""

    config: LlamaConfig
    speed: Speed

    @cached_property
    def table(self) -> int:
        """Parameters of the output layer."""
        return self.config.output_size * self.config.hidden_size

    @cached_property
    def linears(self) -> int:
        """Parameters of all layers."""
        tables = self.table * (1 if self.config.tie_word_embeddings else 2)
        return max(1, self.config.parameters - tables)

    def products(self, operations: float) -> float:
        """Float32 products. Those of narrow layers are less efficient."""
        return operations * (1.1 + 294 / self.config.hidden_size) / self.speed.products

    def values(self, count: float) -> float:
        """Elementwise operations on so many values, in torch."""
        return 240 * count / self.speed.products

    def passed(self, lengths: Sequence[int]) -> float:
        """Texts of these lengths that pass through all layers in torch."""
        config, tokens = self.config, sum(lengths)
        width = 5 * config.hidden_size + 4 * config.intermediate_size
        scores = sum(n * n for n in lengths) * config.num_attention_heads * config.head_dim
        elementwise = self.values(1.6e-9 * 150e9 / 240 * tokens * width * config.num_hidden_layers)
        attention = 4 * scores * config.num_hidden_layers / self.speed.products
        return self.products(2 * self.linears * tokens) + attention + elementwise

    def head(self, rows: float, calls: int = 1) -> float:
        """Logits of rows in torch. Each call converts the table."""
        return self.products(2 * rows * self.table) + self.read(8 * calls * self.table)

    def compared(self, rows: float) -> float:
        """Metrics of rows of logits, in float64."""
        return 2.9e3 * rows * self.config.output_size / self.speed.products

    def read(self, count: float) -> float:
        """Bytes that are read and converted."""
        return count / self.speed.memory

    def python(self, units: float) -> float:
        """Seconds of Python on a machine that turns its loop 11 million times in a second."""
        return units * 11e6 / self.speed.python

    def fed(self, lengths: Sequence[int]) -> float:
        """Calls of the artifact with so many tokens each."""
        config = self.config
        scores = sum(n * n for n in lengths) * config.num_attention_heads * config.head_dim
        attention = 9 * scores * config.num_hidden_layers / self.speed.products
        return 2.4 * sum(lengths) * self.linears / self.speed.products + attention

    def stepped(self, size: int, steps: int) -> float:
        """Calls of the artifact with one token each. size: bytes that each reads."""
        return 1.4 * steps * self.read(size)


def stages(
    config: LlamaConfig,
    recipe: Recipe,
    targets: Sequence[Target],
    context_length: int,
    speed: Speed,
    *,
    validate: bool = True,
    dequantized: bool = False,
) -> tuple[Stage, ...]:
    """Forecast of the stages of an export, in order.

    Args:
        config: of the model that is quantized.
        recipe: the recipe.
        targets: the targets.
        context_length: length of the KV cache in tokens.
        speed: of this machine.
        validate: with the gate, on SHORT_TOKENS tokens.
        dequantized: the checkpoint's weights are quantized, so reading computes.
    """
    work = Work(config, speed)
    found = [Stage("open", work.python(2), 0), *_quantization(work, recipe, dequantized=dequantized)]
    for target in targets:
        found += _lowering(work, recipe, target, context_length)
    for number, target in enumerate(targets):
        found += _gate(work, recipe, target, context_length, first=number == 0, validate=validate)
    if validate:
        foreign = work.python(5) + work.read((500 if dequantized else 30) * config.parameters)
        found.append(Stage("cross-check, first time", foreign, 0.2))
    return tuple(_added(found))


def _added(found: Sequence[Stage]) -> Iterator[Stage]:
    """One stage for each name, with the time of all."""
    for name in dict.fromkeys(stage.name for stage in found):
        same = [stage for stage in found if stage.name == name]
        yield replace(same[0], processor_seconds=sum(stage.processor_seconds for stage in same))


def _quantization(work: Work, recipe: Recipe, *, dequantized: bool) -> Iterator[Stage]:
    config, tokens = work.config, recipe.calibration_tokens
    reading = work.read((100 if dequantized else 40) * config.parameters)
    if recipe.algorithm == GIVEN:
        yield Stage("take codes", work.read(60 * config.parameters), 0)
    elif not tokens:
        yield Stage("quantize", reading + work.read(180 * config.parameters), 0.6)
    else:
        squares = 3 * config.hidden_size**2 + config.intermediate_size**2
        layers = config.num_hidden_layers
        shapes = [shape for name, shape in config.tensor_shapes().items() if ".layers.0." in name]
        cubes = sum(shape[0] * shape[1] ** 2 for shape in shapes if len(shape) == 2)
        moments = work.products(2.2 * tokens * squares * layers)
        rounding = work.values(0.15 * cubes * layers) + work.values(100 * work.linears)
        passes = 1.125 * work.passed([LENGTH] * max(1, tokens // LENGTH))
        yield Stage("calibrate", reading + passes + moments + rounding, 0.95)
    if recipe.algorithm in BUDGETED:
        # Every half of every layer passes through the layers after it, with its codes and with int8.
        passes = 2 * config.num_hidden_layers
        measured = passes * work.passed([64] * (HELD_OUT // 64)) + work.head(2 * passes * HELD_OUT)
        yield Stage("measure", measured, 0.9)
    if "recover" in recipe.algorithm:
        trained = TUNING.steps * TUNING.batch * LENGTH
        yield Stage("recover", work.products(DISTILLED * trained * work.linears), 0.9)


def _lowering(work: Work, recipe: Recipe, target: Target, context_length: int) -> Iterator[Stage]:
    size = planned_bytes(work.config, recipe, target.storage, context_length)
    traced = target.name in ("xnnpack", "coreml", "coreml-pte")
    python = 4 + 0.6 * work.config.num_hidden_layers if traced else 2 + 0.1 * work.config.num_hidden_layers
    yield Stage("lower and write", work.python(python) + work.read(40 * size), 0)


def _gate(
    work: Work, recipe: Recipe, target: Target, context_length: int, *, first: bool, validate: bool
) -> Iterator[Stage]:
    """Gate and golden vectors of a target. The full-precision model reads its texts once for all targets."""
    config = work.config
    step = _step_bytes(config, recipe, target, context_length)
    longest, window = min(context_length, LONGEST), min(256, context_length)
    golden = [longest, *[min(83, context_length)] * 10]
    windows = [window] * -(-SHORT_TOKENS // window)
    others = len(target.families(recipe)[1:])
    texts = [*golden, *([min(64, window)] * 4 if validate else ())]
    passes = 2 * work.passed(texts) + others * (2 * work.passed(golden) + work.passed(windows))
    if first:
        passes += work.passed([*golden, *(windows if validate else ())])
    slow = SLOW * config.parameters if target.is_slow_here() else None

    def artifact(calls: Sequence[int], steps: int) -> float:
        if slow is not None:
            return slow * (sum(calls) + steps) / 4
        return work.fed(calls) + work.stepped(step, steps)

    heads = work.head(10 * 16 * (3 + 2 * others), 3 + 2 * others)
    recorded = artifact(golden, 16 * len(golden)) + heads + work.compared(16 * len(golden) * 3)
    yield Stage("references", passes, 0.95)
    yield Stage("golden", recorded, 0.8)
    if not validate:
        return
    tokens = sum(windows)
    logits = work.head(tokens, len(windows)) + work.compared(tokens) * (1 + others)
    parity = work.head(2 * PARITY_TOKENS, 8) + work.compared(2 * PARITY_TOKENS)
    deep = work.head(longest / 4 + 300, 9) + work.compared(longest / 8 + 200)
    calls = [min(n, longest) for n in (CALL_TOKENS // 45,) * 45]
    reading = work.read(10 * (work.linears + work.table)) * GREEDY_STEPS
    shaped = work.python(0.08 * config.num_hidden_layers) + work.read(130 * config.parameters)
    parts = work.python(0.12 * config.num_hidden_layers) + work.read(300 * config.parameters)
    yield Stage("structure and weights", shaped, 0.3)
    yield Stage("score", artifact((), tokens) + logits + parity, 0.9)
    yield Stage("long window", artifact([128] * (longest // 128), LAST_STEPS) + deep, 0.9)
    yield Stage("consistency", artifact(calls, STEPS) + reading, 0.8)
    yield Stage("end of the context", artifact([longest, longest] if slow is None else (), 0), 0.9)
    yield Stage("parity of parts", parts, 0.1)


def _step_bytes(config: LlamaConfig, recipe: Recipe, target: Target, context_length: int) -> int:
    """Bytes of the artifact that a token reads: without the embedding's table if that is stored apart."""
    size = planned_bytes(config, recipe, target.storage, context_length)
    if target.storage.tied_once and config.tie_word_embeddings:
        return size
    shapes = module_shapes(config.tensor_shapes(), config.tie_word_embeddings)
    table = "model.embed_tokens"
    scheme = check_recipe(recipe, shapes)[table]
    return max(1, size - target.storage.weight_bytes(shapes[table], scheme))
