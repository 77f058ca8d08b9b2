"""Target: the environment in which an artifact will run. One class per target, in the folder of its name.

A target has the same name in three places. `edgellama/targets/NAME/` holds the format and the checks of its
files, `export/NAME/` the lowering, and `runtimes/NAME.py` the runtime.

A target's class imports from its own folder only, and inside its methods, because commands that need no
torch read the table of targets.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgellama.errors import MissingDependencyError
from edgellama.targets.families import Family
from edgellama.targets.provenance import Provenance

if TYPE_CHECKING:
    from torch import Tensor

    from edgellama.formats.listing import Listing
    from edgellama.model.activations import ActivationRounding
    from edgellama.model.adapted import Pairs
    from edgellama.model.config import LlamaConfig
    from edgellama.model.llama import Llama
    from edgellama.recipe import Recipe, Scheme
    from edgellama.report import Check
    from edgellama.targets.adapters import StoredAdapter

# Relative size of the noise by which two correct runs may differ, at the input of a layer.
FLOAT32_NOISE = 1e-6  # sums in another order
FLOAT16_NOISE = 1e-3  # a step of float16: the several roundings of a layer, each at most half a step
PIECE = 128  # prompt tokens per call, for targets that allocate memory call by call


class Activations(Enum):
    """Rounding of activations before a quantized linear.

    Targets of one kind must agree within rounding noise.
    """

    INT8_PER_TOKEN = "int8 per token"
    INT8_PER_BLOCK = "int8 per block"
    Q8_0 = "int8 per 32 values, with float16 scales"
    FLOAT16 = "float16"
    FLOAT = "float"


FLOATS = frozenset((Activations.FLOAT16, Activations.FLOAT))  # they differ by rounding noise


@dataclass(frozen=True)
class Storage:
    """Bytes of the tensors in a format.

    Attributes:
        tied_once: a tied lm_head and embedding share one table.
        rope_width: columns of each RoPE table, as a share of head_dim.
        largest_block: for formats without per-row scales. Such a format stores rows in blocks, each with a
            copy of the row's scale. A block is the largest power of two up to this that divides the row.
        pairs: scales that are no positive bfloat16 numbers take their bytes twice.
        program: upper limit of the graph around the weights. Measured with the versions that pyproject.toml
            names. A choice of schemes under --max-bytes leaves these bytes free.
        layer_program: the same for the graph of each layer.
    """

    float_bytes: int
    row_scale_bytes: int
    tied_once: bool
    rope_width: float = 0.5
    group_scale_bytes: int = 2
    largest_block: int | None = None
    pairs: bool = False
    program: int = 0
    layer_program: int = 0

    def scale_bytes(self, columns: int, group_size: int | None) -> int:
        """Bytes of the scales of one row."""
        if group_size is not None:
            return columns // group_size * self.group_scale_bytes
        blocks = columns // math.gcd(columns, self.largest_block) if self.largest_block else 1
        return blocks * self.row_scale_bytes

    def weight_bytes(self, shape: tuple[int, ...], scheme: Scheme | None) -> int:
        """Bytes of one weight [rows, columns]: codes and scales, or floats without a scheme."""
        rows, columns = shape
        if scheme is None:
            return rows * columns * self.float_bytes
        scales = self.scale_bytes(columns, scheme.group_size) * (
            2 if self.pairs and scheme.paired_scales else 1
        )
        return rows * (columns * scheme.bits // 8 + scales)

    def vocabulary_bytes(self, tokens: int) -> int:
        """Bytes of a tokenizer with so many tokens, roughly; 0 for formats without one."""
        return 0

    def program_bytes(self, layers: int) -> int:
        """Upper limit of the graph of a model with `layers` layers, beside its weights."""
        return self.program + layers * self.layer_program


class Target(ABC):
    """One target. Class attributes are facts about the format. Methods open files and models.

    Attributes:
        artifact: path of the artifact in a bundle, a file or a directory.
        holds_tokenizer: True if the artifact holds the tokenizer.
        artifact_files: for an artifact that is a directory, paths in it of the files that are lowered. Clients'
            files lie beside them.
        storage: bytes that the format takes for the tensors of a recipe.
        packages: distributions, beside torch and torchao, whose version changes the artifact. The manifest
            records the versions.
        extra: the pip extra that installs them. None for dependencies of edgellama itself.
        options: the recipe's TARGET_OPTIONS that change the artifact.
        int8_groups: True if integers of 8 bits may have a scale for each group, and not for a row only.
        kv_caches: kinds of a recipe's `kv_cache` that the target supports.
        activations: the rounding of activations.
        compute_bytes: bytes of a float in the KV cache and between two operators.
        all_logits: True if a call returns logits of all its positions, False for the last position only.
        copies: copies of the artifact that its lowering holds in memory.
        interpreted_off_macos: True if the reference interpreter replaces the runtime outside macOS.
        parity_kl: KL from the quantized torch model that always passes, nats per token. It allows for
            rounding of the target that `arithmetic` does not reproduce.
        noise: relative size of the noise that a noise floor is measured with.
        assumed_floor: noise floor of parity, nats per token, used without a reference to measure it.
        device_runtime: first word of the name of each runtime that runs the artifacts on devices.
        device_backends: backends that such a name may state.
        adapter_ending: end of the names of files with adapters that the runtime can switch; None if it cannot.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    artifact: ClassVar[str]
    artifact_files: ClassVar[tuple[str, ...]] = ()
    holds_tokenizer: ClassVar[bool] = False
    storage: ClassVar[Storage]
    packages: ClassVar[tuple[str, ...]]
    extra: ClassVar[str | None] = None
    options: ClassVar[tuple[str, ...]] = ()
    int8_groups: ClassVar[bool] = True
    kv_caches: ClassVar[tuple[str, ...]] = ("float",)
    activations: ClassVar[Activations]
    compute_bytes: ClassVar[int] = 4
    all_logits: ClassVar[bool] = False
    copies: ClassVar[float] = 2.0
    interpreted_off_macos: ClassVar[bool] = False
    parity_kl: ClassVar[float] = 1e-4
    noise: ClassVar[float] = FLOAT32_NOISE
    assumed_floor: ClassVar[float] = 0.0
    device_runtime: ClassVar[str]
    device_backends: ClassVar[tuple[str, ...]]
    adapter_ending: ClassVar[str | None] = None

    def check(self, config: LlamaConfig, recipe: Recipe, context_length: int) -> None:  # noqa: B027 (no limits)
        """Raises RecipeError or UsageError if the target cannot hold the model.

        Called before the slow part.
        """

    @property
    def device_kl(self) -> float:
        """`parity_kl` for a device. A target whose devices round more than the host's runtime overrides it."""
        return self.parity_kl

    @abstractmethod
    def arithmetic(self, model: Llama, recipe: Recipe) -> AbstractContextManager[None]:
        """Returns a context in which the quantized torch `model` computes as the target does."""

    def exact_arithmetic(self, model: Llama, recipe: Recipe) -> AbstractContextManager[None]:
        """`arithmetic` with every rounding of stored numbers that it leaves out. For the parity of parts."""
        return self.arithmetic(model, recipe)

    def is_slow_here(self) -> bool:
        """Returns True if the runtime of this machine takes a minute for a thousand tokens of a small model."""
        return False

    def has_parts(self) -> bool:
        """Returns True if an artifact made with the installed tools can return the input of every layer."""
        return True

    def stored_floats(self, model: Llama, recipe: Recipe) -> AbstractContextManager[None]:
        """Returns a context in which the float tensors of `model` have the values that parity assumes in the file."""
        return nullcontext()

    def rounding(self, recipe: Recipe) -> ActivationRounding | None:
        """Rounding of activations under `recipe`: `arithmetic` without the order of sums. None for floats."""
        return None

    def families(self, recipe: Recipe) -> tuple[Family, ...]:
        """Families of processors whose kernels round an artifact of `recipe` in different ways.

        None if all round alike. `arithmetic` and `rounding` are those of `family_here`.
        """
        return ()

    def family_here(self, recipe: Recipe) -> Family | None:
        """The family of this machine, by what its kernels do; None without families."""
        return None

    def other_families(self, recipe: Recipe) -> tuple[Family, ...]:
        """Families of processors whose kernels round otherwise than this machine's."""
        here = self.family_here(recipe)
        return tuple(family for family in self.families(recipe) if family != here)

    def rounding_of(self, recipe: Recipe, family: Family | None) -> ActivationRounding | None:
        """`rounding` of a family of processors. None for a target without families."""
        return self.rounding(recipe)

    @abstractmethod
    def check_structure(self, path: Path, model: Llama, provenance: Provenance) -> list[Check]:
        """Exact checks of the artifact at `path`, lowered from `model`."""

    @abstractmethod
    def listing(self, path: Path, model: Llama) -> Listing:
        """Instructions and values of the artifact at `path`. `model` gives names of constants for messages."""

    @abstractmethod
    def describe(self, path: Path, model: Llama) -> dict[str, Any]:
        """The manifest's entry about the artifact at `path`, without `target` and `path`."""

    @abstractmethod
    def bound_manifest(self, path: Path) -> str | None:
        """`Provenance.manifest_sha256` as the artifact at `path` records it; None for an artifact without it."""

    @abstractmethod
    def stored_codes(self, path: Path) -> Iterator[tuple[Tensor, Tensor]]:
        """(codes int8 [rows, columns], scales float32 [rows, groups]) of each quantized weight."""

    def tokenizer_entries(self, path: Path) -> Mapping[str, Any]:
        """Entries about the tokenizer in the artifact at `path`; none for formats without a tokenizer."""
        return {}

    def planned_adapter(self, pairs: Pairs, config: LlamaConfig, provenance: Provenance) -> StoredAdapter:
        """Content of the file of an adapter that is in the basis of the quantized model.

        provenance: of the artifact that it changes. Only for targets with an `adapter_ending`.
        """
        raise NotImplementedError(self.name)

    def read_adapter(self, path: Path) -> StoredAdapter:
        """Content of an adapter's file. Raises BundleError if it cannot be read."""
        raise NotImplementedError(self.name)

    def activation_floats(self, config: LlamaConfig, context_length: int) -> int:
        """Largest number of floats that a call holds between operators, logits included.

        Assumes that each call allocates its memory and that a prompt enters in pieces of PIECE tokens.
        """
        rows = min(context_length, PIECE)
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        logits = config.output_size * (rows if self.all_logits else 1)
        return rows * (q + 2 * kv + 3 * config.intermediate_size + 2 * config.hidden_size) + logits

    def provenance(self, manifest: Mapping[str, Any]) -> Provenance:
        """Provenance that an artifact for this target records, read from a manifest that may be incomplete."""
        return Provenance.of(manifest, self.options)

    def artifact_in(self, bundle: Path) -> Path:
        """Path of the artifact in the bundle at `bundle`."""
        return bundle / self.artifact

    @contextmanager
    def needs_extra(self) -> Iterator[None]:
        """Context for imports.

        Raises MissingDependencyError with the extra to install if a package is missing.
        """
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
    """Versions of the packages that determine the numbers and the files of these targets."""
    names = {"torch", "torchao", "tokenizers"}.union(*(target.packages for target in targets))
    return {name: version(name).partition("+")[0] for name in sorted(names)}
