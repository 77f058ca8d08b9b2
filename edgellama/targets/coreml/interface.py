"""The interface of our Core ML programs: names, shapes, and the mask that goes with a position.

Written by the export, read by the runtimes and the apps. Names are the ones that Swift clients of language models
use (swift-transformers: inputIds, causalMask, keyCache, valueCache, logits).

Shapes: T tokens of a call, S context length, E keys that the mask covers, L layers, G key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edgellama.model.config import LlamaConfig

INPUT_IDS = "inputIds"  # int32 [1, T]
MASK = "causalMask"  # float16 [1, 1, T, E], 0 where a token may look and -inf elsewhere
POSITION = "position"  # int32 [1], tokens in the cache before this call; static forms only
KEY_CACHE = "keyCache"  # float16 [L, 1, G, S, D]
VALUE_CACHE = "valueCache"
LOGITS = "logits"  # float16 [1, T, vocab_size]
NEW_KEYS = "newKeys"  # float16 [L, 1, G, T, D], for the host to write into the cache at `position`
NEW_VALUES = "newValues"

# Keys of a package's own metadata.
VOCAB_SIZE = "edgellama.vocab_size"
CONTEXT_LENGTH = "edgellama.context_length"

DESCRIPTIONS = {
    INPUT_IDS: "Token ids.",
    MASK: "0 where a token may attend to a position, -inf elsewhere.",
    POSITION: "Number of tokens that the cache holds already.",
    KEY_CACHE: "Rotated keys of the tokens so far: [layer, 1, head, position, head_dim].",
    VALUE_CACHE: "Values of the tokens so far: [layer, 1, head, position, head_dim].",
    LOGITS: "Logits after each token of the call.",
    NEW_KEYS: "Keys of this call's tokens, to be written into keyCache at `position`.",
    NEW_VALUES: "Values of this call's tokens, to be written into valueCache at `position`.",
}


@dataclass(frozen=True)
class CoremlForm:
    """One function of a program. tokens: how many a call takes; None for any number, with E = position + T.

    stateful: the cache is a Core ML state that the function updates; otherwise it comes in as an input and the new
    rows go out.
    """

    tokens: int | None
    stateful: bool = True

    def mask_width(self, context_length: int) -> int | None:
        """E: the whole cache, followed by the call's own tokens where the cache is an input. None: as the call says."""
        if self.tokens is None:
            return None
        return context_length if self.stateful else context_length + self.tokens


# A prompt goes in 32 tokens at a time where shapes are static: longer updates of a state were seen to fall off the
# Neural Engine (Anemll issue #27).
PREFILL_TOKENS = 32

# The functions of a package by profile. The GPU runs flexible shapes well (Apple's own Llama recipe), and a decode
# step then reads only the positions that are filled; the Neural Engine runs static shapes only, so there the two
# lengths are two functions, which share their weights in the file.
PROFILES: Mapping[str, Mapping[str, CoremlForm]] = {
    "gpu": {"main": CoremlForm(None)},
    "ane": {"decode": CoremlForm(1), "prefill": CoremlForm(PREFILL_TOKENS)},
}
# States do not work inside a .pte (pytorch/executorch #21855), so its cache goes in and out.
PTE_METHODS: Mapping[str, CoremlForm] = {
    "forward": CoremlForm(1, stateful=False),
    "prefill": CoremlForm(PREFILL_TOKENS, stateful=False),
}


def cache_shape(config: LlamaConfig, context_length: int) -> tuple[int, int, int, int, int]:
    """[L, 1, G, S, D]."""
    return (config.num_hidden_layers, 1, config.num_key_value_heads, context_length, config.head_dim)


def causal_mask(form: CoremlForm, tokens: int, position: int, context_length: int) -> Tensor:
    """The mask for `tokens` tokens at `position`: float16 [1, 1, T, E]. Tokens of a static form past `tokens` see all
    that the last one sees; what they compute is not used.
    """
    rows = form.tokens or tokens
    width = form.mask_width(context_length) or position + tokens
    mask = torch.full((rows, width), -torch.inf, dtype=torch.float16)
    mask[:, :position] = 0
    own = position if form.stateful else context_length  # where the call's own keys lie
    mask[:, own : own + rows] = torch.full((rows, rows), -torch.inf, dtype=torch.float16).triu(1)[
        :, : width - own
    ]
    return mask[None, None]
