"""Given codes: checkpoints that somebody else quantized, read as codes and scales, never rounded again.

`settings` judges a quantization_config, `layouts` unpacks the tensors of each package, and `huggingface` and
`gguf` find the weights in a checkpoint. A model's float weights stay what they are.
"""

from __future__ import annotations

from edgellama.checkpoints.given.weights import Given, Origin

__all__ = ["Given", "Origin"]
