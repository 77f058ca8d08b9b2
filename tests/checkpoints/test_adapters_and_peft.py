"""Merged adapters against peft's own logits, for every variant that edgellama merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellama.checkpoints import open_checkpoint
from edgellama.checkpoints.adapters import with_adapters
from tests.helpers.adapters import ALL, logits_of, train, weighted_sum
from tests.helpers.paths import TINY

pytestmark = pytest.mark.slow

LOGITS = 1e-5  # of the largest logit

VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "all linears": {"target_modules": list(ALL)},
    "a regular expression": {"target_modules": r".*\.[0-2]\.self_attn\.[qk]_proj"},
    "some layers": {"layers_to_transform": [1, 3]},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True, "target_modules": list(ALL)},
    "DoRA and rsLoRA": {"use_dora": True, "use_rslora": True},
    "patterns": {
        "target_modules": list(ALL),
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 7, "down_proj": 2},
        "alpha_pattern": {"v_proj": 3, r"layers\.[01]\..*up_proj": 5},
    },
    "rsLoRA and patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"v_proj": 1},
    },
    "head alone": {"target_modules": ["q_proj", "lm_head"]},
    "embedding alone": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
    "whole embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "whole pair, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "whole norms": {"modules_to_save": ["input_layernorm"]},
    "resized vocabulary": {"rows": 520, "save_embedding_layers": True},
    "resized vocabulary, embedding adapted": {
        "rows": 520,
        "save_embedding_layers": True,
        "target_modules": ["q_proj", "embed_tokens"],
    },
    "resized vocabulary, whole pair": {"rows": 520, "modules_to_save": ["embed_tokens", "lm_head"]},
    "a pickle": {"safe": False},
    "EVA's and Gaussian beginnings": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_merged_adapter_computes_as_peft_computes(name: str, tmp_path: Path) -> None:
    trained = train(TINY, tmp_path / "adapter", **VARIANTS[name])
    base = open_checkpoint(TINY)
    merged = with_adapters(base, [trained.path])
    actual = logits_of(merged)
    assert np.abs(actual - trained.logits).max() <= LOGITS * np.abs(trained.logits).max()
    expected_size = base.config.vocab_size
    if "resized" not in name:
        assert np.abs(actual - logits_of(base))[:, :expected_size].max() > 100 * LOGITS


def test_adapters_add_up_with_their_weights(tmp_path: Path) -> None:
    first = train(TINY, tmp_path / "first", seed=1)
    second = train(TINY, tmp_path / "second", seed=2, target_modules=list(ALL), use_rslora=True)
    expected = weighted_sum(TINY, [(first.path, 0.5), (second.path, 2.0)])
    places = [f"{first.path}:0.5", f"{second.path}:2"]
    actual = logits_of(with_adapters(open_checkpoint(TINY), places))
    assert np.abs(actual - expected).max() <= LOGITS * np.abs(expected).max()
