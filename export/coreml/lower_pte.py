"""Quantized model -> .pte with one Core ML package as its graph, for ExecuTorch apps on Apple devices.

The methods are `forward` (one token) and `prefill` (PREFILL_TOKENS tokens). The KV cache is an explicit input
and output, because states do not work inside a .pte. Both methods are functions of the same package, which
lies in the file once.

The package comes from the same builder as target `coreml`. ExecuTorch's own Core ML lowering would trace the
model again. The file has the format of ExecuTorch's backend for several methods (executorch 1.4.0,
backends/apple/coreml/compiler/coreml_preprocess.py). Each delegate is a reference, "CMJR" and JSON, to the
named data with the package and a metadata.json.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import torch
from executorch.backends.apple.coreml import executorchcoreml
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.backends.apple.coreml.compiler.coreml_preprocess import (
    MethodMetadata,
    MultifunctionModelMetadata,
)
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor, nn

from edgellama.export.coreml.graph import OPSET
from edgellama.export.coreml.lower import write_package
from edgellama.host.log_filters import coremltools_quiet, ignored_deprecations
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.targets.coreml.interface import PREFILL_METHOD, PTE_METHODS, CoremlForm, cache_shape
from edgellama.targets.executorch import metadata_methods
from edgellama.targets.provenance import Provenance

UNITS = {"gpu": ct.ComputeUnit.CPU_AND_GPU, "ane": ct.ComputeUnit.CPU_AND_NE}


def lower_to_coreml_pte(model: Llama, path: Path, provenance: Provenance, *, progress: Progress) -> None:
    """Writes the quantized `model` as a .pte at `path`. The model does not change.

    Raises LoweringError if float16 cannot hold a weight or a scale.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".coreml-pte.") as work:
        # ExecuTorch's own folder name: the stored tree begins with it.
        package = Path(work) / "lowered_module_partition_0" / "model.mlpackage"
        package.parent.mkdir()
        write_package(model, PTE_METHODS, package, provenance, progress=progress)
        with progress.stage("wrap"), coremltools_quiet(), ignored_deprecations():
            content, key = _content(package)
            store = NamedDataStore()
            store.add_named_data(key, content)
            data = store.get_named_data_store_output()
            specs = CoreMLBackend.generate_compile_specs(
                compute_unit=UNITS[provenance.recipe.coreml_profile],
                minimum_deployment_target=OPSET,
                compute_precision=ct.precision.FLOAT16,
            )
            programs = {}
            for name, form in PTE_METHODS.items():
                reference = json.dumps({"version": 1, "key": key, "functionName": name})
                examples = _examples(model, form)
                delegate = LoweredBackendModule(
                    _signature(model, form, examples),
                    CoreMLBackend.__name__,
                    b"CMJR" + reference.encode(),
                    specs,
                    data,
                )
                programs[name] = torch.export.export(_Delegated(delegate), examples)
            methods = metadata_methods(model, provenance) | {PREFILL_METHOD: PTE_METHODS["prefill"].tokens}
            config = EdgeCompileConfig(_check_ir_validity=False)
            edge = to_edge(programs, compile_config=config, constant_methods=methods)
            lowered = edge.to_executorch(ExecutorchBackendConfig(extract_delegate_segments=True))
            with path.open("wb") as file:
                lowered.write_to_file(file)


def _content(package: Path) -> tuple[bytes, str]:
    """(package and its metadata in the delegate's format, key of the stored data).

    The key is a hash of the content, because the device keeps compiled models by it.
    """
    names = _interface(package)
    content = json.dumps(names, sort_keys=True).encode()
    content += b"".join(f.read_bytes() for f in sorted(package.rglob("*")) if f.is_file())
    identifier = f"edgellama_{hashlib.sha256(content).hexdigest()}"
    methods = {name: MethodMetadata(*interface) for name, interface in names.items()}
    CoreMLBackend.save_model_metadata(MultifunctionModelMetadata(identifier, methods), package.parent)
    return executorchcoreml.flatten_directory_contents(str(package.parent)), f"coreml_{identifier}"


def _interface(package: Path) -> dict[str, tuple[list[str], list[str]]]:
    """(input names, output names) of each function, in order."""
    description = ct.utils.load_spec(str(package)).description
    return {f.name: ([x.name for x in f.input], [x.name for x in f.output]) for f in description.functions}


def _examples(model: Llama, form: CoremlForm) -> tuple[Tensor, ...]:
    """Example inputs of a method, in order: inputIds, causalMask, position, keyCache, valueCache."""
    tokens, width = form.tokens, form.mask_width(model.context_length)
    assert tokens is not None and width is not None
    cache = torch.zeros(cache_shape(model.config, model.context_length), dtype=torch.float16)
    return (
        torch.zeros(1, tokens, dtype=torch.int32),
        torch.zeros(1, 1, tokens, width, dtype=torch.float16),
        torch.zeros(1, dtype=torch.int32),
        cache,
        cache.clone(),
    )


class _Signature(nn.Module):
    """Makes outputs of the right shapes from the inputs. ExecuTorch needs no more about a delegate."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        # An unused input would not become an input of the delegate.
        total = sum((x.sum() for x in inputs), torch.zeros(())).to(torch.float16)
        return tuple(total.expand(shape).clone() for shape in self.shapes.values())


def _signature(model: Llama, form: CoremlForm, examples: tuple[Tensor, ...]) -> Any:
    layers, batch, heads, _, width = cache_shape(model.config, model.context_length)
    rows = (layers, batch, heads, form.tokens or 1, width)
    logits = (1, form.tokens or 1, model.config.output_size)
    program = torch.export.export(
        _Signature({"logits": logits, "newKeys": rows, "newValues": rows}), examples
    )
    return to_edge(program, compile_config=EdgeCompileConfig(_check_ir_validity=False)).exported_program()


class _Delegated(nn.Module):
    def __init__(self, delegate: LoweredBackendModule) -> None:
        super().__init__()
        self.delegate = delegate

    def forward(
        self, input_ids: Tensor, causal_mask: Tensor, position: Tensor, keys: Tensor, values: Tensor
    ) -> Any:
        return self.delegate(input_ids, causal_mask, position, keys, values)
