"""Finished layers of a calibration on disk, so that an interrupted one goes on where it stopped.

A directory is named by the hash of everything that decides the codes. A file is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgellama import __version__
from edgellama.calibration import Calibration
from edgellama.checkpoint import Checkpoint
from edgellama.export.codes import Codes, check_codes
from edgellama.export.quantize import TensorRow, apply_codes, codes_of
from edgellama.llama import Llama
from edgellama.recipe import Recipe, Scheme
from edgellama.report import to_json

_PROBES = ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight")


class LayerStore:
    """Layers by index. Nothing is kept where `directory` is None or cannot be written."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory

    @classmethod
    def of(cls, checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration) -> LayerStore:
        """The store of this very calibration, in the user's cache directory."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        decisive = {
            "edgellama": __version__,
            "torch": version("torch"),
            "checkpoint": checkpoint.sha256(),
            "config": checkpoint.config.to_dict(),
            # A checkpoint in memory may read other tensors than its files hold.
            "tensors": [hashlib.sha256(checkpoint.tensor(n).numpy().tobytes()).hexdigest() for n in _PROBES],
            "recipe": recipe.to_dict(),
            "calibration": calibration.sha256,
        }
        key = hashlib.sha256(to_json(decisive).encode()).hexdigest()
        return cls(cache / "edgellama" / "calibration" / key)

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
            partial = self.directory / f"{index}.partial"
            save_file(tensors, partial, about)
            partial.rename(self._file(index))
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
            rows, schemes = json.loads(about["rows"]), json.loads(about["schemes"])
        except (OSError, SafetensorError, ValueError, KeyError):
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

    def clear(self) -> None:
        """Forget everything: the calibration has served its purpose."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _file(self, index: int) -> Path:
        assert self.directory is not None
        return self.directory / f"{index}.safetensors"
