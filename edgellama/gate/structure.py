"""Structure: exact checks of the bundle's files, without arithmetic."""

from __future__ import annotations

from edgellama.bundle import Bundle
from edgellama.gate.copies import check_licenses, examine_copies
from edgellama.gate.differences import claim
from edgellama.gate.subject import Section, Unloaded
from edgellama.model.llama import Llama
from edgellama.report import Check, check
from edgellama.targets import Target

PROBES = (
    "Hello, world! 3.14159 2026-01-01 0xDEADBEEF",
    "Grüße, naïve café — “quotes” … ½ ²",
    "日本語のテキスト、中文字符，한국어 문장",
    "👩‍💻🏳️‍🌈 emoji, ﷽, \u200bzero width, é combining",
    "def f(x):\n\treturn {k: v ** 2 for k, v in x.items()}  # code\r\n",
    "  leading, trailing  and\n\n\nmany   spaces \t ",
)


def check_files(bundle: Bundle) -> Check:
    """Check that the bundle holds the files of its manifest, with their hashes, and no others."""
    problems = bundle.problems()
    return check(
        "structure.files", not problems, value=len(problems), limit=0, detail="; ".join(problems[:3])
    )


def examine_structure(subject: Unloaded) -> Section:
    """Checks the artifact's file against the quantized model, and the copies against the checkpoint."""
    bundle, target = subject.bundle, subject.target
    provenance = target.provenance(bundle.manifest)
    checks = target.check_structure(bundle.artifact(target.name), subject.quantized, provenance)
    copies = examine_copies(bundle, target, subject.quantized, subject.checkpoint.tokenizer)
    return Section((*checks, *copies.checks, check_licenses(bundle, subject.checkpoint)))


def examine_structure_alone(bundle: Bundle, target: Target, model: Llama) -> Section:
    """The structure checks that need no checkpoint. model: of the artifact's shape; its weights are not read."""
    expected = target.provenance(bundle.manifest).manifest_sha256
    actual = target.bound_manifest(bundle.artifact(target.name))
    problems = [] if actual == expected else ["the artifact was lowered for another manifest"]
    copies = examine_copies(bundle, target, model, None)
    return Section((claim("structure.metadata", problems), *copies.checks))
