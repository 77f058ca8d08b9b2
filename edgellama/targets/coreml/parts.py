"""Hidden states of a lowered Llama by their names in its program, for parity of single layers."""

from __future__ import annotations

from edgellama.errors import BundleError
from edgellama.formats.mlpackage import Function


def state_names(function: Function, layers: int) -> list[str]:
    """Names of the inputs of the layers: the embeddings, and the sum behind each down projection but the last.

    Raises BundleError if one is missing.
    """
    return ["embed", *(_sum_with(function, f"model_layers_{i}_mlp_down_proj") for i in range(layers - 1))]


def _sum_with(function: Function, value: str) -> str:
    sums = [op for op in function.consumers(value) if op.type == "add"]
    if len(sums) != 1:
        raise BundleError(
            f"function {function.name}: {len(sums)} sums with {value}, expected one",
            remedy="Export the bundle again.",
        )
    return next(iter(sums[0].outputs))
