"""Interface of edgellama's Core ML programs: names, shapes, and the mask for a position.

The export writes it; the runtimes and the apps read it. The names are those of Swift clients of language
models (swift-transformers: inputIds, causalMask, keyCache, valueCache, logits).

Shapes: T tokens of a call, S context length, E keys under the mask, L layers, G key/value heads, D head_dim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgellama.model.config import LlamaConfig

if TYPE_CHECKING:
    from edgellama.model.llama import Llama
    from edgellama.targets.provenance import Provenance

INPUT_IDS = "inputIds"  # int32 [1, T]
MASK = "causalMask"  # float16 [1, 1, T, E], 0 where a token may attend, -inf elsewhere
POSITION = "position"  # int32 [1], tokens in the cache before this call; static forms only
KEY_CACHE = "keyCache"  # float16 [L, 1, G, S, D]
VALUE_CACHE = "valueCache"
LOGITS = "logits"  # float16 [1, T, output_size]
NEW_KEYS = "newKeys"  # float16 [L, 1, G, T, D], for the host to write into the cache at `position`
NEW_VALUES = "newValues"

# Keys of the package metadata.
VOCAB_SIZE = "edgellama.vocab_size"
OUTPUT_SIZE = "edgellama.output_size"  # of a classifier only: number of logits
CONTEXT_LENGTH = "edgellama.context_length"
MANIFEST_SHA256 = "edgellama.manifest_sha256"
COREMLTOOLS = "com.github.apple.coremltools.version"

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
    """One function of a program.

    Attributes:
        tokens: number of tokens per call. None for any number, with E = position + T.
        stateful: the cache is a Core ML state that the function updates. Otherwise the cache is an input, and
            the new rows are outputs.
    """

    tokens: int | None
    stateful: bool = True

    def mask_width(self, context_length: int) -> int | None:
        """E: the whole cache, followed by the call's own tokens if the cache is an input.

        None if it varies.
        """
        if self.tokens is None:
            return None
        return context_length if self.stateful else context_length + self.tokens


# Prompt tokens per call with static shapes. Longer updates of a state were seen to fall off the Neural Engine
# (Anemll issue #27).
PREFILL_TOKENS = 32

# Functions of a package, by profile. The GPU runs flexible shapes well (Apple's own Llama recipe), and a
# decode step then reads filled positions only. The Neural Engine runs static shapes only, so prefill and
# decode are two functions there. They share their weights in the file.
PROFILES: Mapping[str, Mapping[str, CoremlForm]] = {
    "gpu": {"main": CoremlForm(None)},
    "ane": {"decode": CoremlForm(1), "prefill": CoremlForm(PREFILL_TOKENS)},
}
# States do not work inside a .pte (pytorch/executorch #21855), so its cache is an input and an output.
PTE_METHODS: Mapping[str, CoremlForm] = {
    "forward": CoremlForm(1, stateful=False),
    "prefill": CoremlForm(PREFILL_TOKENS, stateful=False),
}
PREFILL_METHOD = "get_prefill_tokens"  # constant method with the number of tokens of `prefill`


def metadata_fields(provenance: Provenance) -> dict[str, str]:
    """The package's metadata that Xcode shows."""
    return {
        "author": "edgellama",
        "license": provenance.license or "unknown",
        "version": provenance.manifest_sha256[:12],
        "description": provenance.summary,
    }


def user_defined(model: Llama, provenance: Provenance) -> dict[str, str]:
    """The package's metadata under edgellama's own keys. COREMLTOOLS comes on top."""
    return {
        VOCAB_SIZE: str(model.config.vocab_size),
        **({OUTPUT_SIZE: str(model.config.output_size)} if model.config.is_classifier else {}),
        CONTEXT_LENGTH: str(model.context_length),
        "edgellama.version": provenance.edgellama,
        "edgellama.source_sha256": provenance.source_sha256,
        MANIFEST_SHA256: provenance.manifest_sha256,
        "edgellama.recipe": json.dumps(provenance.recipe_data, sort_keys=True),
    }


def cache_shape(config: LlamaConfig, context_length: int) -> tuple[int, int, int, int, int]:
    """Shape of a cache: [L, 1, G, S, D]."""
    return (config.num_hidden_layers, 1, config.num_key_value_heads, context_length, config.head_dim)


def causal_mask(form: CoremlForm, tokens: int, position: int, context_length: int) -> Tensor:
    """Mask for `tokens` tokens at `position`: float16 [1, 1, T, E].

    Padding rows of a static form, past `tokens`, see all keys that the last token sees. Their results are not
    used.
    """
    rows = form.tokens or tokens
    width = form.mask_width(context_length) or position + tokens
    mask = torch.full((rows, width), -torch.inf, dtype=torch.float16)
    mask[:, :position] = 0
    own = position if form.stateful else context_length  # column of the call's first own key
    mask[:, own : own + rows] = torch.full((rows, rows), -torch.inf, dtype=torch.float16).triu(1)[
        :, : width - own
    ]
    return mask[None, None]
