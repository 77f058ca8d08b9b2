"""Reading of PEFT's adapter_config.json: the factor of each module, and a refusal of everything else that computes.

The fields are those of `LoraConfig` in peft 0.21. A field that a newer version adds is refused by name, unless
it holds nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellama.checkpoints.adapters.adapter import is_factor
from edgellama.errors import CheckpointError

# Fields that do not change what the trained adapter computes.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config"),
    *("fan_in_fan_out", "inference_mode", "loftq_config"),
    *("lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision"),
    *("runtime_config", "unsloth_fixed", "unsloth_version"),
}
USED = {
    *("alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "init_lora_weights"),
    *("layers_pattern", "layers_to_transform", "lora_alpha", "modules_to_save"),
    *("peft_type", "r", "rank_pattern", "target_modules", "task_type", "use_dora", "use_rslora"),
}
NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
# Initial values that leave the base as it is. Others, such as PiSSA, train against a base with a part taken out.
INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")
_LONGEST_PATTERN = 500  # characters of a regular expression

MERGE = "Merge it in its own program (peft: merge_and_unload, then save_pretrained), and export the result."


@dataclass(frozen=True)
class PeftConfig:
    """The part of adapter_config.json that decides what an adapter computes.

    Attributes:
        rank, alpha: of modules without a pattern of their own.
        ranks, alphas: by regular expression on the module's name. The first that matches counts.
        rslora: the factor is alpha / sqrt(rank), and not alpha / rank.
        dora: modules have a magnitude for each row.
        targets: names of modules, or one regular expression.
        excluded: names of modules that are no targets, or one regular expression.
        layers: indices of the layers whose named modules are targets; None for all.
        layers_names: regular expressions for the name before a layer's index; empty for any name.
        whole: names of modules that were trained whole.
        keeps_tie: a tied head and its embedding were trained as one.
        base: name of the base model; None without one.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_names: tuple[str, ...]
    whole: tuple[str, ...]
    keeps_tie: bool
    base: str | None

    def adapts(self, module: str) -> bool:
        """True for a module that PEFT gives a LoRA (`check_target_module_exists` of peft 0.21)."""
        if _matches(self.excluded, module) or any(
            re.match(rf"(^|.*\.){m}($|\..*)", module) for m in self.whole
        ):
            return False
        if isinstance(self.targets, str) or module in self.targets or self.layers is None:
            return _matches(self.targets, module)
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_names] or [r".*?\.[^.]*\.(\d+)\."]
        index = next((match[1] for pattern in patterns if (match := re.match(pattern, module))), None)
        return _matches(self.targets, module) and index is not None and int(index) in self.layers

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Factor of the product of a module's two matrices."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def is_named(module: str, names: Sequence[str]) -> bool:
    """True if a module has one of the names, or ends with one after a dot."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    return bool(re.fullmatch(names, module)) if isinstance(names, str) else is_named(module, names)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, default)


def peft_config(data: Mapping[str, Any], file: Path) -> PeftConfig:
    """Reads the object of an adapter_config.json. Raises CheckpointError for one that cannot be merged as it is."""
    _refuse_others(data, file)
    rank, alpha = _number(data, "r", file), _number(data, "lora_alpha", file)
    ranks, alphas = _patterns(data, "rank_pattern", file), _patterns(data, "alpha_pattern", file)
    if any(value < 1 or value != int(value) for value in (rank, *ranks.values())):
        raise _wrong(file, "r and rank_pattern must be whole numbers of at least 1")
    whole = _names(data, "modules_to_save", file)
    keeps_tie = bool(data.get("ensure_weight_tying"))
    if keeps_tie and not whole:
        raise _unsupported(file, "ensure_weight_tying", True)
    base = data.get("base_model_name_or_path")
    return PeftConfig(
        rank=int(rank),
        alpha=alpha,
        ranks={key: int(value) for key, value in ranks.items()},
        alphas=alphas,
        rslora=bool(data.get("use_rslora")),
        dora=bool(data.get("use_dora")),
        targets=_names_or_pattern(data, "target_modules", file),
        excluded=_names_or_pattern(data, "exclude_modules", file),
        layers=_layers(data, file),
        layers_names=_names(data, "layers_pattern", file),
        whole=whole,
        keeps_tie=keeps_tie,
        base=base if isinstance(base, str) and base else None,
    )


def _refuse_others(data: Mapping[str, Any], file: Path) -> None:
    kind, task = data.get("peft_type"), data.get("task_type")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type is {kind!r:.40}, and edgellama merges LORA", remedy=MERGE)
    if task not in (None, "CAUSAL_LM"):
        raise CheckpointError(
            f"{file}: task_type is {task!r:.40}, and edgellama exports language models (CAUSAL_LM)",
            remedy="Give an adapter of a causal language model.",
        )
    if data.get("init_lora_weights", True) not in INITIAL:
        raise CheckpointError(
            f"{file}: init_lora_weights is {data['init_lora_weights']!r:.40}: the adapter belongs to a base that its "
            "training changed, and not to the model that it names",
            remedy="Convert it to a plain LoRA (peft: save_pretrained with path_initial_model_for_weight_conversion).",
        )
    if data.get("bias", "none") not in ("none", "all", "lora_only"):
        raise _unsupported(file, "bias", data["bias"])
    for key, value in data.items():
        if key not in HARMLESS | USED and value not in NOTHING:
            raise _unsupported(file, key, value)


def _unsupported(file: Path, key: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"{file}: {key} is {value!r:.60}, which changes the computation, and edgellama does not merge it",
        remedy=MERGE,
    )


def _wrong(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file}: {reason}", remedy="Take the file from the training's output again.")


def _number(data: Mapping[str, Any], key: str, file: Path) -> float:
    value = data.get(key)
    if not is_factor(value):
        raise _wrong(file, f"{key} is {value!r:.40} and must be a number up to 1e18")
    return float(value)


def _patterns(data: Mapping[str, Any], key: str, file: Path) -> dict[str, float]:
    patterns = data.get(key) or {}
    if not isinstance(patterns, dict):
        raise _wrong(file, f"{key} must be an object of numbers by pattern")
    values = {pattern: _number(patterns, pattern, file) for pattern in patterns}
    for pattern in values:
        _check_pattern(pattern, key, file)
    return values


def _check_pattern(pattern: str, key: str, file: Path) -> None:
    try:
        re.compile(pattern[: _LONGEST_PATTERN + 1])
    except re.error as error:
        raise _wrong(file, f"{key}: {pattern!r:.60} is no regular expression ({error})") from error
    if len(pattern) > _LONGEST_PATTERN:
        raise _wrong(file, f"{key}: a pattern of {len(pattern)} characters")


def _names(data: Mapping[str, Any], key: str, file: Path) -> tuple[str, ...]:
    """Names under a key, each a regular expression too; one name alone is a list of one."""
    names = data.get(key) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _wrong(file, f"{key} must be a list of names")
    for name in names:
        _check_pattern(name, key, file)
    return tuple(names)


def _names_or_pattern(data: Mapping[str, Any], key: str, file: Path) -> str | tuple[str, ...]:
    value = data.get(key)
    if isinstance(value, str) and value:
        _check_pattern(value, key, file)
        return value
    if not isinstance(value, (list, type(None))) or (value is None and key == "target_modules"):
        raise _wrong(file, f"{key} must be a list of names or a regular expression")
    return _names(data, key, file)


def _layers(data: Mapping[str, Any], file: Path) -> tuple[int, ...] | None:
    value = data.get("layers_to_transform")
    value = [value] if isinstance(value, int) else value
    if value is not None and not (isinstance(value, list) and all(isinstance(i, int) for i in value)):
        raise _wrong(file, "layers_to_transform must be a list of indices")
    return tuple(value) if value else None
