"""Reading of PEFT's adapter_config.json: the factor of each module, and a refusal of everything else that computes.

The fields are those of `LoraConfig` in peft 0.21. A field that a newer version adds is refused by name, unless
it holds nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellama.errors import CheckpointError

# Fields that do not change what the trained adapter computes.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules"),
    *("fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config"),
    *("lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision"),
    *("runtime_config", "unsloth_fixed", "unsloth_version"),
}
USED = {
    *("alpha_pattern", "bias", "ensure_weight_tying", "init_lora_weights", "lora_alpha", "modules_to_save"),
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
    whole: tuple[str, ...]
    keeps_tie: bool
    base: str | None

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Factor of the product of a module's two matrices."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


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
    targets = data.get("target_modules")
    if not isinstance(targets, (str, list)) or not all(isinstance(name, str) for name in targets):
        raise _wrong(file, "target_modules must be a list of names or a regular expression")
    whole = data.get("modules_to_save") or []
    if not isinstance(whole, list) or not all(isinstance(name, str) for name in whole):
        raise _wrong(file, "modules_to_save must be a list of names")
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
        targets=targets if isinstance(targets, str) else tuple(targets),
        whole=tuple(whole),
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
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _wrong(file, f"{key} is {value!r:.40} and must be a number")
    return float(value)


def _patterns(data: Mapping[str, Any], key: str, file: Path) -> dict[str, float]:
    patterns = data.get(key) or {}
    if not isinstance(patterns, dict):
        raise _wrong(file, f"{key} must be an object of numbers by pattern")
    values = {pattern: _number(patterns, pattern, file) for pattern in patterns}
    for pattern in values:
        try:
            re.compile(pattern[: _LONGEST_PATTERN + 1])
        except re.error as error:
            raise _wrong(file, f"{key}: {pattern!r:.60} is no regular expression ({error})") from error
        if len(pattern) > _LONGEST_PATTERN:
            raise _wrong(file, f"{key}: a pattern of {len(pattern)} characters")
    return values
