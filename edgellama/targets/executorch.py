"""ExecuTorch facts that its two targets share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellama.formats.pte import PteFile, constant_methods
from edgellama.model.llama import Llama
from edgellama.report import Check, check
from edgellama.report.checks import listed
from edgellama.targets.provenance import Provenance

MANIFEST_SHA256 = "edgellama_manifest_sha256"  # constant method with the hash that binds the manifest


def check_metadata(pte: PteFile, methods: Mapping[str, Any]) -> Check:
    """Constant methods of a .pte are those expected, with their values.

    A list of one is stored as its only entry.
    """
    constant = {name for name, value in pte.methods.items() if value is not None}
    problems = [f"{name} is not expected" for name in sorted(constant - set(methods))]
    for name, expected in methods.items():
        actual = pte.methods.get(name)
        actual = [actual] if isinstance(expected, list) and not isinstance(actual, list) else actual
        if actual != expected:
            problems.append(f"{name} is {actual!r}, expected {expected!r}")
    return check("structure.metadata", not problems, value=len(pte.methods), detail=listed("", problems))


def metadata_methods(model: Llama, provenance: Provenance, longest_call: int | None = None) -> dict[str, Any]:
    """Constant methods for ExecuTorch's text runner and LLM classes (extension/llm/runner in executorch).

    longest_call: tokens of a call at most. The runner feeds a longer prompt in pieces. None for the context.
    MANIFEST_SHA256 is edgellama's own. It binds the manifest to the file.
    """
    config = model.config
    methods: dict[str, Any] = {
        "get_max_seq_len": longest_call or model.context_length,
        "get_max_context_len": model.context_length,
        "get_n_layers": config.num_hidden_layers,
        "get_vocab_size": config.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_eos_ids": list(config.eos_token_ids),
        MANIFEST_SHA256: provenance.manifest_sha256,
    }
    if config.bos_token_id is not None:
        methods["get_bos_id"] = config.bos_token_id
    return methods


def bound_manifest(path: Path) -> str | None:
    """Hash of the manifest in the .pte at `path`."""
    value = constant_methods(path).get(MANIFEST_SHA256)
    return value if isinstance(value, str) else None
