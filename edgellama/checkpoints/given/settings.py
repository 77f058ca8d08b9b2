"""Settings: what a checkpoint's quantization_config says about its codes, with everything unsupported refused.

Keys that change the computation are known by name. Others, such as those of the training, are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellama.checkpoints.given.weights import Origin
from edgellama.errors import CheckpointError

GPTQ, AWQ, PACKED = "gptq", "awq", "pack-quantized"
FLOAT = "Give the full-precision checkpoint: edgellama quantizes it itself."
BITS = (4, 8)

# Keys of the packages around GPTQ and AWQ that change the computation, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "act_bits": (None, 16, 32),
    "act_data_type": (None, "float", "bf16", "fp16"),
    "adapter": (None, {}),
    "data_type": (None, "int"),
    "is_marlin_format": (None, False),
    "lora": (None, {}),
    "rotation_config": (None, {}),
    "hadamard_config": (None, {}),
    "super_bits": (None,),
    "super_group_size": (None,),
    "use_rotation": (None, False),
}
# The same of compressed-tensors.
_PACKED_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "kv_cache_scheme": (None,),
    "sparsity_config": (None, {}),
    "transform_config": (None, {}),
    "quantization_status": (None, "compressed"),
}
# AutoRound's packings (auto_round/inference/backend.py), with the layout of each.
_AUTOROUND = {
    "auto_round": (GPTQ, "gptq_v2"),
    "auto_round:gptqmodel": (GPTQ, "gptq_v2"),
    "auto_round:auto_gptq": (GPTQ, "gptq"),
    "auto_round:gptq": (GPTQ, "gptq"),
    "auto_round:auto_awq": (AWQ, "awq"),
    "auto_round:awq": (AWQ, "awq"),
}


@dataclass(frozen=True)
class Settings:
    """Settings of a quantized checkpoint.

    Attributes:
        origin: maker of the codes.
        layout: GPTQ, AWQ or PACKED.
        bits: of a code.
        group_size: columns that share a scale; None for a whole row.
        zero_is_one_less: True if zero points are stored as one less than they are.
        mixed: True if some modules may have other bits and groups, as their shapes then say.
    """

    origin: Origin
    layout: str
    bits: int
    group_size: int | None
    zero_is_one_less: bool = False
    mixed: bool = False


def read_settings(path: Path, data: Any) -> Settings:
    """Settings of the quantization_config `data`.

    Raises CheckpointError, naming key and value, for a method or an option that edgellama does not take as codes.
    """
    if not isinstance(data, Mapping):
        raise _refused(path, "quantization_config", data, "an object")
    method = str(data.get("quant_method", "unnamed")).lower()
    reader = _READERS.get(method)
    if reader is None:
        raise CheckpointError(
            f"{path}: quantization_config.quant_method is {method!r:.40}, whose weights edgellama does not take as "
            f"codes; it takes {', '.join(_READERS)}",
            remedy=FLOAT,
        )
    return reader(path, data)


def _gptq(path: Path, data: Mapping[str, Any]) -> Settings:
    layout = data.get("checkpoint_format") or data.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise _refused(path, "checkpoint_format", layout, "gptq or gptq_v2")
    origin = Origin("GPTQ", _package(data), layout, bool(data.get("desc_act")))
    return _grouped(path, data, origin, GPTQ, zero_is_one_less=layout == "gptq")


def _awq(path: Path, data: Mapping[str, Any]) -> Settings:
    version = str(data.get("version") or "gemm").lower()
    if version != "gemm":
        raise _refused(path, "version", version, "gemm, the one layout of AWQ that is read")
    return _grouped(path, data, Origin("AWQ", _package(data), "awq"), AWQ)


def _auto_round(path: Path, data: Mapping[str, Any]) -> Settings:
    packing = str(data.get("packing_format") or "auto_round:auto_gptq")
    if packing not in _AUTOROUND:
        raise _refused(path, "packing_format", packing, " or ".join(_AUTOROUND))
    layout, name = _AUTOROUND[packing]
    origin = Origin("AutoRound", _package({"provider": "auto-round", **data}), name)
    return _grouped(path, data, origin, layout, zero_is_one_less=name == "gptq")


def _grouped(
    path: Path, data: Mapping[str, Any], origin: Origin, layout: str, *, zero_is_one_less: bool = False
) -> Settings:
    """Settings of the keys that GPTQ, AWQ and AutoRound share."""
    _check_neutral(path, data, _NEUTRAL)
    bits = data.get("bits", data.get("w_bit"))
    group = data.get("group_size", data.get("q_group_size"))
    if data.get("sym") is False or data.get("zero_point") is True:
        key = "sym" if data.get("sym") is False else "zero_point"
        raise CheckpointError(
            f"{path}: quantization_config.{key} is {data[key]}: the codes have zero points, and no target keeps them",
            remedy="Take a symmetric checkpoint (sym true, zero_point false), or the full-precision one.",
        )
    mixed = bool(data.get("extra_config") or data.get("dynamic"))
    return _settings(path, origin, layout, bits, group, zero_is_one_less, mixed)


def _compressed_tensors(path: Path, data: Mapping[str, Any]) -> Settings:
    _check_neutral(path, data, _PACKED_NEUTRAL)
    if data.get("format") != PACKED:
        raise _refused(path, "format", data.get("format"), PACKED)
    groups = data.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise _refused(path, "config_groups", groups, "one group")
    ((name, group),) = groups.items()
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise _refused(path, f"config_groups.{name}.weights", weights, "an object")
    place = f"config_groups.{name}.weights"
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise _refused(
                path, f"config_groups.{name}.{key}", group[key], "null: weights alone are quantized"
            )
    if group.get("format") not in (None, PACKED):
        raise _refused(path, f"config_groups.{name}.format", group["format"], PACKED)
    for key, neutral in (
        ("type", ("int",)),
        ("symmetric", (True,)),
        ("strategy", ("group", "channel")),
        ("dynamic", (None, False)),
        ("actorder", (None, False, "weight", "static")),
    ):
        value = weights.get(key, neutral[0])
        if value not in neutral:
            raise _refused(path, f"{place}.{key}", value, " or ".join(map(str, neutral)))
    group_size = weights.get("group_size") if weights.get("strategy", "group") == "group" else -1
    version = data.get("version")
    package = f"compressed-tensors {version}" if isinstance(version, str) else None
    act_order = weights.get("actorder") not in (None, False)
    origin = Origin("compressed-tensors", package, PACKED, act_order)
    return _settings(path, origin, PACKED, weights.get("num_bits"), group_size, False, False)


_READERS: dict[str, Callable[[Path, Mapping[str, Any]], Settings]] = {
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
    "compressed-tensors": _compressed_tensors,
}


def _settings(
    path: Path, origin: Origin, layout: str, bits: Any, group: Any, zero_is_one_less: bool, mixed: bool
) -> Settings:
    allowed = (4,) if layout == AWQ else BITS
    if bits not in allowed or isinstance(bits, bool):
        raise _refused(path, "bits", bits, " or ".join(map(str, allowed)))
    if not isinstance(group, int) or isinstance(group, bool) or (group != -1 and (group < 32 or group % 32)):
        raise _refused(path, "group_size", group, "-1 (a whole row) or a multiple of 32")
    return Settings(origin, layout, bits, None if group == -1 else group, zero_is_one_less, mixed)


def _check_neutral(path: Path, data: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in neutral.items():
        if key in data and data[key] not in values:
            raise _refused(path, key, data[key], " or ".join(map(str, values)))


def _package(data: Mapping[str, Any]) -> str | None:
    """Package and version, as GPTQModel (`meta.quantizer`), AutoRound or AutoAWQ write them."""
    meta = data.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else None
    if isinstance(quantizer, list):
        quantizer = ", ".join(map(str, quantizer))
    if isinstance(quantizer, str):
        return quantizer.replace(":", " ")[:80]
    if data.get("provider") is not None:
        version = data.get("autoround_version")
        return f"{data['provider']!s:.40}" + (f" {version!s:.20}" if version else "")
    return None


def _refused(path: Path, key: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: quantization_config.{key} is {value!r:.60}, expected {expected}",
        remedy=f"edgellama does not take such weights as codes. {FLOAT} If these are of full precision, remove the key "
        "from config.json.",
    )
