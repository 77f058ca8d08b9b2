"""Bisection of a parity failure: the first decoder layer that is lowered wrongly.

A prefix of the layers is lowered by the same code and compared again, until the shortest prefix that fails is
known. Its last layer is the result. Each step lowers a file, so the bisection runs only if parity has failed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from edgellama.export.lower import lowering_for
from edgellama.gate import parity
from edgellama.gate.references import QuantizedReference
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.runtimes.load import open_runtime
from edgellama.targets import Target
from edgellama.targets.provenance import Provenance
from edgellama.text.windows import Window

TOKENS = 16  # positions compared; an error above the noise shows in the first ones


def first_bad_layer(
    quantized: Llama, target: Target, provenance: Provenance, windows: Sequence[Window], progress: Progress
) -> int | None:
    """Index of the first layer whose lowering breaks parity; None if every prefix of layers passes."""
    # Numbers of layers: `good` layers pass, `bad` layers fail (assumed until tested).
    good, bad = 0, quantized.config.num_hidden_layers + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        with progress.stage(f"parity of the first {middle} layers"):
            agrees = _agrees(first_layers(quantized, middle), target, provenance, windows)
        good, bad = (middle, bad) if agrees else (good, middle)
    return bad - 1 if bad <= quantized.config.num_hidden_layers else None


def first_layers(model: Llama, count: int) -> Llama:
    """The model cut after its first `count` layers. Modules are shared, not copied."""
    with torch.device("meta"):
        cut = Llama(replace(model.config, num_hidden_layers=count), model.context_length)
    cut.model.embed_tokens, cut.model.norm, cut.lm_head = (
        model.model.embed_tokens,
        model.model.norm,
        model.lm_head,
    )
    cut.model.layers = nn.ModuleList(list(model.model.layers)[:count])
    return cut.eval()


def _agrees(cut: Llama, target: Target, provenance: Provenance, windows: Sequence[Window]) -> bool:
    expected = QuantizedReference(cut, provenance.recipe, target)
    compared = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / Path(target.artifact).name
        lowering_for(target)(cut, path, provenance, progress=Progress())
        runtime = open_runtime(target, path)
        try:
            for window in windows:
                count = min(TOKENS, len(window.tokens))
                logits = parity.steps(runtime, window.tokens[:count])
                compared.append(parity.measure_parity(logits, expected, window))
        finally:
            runtime.close()
    section = parity.summarize([artifact for artifact, _ in compared], [floor for _, floor in compared])
    return all(check.verdict == "pass" for check in parity.checks(section, target.parity_kl))
