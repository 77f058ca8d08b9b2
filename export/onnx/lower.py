"""Quantized model -> model.onnx and model.onnx.data, for ONNX Runtime on Android, Windows, Linux and others.

The recipe's `onnx_form` selects the operators: `ort` for ONNX Runtime's own (export/onnx/graph_ort.py),
`portable` for the standard's (export/onnx/graph_portable.py).
"""

from __future__ import annotations

from pathlib import Path

import onnx

from edgellama.errors import LoweringError
from edgellama.export.onnx.builder import WeightFile
from edgellama.export.onnx.graph_ort import OrtGraph
from edgellama.export.onnx.graph_portable import PortableGraph
from edgellama.formats.onnx_model import MODEL_FILE
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.targets.onnx.interface import DATA_FILE, metadata
from edgellama.targets.provenance import Provenance

GRAPHS: dict[str, type[OrtGraph | PortableGraph]] = {"ort": OrtGraph, "portable": PortableGraph}


def lower_to_onnx(model: Llama, path: Path, provenance: Provenance, *, progress: Progress) -> None:
    """Writes the quantized `model` into the directory `path`. The model does not change.

    Raises LoweringError if the result does not pass onnx's own checker.
    """
    path.mkdir()
    form = provenance.recipe.onnx_form
    with progress.stage("lower"), WeightFile(path / DATA_FILE) as weights:
        graph = GRAPHS[form](model, weights, provenance)
        graph.build()
    with progress.stage("write"):
        proto = graph.proto(metadata(model, provenance), provenance.summary)
        (path / MODEL_FILE).write_bytes(proto.SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(str(path / MODEL_FILE), full_check=form == "portable")
        except onnx.checker.ValidationError as error:
            raise LoweringError(
                f"the model that was written is no valid ONNX: {error}",
                remedy="This is a defect of edgellama; report it with the checkpoint's config.json.",
            ) from error
