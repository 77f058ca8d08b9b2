"""Unloaded, Subject and Section: one target under examination, and the result of one examination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.gate.references import QuantizedReference
from edgellama.model.llama import Llama
from edgellama.report import Check, Report
from edgellama.runtimes.base import Runtime
from edgellama.targets import Target
from edgellama.targets.base import tool_versions
from edgellama.text.windows import WINDOW, Text, WindowedText, windowed


@dataclass(frozen=True)
class Unloaded:
    """One target of a bundle with both of its references, before its file is loaded.

    Attributes:
        full: the full-precision model.
        quantized: the torch model that the artifact was lowered from.
        expected: logits of `quantized` in the target's arithmetic.
    """

    bundle: Bundle
    target: Target
    checkpoint: Checkpoint
    full: StreamedLlama
    quantized: Llama
    expected: QuantizedReference

    @property
    def window_length(self) -> int:
        """Number of tokens in a window of text."""
        return min(WINDOW, self.bundle.context_length)

    def windows(self, texts: Sequence[Text]) -> list[WindowedText]:
        """Windows of the texts, encoded by the bundle's tokenizer."""
        return windowed(texts, self.bundle.tokenizer, self.window_length)


@dataclass(frozen=True)
class Subject(Unloaded):
    """One target with its file on disk, `artifact`, loaded in its runtime."""

    artifact: Runtime

    @classmethod
    def of(cls, unloaded: Unloaded, artifact: Runtime) -> Subject:
        return cls(
            unloaded.bundle,
            unloaded.target,
            unloaded.checkpoint,
            unloaded.full,
            unloaded.quantized,
            unloaded.expected,
            artifact,
        )


@dataclass(frozen=True)
class Section:
    """Result of one examination.

    fields: fields of `Report` by name. `report_of` merges mappings of the same name from several sections.
    """

    checks: tuple[Check, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


def report_of(
    target: Target, runtime: str, checkpoint: Checkpoint | None, sections: Sequence[Section]
) -> Report:
    """Assembles a report from sections, with their checks in order.

    runtime: name of the runtime, or `not run`. checkpoint: None if nothing was compared.
    """
    fields: dict[str, Any] = {}
    for section in sections:
        for name, value in section.fields.items():
            fields[name] = fields[name] | value if name in fields else value
    checks = tuple(check for section in sections for check in section.checks)
    structure = {
        c.name.removeprefix("structure."): c.verdict for c in checks if c.name.startswith("structure.")
    }
    return Report(
        target=target.name,
        runtime=runtime,
        reference=None if checkpoint is None else _reference(checkpoint),
        checks=checks,
        tools=tool_versions([target]),
        structure=structure,
        **{"tokens": 0, "windows": 0, "parity": {}, "quality": {}, "domains": {}, **fields},
    )


def _reference(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "format": checkpoint.format,
        "parameters": checkpoint.config.parameters,
        "sha256": checkpoint.sha256(),
        "config_sha256": checkpoint.config_sha256(),
        "notes": list(checkpoint.notes),
    }
