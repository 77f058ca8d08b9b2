"""Adapters: LoRA directories of PEFT and MLX, merged into a checkpoint's weights in float32.

`open_adapter` reads a directory into changes of weights. `with_adapters` gives the checkpoint that computes
with them. Everything after it sees one plain model: calibration, the gate, every target.
"""

from __future__ import annotations

from edgellama.checkpoints.adapters.adapter import Adapter, LowRank
from edgellama.checkpoints.adapters.merge import with_adapters
from edgellama.checkpoints.adapters.read import open_adapter

__all__ = ["Adapter", "LowRank", "open_adapter", "with_adapters"]
