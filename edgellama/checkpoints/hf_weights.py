"""Weight files of a Hugging Face directory: which ones they are, and their tensors, mapped and read one by one.

Safetensors come first, then pickles, which torch.load reads as tensors only (`weights_only`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgellama.checkpoints.checkpoint import TensorInfo
from edgellama.checkpoints.pickles import DTYPES, load_pickle
from edgellama.errors import CheckpointError
from edgellama.files import is_lfs_pointer
from edgellama.model.config import LlamaConfig

BYTES_PER_WEIGHT = {"F32": 4, "F16": 2, "BF16": 2}
PACKED = ("I32", "I64")  # dtypes of packed codes, and of their shapes and orders
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# Buffers that old versions of transformers saved with the weights. They follow from the config.
BUFFER = re.compile(r"(^|\.)(rotary_emb\.\w+|rope\.freqs|masked_bias|position_ids|causal_mask)$")

# Files of a LoRA training by peft, torchtune and MLX.
ADAPTER = re.compile(r"adapter_config\.json|adapter_model\..+|adapters\.safetensors|adapter_\d+\.(pt|bin)")
# Files of a training's state, which are no weights.
_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|recipe_state|trainer_state)\b.*")
_NUMBERED = re.compile(r"(.*\D)(\d+)-of-(\d+)(\.\w+)")
_TORCHTUNE = re.compile(r"hf_model_(\d{4})_(\d+)\.pt")  # number of the file, epoch

AGAIN = "Download the file again and compare its size with the original's."
_PREFIXES = ("module.", "_orig_mod.")  # of training wrappers: DistributedDataParallel, torch.compile


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: the file, the entry of its header, and a function that returns the tensor."""

    file: Path
    info: TensorInfo
    read: Callable[[], Tensor] = field(repr=False)


@dataclass(frozen=True)
class WeightFiles:
    """Weight files of a directory.

    Attributes:
        files: the files, in order of their names.
        index: file of every tensor, by the index; empty without one.
        index_name: name of the index.
        notes: sentences about the choice.
    """

    files: tuple[Path, ...]
    index: Mapping[str, Path] = field(default_factory=dict)
    index_name: str = ""
    notes: tuple[str, ...] = ()


def adapter_files(path: Path) -> list[str]:
    """Names of the adapter's files in a directory."""
    return sorted(f.name for f in path.iterdir() if ADAPTER.fullmatch(f.name))


def adapter_alone(path: Path) -> CheckpointError:
    try:
        base = read_object(path / "adapter_config.json").get("base_model_name_or_path")
    except CheckpointError:
        base = None
    named = base if isinstance(base, str) and base else "CHECKPOINT"
    return CheckpointError(
        f"{path}: holds an adapter (LoRA) and not a whole model",
        remedy=f"Give its base, and the adapter as an option: `edgellama export {named:.120} --adapter {path}`.",
    )


def weight_files(path: Path) -> WeightFiles:
    """Finds the weight files of a directory. Raises CheckpointError if there are none, or two models."""
    adapter = adapter_files(path)
    found = _safetensors(path) or _pickles(path)
    if found is None:
        raise adapter_alone(path) if adapter else _no_weights(path)
    if adapter:
        raise CheckpointError(
            f"{path}: holds a whole model and an adapter (LoRA) beside it ({', '.join(adapter[:3])}); whether "
            "the weights hold the adapter already, the files do not say",
            remedy="If it is merged already, remove the adapter's files; if not, move them to a directory of their own "
            "and give that with --adapter.",
        )
    return found


def planned_tensors(
    path: Path, config: LlamaConfig, data: Mapping[str, Any]
) -> tuple[dict[str, Stored], list[Stored], tuple[str, ...]]:
    """Tensors that config.json leads to expect, in its dtype, as `stored_tensors` returns them. None can be read."""
    dtypes = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    dtype = dtypes.get(str(data.get("dtype") or data.get("torch_dtype")), "F32")

    def read() -> Tensor:
        raise _no_weights(path)

    stored = {
        name: Stored(path, TensorInfo(dtype, shape, BYTES_PER_WEIGHT[dtype] * math.prod(shape)), read)
        for name, shape in config.tensor_shapes().items()
    }
    return stored, [], ("the weights are not here: tensors and bytes follow from config.json",)


def _safetensors(path: Path) -> WeightFiles | None:
    others = [f for f in sorted(path.glob("*.safetensors")) if not ADAPTER.fullmatch(f.name)]
    if (path / INDEX).exists():
        return _by_index(path / INDEX, path / SINGLE, others)
    if (path / SINGLE).exists():
        return WeightFiles((path / SINGLE,))
    return _unnamed(path, others)


def _pickles(path: Path) -> WeightFiles | None:
    others = [
        f
        for f in sorted((*path.glob("*.bin"), *path.glob("*.pt")))
        if not ADAPTER.fullmatch(f.name) and not _STATE.fullmatch(f.name)
    ]
    if (path / PICKLE_INDEX).exists():
        return _by_index(path / PICKLE_INDEX, path / PICKLE, others)
    if (path / PICKLE).exists():
        return WeightFiles((path / PICKLE,))
    return _unnamed(path, others)


def _by_index(index: Path, single: Path, others: list[Path]) -> WeightFiles:
    """The files that an index names. Another complete set is taken if none of them is there (torchtune)."""
    path = index.parent
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map that says which file holds which tensor", remedy=AGAIN)
    for file in weight_map.values():
        # A path could leave the directory. A link under a plain name may leave it, for Hugging Face's cache.
        if not _is_file_name(file):
            raise CheckpointError(
                f"{index}: {file!r:.80} is not the name of a file in this directory",
                remedy="Shards lie beside their index; correct weight_map.",
            )
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (path / name).is_file()]
    if len(missing) == len(names) and not single.exists():
        chosen = _numbered(path, others)
        if chosen is not None:
            note = f"{index.name} names files that are not here; the weights are {chosen[0].name} and on"
            return WeightFiles(chosen, notes=(note,))
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:4])}",
            remedy=f"Download the files that {index.name} names into the same directory.",
        )
    if single.exists() and single.name not in names:
        raise CheckpointError(
            f"{path}: holds {single.name} and also {index.name} with other files",
            remedy="One of them is left over from another download or save; remove it.",
        )
    file_by_tensor = {name: path / file for name, file in weight_map.items() if not BUFFER.search(name)}
    return WeightFiles(tuple(path / name for name in names), file_by_tensor, index.name)


def _unnamed(path: Path, files: list[Path]) -> WeightFiles | None:
    """Weights under names of another program: a lone file, or one complete set of numbered files."""
    if not files:
        return None
    chosen = tuple(files) if len(files) == 1 and not _NUMBERED.fullmatch(files[0].name) else None
    chosen = chosen or _numbered(path, files)
    if chosen is None:
        raise CheckpointError(
            f"{path}: no {SINGLE} and no {INDEX}, and {', '.join(f.name for f in files[:4])} are not one "
            "complete numbered set",
            remedy=f"Download {INDEX} or the missing files, or rename the file that is the whole model to {SINGLE}.",
        )
    return WeightFiles(chosen, notes=(f"the weights are {', '.join(f.name for f in chosen[:3])}: no index",))


def _numbered(path: Path, files: Iterable[Path]) -> tuple[Path, ...] | None:
    """The one complete set `NAME-00001-of-00002` (or torchtune's hf_model_0001_0) among the files, else None."""
    sets: dict[tuple[str, ...], dict[int, Path]] = {}
    for file in files:
        match, tuned = _NUMBERED.fullmatch(file.name), _TORCHTUNE.fullmatch(file.name)
        if match:
            sets.setdefault((match[1], match[3], match[4]), {})[int(match[2])] = file
        elif tuned:
            sets.setdefault(("hf_model_", tuned[2]), {})[int(tuned[1])] = file
    if len(sets) != 1:
        return None
    ((key, numbered),) = sets.items()
    count = int(key[1]) if len(key) == 3 else len(numbered)
    if sorted(numbered) != list(range(1, count + 1)):
        return None
    return tuple(numbered[i] for i in sorted(numbered))


def _no_weights(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: no weights: neither {SINGLE} nor {INDEX} nor {PICKLE}",
        remedy="Download the weights into the same directory as config.json.",
    )


def stored_tensors(
    files: Iterable[Path], *, packed: bool = False
) -> tuple[dict[str, Stored], list[Stored], tuple[str, ...]]:
    """All tensors of the files by name, the buffers among them, and notes. Reads headers only.

    packed: accept integers as well, which may be packed codes.

    Raises CheckpointError for a name in two files, another dtype, or a damaged file.
    """
    stored: dict[str, Stored] = {}
    buffers: list[Stored] = []
    for file in files:
        pickled = file.suffix != ".safetensors"
        for name, entry in (_pickled(file) if pickled else _mapped(file)).items():
            if BUFFER.search(name):
                buffers.append(entry)
                continue
            if name in stored:
                raise CheckpointError(
                    f"{file}: {name} is also in {stored[name].file.name}",
                    remedy="Remove the file that is left over.",
                )
            if entry.info.dtype not in BYTES_PER_WEIGHT and not (packed and entry.info.dtype in PACKED):
                raise CheckpointError(
                    f"{file}: {name} has dtype {entry.info.dtype}, expected F32, F16 or BF16",
                    remedy="If this checkpoint is quantized, give the full-precision one; else convert it to F32.",
                )
            stored[name] = entry
    for prefix in _PREFIXES:
        if stored and all(name.startswith(prefix) for name in stored):
            note = f"the names of the tensors begin with {prefix!r}, which a training wrapper left: ignored"
            return {name.removeprefix(prefix): entry for name, entry in stored.items()}, buffers, (note,)
    return stored, buffers, ()


def _mapped(file: Path) -> dict[str, Stored]:
    handle, entries = _open(file), {}
    for name in handle.keys():  # noqa: SIM118 (a handle, not a mapping)
        view = handle.get_slice(name)
        dtype, shape = view.get_dtype(), tuple(view.get_shape())
        info = TensorInfo(dtype, shape, BYTES_PER_WEIGHT.get(dtype, 0) * math.prod(shape))
        entries[name] = Stored(file, info, _reader(file, name))
    return entries


def _reader(file: Path, name: str) -> Callable[[], Tensor]:
    """Function that returns a tensor as a view of the mapped file. Pages are read on first access.

    The file is mapped anew for each tensor, so that its pages leave memory together with the tensor.
    """

    def read() -> Tensor:
        try:
            return _open(file).get_tensor(name)  # type: ignore[no-any-return]
        except (SafetensorError, RuntimeError, OSError) as error:
            raise CheckpointError(f"{file}: cannot read {name}: {error}", remedy=AGAIN) from error

    return read


def _pickled(file: Path) -> dict[str, Stored]:
    entries = {}
    for name, tensor in load_pickle(file, foreign=True).items():
        info = TensorInfo(
            DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")),
            tuple(tensor.shape),
            tensor.nbytes,
        )
        entries[name] = Stored(file, info, lambda tensor=tensor: tensor)  # type: ignore[misc]
    return entries


def _open(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            if is_lfs_pointer(stream.read(64)):
                raise CheckpointError(
                    f"{file}: a Git LFS pointer and not the weights", remedy="Run `git lfs pull`."
                )
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file}: damaged or not safetensors: {error}", remedy=AGAIN) from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened: {error}", remedy="Check the file.") from error


def _is_file_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(c in name for c in "/\\\0")
        and len(name.encode("utf-8", "surrogatepass")) <= 255
    )


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError for any other content."""
    try:
        content = file.read_bytes()
        data = None if is_lfs_pointer(content) else json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}", remedy=AGAIN) from error
    if data is None and is_lfs_pointer(content):
        raise CheckpointError(
            f"{file}: a Git LFS pointer and not the file itself", remedy="Run `git lfs pull`."
        )
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(data).__name__}, expected an object", remedy=AGAIN)
    return data
