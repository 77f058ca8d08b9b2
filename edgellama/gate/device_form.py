"""Form in which devices run an artifact, where it differs from the form that parity is measured in.

llama.cpp arranges quantized weights for the processor when an app loads a file, and computes attention in one
kernel. That changes the order of sums and the rounding of attention, and must change nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgellama.gate.limits import parity_limit
from edgellama.gate.metrics import kl_divergence
from edgellama.gate.noise import Noise, geometric_mean
from edgellama.gate.subject import Section
from edgellama.report import below
from edgellama.runtimes.load import open_device_form, open_runtime
from edgellama.targets import Target

TOKENS = 256  # of the long window's beginning


def examine_device_form(target: Target, path: Path, tokens: Sequence[int], noise: Noise) -> Section:
    """The check `parity.device_form`; none for a target with one form.

    The typical KL is judged, because one flipped rounding is no fault.

    Args:
        target: the examined target.
        path: its artifact.
        tokens: ids of a text.
        noise: of positions that differ by rounding alone.
    """
    device = open_device_form(target, path)
    if device is None:
        return Section()
    fed = list(tokens)[:TOKENS]
    try:
        actual = device.forward_all(fed)
    finally:
        device.close()
    runtime = open_runtime(target, path)
    try:
        expected = runtime.forward_all(fed)
    finally:
        runtime.close()
    kl = kl_divergence(expected, actual)
    limit = parity_limit(noise.run, target.parity_kl)
    check = below(
        "parity.device_form", geometric_mean(kl), limit, detail=f"geometric mean of {len(fed)} positions"
    )
    return Section((check,), {"parity": {"device_form_kl": float(kl.mean())}})
