"""Interface of edgellama's ONNX models: file names, inputs and outputs, and the blocks of weights.

The export writes it; the runtime, the gate and apps read it. The names are those of onnxruntime-genai and
Optimum, so that their clients find every file and tensor.

Shapes: T tokens of a call, P tokens in the cache before it, E = P + T, G key/value heads, D head_dim.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from edgellama.errors import BundleError
from edgellama.formats.onnx_weights import JOINED
from edgellama.recipe import Recipe, Scheme

if TYPE_CHECKING:
    from edgellama.model.llama import Llama
    from edgellama.targets.provenance import Provenance

DATA_FILE = "model.onnx.data"
GENAI_FILE = "genai_config.json"

INPUT_IDS = "input_ids"  # int64 [1, T]
ATTENTION_MASK = "attention_mask"  # int64 [1, E], all ones: its width is the number of tokens
PAST_KEY = "past_key_values.{}.key"  # float32 [1, G, P, D]; form `ort` also takes a buffer longer than P
PAST_VALUE = "past_key_values.{}.value"
PRESENT_KEY = "present.{}.key"  # float32 [1, G, E, D]; with form `ort` it may be the past's own buffer
PRESENT_VALUE = "present.{}.value"
LOGITS = "logits"  # float32 [1, 1, vocab_size], after the last token of the call

# Optional inputs of a linear that an adapter may change, by the linear's name. Without a value they have rank 0.
ADAPTER_DOWN = "{}.lora_A.weight"  # float32 [columns, rank]
ADAPTER_UP = "{}.lora_B.weight"  # float32 [rank, rows]

# Keys of the model metadata.
VOCAB_SIZE = "edgellama.vocab_size"
CONTEXT_LENGTH = "edgellama.context_length"
FORM = "edgellama.onnx_form"

# Session entries of ONNX Runtime that the artifact's arithmetic needs, by form.
#
# At accuracy level 1, a fused DequantizeLinear and MatMul computes in float. The portable form specifies that.
SESSION_ENTRIES: dict[str, dict[str, str]] = {
    "ort": {},
    "portable": {"session.qdq_matmulnbits_accuracy_level": "1"},
}
# With `onnx_rounding` per-block. KleidiAI rounds the inputs of int4 products per row on Arm processors with dotprod.
# Without it, ONNX Runtime rounds them per block of weights, as on x86-64, at 1.6 to 3 times the instructions.
PER_BLOCK_ENTRIES = {"mlas.disable_kleidiai": "1"}
SOURCE_SHA256 = "edgellama.source_sha256"
MANIFEST_SHA256 = "edgellama.manifest_sha256"
RECIPE = "edgellama.recipe"
VERSION = "edgellama.version"

OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding
IR_VERSION = 11

# At level 4, MatMulNBits quantizes its input to int8, symmetric, in the blocks of the weight. Its fast
# kernels need this. Levels 0 and 1 multiply floats, at a fraction of the speed.
ACCURACY_LEVEL = 4
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256  # limits of ONNX Runtime's kernels


def metadata(model: Llama, provenance: Provenance) -> dict[str, str]:
    """The model's metadata: every key, as the export writes it and the gate expects it."""
    return {
        CONTEXT_LENGTH: str(model.context_length),
        FORM: provenance.recipe.onnx_form,
        MANIFEST_SHA256: provenance.manifest_sha256,
        RECIPE: json.dumps(provenance.recipe_data, sort_keys=True),
        SOURCE_SHA256: provenance.source_sha256,
        VERSION: provenance.edgellama,
        VOCAB_SIZE: str(model.config.vocab_size),
    }


def adapter_inputs(model: Llama, provenance: Provenance) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the optional inputs by name. Each linear has a rank of its own, whose size varies.

    Raises BundleError for a name that is no linear of the decoder.
    """
    shapes: dict[str, tuple[int | str, ...]] = {}
    linears = {name for name, _ in model.named_modules() if name.endswith("_proj")}
    for name in with_joined(provenance.swappable):
        if name not in linears:
            raise BundleError(
                f"an adapter changes {name!r:.80}, which the model does not have",
                remedy="Export the bundle again.",
            )
        rows, columns = model.get_submodule(name).get_parameter("weight").shape
        rank = f"rank of {name}"
        shapes[ADAPTER_DOWN.format(name)] = (columns, rank)
        shapes[ADAPTER_UP.format(name)] = (rank, rows)
    return shapes


def with_joined(swappable: Iterable[str]) -> list[str]:
    """Linears with optional inputs. Those that may share a product with a swappable one have inputs too."""
    names: set[str] = set()
    for name in swappable:
        prefix, _, leaf = name.rpartition(".")
        together = next((members for members in JOINED.values() if leaf in members), (leaf,))
        names |= {f"{prefix}.{member}" for member in together}
    return sorted(names)


def base_number(manifest_sha256: str) -> int:
    """Number that stands for a base in its adapters' files, which hold no text: 31 bits of the manifest's hash."""
    return int(manifest_sha256[:8], 16) & 0x7FFFFFFF


def session_entries(recipe: Recipe) -> dict[str, str]:
    """Session entries that a client of the artifact sets, by name.

    >>> from edgellama.recipe import RECIPES
    >>> session_entries(RECIPES["int4"])
    {}
    """
    per_block = recipe.onnx_form == "ort" and recipe.onnx_rounding == "per-block"
    return SESSION_ENTRIES[recipe.onnx_form] | (PER_BLOCK_ENTRIES if per_block else {})


def block_size(scheme: Scheme, columns: int) -> int:
    """Number of weights that share a scale in the file: the scheme's group size, or a block of a whole row.

    ONNX Runtime has no scale per row, so the row's scale is repeated for each block. The block is the largest
    power of two, up to LARGEST_BLOCK, that divides the row.
    """
    return scheme.group_size or math.gcd(columns, LARGEST_BLOCK)
