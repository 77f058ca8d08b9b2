"""Forecast of an export's time: it follows from shapes, options and the machine's speed. No time is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edgellama.checkpoints import Checkpoint
from edgellama.export.forecast_time import Stage, stages
from edgellama.host.machine_speed import Speed
from edgellama.model.config import LlamaConfig
from edgellama.recipe import find_recipe
from edgellama.targets import TARGETS, find_target

SPEED = Speed(products=150e9, memory=9e9, python=11e6)
CORES = 2


@pytest.fixture
def smollm2(tiny_checkpoint: Checkpoint) -> LlamaConfig:
    """SmolLM2-135M's shape."""
    return replace(
        tiny_checkpoint.config,
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
    )


def seconds(
    config: LlamaConfig,
    recipe: str = "int4-fast",
    targets: tuple[str, ...] = ("xnnpack",),
    context: int = 2048,
    speed: Speed = SPEED,
    **options: Any,
) -> dict[str, float]:
    chosen = [find_target(name) for name in targets]
    found = stages(config, find_recipe(recipe), chosen, context, speed, **options)
    return {stage.name: stage.processor_seconds for stage in found}


def test_a_calibrated_export_of_two_targets_is_as_long_as_was_measured(smollm2: LlamaConfig) -> None:
    """docs/benchmarks.md: 415 s of processor time, of them 140 calibration."""
    found = seconds(smollm2, "int4", ("xnnpack", "onnx"), dequantized=True)
    assert sum(found.values()) == pytest.approx(415, rel=0.3)
    assert found["calibrate"] == pytest.approx(140, rel=0.3)


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("recipe", ["int4", "int4-best", "int4-fast", "int8", "fp32"])
def test_every_target_and_recipe_has_a_forecast(recipe: str, target: str, smollm2: LlamaConfig) -> None:
    found = seconds(smollm2, recipe, (target,))
    assert all(value >= 0 for value in found.values()) and 30 < sum(found.values()) < 4000


def test_a_forecast_grows_with_everything_that_takes_time(smollm2: LlamaConfig) -> None:
    total = sum(seconds(smollm2).values())
    deep = replace(smollm2, num_hidden_layers=60)
    assert total < sum(seconds(deep).values()) < 2 * total
    assert sum(seconds(smollm2, targets=("xnnpack", "onnx")).values()) > 1.4 * total
    assert sum(seconds(smollm2, context=4096).values()) > 1.2 * total
    assert sum(seconds(smollm2, validate=False).values()) < 0.7 * total
    assert sum(seconds(smollm2, "int4").values()) > total + 60
    assert sum(seconds(smollm2, "int4-best").values()) > 3 * sum(seconds(smollm2, "int4").values())
    wide = replace(smollm2, vocab_size=128_256)
    assert seconds(wide)["score"] > 1.2 * seconds(smollm2)["score"]


def test_each_kind_of_speed_changes_its_own_stages(smollm2: LlamaConfig) -> None:
    base = seconds(smollm2)
    for kind, changed, unchanged in (
        ("products", "references", "lower and write"),
        ("python", "lower and write", "references"),
        ("memory", "quantize", "references"),
    ):
        slower = seconds(smollm2, speed=replace(SPEED, **{kind: getattr(SPEED, kind) / 2}))
        assert slower[changed] > 1.5 * base[changed]
        assert slower[unchanged] == pytest.approx(base[unchanged])


def test_cores_share_the_parallel_part() -> None:
    stage = Stage("references", 10.0, 0.8)
    assert stage.seconds(1) == pytest.approx(10.0) and stage.seconds(CORES) == pytest.approx(6.0)
