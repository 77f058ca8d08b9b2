"""Finished layers of a calibration on disk: an interrupted one goes on where it stopped, and the next export of the
same model, for other targets, say, finds them made.

A directory of the cache (export/quantization/cache.py) is named by the hash of everything that decides the codes. A file is written
whole or not at all, and holds the hash of what is in it: one that was damaged since is computed again.
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
    """Layers by index. Nothing is kept where `directory` is None or cannot be written."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory

    @classmethod
    def of(cls, checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration) -> LayerStore:
        """The store of this very calibration, in the cache; of the recipe only counts what decides the codes."""
        root = cache_directory()
        if root is None:
            return cls()
        decisive = {
            "tools": tools(),
            "checkpoint": checkpoint.sha256(),
            "config": checkpoint.config.to_dict(),
            # A checkpoint in memory may read other tensors than its files hold.
            "tensors": [hashlib.sha256(checkpoint.tensor(n).numpy().tobytes()).hexdigest() for n in _PROBES],
            "algorithm": recipe.algorithm,
            "rotation": recipe.rotation,
            "rules": recipe.to_dict()["rules"],
            "calibration": calibration.sha256,
        }
        store = cls(root / "calibration" / digest(decisive))
        assert store.directory is not None
        touch(store.directory)
        store.trim()
        return store

    def save(self, index: int, model: Llama, rows: list[TensorRow]) -> None:
        """Keep layer `index` of `model` and the rows about it."""
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
        about = {"rows": json.dumps([row.to_dict() for row in rows]), "schemes": json.dumps(schemes)}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.directory, suffix=".partial", delete=False) as partial:
                try:
                    partial.write(save(tensors, {**about, "sha256": _sha256(tensors, about)}))
                    partial.close()
                    os.replace(partial.name, self._file(index))
                except BaseException:
                    os.unlink(partial.name)
                    raise
        except OSError:
            self.directory = None

    def load(self, index: int, model: Llama) -> list[TensorRow] | None:
        """Give layer `index` of `model` what is kept of it: the rows about it, or None where nothing usable is."""
        if self.directory is None or not self._file(index).is_file():
            return None
        try:
            with safe_open(self._file(index), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                about = file.metadata()
            if about.pop("sha256") != _sha256(tensors, about):
                return None
            rows, schemes = json.loads(about["rows"]), json.loads(about["schemes"])
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
        """Hold the cache to its size; what is in this store stays."""
        if self.directory is not None:
            trim(self.directory.parent, self.directory)

    def _file(self, index: int) -> Path:
        assert self.directory is not None
        return self.directory / f"{index}.safetensors"


def _sha256(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Hash of all that a file of the store says."""
    total = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


VARIABLE, OFF = "EDGELLAMA_CACHE", "off"


LIMIT = 8 * 10**9  # bytes; a calibration takes about as many as its model has weights in its layers


def cache_directory() -> Path | None:
    """Where calibrations are kept; None where they are not."""
    named = os.environ.get(VARIABLE)
    if named == OFF:
        return None
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgellama"


def touch(entry: Path) -> None:
    """Note that an entry of the cache is being used."""
    try:
        os.utime(entry)
    except OSError:  # not there yet, or not ours
        return


def trim(directory: Path, keep: Path, limit: int = LIMIT) -> None:
    """Remove entries of `directory`, those used longest ago first, until `limit` is kept; never `keep`.

    Another process may be doing the same, or be using an entry: it then computes again what is gone.
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
        except OSError:  # gone meanwhile
            continue
    return total
