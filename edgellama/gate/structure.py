"""Structure: exact checks of the bundle's files, without arithmetic."""

from __future__ import annotations

import json
from collections.abc import Sequence

from edgellama.bundle import Bundle
from edgellama.gate.subject import Section, Subject
from edgellama.report import Check, check
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.windows import Text

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


def examine_structure(subject: Subject, texts: Sequence[Text]) -> Section:
    """Checks the artifact's file against the quantized model, and the tokenizer against the checkpoint's."""
    bundle, target = subject.bundle, subject.target
    provenance = target.provenance(bundle.manifest)
    checks = target.check_structure(bundle.artifact(target.name), subject.quantized, provenance)
    return Section((*checks, check_tokenizer(bundle.tokenizer, subject.checkpoint.tokenizer, texts)))


def check_tokenizer(actual: Tokenizer, expected: Tokenizer, texts: Sequence[Text]) -> Check:
    """Check that the bundle's tokenizer is the checkpoint's.

    Vocabulary, merges and added tokens are compared as data, since no text reaches every merge. The rest is
    compared by the ids of probes and of the texts' first 20,000 characters.
    """
    actual_json, expected_json = (
        json.loads(tokenizer.files["tokenizer.json"]) for tokenizer in (actual, expected)
    )
    for part, difference in (
        ("model", "another vocabulary or other merges"),
        ("added_tokens", "other added tokens"),
    ):
        if actual_json.get(part) != expected_json.get(part):
            return check("structure.tokenizer", False, detail=f"{difference} than the checkpoint's tokenizer")
    for probe in (*PROBES, *(text.content[:20000] for text in texts)):
        if actual.encode(probe) != expected.encode(probe):
            return check(
                "structure.tokenizer",
                False,
                detail=f"other ids than the checkpoint's tokenizer for {probe[:40]!r}",
            )
    return check("structure.tokenizer", True, value=actual.size)
