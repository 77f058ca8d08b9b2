"""Pass of windows through a layer in blocks: equal to the pass of whole windows, whatever the threads."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellama.checkpoints import Checkpoint
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.host.threads import Workers
from edgellama.model.activations import INT8_PER_TOKEN, NO_ROUNDING
from edgellama.model.config import LlamaConfig
from edgellama.model.layer_pass import BLOCK, blocks, causal_attention, pass_layer
from edgellama.model.layerwise import layer_of, run_layer
from edgellama.model.llama import KVCache, Llama
from edgellama.recipe import find_recipe

CONTEXT = 64
LENGTHS = (1, 7, 40, BLOCK, BLOCK + 1, 1200)


@pytest.fixture
def quantized(tiny_checkpoint: Checkpoint) -> Llama:
    return quantized_llama(tiny_checkpoint, find_recipe("int4-fast"), CONTEXT)[0]


def states(config: LlamaConfig) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, config.hidden_size, generator=generator) for length in LENGTHS]


@pytest.mark.parametrize("rounding", [NO_ROUNDING, INT8_PER_TOKEN], ids=["float", "int8"])
def test_a_pass_equals_the_visited_pass(quantized: Llama, rounding: object) -> None:
    """A rounding to int8 amplifies other last bits, so only values that round alike are compared."""
    config, layer = quantized.config, layer_of(quantized, 1)
    linears = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    prefix = "model.layers.1."
    outside = ["model.embed_tokens", "lm_head"]
    assigned = find_recipe("int4-fast").assign([*outside, *(prefix + name for name in linears)])
    schemes = {name: assigned[prefix + name] for name in linears}
    pool = Workers(2)
    whole = run_layer(layer, states(config), config, schemes, pool, lambda *_: None, rounding)  # type: ignore[arg-type]
    passed = pass_layer(layer, states(config), config, pool, schemes, rounding)  # type: ignore[arg-type]
    pool.close()
    for expected, actual in zip(whole, passed, strict=True):
        close = torch.isclose(actual, expected, rtol=1e-5, atol=1e-5)
        assert float(close.float().mean()) > (0.9999 if rounding is NO_ROUNDING else 0.99)


def test_no_bit_depends_on_threads_or_on_other_windows(quantized: Llama) -> None:
    config, layer = quantized.config, layer_of(quantized, 0)
    results = []
    for count in (1, 3):
        pool = Workers(count)
        results.append(pass_layer(layer, states(config), config, pool))
        pool.close()
    pool = Workers(2)
    results.append(list(chain.from_iterable(pass_layer(layer, [x], config, pool) for x in states(config))))
    pool.close()
    for one, three, alone in zip(*results, strict=True):
        assert torch.equal(one, three) and torch.equal(one, alone)


def test_attention_of_a_window_is_that_of_the_cache(tiny_checkpoint: Checkpoint) -> None:
    config = tiny_checkpoint.config
    generator = torch.Generator().manual_seed(1)
    for length in LENGTHS:
        query, shared = config.num_attention_heads, config.num_key_value_heads
        q, k, v = (
            torch.randn(1, length, count, config.head_dim, generator=generator)
            for count in (query, shared, shared)
        )
        expected = KVCache(config, length)(q, k, v, 0)
        assert torch.allclose(causal_attention(q, k, v), expected, rtol=0, atol=1e-6)
        later = F.pad(k[:, :-1], (0, 0, 0, 0, 0, 1), value=9.0)  # another last key changes the last row alone
        assert torch.equal(causal_attention(q, later, v)[:, :-1], causal_attention(q, k, v)[:, :-1])


@pytest.mark.parametrize("length", [1, 16, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 2048])
def test_blocks_cover_a_window_once_and_are_never_small(length: int) -> None:
    parts = blocks(length)
    assert [i for part in parts for i in range(length)[part]] == list(range(length))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) <= BLOCK and min(sizes) >= min(length, BLOCK // 2)
