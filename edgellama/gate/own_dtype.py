"""A call in the artifact's own dtype, for a runtime that computes in float32 on this machine.

A device computes on the file's 16-bit numbers. A processor emulates that at seconds for a token, so the gate
makes one short call: it shows that the file loads and computes as it is, and that its activations stay within
the range of the dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from edgellama.gate.limits import OWN_DTYPE_KL
from edgellama.gate.metrics import kl_divergence
from edgellama.gate.subject import Section
from edgellama.report import below
from edgellama.runtimes.load import open_in_own_dtype, open_runtime
from edgellama.targets import Target

TOKENS = 4


def examine_own_dtype(target: Target, path: Path, tokens: Sequence[int]) -> Section:
    """The check `parity.own_dtype` of the artifact at `path`. None if its runtime has one dtype only."""
    own = open_in_own_dtype(target, path)
    if own is None:
        return Section()
    with own, open_runtime(target, path) as artifact:
        expected, actual = (torch.from_numpy(r.forward(tokens[:TOKENS]).copy()) for r in (artifact, own))
    kl = float(kl_divergence(expected[None], actual[None])[0])
    verdict = below("parity.own_dtype", kl, OWN_DTYPE_KL, detail=f"after {len(tokens[:TOKENS])} tokens")
    return Section((verdict,), {"parity": {"own_dtype_kl": kl}})
