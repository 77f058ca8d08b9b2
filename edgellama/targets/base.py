"""Target: where an artifact will run. One class a target, in the folder of the target's name.

A target has one name on three desks: `edgellama/targets/NAME/` (the format, and how a file of it is judged),
`export/NAME/` (how it is made), `runtimes/NAME.py` (how it runs). Its class imports from its own folder only, and
inside its methods: the table of targets is read by commands that need no torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgellama.errors import MissingDependencyError

if TYPE_CHECKING:
    from torch import Tensor

    from edgellama.model.activations import ActivationRounding
    from edgellama.model.config import LlamaConfig
    from edgellama.model.llama import Llama
    from edgellama.recipe import Recipe, Scheme
    from edgellama.report import Check
    from edgellama.targets.provenance import Provenance

PIECE = (
    128  # tokens of a prompt that go through a call at a time, where a target takes memory as calls need it
)


class Activations(Enum):
    """Rounding of activations before a quantized linear. Two targets of one kind must agree within rounding noise."""

    INT8_PER_TOKEN = "int8 per token"
    INT8_PER_BLOCK = "int8 per block"
    FLOAT16 = "float16"


@dataclass(frozen=True)
class Storage:
    """Bytes of what a format stores. tied_once: a tied lm_head and embedding share one table.

    rope_width: columns of each RoPE table, as a share of head_dim.
    largest_block: of a format without a scale per row, which stores rows in blocks of the largest power of two up to
    this that divides them, each with a copy of the row's scale.
    program, layer_program: at most so many bytes are the graph around the weights, and the graph of each layer; what a
    choice of schemes leaves free under --max-bytes. Measured with the versions that pyproject.toml names.
    """

    float_bytes: int
    row_scale_bytes: int
    tied_once: bool
    rope_width: float = 0.5
    group_scale_bytes: int = 2
    largest_block: int | None = None
    program: int = 0
    layer_program: int = 0

    def scale_bytes(self, columns: int, group_size: int | None) -> int:
        """Bytes of the scales of one row."""
        if group_size is not None:
            return columns // group_size * self.group_scale_bytes
        blocks = columns // math.gcd(columns, self.largest_block) if self.largest_block else 1
        return blocks * self.row_scale_bytes

    def weight_bytes(self, shape: tuple[int, ...], scheme: Scheme | None) -> int:
        """Bytes of one weight [rows, columns]: codes and scales, or floats where there is no scheme."""
        rows, columns = shape
        if scheme is None:
            return rows * columns * self.float_bytes
        return rows * (columns * scheme.bits // 8 + self.scale_bytes(columns, scheme.group_size))

    def program_bytes(self, layers: int) -> int:
        """The most that the graph of a model with so many layers takes beside its weights."""
        return self.program + layers * self.layer_program


class Target(ABC):
    """One target. Class attributes are facts about the format; methods open files and models.

    Attributes:
        artifact: path of the artifact in a bundle, a file or a directory.
        storage: bytes that the format takes for the tensors of a recipe.
        packages: distributions whose version changes the artifact beside torch and torchao; recorded in the manifest.
        extra: the pip extra that installs them; None for dependencies of edgellama itself.
        options: those of the recipe's TARGET_OPTIONS that change the artifact.
        kv_caches: kinds of a recipe's `kv_cache` that the target has.
        activations: the rounding of activations.
        compute_bytes: bytes of a float in the KV cache and between two operators.
        all_logits: whether a call returns logits of all its positions, or of the last one.
        interpreted_off_macos: whether the reference interpreter stands in away from macOS.
        parity_kl: KL from the quantized torch model that always passes, nats per token: the target's rounding that
            `arithmetic` does not follow.
        assumed_floor: noise floor of parity where there is no reference to measure it with, nats per token.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    artifact: ClassVar[str]
    storage: ClassVar[Storage]
    packages: ClassVar[tuple[str, ...]]
    extra: ClassVar[str | None] = None
    options: ClassVar[tuple[str, ...]] = ()
    kv_caches: ClassVar[tuple[str, ...]] = ("float",)
    activations: ClassVar[Activations]
    compute_bytes: ClassVar[int] = 4
    all_logits: ClassVar[bool] = False
    interpreted_off_macos: ClassVar[bool] = False
    parity_kl: ClassVar[float] = 1e-4
    assumed_floor: ClassVar[float] = 0.0

    def check(self, config: LlamaConfig, recipe: Recipe, context_length: int) -> None:  # noqa: B027 (no limits)
        """Raise RecipeError or UsageError for anything that the target cannot hold; called before the slow part."""

    @abstractmethod
    def arithmetic(self, model: Llama, recipe: Recipe) -> AbstractContextManager[None]:
        """A block in which the quantized torch `model` computes as the target does."""

    def rounding(self, recipe: Recipe) -> ActivationRounding | None:
        """Rounding of activations under `recipe`, the part of `arithmetic` beyond the order of sums; None for floats."""
        return None

    @abstractmethod
    def check_structure(self, path: Path, model: Llama, provenance: Provenance) -> list[Check]:
        """Exact questions about the artifact at `path`, lowered from `model`."""

    @abstractmethod
    def describe(self, path: Path, model: Llama) -> dict[str, Any]:
        """The manifest's entry about the artifact at `path`, without `target` and `path`."""

    @abstractmethod
    def stored_codes(self, path: Path) -> Iterator[tuple[Tensor, Tensor]]:
        """(codes int8 [rows, columns], scales float32 [rows, groups]) of each quantized weight in the artifact."""

    def activation_floats(self, config: LlamaConfig, context_length: int) -> int:
        """Floats between operators that a call holds at most, its logits included.

        Memory is taken as calls need it, and a prompt goes in by pieces of PIECE tokens.
        """
        rows = min(context_length, PIECE)
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        logits = config.vocab_size * (rows if self.all_logits else 1)
        return rows * (q + 2 * kv + 3 * config.intermediate_size + 2 * config.hidden_size) + logits

    def arithmetic_for(self, recipe: Recipe) -> Callable[[Llama], AbstractContextManager[None]]:
        """`arithmetic` for models of that recipe."""
        return partial(self.arithmetic, recipe=recipe)

    def artifact_in(self, bundle: Path) -> Path:
        """Path of the artifact in the bundle at `bundle`."""
        return bundle / self.artifact

    @contextmanager
    def needs_extra(self) -> Iterator[None]:
        """A block of imports. Raises MissingDependencyError with the extra to install where a package is missing."""
        try:
            yield
        except ModuleNotFoundError as error:
            if self.extra is None or (error.name or "").startswith("edgellama"):
                raise
            raise MissingDependencyError(
                f"target {self.name!r} needs the package {error.name!r}, which is not installed",
                remedy=f"pip install 'edgellama[{self.extra}]'",
            ) from error


def tool_versions(targets: Iterable[Target]) -> dict[str, str]:
    """Versions of what the numbers and the files of these targets depend on."""
    names = {"torch", "torchao", "tokenizers"}.union(*(target.packages for target in targets))
    return {name: version(name).partition("+")[0] for name in sorted(names)}
