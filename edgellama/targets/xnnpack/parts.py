"""Hidden states of a lowered Llama as additional outputs of its method, for parity of single layers."""

from __future__ import annotations

from typing import Any

from edgellama.errors import BundleError
from edgellama.formats.pte_program import PteProgram

_OUTPUTS = 4  # of a delegate between two attentions: residual, q, k and v


def with_states(program: PteProgram, layers: int, tokens: int) -> PteProgram:
    """The program with the input of each layer, float32 [1, T, hidden_size], after the logits.

    Nothing else changes, except the memory of these states, which holds up to `tokens` tokens and is not used
    again. Raises BundleError unless one delegate call stands before, between and after the attentions.
    """
    plans = program.data["execution_plan"]
    plan = program.method("forward")
    calls = [
        i["instr_args"]["args"]
        for chain in plan["chains"]
        for i in chain["instructions"]
        if i["instr_args_type"] == "DelegateCall"
    ]
    if len(calls) != layers + 1:
        raise BundleError(
            f"{program.path}: {len(calls)} delegate calls, expected {layers + 1} for {layers} layers",
            remedy="Export the bundle again.",
        )
    states = [calls[0][0], *(call[-_OUTPUTS] for call in calls[1:-1])]
    values, sizes = list(plan["values"]), list(plan["non_const_buffer_sizes"])
    for state in states:
        values[state] = _moved(values[state], tokens, sizes)
    changed = {
        **plan,
        "values": values,
        "non_const_buffer_sizes": sizes,
        "outputs": [*plan["outputs"], *states],
    }
    data = {**program.data, "execution_plan": [changed if p["name"] == "forward" else p for p in plans]}
    return PteProgram(program.path, data, program.segments)


def _moved(value: dict[str, Any], tokens: int, sizes: list[int]) -> dict[str, Any]:
    """The tensor in new memory at the end of its buffer. `sizes`: of the buffers, which grow."""
    tensor = value["val"]
    memory, shape = tensor["allocation_info"]["memory_id"], [1, tokens, tensor["sizes"][-1]]
    offset = -(-sizes[memory] // 16) * 16
    sizes[memory] = offset + 4 * shape[1] * shape[2]
    place = {
        "memory_id": memory,
        "memory_offset_low": offset & 0xFFFFFFFF,
        "memory_offset_high": offset >> 32,
    }
    return {**value, "val": {**tensor, "sizes": shape, "allocation_info": place}}
