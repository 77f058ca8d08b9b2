"""Quantized model -> .mlpackage for iOS 18 and macOS 15, with the KV cache as Core ML state.

Profile `gpu` has one function with flexible shapes, `ane` two functions with static ones. The reasons are in
edgellama.targets.coreml.interface. With both profiles the weights lie in the file once.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import Program

from edgellama.export.coreml.graph import OPSET, build_program
from edgellama.host.log_filters import coremltools_quiet
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.targets.coreml.interface import (
    COREMLTOOLS,
    DESCRIPTIONS,
    INPUT_IDS,
    MASK,
    PROFILES,
    CoremlForm,
    metadata_fields,
    user_defined,
)
from edgellama.targets.provenance import Provenance

SPEC = Path("Data/com.apple.CoreML/model.mlmodel")
_NAMESPACE = uuid.UUID("6f1d4b52-7a0c-5d0e-9d0b-0e1c7a3c5f10")  # of the item ids in a package's Manifest.json


def lower_to_coreml(model: Llama, path: Path, provenance: Provenance, *, progress: Progress) -> None:
    """Writes the quantized `model` as an .mlpackage directory at `path`. The model does not change.

    Raises LoweringError if float16 cannot hold a weight or a scale.
    """
    write_package(model, PROFILES[provenance.recipe.coreml_profile], path, provenance, progress=progress)


def write_package(
    model: Llama, forms: Mapping[str, CoremlForm], path: Path, provenance: Provenance, *, progress: Progress
) -> None:
    """Writes one package with a function for each of `forms`. The first is the default."""
    with coremltools_quiet(), tempfile.TemporaryDirectory(dir=path.parent, prefix=".coreml.") as work:
        parts = {}
        for name, form in forms.items():
            with progress.stage(f"lower {name}"):
                package = convert(build_program(model, form), form, model.context_length)
                parts[name] = Path(work) / f"{name}.mlpackage"
                package.save(str(parts[name]))
        with progress.stage("write"):
            if len(parts) == 1:
                (part,) = parts.values()
                shutil.move(part, path)
            else:
                _merge(parts, path)
            _finish(path, model, provenance)


def convert(program: Program, form: CoremlForm, context_length: int) -> Any:
    """coremltools' MLModel of `program`.

    The graph is float16 throughout, so a precision pass has nothing to do.
    """
    inputs = None
    if form.tokens is None:
        # Explicit RangeDim, because a range that coremltools infers ends at 2.
        length = ct.RangeDim(1, context_length, default=1)
        span = ct.RangeDim(1, context_length, default=1)
        inputs = [
            ct.TensorType(name=INPUT_IDS, shape=(1, length), dtype=np.int32),
            ct.TensorType(name=MASK, shape=(1, 1, length, span), dtype=np.float16),
        ]
    return ct.convert(
        program,
        convert_to="mlprogram",
        inputs=inputs,
        minimum_deployment_target=OPSET,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )


def _merge(parts: Mapping[str, Path], path: Path) -> None:
    """Packages of one function each -> one package. Equal weights are stored once."""
    functions = ct.utils.MultiFunctionDescriptor()
    for name, part in parts.items():
        functions.add_function(str(part), src_function_name="main", target_function_name=name)
    functions.default_function_name = next(iter(parts))
    ct.utils.save_multifunction(functions, str(path))


def _finish(path: Path, model: Llama, provenance: Provenance) -> None:
    """Writes descriptions and metadata. Nothing differs between two exports: no date, no random ids."""
    spec = ct.utils.load_spec(str(path))
    description = spec.description
    for function in [description, *description.functions]:
        for feature in (*function.input, *function.output, *function.state):
            feature.shortDescription = DESCRIPTIONS[feature.name]
    metadata, fields = description.metadata, metadata_fields(provenance)
    metadata.shortDescription = fields["description"]
    metadata.author = fields["author"]
    metadata.license = fields["license"]
    metadata.versionString = fields["version"]
    metadata.userDefined.clear()
    metadata.userDefined.update(user_defined(model, provenance) | {COREMLTOOLS: ct.__version__})
    (path / SPEC).write_bytes(spec.SerializeToString(deterministic=True))
    manifest = json.loads((path / "Manifest.json").read_text(encoding="utf-8"))
    ids = {
        old: str(uuid.uuid5(_NAMESPACE, item["path"])) for old, item in manifest["itemInfoEntries"].items()
    }
    manifest["itemInfoEntries"] = {ids[old]: item for old, item in manifest["itemInfoEntries"].items()}
    manifest["rootModelIdentifier"] = ids[manifest["rootModelIdentifier"]]
    # coremltools rewrites this file whenever it opens a package. With a layout other than its own, the first
    # look at a bundle with coremltools would change the bundle's hash.
    text = json.dumps(manifest, indent=4, sort_keys=True) + "\n"
    (path / "Manifest.json").write_text(text, encoding="utf-8")
