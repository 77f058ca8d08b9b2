"""Runtime of Core ML packages: splits prompts into calls and keeps masks, KV cache and position.

An engine computes the functions: Core ML itself on macOS (`coreml`), elsewhere the MIL reference interpreter
(`mil-reference`). The runtime has the engine's name, because interpreter numbers are not device numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from edgellama.errors import BundleError, UsageError
from edgellama.report import Check
from edgellama.runtimes.base import Logits, Runtime
from edgellama.runtimes.parts import States
from edgellama.targets.coreml.interface import (
    CONTEXT_LENGTH,
    INPUT_IDS,
    KEY_CACHE,
    LOGITS,
    MASK,
    NEW_KEYS,
    NEW_VALUES,
    OUTPUT_SIZE,
    POSITION,
    VALUE_CACHE,
    VOCAB_SIZE,
    CoremlForm,
    causal_mask,
)

LONGEST_CALL = 256  # tokens per call of a flexible function; its output has one row of logits per token


class Engine(Protocol):
    """Computes the functions of a package. `name` is the runtime's name in reports."""

    name: str

    def make_state(self) -> Any: ...

    def predict(self, inputs: Mapping[str, Tensor], function: str, state: Any) -> dict[str, Tensor]:
        """Returns the outputs by name. Updates `state` with the values that the function keeps."""

    def checks(self) -> list[Check]:
        """Returns the gate checks made during the predictions."""


@dataclass(frozen=True)
class Interface:
    """Properties of a package that the runtime needs, read from the package's description.

    forms: form of each function, by name.
    cache: shape [L, 1, G, S, D] of the keys and of the values if they are inputs, None if they are states.
    """

    forms: Mapping[str, CoremlForm]
    vocab_size: int
    output_size: int
    context_length: int
    cache: tuple[int, ...] | None

    @classmethod
    def read(cls, package: Path) -> Self:
        """Reads the description. Raises BundleError for a package that edgellama did not write."""
        from edgellama.formats.mlpackage import load_spec

        description = load_spec(package).description
        functions = {f.name: f for f in description.functions} or {"main": description}
        try:
            forms = {name: _form(function) for name, function in functions.items()}
            # As a dict, because the protobuf map returns "" for a missing key.
            metadata = dict(description.metadata.userDefined)
            vocab_size, context_length = int(metadata[VOCAB_SIZE]), int(metadata[CONTEXT_LENGTH])
            output_size = int(metadata.get(OUTPUT_SIZE, vocab_size))
        except (KeyError, ValueError) as error:
            raise BundleError(
                f"{package}: not a package that edgellama wrote ({error!r:.80} is missing in its description)",
                remedy="`edgellama inspect` shows any package; only edgellama's own can be run as a language model.",
            ) from error
        first = next(iter(functions.values()))
        shapes = {x.name: tuple(x.type.multiArrayType.shape) for x in first.input}
        return cls(forms, vocab_size, output_size, context_length, shapes.get(KEY_CACHE))


def _form(function: Any) -> CoremlForm:
    types = {x.name: x.type.multiArrayType for x in function.input}
    states = {x.name for x in function.state}
    if MASK not in types or not {KEY_CACHE, VALUE_CACHE} <= states | set(types):
        raise KeyError(MASK)
    ids = types[INPUT_IDS]
    flexible = ids.WhichOneof("ShapeFlexibility") is not None
    return CoremlForm(None if flexible else int(ids.shape[1]), stateful=KEY_CACHE in states)


class CoremlRuntime(Runtime):
    """Runs a package of the targets `coreml` and `coreml-pte`."""

    can_rewind = True

    def __init__(self, engine: Engine, interface: Interface) -> None:
        self.engine, self.forms = engine, interface.forms
        self.name = engine.name
        self.vocab_size, self.context_length = interface.vocab_size, interface.context_length
        self._output_size = interface.output_size
        self._state = engine.make_state()
        self._cache: dict[str, Tensor] = {}
        if interface.cache is not None:
            for name in (KEY_CACHE, VALUE_CACHE):
                self._cache[name] = torch.zeros(interface.cache, dtype=torch.float16)

    def _forward(self, tokens: Sequence[int], position: int) -> Logits:
        logits: Logits = self._run(tokens, position, keep=1)[-1].numpy()
        return logits

    def forward_all(self, tokens: Sequence[int]) -> Tensor:
        tokens = self._checked(tokens)
        logits = self._run(tokens, self.position, keep=len(tokens))
        self.position += len(tokens)
        return logits

    def checks(self) -> list[Check]:
        return self.engine.checks()

    def close(self) -> None:
        self._state = None
        self._cache = {}

    def _run(self, tokens: Sequence[int], position: int, *, keep: int) -> Tensor:
        """Returns the logits after the last `keep` of `tokens`: float32 [keep, vocab_size]."""
        kept_logits: list[Tensor] = []
        remaining = list(tokens)
        while remaining:
            name, count = self._choose(len(remaining), position)
            logits = self._call(name, remaining[:count], position)
            remaining, position = remaining[count:], position + count
            if len(remaining) < keep:
                kept_logits.append(logits.float())
        return torch.cat(kept_logits)[-keep:]

    def _choose(self, count: int, position: int) -> tuple[str, int]:
        """Returns the function for the next call and the number of tokens it takes."""
        for name, form in self.forms.items():
            if form.tokens is None:
                return name, min(count, LONGEST_CALL)
        by_length = {form.tokens or 1: name for name, form in self.forms.items()}
        longest = max(by_length)
        # A call writes all rows of its form, even unused ones. At the end of the context they would not fit.
        if count > 1 and position + longest <= self.context_length:
            return by_length[longest], min(count, longest)
        return by_length[1], 1

    def _call(self, name: str, tokens: Sequence[int], position: int) -> Tensor:
        """Runs one call. Returns its logits [T, vocab_size]."""
        return self._outputs(name, tokens, position)[LOGITS][0, : len(tokens)]

    def _outputs(self, name: str, tokens: Sequence[int], position: int) -> dict[str, Tensor]:
        """Runs one call. Returns the outputs of function `name`, by their names."""
        form, count = self.forms[name], len(tokens)
        ids = torch.zeros(1, form.tokens or count, dtype=torch.int32)
        ids[0, :count] = torch.tensor(list(tokens))
        inputs = {INPUT_IDS: ids, MASK: causal_mask(form, count, position, self.context_length)}
        if form.tokens:
            inputs[POSITION] = torch.tensor([position], dtype=torch.int32)
        outputs = self.engine.predict(inputs | self._cache, name, self._state)
        if not form.stateful:
            for cache, rows in ((KEY_CACHE, NEW_KEYS), (VALUE_CACHE, NEW_VALUES)):
                self._cache[cache][:, :, :, position : position + count] = outputs[rows][:, :, :, :count]
        return outputs


class CoremlParts(CoremlRuntime):
    """Runs a package in the interpreter and returns the input of each layer. Floats stay float32.

    kept: names of these values, by function.
    """

    def __init__(self, engine: Engine, interface: Interface, kept: Mapping[str, Sequence[str]]) -> None:
        super().__init__(engine, interface)
        self._kept = kept

    def states(self, tokens: Sequence[int]) -> States:
        tokens = self._checked(tokens)
        name, count = self._choose(len(tokens), self.position)
        outputs = self._outputs(name, tokens[:count], self.position)
        self.position += count
        inputs = [outputs[value][0, :count].float() for value in self._kept[name]]
        return States(inputs, outputs[LOGITS][0, count - 1].float())


def open_coreml_parts(path: Path, layers: int, *, inside_pte: bool) -> CoremlParts:
    """Opens a package, or the package inside a .pte, with the input of each layer as further outputs."""
    from edgellama.formats.coreml_pte import extracted_package
    from edgellama.formats.mlpackage import read_mlpackage
    from edgellama.runtimes.mil.engine import MilEngine
    from edgellama.targets.coreml.parts import state_names

    with extracted_package(path) if inside_pte else nullcontext(path) as package:
        kept = {f.name: state_names(f, layers) for f in read_mlpackage(package).functions}
        return CoremlParts(MilEngine(package, mode="fp32", kept=kept), Interface.read(package), kept)


def open_coreml(path: Path, *, threads: int | None = None) -> Runtime:
    """Opens the .mlpackage at `path`: in Core ML on macOS, elsewhere in the reference interpreter.

    Raises UsageError if `threads` is given.
    """
    _refuse_threads(threads)
    interface = Interface.read(path)
    if sys.platform == "darwin":
        from edgellama.runtimes.coreml_engine import AppleEngine

        return CoremlRuntime(AppleEngine(path), interface)
    return CoremlRuntime(_interpreter(path), interface)


def open_coreml_pte(path: Path, *, threads: int | None = None) -> Runtime:
    """Opens the package inside the .pte at `path` in the reference interpreter.

    No pip package of ExecuTorch can run it. Raises UsageError if `threads` is given.
    """
    from edgellama.formats.coreml_pte import extracted_package

    _refuse_threads(threads)
    with extracted_package(path) as package:
        return CoremlRuntime(_interpreter(package), Interface.read(package))


def _refuse_threads(threads: int | None) -> None:
    if threads is not None:
        raise UsageError(
            "Core ML chooses its threads itself, and so does the interpreter", remedy="Leave out --threads."
        )


def _interpreter(package: Path) -> Engine:
    from edgellama.runtimes.mil.engine import MilEngine

    return MilEngine(package)
