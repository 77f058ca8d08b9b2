"""Per-layer cache of calibrated codes: resumes a calibration and is shared by exports to other targets.

The directory of a calibration is named by the hash of everything that decides the codes: its key. Each layer's
file is written whole or not at all. It holds the key, the layer's index, and a hash of these and its contents.
A file that is damaged, or of another layer or calibration, is removed with a note and computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from edgellama.checkpoints import Checkpoint
from edgellama.errors import EdgellamaError
from edgellama.export.quantization.tensors import TensorRow
from edgellama.files import digest
from edgellama.host.cache import cache_directory, touch, trim
from edgellama.host.progress import Progress
from edgellama.host.versions import tools
from edgellama.model.llama import Llama
from edgellama.model.quantized import Codes, apply_codes, check_codes, codes_of
from edgellama.recipe import Recipe, Scheme
from edgellama.text.calibration import Calibration

_UNUSABLE = (
    OSError,
    SafetensorError,
    EdgellamaError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
)
_FOLD = "fold "  # before the name of a fold in a file; no name of a tensor has a space
_FORM = "with folds"  # of the files; a file of an earlier form has another key
LIMIT = 8 * 10**9  # bytes; a calibration takes about one byte per weight of the decoder layers


class LayerStore:
    """Quantized layers of one calibration, by index.

    Nothing is stored if `directory` is None or cannot be written.

    key: hash of everything that decides the codes. Only files that were saved with an equal key are loaded.
    """

    def __init__(self, directory: Path | None = None, key: str = "") -> None:
        self.directory = directory
        self.key = key

    @classmethod
    def of(cls, checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration) -> LayerStore:
        """Store of this calibration. Its key covers only the recipe fields that decide the codes.

        Trims the cache to its size limit.
        """
        root = cache_directory()
        if root is None:
            return cls()
        key = digest(
            {
                "tools": tools(),
                # Codes of another kind of processor may differ, and a home directory may serve several.
                "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
                "checkpoint": checkpoint.sha256(),
                "config": checkpoint.config.to_dict(),
                # A checkpoint in memory may read tensors that differ from those in its files.
                "tensors": None if checkpoint.as_opened else _tensor_hashes(checkpoint),
                "algorithm": recipe.algorithm,
                "form": _FORM,
                "rotation": recipe.rotation,
                "rules": recipe.to_dict()["rules"],
                "calibration": calibration.sha256,
            }
        )
        store = cls(root / "calibration" / key, key)
        assert store.directory is not None
        touch(store.directory)
        store.trim()
        return store

    def save(self, index: int, model: Llama, rows: list[TensorRow]) -> None:
        """Writes layer `index` of `model` and its rows. After an OSError the store keeps nothing more."""
        if self.directory is None:
            return
        tensors: dict[str, Tensor] = {}
        schemes = {}
        for name, parameter in model.model.layers[index].named_parameters():
            module = model.model.layers[index].get_submodule(name.rpartition(".")[0])
            codes = codes_of(module) if isinstance(module, nn.Linear) and name.endswith(".weight") else None
            if codes is None:
                tensors[name] = parameter.detach().contiguous()
            else:
                tensors |= {f"{name}.values": codes.values, f"{name}.scales": codes.scales.contiguous()}
                schemes[name] = codes.scheme.to_dict()
        prefix = f"model.layers.{index}."
        for name, scale in model.folds.items():
            if name.startswith(prefix):
                tensors[f"{_FOLD}{name.removeprefix(prefix)}"] = scale.contiguous()
        metadata = {
            "key": self.key,
            "layer": str(index),
            "rows": json.dumps([row.to_dict() for row in rows]),
            "schemes": json.dumps(schemes),
        }
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.directory, suffix=".partial", delete=False) as partial:
                try:
                    partial.write(save(tensors, {**metadata, "sha256": _sha256(tensors, metadata)}))
                    partial.close()
                    os.replace(partial.name, self._file(index))
                except BaseException:
                    os.unlink(partial.name)
                    raise
        except OSError:
            self.directory = None

    def has(self, index: int) -> bool:
        """True if layer `index` was saved. Its file may still be unusable."""
        return self.directory is not None and self._file(index).is_file()

    def load(self, index: int, model: Llama, progress: Progress | None = None) -> list[TensorRow] | None:
        """Loads layer `index` into `model` and returns its rows. None if its file is missing.

        Also None for a file that is damaged or of another layer or calibration. It is then removed, and
        `progress` says so.
        """
        if not self.has(index):
            return None
        try:
            tensors, metadata = self._content(index)
            return _put_layer(index, model, tensors, metadata)
        except _UNUSABLE as error:
            if progress is not None:
                reason = error.message if isinstance(error, EdgellamaError) else str(error)
                progress.say(f"note: the cached layer {index} is not used, it is calibrated again ({reason})")
            self.reject(self._file(index))
            return None

    def reject(self, file: Path) -> None:
        """Removes a file of the store that cannot be used."""
        try:
            file.unlink(missing_ok=True)
        except OSError:
            self.directory = None

    def _content(self, index: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of a layer's file. Raises ValueError unless it was saved for this layer and key."""
        with safe_open(self._file(index), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata: dict[str, str] = file.metadata() or {}
        if metadata.pop("sha256", None) != _sha256(tensors, metadata):
            raise ValueError("its content does not have the hash that it was saved with")
        if metadata.get("key") != self.key:
            raise ValueError("it belongs to another checkpoint, text, recipe or version")
        if metadata.get("layer") != str(index):
            raise ValueError(f"it is layer {metadata.get('layer')}")
        return tensors, metadata

    @contextmanager
    def named_on_interrupt(self, layers: int, progress: Progress) -> Iterator[None]:
        """Says what this store keeps when the user interrupts the block. layers: of the whole model."""
        try:
            yield
        except KeyboardInterrupt:
            kept = sum(map(self.has, range(layers)))
            if kept:
                progress.say(
                    f"\n{kept} of {layers} calibrated layers are kept in {self.directory}: the same command goes on "
                    "from them"
                )
            raise

    def trim(self) -> None:
        """Trims the cache to its size limit, but keeps this store."""
        if self.directory is not None:
            trim(self.directory.parent, self.directory, LIMIT)

    def _file(self, index: int) -> Path:
        assert self.directory is not None
        return self.directory / f"{index}.safetensors"


def _put_layer(
    index: int, model: Llama, tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> list[TensorRow]:
    """Puts the tensors of a layer into `model`. Raises before it changes anything if they do not fit."""
    prefix, layer = f"model.layers.{index}.", model.model.layers[index]
    rows = [TensorRow.from_dict(row) for row in json.loads(metadata["rows"])]
    quantized = {}
    for name, scheme in json.loads(metadata["schemes"]).items():
        codes = Codes(tensors.pop(f"{name}.values"), tensors.pop(f"{name}.scales"), Scheme.from_dict(scheme))
        check_codes(prefix + name.removesuffix(".weight"), codes)
        quantized[name] = codes
    folds = {n: tensors.pop(n) for n in [n for n in tensors if n.startswith(_FOLD)]}
    shapes = {name: parameter.shape for name, parameter in layer.named_parameters()}
    actual = {name: t.shape for name, t in tensors.items()} | {
        n: c.values.shape for n, c in quantized.items()
    }
    if actual != shapes:
        raise ValueError("its tensors are not those of the layer")
    for name, codes in quantized.items():
        apply_codes(model, prefix + name.removesuffix(".weight"), codes)
    for name, tensor in tensors.items():
        module, _, attribute = (prefix + name).rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(tensor, requires_grad=False))
    model.folds |= {prefix + name.removeprefix(_FOLD): scale for name, scale in folds.items()}
    return rows


def _tensor_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    names = sorted(checkpoint.infos)
    return {n: hashlib.sha256(checkpoint.tensor(n).contiguous().numpy().tobytes()).hexdigest() for n in names}


def _sha256(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Hash of the tensors and metadata of a layer's file."""
    total = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()
