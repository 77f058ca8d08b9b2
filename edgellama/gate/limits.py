"""Limits of the gate: every number that decides a verdict, with its reason. `docs/gate.md` quotes them.

Two limits belong to other classes. `Recipe.max_kl` is the KL that a recipe allows. `Target.parity_kl` is the
KL to the quantized model that a target's own rounding explains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgellama.errors import UsageError
from edgellama.recipe import RECIPES, Recipe
from edgellama.targets import Target
from edgellama.targets.base import FLOATS
from edgellama.text.windows import WINDOW

# Parity: artifact against the quantized torch model. KL in nats per token.
ALWAYS_PASSES = 1e-4  # KL that passes on any target; a target's `parity_kl` may be larger
NOISE_FACTOR = 3.0  # multiple of the measured noise floor that passes
ASSUMED_TAIL = 10.0  # largest noise of a position over the mean, where no noise floor is measured
MIN_TOP1 = 0.99  # share of positions without a tie whose top token agrees
TIE = 0.05  # nats between the best two tokens; float16 logits of 32 and more are 0.03 apart

# Long window. The passes of the torch models grow with the square of its length.
LONGEST = 4096  # positions that are compared with the torch models
TYPICAL_SHARE = 0.1  # of the KL that always passes, for a geometric mean, which single positions do not raise
# Quality at depth: multiple of the short windows' mean KL that passes. Sound models reach 2.1. The texts
# differ: digits are harder to predict than prose.
LONG_KL_FACTOR = 3.0
LONG_KL_LEAST = 0.01  # nats per token; smaller differences say nothing, since 64 positions are few

# Parity of single layers: error relative to the change that the layer makes. Sound layers of SmolLM2 stay
# below 1e-6, and below 1e-5 with a float16 cache between calls. Attention with a scale 1 % off makes 1e-2.
PART_ERROR = 1e-4

# A call in a file's own 16 bits against one in float32: KL of a position, nats. The tiny model makes 1e-6 in
# float16 and 1e-4 in bfloat16. An activation beyond the range of float16 makes the logits infinite.
OWN_DTYPE_KL = 0.05

# Agreement of two artifacts that round activations in different ways: mean KL, nats per token. Int8
# activations alone cost SmolLM2-135M about 0.014. They leave 0.035 between two runs of one model that
# differ by rounding noise.
OTHER_ROUNDING_KL = 0.04

# Quality: probability that a mean beyond its limit passes, and that a good one fails. An interval has twice
# this error: 95 % of them hold the mean.
ERROR = 0.025
# Nats between logits that count as equal. Equal rows of lm_head, summed in another order, are 2e-6 apart.
SAME_LOGIT = 1e-5

# Regression: default of the largest increase of the mean KL over the baseline.
KL_INCREASE_SHARE = 0.05  # of the baseline's mean KL
KL_INCREASE_LEAST = 1e-5  # nats per token; smaller differences are rounding noise

# Device logs. Bounds of speeds and sizes lie far beyond any device: 10 times the memory bandwidth of the
# fastest desktop, ten times the memory of the largest phone.
DEVICE_TOKENS_PER_S = 1e6  # a model of one million parameters decodes about 1e4 on a desktop
DEVICE_BYTES_PER_S = 1e13  # weights read by decode
DEVICE_LOAD_MS = 3.6e6  # an hour
DEVICE_BYTES = 1e12
DEVICE_SUMMARY_ERROR = 1e-6  # relative, between sums in other orders
DEVICE_KL_ZERO = 1e-6  # nats; golden vectors are float32, which leaves up to 2e-7
DEVICE_KL_ERROR = 0.01  # relative error of bounds on KL, for the same reason
# Noise moves the KL to the reference by at most this multiple of what the parity KL explains to second order.
# SmolLM2 reaches 2.0 under noise of every size.
DEVICE_SPREAD = 3.0
# Share of the reference that lies on tokens that the host did not record, times this: the KL that it may hide.
# SmolLM2 at int4 reaches 3.8 nats.
DEVICE_HIDDEN_NATS = 10.0
# Rounding of golden vectors to float32 gives a positive KL in half of the positions. A tenth of 64 positions
# or fewer would come by chance once in 1e11 logs.
DEVICE_ROUNDING_POSITIONS = 0.1
DEVICE_ROUNDING_COUNT = 32  # positions, below which chance decides
DEVICE_ROUNDING_SHARE = 0.01  # of the standard deviation of the rounding, which counts as a trace
DEVICE_ROUNDING_LEAST = 1e-12  # nats; below, float64 rounds as well
DEVICE_REPEATS = 0.25  # share of positions whose KL another position has too; honest logs have none
DEVICE_REPEATS_COUNT = 8  # positions

# Challenges. Two processors with other kernels differ by more than CHALLENGE_OWN_BITS at some position.
CHALLENGE_OWN_BITS = 1e-9  # largest difference of a log-probability, nats
CHALLENGE_DAYS = 31  # of validity at most
CHALLENGE_SUM = 1e-4  # difference of the total probability from 1


@dataclass(frozen=True)
class WeightLevel:
    """Bounds of the parts of calibrated weights at one level, against the checkpoint's with folds undone.

    Attributes:
        name: of the parts: `group` (weights that share a scale), `row`, `block` (the same group of all rows),
            `column` or `weight` (all of it).
        correlation: least cosine to the checkpoint's weights.
        shorter: share of its best length that a part may lack.
        longer: share of the checkpoint's length that a part may have more.
        noise: standard errors of the length that are allowed as well.
        share: parts with less than this share of the mean power are not judged alone.
    """

    name: str
    correlation: float
    shorter: float
    longer: float
    noise: float
    share: float


# Weights of calibrated recipes. Sound models come as far as this. First SmolLM2 at int4; then the worst of 27
# random models: heavy tails, lognormal rows, columns and groups, low rank, sparse, dead channels, negative
# norms, groups of 32, 64 and whole rows. Faults lie at correlations of 0 and lengths of 0 or 2.
#            correlation      length               furthest from its limit
#   group    0.83   0.49      0.78-1.14            0.45   0.93
#   row      0.96   0.49      0.94-1.02            0.17   0.85
#   block    0.97   0.70      0.96-1.00            0.16   0.65
#   column   0.70   0.39      0.87-1.10            0.40   0.81
#   weight   0.98   0.53      0.98-0.99            0.54   0.77
# The last two columns are shares of the limit: 1 would fail.
WEIGHT_LEVELS = (
    WeightLevel("group", correlation=0.3, shorter=0.35, longer=0.6, noise=3.0, share=0.25),
    WeightLevel("row", correlation=0.4, shorter=0.3, longer=0.55, noise=3.0, share=0.25),
    WeightLevel("block", correlation=0.6, shorter=0.12, longer=0.08, noise=3.0, share=0.25),
    WeightLevel("column", correlation=0.25, shorter=0.4, longer=0.5, noise=3.0, share=0.5),
    WeightLevel("weight", correlation=0.75, shorter=0.01, longer=0.01, noise=6.0, share=0.0),
)
# Folds between two linears: product of both sides' lengths, 1 if one undoes the other. Sound models reach 0.70
# to 1.39, SmolLM2 0.81 to 1.06. A fold that is applied twice or on one side is a factor of its own.
FOLD_RATIO = 1.8
FOLD_NOISE = 0.1  # standard error above which a length says nothing about a fold
FOLD_SHARE = 0.25  # of the mean power; smaller channels say nothing about a fold
# Distillation trains scales and norm weights, with Adam at 0.001 for 96 steps: at most 10 % in all, mostly 1 %.
TUNED_SLACK = 0.03  # of the length
TUNED_NORM = 0.25  # of a weight of the final norm
BIAS_SLACK = 0.2  # of a bias that was divided by its fold, because the fold is estimated
# A rotation is orthogonal: SmolLM2 loses 1e-10 by rounding. KL in nats per token, the largest of 48 tokens.
ROTATION_KL = 1e-6
ROTATION_ROUNDING = 1e-5  # relative difference of a rotated weight on another processor

# Cross-check: largest KL of any of 64 tokens, nats, in float32 on both sides. SmolLM2 has 4e-11.
CROSS_CHECK_KL = 1e-6
# Largest difference of a cosine or sine. Positions of 100,000 times a float32 frequency have an error of 0.006,
# and both sides make the same one; every wrong setting of RoPE reaches 0.1 within a context.
CROSS_CHECK_ANGLE = 1e-3


# Adapters: largest KL of any of 48 tokens between merged and moved, both in float32, nats. Sound ones have 1e-10.
ADAPTER_KL = 1e-6
# Median |ln ratio| of folded rows or columns of quantized weights to those of the adapter's basis, beside standard errors
# of it. SmolLM2 has 0.003 to 0.009, and 0.023 to 0.057 where a fold is missing.
ADAPTER_FOLD = 0.01
ADAPTER_NOISE = 2.0

# Golden vectors: limits of `golden.*`, see edgellama/gate/golden_claims.py.
GOLDEN_EXACT = 1e-4  # nats; float32 sums in another order and log-probabilities in float32 leave 2e-7
GOLDEN_FLOOR = (
    3.0  # multiple of parity's noise floor that a recorded floor may have without being measured again
)


@dataclass(frozen=True)
class Limits:
    """Limits of quality that a user gives. None stands for no limit.

    Raises UsageError for a limit out of range.

    Attributes:
        max_kl: mean KL, nats per token, in (0, 100].
        min_top1: share of positions whose top token agrees, in (0, 1].
        max_ppl_ratio: perplexity of the artifact over the reference's, in (0, 1e6].
        kl_source: origin of `max_kl` in words, for the report.

    >>> Limits(max_kl=0.1).max_kl
    0.1
    """

    max_kl: float | None = None
    min_top1: float | None = None
    max_ppl_ratio: float | None = None
    kl_source: str = ""

    def __post_init__(self) -> None:
        for name, low, high in (("max_kl", 0.0, 100.0), ("min_top1", 0.0, 1.0), ("max_ppl_ratio", 0.0, 1e6)):
            value = getattr(self, name)
            if value is not None and not low < value <= high:
                raise UsageError(
                    f"{name} must lie in ({low:g}, {high:g}], got {value!r}", remedy="Correct the limit."
                )


def recipe_limit(recipe: Recipe, parameters: int) -> tuple[float, str]:
    """(limit of the mean KL, its origin in words) of a bundle's recipe, for a model of that size.

    The limits of edgellama's own recipes are edgellama's, whatever the bundle says. A recipe of another name
    may ask for a stricter limit than the loosest of these, never for a looser one.
    """
    own = RECIPES.get(recipe.name)
    if own is not None:
        return own.kl_limit(parameters), f"edgellama's own limit of {recipe.name}"
    asked = recipe.kl_limit(parameters)
    loosest = max(RECIPES.values(), key=lambda r: r.kl_limit(parameters))
    ceiling = loosest.kl_limit(parameters)
    if asked <= ceiling:
        return asked, f"the limit of the bundle's own recipe {recipe.name!r}"
    return ceiling, (
        f"the limit of {loosest.name}, the loosest of edgellama's own; recipe {recipe.name!r} asks for "
        f"{asked:g}, which needs --max-kl"
    )


def check_tokens(tokens: int) -> None:
    """Raises UsageError if `tokens` is less than one window."""
    if tokens < WINDOW:
        raise UsageError(
            f"--tokens must be at least {WINDOW}, one window, got {tokens}", remedy="Ask for more tokens."
        )


def parity_limit(floor: float, always_passes: float = ALWAYS_PASSES) -> float:
    """Largest KL that passes for a measured noise floor, nats per token.

    A floor that is not finite explains nothing.

    >>> parity_limit(0.02)
    0.06
    """
    limit = NOISE_FACTOR * floor
    return max(always_passes, limit) if math.isfinite(limit) else always_passes


def long_kl_limit(kl_mean: float) -> float:
    """Largest mean KL at depth for the mean KL of the short windows, nats per token."""
    return max(LONG_KL_LEAST, LONG_KL_FACTOR * kl_mean)


def same_activations(target: Target, other: Target) -> bool:
    """True if both targets round activations in one way, or both only to floats."""
    return target.activations is other.activations or {target.activations, other.activations} <= FLOATS


def agreement_limit(target: Target, other: Target) -> float:
    """Largest mean KL between artifacts of two targets, nats per token."""
    if same_activations(target, other):
        return 2 * (target.parity_kl + other.parity_kl)
    return OTHER_ROUNDING_KL


def increase_limit(kl_before: float) -> float:
    """Default of the largest increase of the mean KL over a baseline's, nats per token."""
    return max(KL_INCREASE_LEAST, KL_INCREASE_SHARE * kl_before)
