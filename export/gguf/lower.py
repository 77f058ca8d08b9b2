"""Quantized model -> one GGUF file, for llama.cpp and the programs around it.

Codes and scales are written as they are: a group of 32 codes with its scale is a block of Q4_0. The writer of the
`gguf` package writes keys and tensors in the given order, and nothing that differs between two exports.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from edgellama.errors import LoweringError
from edgellama.export.gguf.tokenizer import tokenizer_keys, without_tokenizer
from edgellama.formats.gguf_blocks import BLOCK, BYTES, pack
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.targets.gguf.interface import PlannedTensor, Value, model_keys, scale_halves, tensors
from edgellama.targets.provenance import Provenance
from edgellama.text.tokenizer import Tokenizer

_TYPES = {kind: gguf.GGMLQuantizationType[kind] for kind in (*BYTES, "F32")}


def lower_to_gguf(
    model: Llama,
    path: Path,
    provenance: Provenance,
    *,
    tokenizer: Tokenizer | None = None,
    progress: Progress,
) -> None:
    """Writes the quantized `model` to the file `path`. The model does not change.

    tokenizer: None for a file without one, which llama.cpp runs on ids only.

    Raises LoweringError for a scale that float16 does not hold, TokenizerError for a tokenizer that llama.cpp
    does not have.
    """
    keys = model_keys(model, provenance)
    keys |= without_tokenizer() if tokenizer is None else tokenizer_keys(tokenizer, model.config)
    with progress.stage("lower"):
        planned = list(tensors(model))
        inexact = [tensor.source.removesuffix(".weight") for tensor in planned if not _is_exact(tensor)]
        if inexact:
            raise LoweringError(
                f"scales of {', '.join(inexact[:3])}{' …' if len(inexact) > 3 else ''} are no float16 numbers, which "
                "GGUF stores",
                remedy="Keep these modules in float (a rule with scheme null), or leave out target gguf.",
            )
    with progress.stage("write"):
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in keys.items():
            _add(writer, key, value)
        for tensor in planned:
            shape = tensor.shape if tensor.codes is None else (tensor.shape[0], _row_bytes(tensor))
            dtype = np.dtype(np.float32 if tensor.codes is None else np.uint8)
            nbytes = int(np.prod(shape)) * dtype.itemsize
            writer.add_tensor_info(tensor.name, shape, dtype, nbytes, raw_dtype=_TYPES[tensor.kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in planned:
            writer.write_tensor_data(_content(tensor))
        writer.close()


def _is_exact(tensor: PlannedTensor) -> bool:
    return tensor.codes is None or scale_halves(tensor.codes.scales, tensor.shape[1], BLOCK)[1]


def _row_bytes(tensor: PlannedTensor) -> int:
    return tensor.shape[1] // BLOCK * BYTES[tensor.kind]


def _content(tensor: PlannedTensor) -> np.ndarray:
    if tensor.codes is None:
        assert tensor.floats is not None
        return np.ascontiguousarray(tensor.floats.numpy())
    halves, _ = scale_halves(tensor.codes.scales, tensor.shape[1], BLOCK)
    return pack(tensor.kind, np.ascontiguousarray(tensor.codes.values.numpy()), halves)


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
