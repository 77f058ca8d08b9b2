"""Per-layer cache of calibrated codes: resumes a calibration and is shared by exports to other targets.

The directory of a calibration is named by the hash of everything that decides the codes. Each layer's file is
written whole or not at all, and holds the hash of its contents. A damaged file is ignored, and the layer is
computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from edgellama.checkpoints import Checkpoint
from edgellama.export.quantization.tensors import TensorRow
from edgellama.files import digest
from edgellama.host.versions import tools
from edgellama.model.llama import Llama
from edgellama.model.quantized import Codes, apply_codes, check_codes, codes_of
from edgellama.recipe import Recipe, Scheme
from edgellama.text.calibration import Calibration

_PROBES = ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight")


class LayerStore:
    """Quantized layers of one calibration, by index.

    Nothing is stored if `directory` is None or cannot be written.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory

    @classmethod
    def of(cls, checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration) -> LayerStore:
        """Store of this calibration. Its key covers only the recipe fields that decide the codes.

        Trims the cache to its size limit.
        """
        root = cache_directory()
        if root is None:
            return cls()
        key = {
            "tools": tools(),
            "checkpoint": checkpoint.sha256(),
            "config": checkpoint.config.to_dict(),
            # A checkpoint in memory may read tensors that differ from those in its files.
            "tensors": [hashlib.sha256(checkpoint.tensor(n).numpy().tobytes()).hexdigest() for n in _PROBES],
            "algorithm": recipe.algorithm,
            "rotation": recipe.rotation,
            "rules": recipe.to_dict()["rules"],
            "calibration": calibration.sha256,
        }
        store = cls(root / "calibration" / digest(key))
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
        metadata = {"rows": json.dumps([row.to_dict() for row in rows]), "schemes": json.dumps(schemes)}
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

    def load(self, index: int, model: Llama) -> list[TensorRow] | None:
        """Loads layer `index` into `model` and returns its rows. None if its file is missing or damaged."""
        if self.directory is None or not self._file(index).is_file():
            return None
        try:
            with safe_open(self._file(index), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
            if metadata.pop("sha256") != _sha256(tensors, metadata):
                return None
            rows, schemes = json.loads(metadata["rows"]), json.loads(metadata["schemes"])
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError):
            return None
        prefix = f"model.layers.{index}."
        for name, scheme in schemes.items():
            codes = Codes(
                tensors.pop(f"{name}.values"), tensors.pop(f"{name}.scales"), Scheme.from_dict(scheme)
            )
            module = prefix + name.removesuffix(".weight")
            check_codes(module, codes)
            apply_codes(model, module, codes)
        for name, tensor in tensors.items():
            module, _, attribute = (prefix + name).rpartition(".")
            setattr(model.get_submodule(module), attribute, nn.Parameter(tensor, requires_grad=False))
        return [TensorRow.from_dict(row) for row in rows]

    def trim(self) -> None:
        """Trims the cache to its size limit, but keeps this store."""
        if self.directory is not None:
            trim(self.directory.parent, self.directory)

    def _file(self, index: int) -> Path:
        assert self.directory is not None
        return self.directory / f"{index}.safetensors"


def _sha256(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Hash of the tensors and metadata of a layer's file."""
    total = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


VARIABLE, OFF = "EDGELLAMA_CACHE", "off"


LIMIT = 8 * 10**9  # bytes; a calibration takes about one byte per weight of the decoder layers


def cache_directory() -> Path | None:
    """Root of the cache: $EDGELLAMA_CACHE, or edgellama in $XDG_CACHE_HOME or ~/.cache. None if it is off."""
    setting = os.environ.get(VARIABLE)
    if setting == OFF:
        return None
    if setting:
        return Path(setting)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgellama"


def touch(entry: Path) -> None:
    """Marks a cache entry as recently used."""
    try:
        os.utime(entry)
    except OSError:  # missing, or owned by another user
        return


def trim(directory: Path, keep: Path, limit: int = LIMIT) -> None:
    """Removes the least recently used entries of `directory`, except `keep`, down to `limit` bytes.

    Another process may trim at the same time, or use an entry that is removed. It then computes that entry
    again.
    """
    try:
        entries = sorted((entry.stat().st_mtime, entry) for entry in directory.iterdir())
    except OSError:
        return
    sizes = {entry: _bytes(entry) for _, entry in entries}
    total = sum(sizes.values())
    for _, entry in entries:
        if total <= limit:
            return
        if entry != keep:
            shutil.rmtree(entry, ignore_errors=True)
            total -= sizes[entry]


def _bytes(entry: Path) -> int:
    total = 0
    for file in entry.rglob("*"):
        try:
            total += file.stat().st_size
        except OSError:  # removed in the meantime
            continue
    return total
