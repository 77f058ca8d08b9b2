"""The targets: one row each. A new target is a row here and the files that the row names."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.errors import MissingDependencyError

if TYPE_CHECKING:
    from edgellama.model.activations import Rounding
    from edgellama.model.llama import Llama
    from edgellama.recipe import Recipe, Scheme
from collections.abc import Iterable
from importlib.metadata import version


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


@dataclass(frozen=True)
class Target:
    """Where an artifact will run. `artifact` is its path in a bundle; the others are `module:name`.

    lower(model, path, identity, progress) writes the artifact. runtime(path) runs it. structure(path, model,
    identity) answers the gate's exact questions about the file. describe(path, model) fills the manifest's artifact
    entry. numerics(model, recipe) is a block in which the quantized torch model computes as the target does.
    rounding(recipe), if any, gives what the target rounds in between: the part of `numerics` that is more than the order
    of sums. kv_caches: which of a recipe's kinds of `kv_cache` the target has.
    check(config, recipe, context_length), if any, refuses what the target cannot do before anything slow starts.
    client_files(checkpoint, model, path, identity), if any, writes what clients want beside the artifact.

    packages: what the artifact's bytes depend on beside torch and torchao, for the manifest. extra: of edgellama's
    optional dependencies, the one that has them. options: of the recipe's TARGET_OPTIONS those that change the artifact.

    storage: how the artifact stores what a recipe makes. parity_kl: KL from the quantized torch model that always
    passes, nats per token; what the target's own rounding costs that `numerics` does not follow. assumed_floor: the
    noise floor of parity where no reference is there to measure it with.
    """

    name: str
    summary: str
    artifact: str
    lower: str
    runtime: str
    structure: str
    describe: str
    numerics: str
    storage: Storage
    packages: tuple[str, ...]
    parity_kl: float = 1e-4
    assumed_floor: float = 0.0
    check: str | None = None
    client_files: str | None = None
    stored: str | None = None
    rounding: str | None = None
    kv_caches: tuple[str, ...] = ("float",)
    extra: str | None = None
    options: tuple[str, ...] = ()

    def load(self, role: str) -> Any:
        """The function or class that plays `role` (`lower`, `runtime`, `structure`, `describe`, `stored`)."""
        module, _, name = getattr(self, role).partition(":")
        try:
            return getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            if self.extra is None or (error.name or "").startswith("edgellama"):
                raise
            raise MissingDependencyError(
                f"target {self.name!r} needs the package {error.name!r}, which is not installed",
                remedy=f"pip install 'edgellama[{self.extra}]'",
            ) from error

    def numerics_for(self, recipe: Recipe) -> Callable[[Llama], AbstractContextManager[None]]:
        """`numerics` for models of that recipe."""
        return partial(self.load("numerics"), recipe=recipe)

    def rounding_for(self, recipe: Recipe) -> Rounding | None:
        """What the target rounds in between under that recipe; None where everything stays float."""
        found: Rounding | None = self.load("rounding")(recipe) if self.rounding else None
        return found

    def artifact_in(self, bundle: Path) -> Path:
        return bundle / self.artifact


def tool_versions(targets: Iterable[Target]) -> dict[str, str]:
    """Versions of what the numbers and the files of these targets depend on."""
    names = {"torch", "torchao", "tokenizers"}.union(*(target.packages for target in targets))
    return {name: version(name).partition("+")[0] for name in sorted(names)}
