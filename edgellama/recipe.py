"""Recipes: quantization schemes by module, as frozen data that the bundle stores complete.

A recipe is a list of rules. For every linear and the embedding, the first rule whose pattern matches the
module's name decides. A module that no rule covers, and a rule that covers no module, are errors. So no
module stays in float unnoticed, and no misspelled rule passes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from edgellama.errors import RecipeError, UsageError, did_you_mean
from edgellama.files import is_unicode


@dataclass(frozen=True)
class PerGroup:
    """One scale for every `size` consecutive weights of a row: scales are [rows, columns / size]."""

    size: int


@dataclass(frozen=True)
class PerChannel:
    """One scale for each row (output channel): scales are [rows, 1]."""


@dataclass(frozen=True)
class Scheme:
    """Symmetric integer weights with one scale for a group or a row; zero points are always 0.

    Scales are bfloat16, except those of given codes, which are as they were given.

    bits: 4 (codes -8..7) or 8 (codes -127..127).
    int8_activations: the layer's input is quantized at run time to int8 per token, asymmetric (linears only).
    paired_scales: some scales are no positive bfloat16 numbers. XNNPACK stores each as a difference of two. Two
        schemes that differ in it alone are equal.
    """

    bits: int
    granularity: PerGroup | PerChannel
    int8_activations: bool = True
    paired_scales: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise RecipeError(
                f"bits must be 4 or 8, got {self.bits!r}", remedy="Use 4, 8, or float (no scheme)."
            )
        group = self.group_size
        if group is not None and (group < 32 or group % 32):
            raise RecipeError(
                f"group_size {group} with {self.bits} bits: groups come in multiples of 32",
                remedy="Use 32, 64 or 128, or null for one scale a row.",
            )

    @property
    def group_size(self) -> int | None:
        """Number of weights that share a scale, None for a whole row."""
        return self.granularity.size if isinstance(self.granularity, PerGroup) else None

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code. Int8 omits -128: a symmetric range, on which all formats agree."""
        return (-8, 7) if self.bits == 4 else (-127, 127)

    def describe(self) -> str:
        """Form used in tables: `int4 g32 a8`, `int8 channel a8`, `int8 channel`."""
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits} {group}" + (" a8" if self.int8_activations else "")

    def to_dict(self) -> dict[str, Any]:
        data = {"bits": self.bits, "group_size": self.group_size, "int8_activations": self.int8_activations}
        return data | ({"paired_scales": True} if self.paired_scales else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scheme:
        """Inverse of `to_dict`. Raises RecipeError for unknown or missing keys and wrong types."""
        if isinstance(data, Mapping):
            data = {"paired_scales": False, **data}
        _keys(data, {"bits", "group_size", "int8_activations", "paired_scales"}, "scheme")
        group = data["group_size"]
        if group is not None and (not isinstance(group, int) or isinstance(group, bool)):
            raise RecipeError(
                f"group_size must be an integer or null, got {group!r}", remedy="Use 32, 64, 128 or null."
            )
        granularity = PerChannel() if group is None else PerGroup(group)
        return cls(
            _typed(data, "bits", int),
            granularity,
            _typed(data, "int8_activations", bool),
            _typed(data, "paired_scales", bool),
        )


@dataclass(frozen=True)
class Rule:
    """Scheme of the modules whose name matches `modules` (a shell pattern); None keeps them in float32."""

    modules: str
    scheme: Scheme | None


def _option(default: str, *others: str, of_target: bool = False) -> Any:
    """A field of Recipe with a choice of values. of_target: only some targets heed it."""
    return field(default=default, metadata={"choices": (default, *others), "of_target": of_target})


@dataclass(frozen=True)
class Recipe:
    """Quantization of a checkpoint. The gate uses `kl_limit` if no limit is given.

    Attributes:
        max_kl: acceptable mean KL divergence from the full-precision model, nats per token, for models from
            8B parameters on.
        max_kl_small: the same for models up to 135M parameters, where the same rounding costs several times
            as much. See `kl_limit` for sizes between.
        algorithm: choice of the codes, a name in ALGORITHMS.
        coreml_profile: hardware that Core ML targets are arranged for, `gpu` or `ane` (Neural Engine).
        onnx_form: operators of target `onnx`: `ort` for ONNX Runtime's own, `portable` for the standard only.
        onnx_rounding: kernels of form `ort`: the fastest of each `processor`, whose rounding differs, or those
            that round `per-block` on every processor with products of int8.
        mlx_dtype: floats of target `mlx`, in the file and on the device: `float16` or `bfloat16`.
        kv_cache: form of keys and values: `float`, in the target's own dtype, or `int8`. Int8 has a scale and
            a zero point for each head of each token.
        rotation: activations that are rotated into another basis before quantization: `none`, `values` or
            `hidden`. `values` are the outputs of the heads, which go to o_proj. `hidden` adds the residual
            stream, which unties a tied table.
        calibration_tokens: tokens of text that the algorithm reads; 0 for `round` (RTN), which reads none.

    >>> from dataclasses import replace
    >>> recipe = replace(RECIPES["int8"], name="int8-mlp", rules=(
    ...     Rule("model.layers.*.mlp.*", Scheme(8, PerChannel())),
    ...     Rule("*", None),
    ... ))
    >>> recipe.assign(["model.layers.0.mlp.up_proj", "lm_head"])["lm_head"] is None
    True
    >>> Recipe.from_dict(recipe.to_dict()) == recipe
    True
    """

    name: str
    summary: str
    rules: tuple[Rule, ...]
    max_kl: float
    max_kl_small: float
    algorithm: str = "round"
    coreml_profile: str = _option("gpu", "ane", of_target=True)
    onnx_form: str = _option("ort", "portable", of_target=True)
    onnx_rounding: str = _option("processor", "per-block", of_target=True)
    mlx_dtype: str = _option("float16", "bfloat16", of_target=True)
    kv_cache: str = _option("float", "int8", of_target=True)
    rotation: str = _option("none", "values", "hidden")
    calibration_tokens: int = 0

    def kl_limit(self, parameters: int) -> float:
        """KL limit for a model with that many parameters, nats per token.

        `max_kl_small` up to SMALL parameters, `max_kl` from LARGE on. Between them the logarithm of the limit
        falls with the logarithm of the size, as the cost of rounding does.
        """
        if parameters <= SMALL:
            return self.max_kl_small
        if parameters >= LARGE:
            return self.max_kl
        share = math.log(parameters / SMALL) / math.log(LARGE / SMALL)
        return float(self.max_kl_small ** (1 - share) * self.max_kl**share)

    def __post_init__(self) -> None:
        if not self.name.strip() or not is_unicode(self.name + self.summary):
            raise RecipeError(
                f"a recipe's name must not be blank, and its texts must be Unicode, got {self.name!r:.40}",
                remedy="Correct `name` and `summary`.",
            )
        if not self.rules:
            raise RecipeError(f"recipe {self.name!r} has no rules", remedy="Give at least one rule.")
        if self.algorithm not in ALGORITHMS:
            raise RecipeError(
                f"recipe {self.name!r}: unknown algorithm {self.algorithm!r}",
                remedy=f"Use one of: {', '.join(ALGORITHMS)}.",
            )
        for option, choices in CHOICES.items():
            if getattr(self, option) not in choices:
                raise RecipeError(
                    f"recipe {self.name!r}: unknown {option} {getattr(self, option)!r:.40}",
                    remedy=f"Use one of: {', '.join(choices)}.",
                )
        if (self.calibration_tokens > 0) != ALGORITHMS[self.algorithm] or self.calibration_tokens < 0:
            raise RecipeError(
                f"recipe {self.name!r}: algorithm {self.algorithm!r} with calibration_tokens "
                f"{self.calibration_tokens!r:.40}",
                remedy=f"Use {'at least 2048' if ALGORITHMS[self.algorithm] else '0, or a calibrated algorithm'}.",
            )
        if self.algorithm == GIVEN and self.rotation != "none":
            raise RecipeError(
                f"recipe {self.name!r}: rotation {self.rotation!r} would change the codes that algorithm {GIVEN!r} keeps",
                remedy='Use rotation "none", or another algorithm.',
            )
        for limit in (self.max_kl, self.max_kl_small):
            if not 0 < limit <= 100:
                raise RecipeError(
                    f"recipe {self.name!r}: a KL limit must lie in (0, 100], got {limit!r:.40}",
                    remedy="Give nats per token.",
                )

    def assign(self, modules: Iterable[str]) -> dict[str, Scheme | None]:
        """Scheme of every module, by name. Raises RecipeError for a module or a rule without a match."""
        assigned: dict[str, Scheme | None] = {}
        used: set[Rule] = set()
        for name in modules:
            rule = next((r for r in self.rules if fnmatchcase(name, r.modules)), None)
            if rule is None:
                raise RecipeError(
                    f"recipe {self.name!r} has no rule for {name}",
                    remedy='Add a rule for it; {"modules": "*", "scheme": null} keeps the rest in float32.',
                )
            assigned[name] = rule.scheme
            used.add(rule)
        idle = [r.modules for r in self.rules if r not in used]
        if idle:
            raise RecipeError(
                f"recipe {self.name!r}: these rules match no module: {', '.join(idle)}",
                remedy="Check the patterns against `edgellama inspect CHECKPOINT`, or remove the rules.",
            )
        return assigned

    def to_dict(self) -> dict[str, Any]:
        """Recipe as JSON data, in the form that a manifest holds and `-r FILE.json` reads."""
        rules = [{"modules": r.modules, "scheme": r.scheme and r.scheme.to_dict()} for r in self.rules]
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"rules": rules}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_dict`. Raises RecipeError for unknown or missing keys and wrong types."""
        if data:
            data = {**{key: getattr(cls, key) for key in _OPTIONAL}, **data}
        _keys(data, {field.name for field in fields(cls)}, "recipe")
        rules = []
        for rule in _typed(data, "rules", list):
            _keys(rule, {"modules", "scheme"}, "rule")
            rules.append(
                Rule(
                    _typed(rule, "modules", str),
                    None if rule["scheme"] is None else Scheme.from_dict(rule["scheme"]),
                )
            )
        values = {
            field.name: _typed(data, field.name, _JSON_TYPES[str(field.type)])
            for field in fields(cls)
            if field.name != "rules"
        }
        return cls(rules=tuple(rules), **values)


GIVEN = "given"  # takes the codes of a quantized checkpoint as they are; float tables are rounded to nearest

# Algorithms by name: True if they read calibration text.
ALGORITHMS = {
    "round": False,
    GIVEN: False,
    "scales": True,
    "gptq": True,
    "recover": True,
    "mixed": True,
    "mixed-recover": True,
}
# Algorithms that first choose schemes to a budget (edgellama.export.quantization.sensitivity), with the
# algorithm that then chooses the codes.
BUDGETED = {"mixed": "gptq", "mixed-recover": "recover"}
CHOICES = {f.name: f.metadata["choices"] for f in fields(Recipe) if "choices" in f.metadata}
# Options that only some targets heed (edgellama.targets.base).
TARGET_OPTIONS = tuple(f.name for f in fields(Recipe) if f.metadata.get("of_target"))
_OPTIONAL = (*CHOICES, "calibration_tokens")  # keys that a recipe file may leave out
_JSON_TYPES: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float)}
# Parameters of the models with known costs. SmolLM2-135M was measured: int4-fast 0.34 to 0.36, int4 0.08 to
# 0.085, int4-best 0.07, int8 0.026. For Llama 3 8B, llama.cpp publishes 0.072 for Q4_0, the grid of int4-fast.
# The limits lie 1.2 to 1.5 times above: intervals at 1,024 tokens are 12 % wide, and fine-tunes differ.
SMALL, LARGE = 135_000_000, 8_000_000_000

_INT4 = Scheme(4, PerGroup(32))
_INT8 = Scheme(8, PerChannel())
_INT8_ROWS = Scheme(8, PerChannel(), int8_activations=False)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "fp32",
            "float32 throughout: the baseline for size, speed and parity",
            (Rule("*", None),),
            max_kl=1e-4,
            max_kl_small=1e-4,
        ),
        Recipe(
            "int8",
            "int8 per channel, int8 activations: near lossless",
            (Rule("model.embed_tokens", _INT8_ROWS), Rule("*", _INT8)),
            max_kl=0.01,
            max_kl_small=0.04,
        ),
        Recipe(
            "int8-ane",
            "int8 per channel; Core ML packages for the Neural Engine",
            (Rule("model.embed_tokens", _INT8_ROWS), Rule("*", _INT8)),
            max_kl=0.01,
            max_kl_small=0.04,
            coreml_profile="ane",
        ),
        Recipe(
            "int4",
            "int4 in groups of 32 chosen on calibration text (scaling folded, GPTQ); lm_head, embedding as int4-fast",
            (Rule("model.embed_tokens", _INT8_ROWS), Rule("lm_head", _INT8), Rule("model.layers.*", _INT4)),
            max_kl=0.05,
            max_kl_small=0.12,
            algorithm="gptq",
            calibration_tokens=16384,
        ),
        Recipe(
            "int4-best",
            "as int4, from more text, then tuned towards the full-precision model: same bytes, several times the time",
            (Rule("model.embed_tokens", _INT8_ROWS), Rule("lm_head", _INT8), Rule("model.layers.*", _INT4)),
            max_kl=0.05,
            max_kl_small=0.1,
            algorithm="recover",
            calibration_tokens=26112,
        ),
        Recipe(
            "auto",
            "as int4, with the scheme of every attention and MLP chosen to --max-bytes or --max-kl",
            (Rule("model.embed_tokens", _INT8_ROWS), Rule("lm_head", _INT8), Rule("model.layers.*", _INT4)),
            max_kl=0.05,
            max_kl_small=0.12,
            algorithm="mixed",
            calibration_tokens=16384,
        ),
        Recipe(
            "auto-best",
            "as auto, then tuned as int4-best is",
            (Rule("model.embed_tokens", _INT8_ROWS), Rule("lm_head", _INT8), Rule("model.layers.*", _INT4)),
            max_kl=0.05,
            max_kl_small=0.12,
            algorithm="mixed-recover",
            calibration_tokens=26112,
        ),
        Recipe(
            "int4-fast",
            "int4 in groups of 32, lm_head and embedding int8, int8 activations; no calibration data",
            (Rule("model.embed_tokens", _INT8_ROWS), Rule("lm_head", _INT8), Rule("model.layers.*", _INT4)),
            max_kl=0.1,
            max_kl_small=0.42,
        ),
        Recipe(
            "as-is",
            "the codes and scales of a checkpoint that is quantized already, bit for bit; float tables int8",
            (Rule("model.embed_tokens", _INT8_ROWS), Rule("lm_head", _INT8), Rule("model.layers.*", _INT4)),
            max_kl=0.01,
            max_kl_small=0.04,
            algorithm=GIVEN,
        ),
    )
}


def altered_fields(recipe: Recipe) -> list[str]:
    """Fields in which `recipe` differs from edgellama's own recipe of its name. Empty for another name.

    The rules and the algorithm of a budgeted recipe are chosen at the export, so they may differ. The rules of
    given codes follow from the checkpoint.

    >>> from dataclasses import replace
    >>> altered_fields(replace(RECIPES["int4"], max_kl=1.0))
    ['max_kl']
    """
    own = RECIPES.get(recipe.name)
    if own is None:
        return []
    if BUDGETED.get(own.algorithm) == recipe.algorithm:
        own = replace(own, algorithm=recipe.algorithm, rules=recipe.rules)
    elif own.algorithm == GIVEN:
        own = replace(own, rules=recipe.rules)
    return [field.name for field in fields(Recipe) if getattr(recipe, field.name) != getattr(own, field.name)]


def check_name(recipe: Recipe) -> None:
    """Raises RecipeError for another recipe under the name of one of edgellama's own."""
    if altered := altered_fields(recipe):
        raise RecipeError(
            f"recipe {recipe.name!r} differs from edgellama's own {recipe.name!r} in {', '.join(altered)}",
            remedy="Give it a name of its own.",
        )


def find_recipe(name: str) -> Recipe:
    """Recipe of that name, or the one in the JSON file `name`.

    Raises UsageError for an unknown name and RecipeError for a file that is not a recipe.
    """
    if name in RECIPES:
        return RECIPES[name]
    if name.endswith(".json"):
        path = Path(name)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RecipeError(
                f"{path}: not a readable recipe ({error})",
                remedy="Start from `edgellama recipes NAME --json -`.",
            ) from error
        if not isinstance(data, dict):
            raise RecipeError(
                f"{path}: a recipe is a JSON object", remedy="Start from `edgellama recipes NAME --json -`."
            )
        return Recipe.from_dict(data)
    hint = did_you_mean(name, RECIPES)
    raise UsageError(
        f"unknown recipe {name!r}",
        remedy=f"{hint}Recipes: {', '.join(sorted(RECIPES))}, or the path of a recipe file ending in .json.",
    )


def _keys(data: Any, expected: set[str], what: str) -> None:
    actual_keys = set(data) if isinstance(data, Mapping) else set()
    if actual_keys != expected:
        raise RecipeError(
            f"a {what} has the keys {', '.join(sorted(expected))}; "
            f"got {', '.join(sorted(map(str, actual_keys))) or 'none'}",
            remedy="Start from `edgellama recipes NAME --json -`.",
        )


def _typed(data: Mapping[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    value = data[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecipeError(
            f"{key} has the wrong type: {value!r}", remedy="Start from `edgellama recipes NAME --json -`."
        )
    return value
