"""Reading of a checkpoint by transformers: logits, rotary angles, and token ids of probe texts."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgellama.checkpoints import Checkpoint
from edgellama.gate.structure import PROBES
from edgellama.gate.transformers_files import GgufWeights, SafetensorsWeights
from edgellama.gate.transformers_layers import ForeignWeights, empty_model, logits_and_angles
from edgellama.model.labels import SCORE, TOKENS, Classifier

WHOLE_BYTES = 1 << 28  # of float32 weights that transformers may load as a whole, by its own means
_OWN: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class Foreign:
    """A checkpoint as transformers reads it.

    logits: float32 [tokens, vocab_size]. cosines, sines: rotary tables, float32 [positions, head_dim].
    ids: token ids of each probe; None if transformers has no reader of the tokenizer.
    """

    logits: Tensor
    cosines: Tensor
    sines: Tensor
    ids: list[list[int]] | None


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers silent and offline."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        # The bar of transformers' GGUF reader writes to stderr and has no switch.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            from transformers.utils import logging

            level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
            logging.set_verbosity_error()
            logging.disable_progress_bar()
            try:
                yield
            finally:
                logging.set_verbosity(level)
                if bars:
                    logging.enable_progress_bar()
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def is_layered(checkpoint: Checkpoint) -> bool:
    """Whether transformers' layers are filled one by one, so that no second copy of a model is in memory."""
    if checkpoint.format == "gguf":
        return True
    large = 4 * checkpoint.config.parameters > WHOLE_BYTES
    return large and all(file.suffix == ".safetensors" for file in checkpoint.files)


@torch.no_grad()
def read_foreign(checkpoint: Checkpoint, tokens: list[int], positions: Tensor) -> Foreign:
    """transformers' reading of the files at `checkpoint.path`.

    Args:
        checkpoint: as opened by edgellama; its weights are not read.
        tokens: a text, for the logits.
        positions: of the rotary tables, int64 [positions].

    Raises the errors of transformers and its libraries, which are of every class.
    """
    # transformers rebuilds the tokenizers of GGUF files without the pre-tokenizer that the file names.
    ids = None if checkpoint.format == "gguf" else _probe_ids(checkpoint)
    layered = logits_and_angles(*_layers(checkpoint), tokens, positions) if is_layered(checkpoint) else None
    logits, cosines, sines = layered or _whole(checkpoint, tokens, positions)
    return Foreign(_answers(checkpoint.classifier, logits), cosines, sines, ids)


def _probe_ids(checkpoint: Checkpoint) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.path.resolve()), **_OWN)
    return [list(tokenizer.encode(probe)) for probe in PROBES]


def _layers(checkpoint: Checkpoint) -> tuple[Any, ForeignWeights]:
    """transformers' empty model of a checkpoint, and a reader of its weights."""
    from transformers import LlamaConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = checkpoint.path.resolve()
    if checkpoint.format == "gguf":
        data = load_gguf_checkpoint(str(path))["config"]
        model = empty_model(LlamaConfig(**data))
        return model, GgufWeights(path, data, model)
    config = LlamaConfig.from_pretrained(str(path), local_files_only=True)
    return empty_model(config), SafetensorsWeights(path)


def _whole(checkpoint: Checkpoint, tokens: list[int], positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and angles as `logits_and_angles` has them, of a model that transformers loads by its own means."""
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    if checkpoint.format == "gguf":
        raise ValueError("its tensors are not those of a Llama")
    classifier = checkpoint.classifier
    trained_head = classifier is not None and classifier.head == SCORE
    # Not the Auto class: config.json must not choose another model.
    model: Any = (LlamaForSequenceClassification if trained_head else LlamaForCausalLM).from_pretrained(
        str(checkpoint.path.resolve()),
        dtype=torch.float32,
        attn_implementation="eager",
        use_safetensors=checkpoint.files[0].suffix == ".safetensors",
        **_OWN,
    )
    model = model.eval()
    states = model.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
    logits = model.score(states) if trained_head else model.lm_head(states)
    cosines, sines = model.model.rotary_emb(torch.zeros(1, 1, 1), positions[None])
    return logits, cosines[0], sines[0]


def _answers(classifier: Classifier | None, logits: Tensor) -> Tensor:
    """Columns of the logits that are answers: all but for a classifier by tokens."""
    if classifier is None or classifier.head != TOKENS:
        return logits
    return logits[:, list(classifier.tokens)]
