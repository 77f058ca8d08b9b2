"""Given codes of a GGUF file: blocks of Q4_0 and Q8_0, which are codes with one float16 scale for 32 weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edgellama.checkpoints.given.weights import Given, Origin
from edgellama.formats.gguf import GgufFile
from edgellama.formats.gguf_blocks import BLOCK, unpack
from edgellama.formats.gguf_names import is_rotated, unpermute
from edgellama.model.quantized import Codes
from edgellama.recipe import PerGroup, Scheme

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_BITS = {"Q4_0": 4, "Q8_0": 8}


def given_blocks(file: GgufFile, names: Mapping[str, str], head_dim: int) -> Given | None:
    """Weights of the file that are codes; None without any.

    An embedding's codes are widened to 8 bits, which changes no value. A tied lm_head has the embedding's.

    Args:
        file: the open file.
        names: GGUF's name of every weight, by Hugging Face name.
        head_dim: size of a head: rows of q and k are put back into Hugging Face's order.
    """
    schemes = {}
    for name, own in names.items():
        module, dtype = name.removesuffix(".weight"), file.tensors[own].dtype
        if name.endswith(".weight") and dtype in _BITS:
            embedding = module == EMBEDDING
            schemes[module] = Scheme(
                8 if embedding else _BITS[dtype], PerGroup(BLOCK), int8_activations=not embedding
            )
    if not schemes:
        return None
    tied = f"{HEAD}.weight" not in names
    if tied and EMBEDDING in schemes:
        schemes[HEAD] = Scheme(8, PerGroup(BLOCK))

    def own_name(module: str) -> str:
        return names[f"{EMBEDDING if tied and module == HEAD else module}.weight"]

    def raw(module: str) -> Mapping[str, Tensor]:
        tensor = file.tensors[own_name(module)]
        part = file.parts[tensor.part][tensor.start : tensor.start + tensor.nbytes]
        return {tensor.dtype: torch.from_numpy(part).reshape(tensor.shape[0], -1)}

    def codes(module: str) -> Codes:
        tensor = file.tensors[own_name(module)]
        ((dtype, blocks),) = raw(module).items()
        shape = (tensor.shape[0], tensor.shape[1])
        values, halves = (torch.from_numpy(x) for x in unpack(dtype, blocks.numpy(), shape))
        scales = halves.float()
        if is_rotated(f"{module}.weight"):
            values, scales = unpermute(values, head_dim), unpermute(scales, head_dim)
        return Codes(values.contiguous(), scales.contiguous(), schemes[module])

    kinds = sorted({file.tensors[own_name(module)].dtype for module in schemes})
    program = file.metadata.get("general.quantized_by")
    origin = Origin("GGUF", program[:80] if isinstance(program, str) else None, " and ".join(kinds))
    return Given(origin, schemes, codes, raw, requires_as_is=False)
