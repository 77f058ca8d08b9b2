"""Runtime `onnxruntime-cpu`: an ONNX model in ONNX Runtime, with the KV cache bound to the session.

Form `ort`: past and present share one buffer of the context's length, which attention updates in place. Form
`portable`: the standard's Attention returns a longer cache on each call. That output is bound without a copy
as the next call's past.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgellama.errors import BundleError
from edgellama.formats.onnx_adapter import open_onnx_adapter
from edgellama.formats.onnx_model import MODEL_FILE, read_onnx
from edgellama.host.onnxruntime_library import ort, state
from edgellama.runtimes.base import Logits, Runtime
from edgellama.runtimes.parts import States
from edgellama.targets.onnx.interface import (
    ATTENTION_MASK,
    CONTEXT_LENGTH,
    FORM,
    INPUT_IDS,
    LOGITS,
    MANIFEST_SHA256,
    PAST_KEY,
    PAST_VALUE,
    PER_BLOCK_ENTRIES,
    PRESENT_KEY,
    PRESENT_VALUE,
    RECIPE,
    SESSION_ENTRIES,
    VOCAB_SIZE,
    base_number,
)
from edgellama.targets.onnx.parts import with_states

_WEIGHTS = "session.model_external_initializers_file_folder_path"
_QUIET = 4  # logs fatal messages only, because errors arrive as exceptions
_ERRORS = (
    RuntimeError,
    *(state.EPFail, state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf),
    *(state.ModelLoaded, state.NoModel, state.NoSuchFile, state.NotImplemented, state.RuntimeException),
)


class OrtRuntime(Runtime):
    """Runs the model in the directory `path`. threads: None for ONNX Runtime's choice, one per core."""

    name = "onnxruntime-cpu"
    can_rewind = cache_is_input = True

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        model = path / MODEL_FILE
        if not model.is_file():
            raise BundleError(f"{model}: no such file", remedy="Check the path, or export again.")
        options = ort.SessionOptions()
        options.log_severity_level = _QUIET
        options.intra_op_num_threads = threads or 0
        # The form is known only after loading, and each entry changes nothing in the other form.
        for entries in SESSION_ENTRIES.values():
            _add(options, entries)
        try:
            self._session = self._open(model, options)
            metadata = self._session.get_modelmeta().custom_metadata_map
            self.vocab_size, self.context_length = int(metadata[VOCAB_SIZE]), int(metadata[CONTEXT_LENGTH])
            self._grows = metadata[FORM] != "ort"
            self._base = metadata.get(MANIFEST_SHA256, "")
            if json.loads(metadata[RECIPE]).get("onnx_rounding") == "per-block":
                _add(options, PER_BLOCK_ENTRIES)
                self._session = self._open(model, options)
        except (*_ERRORS, KeyError, ValueError, AttributeError) as error:
            raise BundleError(
                f"{model}: ONNX Runtime cannot load it ({_line(error)})",
                remedy="Export again with this version of edgellama; `edgellama inspect` shows the file's requirements.",
            ) from error
        self.path = path
        self._grown: dict[
            str, Any
        ] = {}  # present keys and values of form `portable`, by the name of the past
        self._opened: dict[Path, Any] = {}  # adapters, which own the memory of their tensors
        self._bind()

    def _open(self, model: Path, options: Any) -> Any:
        """A session of the model. A recipe with `onnx_rounding` per-block opens two, because the file names it."""
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def _bind(self) -> None:
        """Binds buffers for the KV cache and the logits.

        `_cache` lists the (past, present) names that belong together.
        """
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        layers = sum(name not in (INPUT_IDS, ATTENTION_MASK) for name in shapes) // 2
        self._cache = [
            (past.format(layer), present.format(layer))
            for layer in range(layers)
            for past, present in ((PAST_KEY, PRESENT_KEY), (PAST_VALUE, PRESENT_VALUE))
        ]
        self._binding = self._session.io_binding()
        self._output_size = int(self._session.get_outputs()[0].shape[-1])
        self._logits = np.zeros((1, 1, self.output_size), np.float32)
        self._binding.bind_ortvalue_output(LOGITS, ort.OrtValue.ortvalue_from_numpy(self._logits))
        _, self._heads, _, self._width = shapes[PAST_KEY.format(0)]
        self._buffers = (
            {} if self._grows else {past: self._zeros(self.context_length) for past, _ in self._cache}
        )
        for past, present in self._cache:
            if self._grows:
                self._binding.bind_output(present)
            else:
                self._binding.bind_ortvalue_input(past, self._buffers[past])
                self._binding.bind_ortvalue_output(present, self._buffers[past])

    def _use(self, file: Path | None) -> None:
        """Binds the adapter's tensors to the graph's optional inputs. `RunOptions` has no effect on bound calls."""
        values = {} if file is None else self._values(file)
        self._binding.clear_binding_inputs()
        for name, value in (*self._buffers.items(), *values.items()):
            self._binding.bind_ortvalue_input(name, value)

    def _values(self, file: Path) -> Mapping[str, Any]:
        """Tensors of an adapter by input. Raises BundleError if they do not belong to this model."""
        if file not in self._opened:
            adapter = open_onnx_adapter(file)
            inputs = {value.name for value in self._session.get_overridable_initializers()}
            wrong = sorted(adapter.get_parameters().keys() - inputs)
            if wrong or not self._base or adapter.get_model_version() != base_number(self._base):
                reason = f"it changes {wrong[0]}" if wrong else "it was made for another base"
                raise BundleError(
                    f"{file}: this adapter does not belong to {self.path} ({reason})",
                    remedy="Take both from one bundle.",
                )
            self._opened[file] = adapter
        values: Mapping[str, Any] = self._opened[file].get_parameters()
        return values

    def _zeros(self, length: int) -> ort.OrtValue:
        """Returns zero keys or values of one layer: float32 [1, G, length, D]."""
        return ort.OrtValue.ortvalue_from_numpy(np.zeros((1, self._heads, length, self._width), np.float32))

    def _forward(self, tokens: Sequence[int], position: int) -> Logits:
        ids = np.array([list(tokens)], np.int64)
        self._binding.bind_cpu_input(INPUT_IDS, ids)
        self._binding.bind_cpu_input(ATTENTION_MASK, np.ones((1, position + len(tokens)), np.int64))
        if self._grows and position == 0:
            for past, _ in self._cache:
                self._binding.bind_ortvalue_input(past, self._zeros(0))
        try:
            self._session.run_with_iobinding(self._binding)
        except _ERRORS as error:
            raise BundleError(
                f"{self.path}: ONNX Runtime failed while running it ({_line(error)})",
                remedy="Export again, or report it with the bundle's manifest.",
            ) from error
        if self._grows:
            presents = self._binding.get_outputs()[1 : 1 + len(self._cache)]
            for (past, present), value in zip(self._cache, presents, strict=True):
                self._grown[past] = value
                self._binding.bind_ortvalue_input(past, value)
                self._binding.bind_output(present)  # again, because the next output is longer
        logits: Logits = self._logits[0, 0].copy()
        return logits

    def _rewind(self, position: int) -> None:
        if self._grows:
            self._bind_past(self.cache(position))

    def cache(self, count: int) -> dict[str, npt.NDArray[np.float32]]:
        values = self._grown if self._grows else self._buffers
        return {past: np.ascontiguousarray(values[past].numpy()[:, :, :count]) for past, _ in self._cache}

    def restore(self, tokens: Sequence[int], arrays: Mapping[str, npt.NDArray[np.float32]]) -> None:
        tokens = self._checked(tokens)
        shape = (1, self._heads, len(tokens), self._width)
        found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        if found != {past: (shape, np.dtype(np.float32)) for past, _ in self._cache}:
            raise BundleError(
                f"{self.path}: its keys and values have the shape {list(shape)}, and a beginning has others",
                remedy="Export the bundle again.",
            )
        if self._grows:
            self._bind_past(arrays)
        else:
            for past, array in arrays.items():
                whole = np.zeros((1, self._heads, self.context_length, self._width), np.float32)
                whole[:, :, : len(tokens)] = array
                self._buffers[past].update_inplace(whole)
        self.position, self.cached = len(tokens), tuple(tokens)

    def _bind_past(self, arrays: Mapping[str, npt.NDArray[np.float32]]) -> None:
        for past, array in arrays.items():
            self._grown[past] = ort.OrtValue.ortvalue_from_numpy(array)
            self._binding.bind_ortvalue_input(past, self._grown[past])

    def close(self) -> None:
        self._grown.clear()
        del self._binding, self._session
        self._opened.clear()


class OrtParts(OrtRuntime):
    """Runs a model whose graph also returns the input of each layer."""

    def __init__(self, path: Path, layers: int) -> None:
        self._content, self._states = with_states(read_onnx(path), layers)
        super().__init__(path)

    def _open(self, model: Path, options: Any) -> Any:
        options.add_session_config_entry(_WEIGHTS, str(model.parent))
        return ort.InferenceSession(self._content, options, providers=["CPUExecutionProvider"])

    def states(self, tokens: Sequence[int]) -> States:
        for name in self._states:
            self._binding.bind_output(name)
        logits = self.forward(tokens)
        values = self._binding.get_outputs()[-len(self._states) :]
        return States([torch.from_numpy(v.numpy().copy())[0] for v in values], torch.from_numpy(logits))


def _add(options: Any, entries: Mapping[str, str]) -> None:
    for name, value in entries.items():
        options.add_session_config_entry(name, value)


def _line(error: Exception) -> str:
    """Returns the first line of ONNX Runtime's message, which has many lines."""
    return str(error).strip().partition("\n")[0]
