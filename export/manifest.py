"""Manifest of a bundle, and the files beside the artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from edgellama._version import __version__
from edgellama.bundle.record import bundle_name
from edgellama.bundle.reports import EXPORT_REPORT, EXPORT_SCHEMA
from edgellama.bundle.restore import FLOATS, FOLDS, code_hashes, save_floats, save_folds
from edgellama.checkpoints import Checkpoint
from edgellama.errors import TokenizerError
from edgellama.export.plan import Plan
from edgellama.export.quantization.given import given_summary
from edgellama.export.quantization.tensors import TensorRow
from edgellama.files import to_json
from edgellama.model.llama import Llama
from edgellama.recipe import GIVEN
from edgellama.targets.base import tool_versions
from edgellama.text.chat import NO_DATE, ChatTemplate, derive_format
from edgellama.text.tokenizer import Tokenizer

LICENSES = "licenses"
NO_CHAT = {"template": None, "format": None, "reason": "a classifier answers with a label, and does not chat"}


def write_model_files(directory: Path, plan: Plan, tensors: Sequence[TensorRow], model: Llama) -> None:
    """Writes the files of the quantized model: tokenizer, report of its tensors, and float tensors.

    Float tensors and hashes of the codes are written for a calibrated model only.
    """
    checkpoint = plan.checkpoint
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    for name, content in checkpoint.tokenizer.files.items():
        (tokenizer / name).write_bytes(content)
    reports = directory / "reports"
    reports.mkdir(exist_ok=True)
    table: dict[str, Any] = {
        "schema": EXPORT_SCHEMA,
        "tensors": [row.to_dict() for row in tensors],
        "notes": list(checkpoint.notes),
    }
    if plan.calibration is not None:
        table["calibration"] = plan.calibration.to_dict()
        table["codes"] = code_hashes(model)
        save_floats(model, reports / FLOATS)
    if plan.swappable and model.folds:
        save_folds(model, reports / FOLDS)
    (directory / EXPORT_REPORT).write_text(to_json(table), encoding="utf-8")


def write_licenses(directory: Path, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint's licence files, which its terms may ask an app to carry."""
    for name, content in checkpoint.license_files.items():
        file = directory / LICENSES / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)


def manifest_sections(destination: Path, plan: Plan, date: str | None = None) -> dict[str, Any]:
    """Manifest sections known before lowering. Artifacts embed them as metadata.

    date: ISO date that the chat template writes; None for the template's own.
    """
    checkpoint = plan.checkpoint
    return {
        "name": bundle_name(destination),
        "tools": {"edgellama": __version__, **tool_versions(plan.targets)},
        "source": {
            "format": checkpoint.format,
            "architecture": "llama",
            "parameters": checkpoint.config.parameters,
            "sha256": checkpoint.sha256(),
            "config_sha256": checkpoint.config_sha256(),
            "license": checkpoint.license,
            **_adapters(checkpoint),
            **({"codes": given_summary(checkpoint, plan.recipe)} if plan.recipe.algorithm == GIVEN else {}),
            **({"hub": checkpoint.hub.to_dict()} if checkpoint.hub else {}),
        },
        "model": {**plan.config.to_dict(), "context_length": plan.context_length},
        "chat": chat_section(checkpoint.tokenizer, date) if checkpoint.classifier is None else dict(NO_CHAT),
        "recipe": plan.recipe.to_dict(),
        **({"adapters": adapter_section(plan)} if plan.swappable else {}),
        **({} if checkpoint.classifier is None else {"classifier": checkpoint.classifier.to_dict()}),
        "artifacts": [],
        "accuracy": {},
    }


def chat_section(tokenizer: Tokenizer, date: str | None = None) -> dict[str, Any]:
    """File of the chat template and its flat format for phones. None for a missing one, with the reason."""
    if tokenizer.chat_template is None:
        return {"template": None, "format": None, "reason": "the checkpoint has no chat template"}
    try:
        template = ChatTemplate.of(tokenizer, None if date is None else datetime.fromisoformat(date))
        chat_format, reason = derive_format(template)
        if template.needs_date() and date is None:
            reason = f"{NO_DATE}: an app has no prefixes that hold every day"
    except TokenizerError as error:
        chat_format, reason = None, error.message
    return {
        "template": "tokenizer/chat_template.jinja",
        "format": chat_format.to_dict() if chat_format else None,
        "reason": None if chat_format else reason,
        **({} if date is None else {"date": date}),
    }


def adapter_section(plan: Plan) -> list[dict[str, Any]]:
    """Entries about the adapters that are switched at run time."""
    endings = {t.name: t.adapter_ending for t in plan.targets if t.adapter_ending is not None}
    return [swappable.to_dict(endings) for swappable in plan.swappable]


def _adapters(checkpoint: Checkpoint) -> dict[str, Any]:
    """Hash of the base, and the adapters that are merged into it; empty without any."""
    if not checkpoint.adapters:
        return {}
    return {
        "base_sha256": checkpoint.base_sha256(),
        "adapters": [adapter.to_dict() for adapter in checkpoint.adapters],
    }
