"""Restoring of a bundle's quantized model from the bundle's own files.

To validate a bundle, calibrated codes are not computed again. That would need minutes, the calibration text,
and a processor that rounds alike. The codes are read from the artifact and compared with the hashes in
`reports/export.json`, which were recorded before lowering. The float tensors lie in
`reports/floats.safetensors`, because folding changes them and formats may round them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from edgellama.bundle.bundle import Bundle
from edgellama.bundle.reports import EXPORT_REPORT
from edgellama.errors import BundleError, LoweringError
from edgellama.model.llama import Llama
from edgellama.model.quantized import Codes, QuantizedEmbedding, apply_codes, codes_of
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.targets import Target

FLOATS = "floats.safetensors"
FOLDS = "folds.safetensors"  # of a bundle with adapters that are switched

Stored = tuple[Tensor, Tensor]  # int8 codes [rows, columns], float32 scales [rows, groups]


def quantized_modules(model: Llama) -> Iterator[tuple[str, Codes]]:
    """Name and codes of every quantized linear or embedding."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, QuantizedEmbedding)):
            codes = codes_of(module)
            if codes is not None:
                yield name, codes


def code_hashes(model: Llama) -> dict[str, str]:
    """sha256 of the codes and scales of every quantized module, by name."""
    return {name: _hash(codes.values, codes.scales) for name, codes in quantized_modules(model)}


def save_floats(model: Llama, path: Path) -> None:
    """Writes the float tensors of `model` to a safetensors file."""
    quantized = {f"{name}.weight" for name, _ in quantized_modules(model)}
    floats = {n: p.detach().clone() for n, p in model.named_parameters() if n not in quantized}
    path.write_bytes(save(floats))  # Python's own errors name the cause


def save_folds(model: Llama, path: Path) -> None:
    """Writes the folds of `model` to a safetensors file."""
    path.write_bytes(save({name: scale.contiguous() for name, scale in model.folds.items()}))


def _folds(bundle: Bundle) -> dict[str, Tensor]:
    """The recorded folds; empty for a bundle without adapters that are switched."""
    name = f"reports/{FOLDS}"
    if name not in bundle.manifest["files"]:
        return {}
    try:
        return load_file(bundle.verify(name))
    except (OSError, ValueError, SafetensorError) as error:
        raise BundleError(
            f"{bundle.path}: {name} cannot be read ({error})", remedy="Export the bundle again."
        ) from error


def restored_llama(bundle: Bundle, target: Target) -> Llama:
    """The quantized model that `target`'s artifact was lowered from.

    Raises LoweringError, with the names of the modules, if their codes are not in the artifact. Raises
    BundleError if the files under reports/ cannot be read.
    """
    expected_hashes, floats = _recorded(bundle)
    config = bundle.config
    schemes = check_recipe(bundle.recipe, module_shapes(config.tensor_shapes(), config.tie_word_embeddings))
    with torch.device("meta"):
        model = Llama(config, bundle.context_length)
    model.folds = _folds(bundle)
    for name, tensor in floats.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(tensor, requires_grad=False))
    if config.tie_word_embeddings and "model.embed_tokens.weight" in floats:
        model.lm_head.weight = model.model.embed_tokens.weight
    stored: list[Stored] = list(target.stored_codes(bundle.artifact(target.name)))
    expected_schemes = {name: schemes[name] for name in expected_hashes}
    missing = []
    shapes = module_shapes(config.tensor_shapes(), True)
    shared: dict[
        str, Stored | None
    ] = {}  # by hash: a tied head and its embedding get one tensor, as at export
    for name, scheme in expected_schemes.items():
        wanted = expected_hashes[name]
        if wanted not in shared:
            shared[wanted] = _find(stored, shapes[name], wanted)
        codes = shared[wanted]
        if codes is None or scheme is None:
            missing.append(name)
        else:
            apply_codes(model, name, Codes(*codes, scheme))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise LoweringError(
            f"the {target.name} artifact does not hold the codes that were chosen for "
            f"{', '.join(missing[:3])}{more}",
            remedy="Something changed it after quantization; export the bundle again.",
        )
    return model.eval()


def _recorded(bundle: Bundle) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        report: dict[str, Any] = json.loads((bundle.path / EXPORT_REPORT).read_text(encoding="utf-8"))
        return dict(report["codes"]), load_file(bundle.path / "reports" / FLOATS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BundleError(
            f"{bundle.path}: its recipe {bundle.recipe.name!r} is calibrated, and {EXPORT_REPORT} or "
            f"reports/{FLOATS}, the record of its codes, cannot be read ({error})",
            remedy="Validate the bundle as it was exported, with its reports.",
        ) from error


def _find(stored: list[Stored], shape: tuple[int, ...], wanted: str) -> Stored | None:
    """The codes and scales with the hash `wanted`: a complete weight, or rows of a joined weight."""
    rows, columns = shape
    for values, scales in stored:
        if values.shape[1] != columns or len(values) < rows:
            continue
        for start in range(0, len(values) - rows + 1, math.gcd(rows, len(values))):
            part = slice(start, start + rows)
            if _hash(values[part], scales[part]) == wanted:
                return values[part].contiguous(), scales[part].contiguous()
    return None


def _hash(values: Tensor, scales: Tensor) -> str:
    total = hashlib.sha256()
    for tensor in (values, scales):
        total.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()
