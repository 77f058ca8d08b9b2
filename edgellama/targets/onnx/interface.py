"""The interface of our ONNX models: file names, inputs and outputs, and how weights lie in blocks.

Written by the export, read by the runtime, the gate and apps. Names are the ones that onnxruntime-genai and Optimum
use, so that their clients find everything where they look.

Shapes: T tokens of a call, P tokens in the cache before it, E = P + T, G key/value heads, D head_dim.
"""

from __future__ import annotations

import math

from edgellama.recipe import Scheme

DATA_FILE = "model.onnx.data"
GENAI_FILE = "genai_config.json"

INPUT_IDS = "input_ids"  # int64 [1, T]
ATTENTION_MASK = "attention_mask"  # int64 [1, E], all ones: its width says how many tokens there are
PAST_KEY = "past_key_values.{}.key"  # float32 [1, G, P, D]; form `ort` also takes a buffer longer than P
PAST_VALUE = "past_key_values.{}.value"
PRESENT_KEY = "present.{}.key"  # float32 [1, G, E, D]; with form `ort` it may be the past's own buffer
PRESENT_VALUE = "present.{}.value"
LOGITS = "logits"  # float32 [1, 1, vocab_size], after the last token of the call

# Keys of a model's own metadata.
VOCAB_SIZE = "edgellama.vocab_size"
CONTEXT_LENGTH = "edgellama.context_length"
FORM = "edgellama.onnx_form"
SOURCE_SHA256 = "edgellama.source_sha256"
MANIFEST_SHA256 = "edgellama.manifest_sha256"
RECIPE = "edgellama.recipe"
VERSION = "edgellama.version"

OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding
IR_VERSION = 11

# MatMulNBits quantizes its input to int8, symmetric, in the blocks of the weight, which is what makes its kernels
# fast: level 4. Levels 0 and 1 multiply floats, at a fraction of the speed.
ACCURACY_LEVEL = 4
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256  # of ONNX Runtime's kernels


def block_size(scheme: Scheme, columns: int) -> int:
    """Weights that share a scale in the file: the scheme's groups, or for whole rows the largest power of two that
    divides them, since ONNX Runtime has no scale per row (the row's scale is repeated).
    """
    return scheme.group_size or math.gcd(columns, LARGEST_BLOCK)
