"""Quality of a GGUF file that is no bundle, whoever made it, against a full-precision checkpoint.

Nothing is known about how such a file was made. So there is no structure to compare and no quantized model, and
the report says how far the file's answers are from the checkpoint's, in llama.cpp, and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.commands.validate import DEFAULT_TOKENS
from edgellama.errors import UsageError
from edgellama.files import file_sha256
from edgellama.formats.gguf import is_gguf
from edgellama.gate.limits import Limits, check_tokens
from edgellama.gate.own_tokenizer import check_ids
from edgellama.gate.quality import quality_section, score_quality
from edgellama.gate.subject import Section, report_of
from edgellama.host.progress import Progress
from edgellama.host.threads import one_thread
from edgellama.report import Report
from edgellama.runtimes.load import open_device_form
from edgellama.targets import find_target
from edgellama.text.windows import WINDOW, Text, default_texts, windowed

NOTE = "quality only: the file is no bundle, so its structure and its parity with a quantized model were not checked"


def is_foreign(path: Path) -> bool:
    """Returns True for a GGUF file, which `validate` and `bench` take in place of a bundle."""
    return path.is_file() and is_gguf(path)


@one_thread()
def validate_gguf(
    path: Path,
    *,
    reference: Checkpoint | str | Path,
    texts: Sequence[Text] | None = None,
    tokens: int = DEFAULT_TOKENS,
    max_kl: float | None = None,
    min_top1: float | None = None,
    max_ppl_ratio: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measures the GGUF file at `path` in llama.cpp, in the form that apps run, against `reference`.

    The arguments are those of `validate`. No limit is assumed. The file's own tokenizer must give the
    checkpoint's ids (`consistency.tokenizer`).

    Raises UsageError if the vocabularies have different sizes, InputError if one of the two cannot be used.
    """
    progress = progress or Progress()
    check_tokens(tokens)
    limits = Limits(max_kl, min_top1, max_ppl_ratio, "the limit that was given")
    checkpoint = reference if isinstance(reference, Checkpoint) else open_checkpoint(reference)
    target, chosen = find_target("gguf"), texts or default_texts()
    artifact = open_device_form(target, path)
    assert artifact is not None
    with artifact:
        if artifact.vocab_size != checkpoint.config.vocab_size:
            raise UsageError(
                f"{path} has a vocabulary of {artifact.vocab_size}, the reference of {checkpoint.config.vocab_size}",
                remedy="Give the checkpoint that the file was made from.",
            )
        with progress.stage("load for validation"):
            full = StreamedLlama(checkpoint)
        own = artifact.own_tokenizer()
        assert own is not None
        sections = [Section((check_ids(checkpoint.tokenizer, own, chosen),))]
        length = min(WINDOW, artifact.context_length)
        with progress.stage("score"):
            scores = score_quality(
                artifact,
                full,
                windowed(chosen, checkpoint.tokenizer, length),
                -(-tokens // length),
                limits,
                progress,
            )
            sections.append(
                quality_section(
                    artifact, full, checkpoint.tokenizer, scores, limits, by_domain=len(chosen) > 1
                )
            )
        runtime = artifact.name
    report = report_of(target, runtime, checkpoint, sections)
    return replace(report, artifact_sha256=file_sha256(path))
