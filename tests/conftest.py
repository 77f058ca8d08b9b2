"""What all tests share: the trained tiny model, one bundle of it, and its cuts, each lowered once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgellama.build import export
from edgellama.bundle import Bundle
from edgellama.checkpoint import Checkpoint, open_checkpoint
from edgellama.recipe import RECIPES
from tests.tiny_models import CONTEXT, TINY, Cut, lower


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Checkpoint:
    return open_checkpoint(TINY)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The whole tiny model at int4-fast, exported and validated. Read-only: a test that alters it copies it first."""
    output = tmp_path_factory.mktemp("bundle") / "tiny.edgellama"
    return export(tiny_checkpoint, output, recipe="int4-fast", context=CONTEXT)


@pytest.fixture(scope="session")
def cut(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Cut]:
    """`cut(layers, recipe)`: the first layers of the tiny model, quantized and lowered. The model must not be altered."""
    directory: Path = tmp_path_factory.mktemp("cuts")
    made: dict[tuple[int, str], Cut] = {}

    def make(layers: int, recipe: str) -> Cut:
        if (layers, recipe) not in made:
            path = directory / f"{layers}-{recipe}.pte"
            made[layers, recipe] = lower(tiny_checkpoint.first_layers(layers), RECIPES[recipe], path)
        return made[layers, recipe]

    return make
