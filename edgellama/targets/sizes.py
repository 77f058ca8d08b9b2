"""Bytes of an artifact, predicted from shapes and schemes."""

from __future__ import annotations

import math

from edgellama.model.config import LlamaConfig
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import Recipe
from edgellama.targets.base import Storage


def planned_bytes(config: LlamaConfig, recipe: Recipe, storage: Storage, context_length: int) -> int:
    """Bytes of all weights and RoPE tables under `recipe`, and of the vocabulary, in the format of `storage`."""
    shapes = module_shapes(config.tensor_shapes(), config.tie_word_embeddings)
    schemes = check_recipe(recipe, shapes)
    floats = int(2 * context_length * config.head_dim * storage.rope_width) + sum(
        math.prod(s)
        for name, s in config.tensor_shapes().items()
        if name.removesuffix(".weight") not in shapes
    )
    total = floats * storage.float_bytes + storage.vocabulary_bytes(config.vocab_size)
    for name, scheme in schemes.items():
        if storage.tied_once and name == "lm_head" and config.tie_word_embeddings:
            table = schemes["model.embed_tokens"]
            if (table and (table.bits, table.group_size)) == (scheme and (scheme.bits, scheme.group_size)):
                continue
        total += storage.weight_bytes(shapes[name], scheme)
    return total
