"""Time of a run of the .pte by part of the model, from the places of its calls and of its norms.

The layout is that of export/xnnpack/blocks.py: one delegate reaches from an attention to the next, so it holds
parts of two modules. Each norm begins with a square, and nothing else is squared.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgellama.errors import BundleError
from edgellama.formats.pte_profile import ProfiledCall, ProfiledRun

# "q k v o" are these four linears with their norm and RoPE; "attention" is the update of the cache and the rest
# between them. "MLP" and "head" have their norms too, and "rest" is what lies outside of operators.
EMBEDDING, LINEARS, ATTENTION, MLP, HEAD, REST = PARTS = (
    "embedding",
    "q k v o",
    "attention",
    "MLP",
    "head",
    "rest",
)
_SQUARE = "Square"


def seconds_by_part(run: ProfiledRun) -> dict[str, float]:
    """Seconds of each of PARTS in `run`. Their sum is the run's time.

    Raises BundleError for a .pte of another layout.
    """
    delegates = [i for i, call in enumerate(run.calls) if call.operators]
    if len(delegates) < 2 or any(_norms(run.calls[i]) != (1 if i == delegates[0] else 2) for i in delegates):
        raise BundleError(
            "the delegates of this .pte are not those that edgellama writes; their parts cannot be told apart",
            remedy="Export the bundle again with a version of ExecuTorch that `edgellama doctor` finds right.",
        )
    seconds = dict.fromkeys(PARTS, 0.0)
    for i, call in enumerate(run.calls):
        if call.operators:
            parts = _parts(call, first=i == delegates[0], last=i == delegates[-1])
            for part, (_, time) in zip(parts, call.operators, strict=True):
                seconds[part] += time
        elif i < delegates[0]:
            seconds[EMBEDDING if call.name.startswith("embedding") else REST] += call.seconds
        else:
            seconds[ATTENTION if i < delegates[-1] and call.name else REST] += call.seconds
    seconds[REST] = run.seconds - sum(time for part, time in seconds.items() if part != REST)
    return seconds


def _norms(call: ProfiledCall) -> int:
    return sum(name.startswith(_SQUARE) for name, _ in call.operators)


def _parts(call: ProfiledCall, *, first: bool, last: bool) -> Sequence[str]:
    """Part of each operator of a delegate. The two norms begin the MLP and what follows it."""
    if first:
        return [LINEARS] * len(call.operators)
    following = iter((MLP, HEAD if last else LINEARS))
    part, parts = LINEARS, []
    for name, _ in call.operators:
        part = next(following) if name.startswith(_SQUARE) else part
        parts.append(part)
    return parts
