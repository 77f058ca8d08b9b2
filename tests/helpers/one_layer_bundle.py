"""One bundle of one layer for all targets, for tests that alter copies of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint
from edgellama.commands.export import export
from edgellama.commands.validate import validate

CONTEXT = 32


@dataclass(frozen=True)
class Sound:
    """A checkpoint, and its bundle without faults."""

    checkpoint: Checkpoint
    bundle: Bundle


def sound_bundle(checkpoint: Checkpoint, directory: Path, targets: tuple[str, ...]) -> Sound:
    """Exports the first layer of `checkpoint`, with the gate."""
    one_layer = checkpoint.first_layers(1)
    path = directory / "sound.edgellama"
    bundle = export(
        one_layer, path, recipe="int4-fast", targets=targets, context=CONTEXT, validation_tokens=256
    )
    return Sound(one_layer, bundle)


def assert_found(
    bundle: Bundle, sound: Sound, target: str, check: str, detail: str, also: Collection[str] = ()
) -> None:
    """Asserts that `check` finds a fault with `detail` in its words, and that no other check but `also` does."""
    found = failures(bundle, sound.checkpoint, target)
    assert detail in found.get(check, ""), found
    assert set(found) <= {check, *also}, "nothing else finds it"


def failures(
    bundle: Bundle, checkpoint: Checkpoint | None, target: str = "xnnpack", max_kl: float | None = 100.0
) -> Mapping[str, str]:
    """Name and detail of the checks that do not pass. The default limit of KL is too high to matter."""
    limit = None if checkpoint is None else max_kl
    report = validate(bundle, reference=checkpoint, target=target, tokens=256, max_kl=limit, relower=False)
    return {c.name: c.detail for c in report.checks if c.verdict != "pass"}
