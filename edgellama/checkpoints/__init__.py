"""Full-precision sources: Hugging Face directories, GGUF files, Meta directories."""

from __future__ import annotations

from edgellama.checkpoints.checkpoint import Checkpoint
from edgellama.checkpoints.open import open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
