"""Quality of a bundle of given codes against the model that somebody quantized, and not against the codes.

The bundle's source are the codes, so its own gate measures what this export adds. The loss of the quantization
itself shows only beside the original model, of which the bundle knows nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.errors import InputError
from edgellama.gate.claims import examine_claims, shape_of
from edgellama.gate.limits import Limits
from edgellama.gate.quality import quality_section, score_quality
from edgellama.gate.structure import PROBES, examine_structure_alone
from edgellama.gate.subject import Section, report_of
from edgellama.host.progress import Progress
from edgellama.recipe import GIVEN
from edgellama.report import Check, Report
from edgellama.runtimes.load import load
from edgellama.targets import Target
from edgellama.text.windows import WINDOW, Text, windowed


def is_original(bundle: Bundle, checkpoint: Checkpoint) -> bool:
    """Returns True for another checkpoint than the codes that a bundle of given codes was made from."""
    return (
        bundle.recipe.algorithm == GIVEN
        and checkpoint.given is None
        and bundle.manifest["source"]["sha256"] != checkpoint.sha256()
    )


def examined_original(
    bundle: Bundle,
    target: Target,
    checkpoint: Checkpoint,
    files: Check,
    texts: Sequence[Text],
    tokens: int,
    limits: Limits,
    progress: Progress,
) -> Report:
    """The report of quality against the original model. Parity and weights are for the codes to judge.

    limits: those that were asked for. The recipe's own limit is about the codes, and does not apply.

    Raises InputError if the original has another shape or another tokenizer.
    """
    _check_alike(bundle, checkpoint)
    with progress.stage("load for validation"):
        full = StreamedLlama(checkpoint)
    with load(bundle, target.name) as artifact:
        with progress.stage("score"):
            length = min(WINDOW, artifact.context_length)
            text_windows = windowed(texts, bundle.tokenizer, length)
            scores = score_quality(artifact, full, text_windows, -(-tokens // length), limits, progress)
            quality = quality_section(
                artifact, full, bundle.tokenizer, scores, limits, by_domain=len(texts) > 1
            )
        sections = [
            Section((files,)),
            examine_structure_alone(bundle, target, shape_of(bundle.config, bundle.context_length)),
            examine_claims(bundle, target),
            Section(tuple(artifact.checks())),
            quality,
        ]
        runtime = artifact.name
    return report_of(target, runtime, checkpoint, sections)


def _check_alike(bundle: Bundle, checkpoint: Checkpoint) -> None:
    own, other = bundle.config.tensor_shapes(), checkpoint.config.tensor_shapes()
    differing = next((name for name in {**own, **other} if own.get(name) != other.get(name)), None)
    if differing is not None:
        raise InputError(
            f"{checkpoint.path} is not the model that {bundle.path} was quantized from: {differing} has shape "
            f"{list(other.get(differing, ()))}, expected {list(own.get(differing, ()))}",
            remedy="Give the codes that were exported, or the full-precision model that they were made from.",
        )
    wrong = [t for t in PROBES if checkpoint.tokenizer.encode(t) != bundle.tokenizer.encode(t)]
    if wrong:
        raise InputError(
            f"{checkpoint.path} has another tokenizer than {bundle.path}: {wrong[0][:24]!r} gets other tokens",
            remedy="Give the full-precision model that the codes were made from.",
        )
