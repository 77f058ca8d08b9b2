"""Recovery on the tiny model: it gets better on text that nobody tuned on, or stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgellama import data
from edgellama.calibration import Calibration, calibrate_on, calibration_texts
from edgellama.checkpoint import Checkpoint, load_llama
from edgellama.export.calibrate import calibrated_llama
from edgellama.export.layer_store import LayerStore
from edgellama.export.recovery import Tuning, recover
from edgellama.llama import Llama
from edgellama.progress import Progress
from edgellama.recipe import RECIPES
from edgellama.xnnpack_numerics import xnnpack_numerics
from tests.tiny_models import CONTEXT

RECIPE = replace(RECIPES["int4-best"], calibration_tokens=3072)
QUICK = Tuning(steps=24, batch=4, rounds=3, sampled=4, rate=4e-3, warm_up=2)


@pytest.fixture(scope="module")
def read(tiny_checkpoint: Checkpoint) -> Calibration:
    return calibrate_on(calibration_texts(), tiny_checkpoint.tokenizer, 3072, CONTEXT)


@pytest.fixture(scope="module")
def start(tiny_checkpoint: Checkpoint, read: Calibration) -> Callable[[], Llama]:
    """A calibrated model, made anew at each call from layers that were calibrated once."""
    import tempfile

    store = LayerStore(Path(tempfile.mkdtemp()))

    def make() -> Llama:
        return calibrated_llama(tiny_checkpoint, RECIPE, CONTEXT, read, store=store, progress=Progress())[0]

    return make


def tuned(
    model: Llama,
    checkpoint: Checkpoint,
    read: Calibration,
    tuning: Tuning = QUICK,
    store: LayerStore | None = None,
) -> Llama:
    recover(model, checkpoint, read, store=store or LayerStore(), progress=Progress(), tuning=tuning)
    return model


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Checkpoint, read: Calibration, start: Callable[[], Llama]) -> Llama:
    return tuned(start(), tiny_checkpoint, read)


@torch.no_grad()
def kl(checkpoint: Checkpoint, model: Llama) -> float:
    """Mean over evaluation text, with the artifact's arithmetic."""
    ids = checkpoint.tokenizer.encode(data.read_text(data.EVALUATION[0])[:20000])
    full, total = load_llama(checkpoint, CONTEXT), 0.0
    with xnnpack_numerics(model):
        for i in range(8):
            tokens = torch.tensor(ids[i * CONTEXT : (i + 1) * CONTEXT])[None]
            p, q = full(tokens).log_softmax(-1), model(tokens).log_softmax(-1)
            total += float((p.exp() * (p - q)).sum(-1).mean()) / 8
    return total


def test_the_tuned_model_is_nearer_to_the_full_one(
    tiny_checkpoint: Checkpoint, made: Llama, start: Callable[[], Llama]
) -> None:
    calibrated = start()
    print(kl(tiny_checkpoint, calibrated), kl(tiny_checkpoint, made))
    assert kl(tiny_checkpoint, made) < 0.96 * kl(tiny_checkpoint, calibrated)
