"""Files of a checkpoint, opened without edgellama's readers: by safetensors, or by gguf and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsWeights:
    """Weights of a directory, from the files that transformers chooses.

    Raises FileNotFoundError for a directory without safetensors.
    """

    def __init__(self, path: Path) -> None:
        self._files = _files(path)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    def tensor(self, name: str) -> Tensor:
        return self._stored(name).float()

    def rows(self, name: str, rows: slice | Tensor) -> Tensor:
        return self._stored(name)[rows].float()

    def _stored(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def _files(path: Path) -> Mapping[str, Path]:
    if (path / _SINGLE).is_file():
        with safe_open(path / _SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), path / _SINGLE)
    names: dict[str, str] = json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"]
    return {name: path / file for name, file in names.items()}


class GgufWeights:
    """Weights of a GGUF file as transformers converts them, a tensor at a time.

    Names and the order of rows are transformers' (transformers.modeling_gguf_pytorch_utils). The gguf package reads
    and dequantizes, as it does for transformers.

    Args:
        path: the file.
        config: of the model, as transformers reads it from the file.
        model: transformers' model, which the names are for.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], model: Any) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, get_gguf_hf_weights_map

        processor: Any = TENSOR_PROCESSORS["llama"]
        processor = processor(config=dict(config))
        self._convert: Callable[..., Any] = processor.process
        names = get_gguf_hf_weights_map(model, processor)
        # The reader is not kept: its metadata holds several objects for each token.
        tensors = gguf.GGUFReader(path).tensors
        self._tensors = {names[tensor.name]: tensor for tensor in tensors if tensor.name in names}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def tensor(self, name: str) -> Tensor:
        stored = self._tensors[name]
        return self._converted(stored.name, stored.data, stored.tensor_type)

    def rows(self, name: str, rows: slice | Tensor) -> Tensor:
        stored = self._tensors[name]
        place = rows if isinstance(rows, slice) else rows.numpy()
        return self._converted(stored.name, stored.data[place], stored.tensor_type)

    def _converted(self, name: str, data: np.ndarray, kind: gguf.GGMLQuantizationType) -> Tensor:
        weights = gguf.dequantize(data, kind)
        result = self._convert(weights=weights, name=name, tensor_key_mapping={}, parsed_parameters={})
        return torch.from_numpy(np.array(result.weights, np.float32))
