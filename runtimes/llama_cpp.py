"""llama.cpp's C interface out of the PyPI package `xllamacpp`, called through ctypes. No compiler is needed.

The package's one library exports llama.h. Its structs have other fields from one version to the next, so
`library` compares the defaults that the library itself writes into them with those of the pinned version. A field
that moved shows as a wrong default.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections import deque
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int32, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellama.errors import BundleError, MissingDependencyError
from edgellama.runtimes.llama_structs import (
    CONTEXT_DEFAULTS,
    EVALUATED,
    LOG,
    MODEL_DEFAULTS,
    SIGNATURES,
    ContextParams,
)

PACKAGE = "xllamacpp"
VERSION = "2026.10.11549"  # whose structs llama_structs.py has; the last part is llama.cpp's build number

_WARNING = 3  # ggml.h, `enum ggml_log_level`; 4 is an error, 5 continues a line
_SEQUENCE = 0  # the only one

_messages: deque[str] = deque(maxlen=8)  # the last warnings and errors of llama.cpp


def _keep_message(level: int, text: bytes, _: object) -> None:
    if level >= _WARNING and (line := text.decode(errors="replace").strip().strip(".")):
        _messages.append(line)


_keep = LOG(_keep_message)


@cache
def library() -> Any:
    """llama.cpp's library, with declared functions and proven structs.

    Raises MissingDependencyError if the package is missing or has other structs.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise ModuleNotFoundError(f"No module named {PACKAGE!r}", name=PACKAGE)
    (path,) = Path(package.origin).parent.glob("xllamacpp*.so")
    loaded = ctypes.CDLL(str(path))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name, None)
        if function is None:
            raise _other_version(f"it has no function {name}")
        function.restype, function.argtypes = result, arguments
    problems = layout_problems(loaded.llama_model_default_params(), MODEL_DEFAULTS)
    problems += layout_problems(loaded.llama_context_default_params(), CONTEXT_DEFAULTS)
    if problems:
        raise _other_version(f"its structs have other fields: {', '.join(problems[:3])}")
    loaded.llama_log_set(_keep, None)
    loaded.llama_backend_init()
    return loaded


def layout_problems(params: ctypes.Structure, defaults: dict[str, Any]) -> list[str]:
    """Words about each field that does not hold its default."""
    return [
        f"{name} is {getattr(params, name)}, expected {value}"
        for name, value in defaults.items()
        if getattr(params, name) != value
    ]


def _other_version(reason: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"the installed {PACKAGE} is not of the version that target 'gguf' knows: {reason}",
        remedy=f"pip install '{PACKAGE}=={VERSION}'",
    )


class LlamaModel:
    """A GGUF file, loaded by llama.cpp. Raises BundleError if it cannot load it.

    Args:
        path: the GGUF file.
        repacked: True to arrange the weights for this processor, as apps do. The numbers are the same but for
            the order of sums.
        vocabulary_only: True to load the tokenizer and no weights.
    """

    def __init__(self, path: Path, *, repacked: bool = False, vocabulary_only: bool = False) -> None:
        self._library, self.path = library(), path
        if not path.is_file():
            raise BundleError(f"{path}: no such file", remedy="Check the path, or export again.")
        params = self._library.llama_model_default_params()
        params.use_extra_bufts, params.vocab_only = repacked, vocabulary_only
        _messages.clear()
        self.handle: int | None = self._library.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise BundleError(
                f"{path}: llama.cpp cannot load it ({'; '.join(list(_messages)[:2]) or 'no reason given'})",
                remedy="Export again with this version of edgellama; `edgellama inspect` shows the file's contents.",
            )
        self._vocabulary = self._library.llama_model_get_vocab(self.handle)

    @property
    def vocab_size(self) -> int:
        return int(self._library.llama_vocab_n_tokens(self._vocabulary))

    @property
    def trained_context(self) -> int:
        """Length of context that the model was trained for, in tokens."""
        return int(self._library.llama_model_n_ctx_train(self.handle))

    def key(self, name: str) -> str | None:
        """Value of a metadata key as text; None for an absent key."""
        buffer = ctypes.create_string_buffer(256)
        length = self._library.llama_model_meta_val_str(self.handle, name.encode(), buffer, len(buffer))
        return None if length < 0 else buffer.value.decode(errors="replace")

    def adapter(self, path: Path) -> LlamaAdapter:
        """The adapter in a GGUF file, loaded for this model, which owns it. Raises BundleError if it does not fit."""
        _messages.clear()
        handle = self._library.llama_adapter_lora_init(self.handle, str(path).encode())
        if not handle:
            raise BundleError(
                f"{path}: llama.cpp cannot load this adapter ({'; '.join(list(_messages)[:2]) or 'no reason given'})",
                remedy="Take model and adapter from one bundle.",
            )
        return LlamaAdapter(handle, self._library)

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids by llama.cpp's own tokenizer. Special tokens in the text become their ids."""
        data = text.encode()
        ids = (c_int32 * (len(data) + 8))()
        count = self._library.llama_tokenize(
            self._vocabulary, data, len(data), ids, len(ids), add_special, True
        )
        return list(ids[: max(0, count)])

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of token ids by llama.cpp. Special tokens give no text."""
        ids = (c_int32 * len(tokens))(*tokens)
        size = 64 + 64 * len(tokens)
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._library.llama_detokenize(
                self._vocabulary, ids, len(ids), buffer, size, False, False
            )
            if length >= 0:
                return buffer.raw[:length].decode(errors="replace")
            size = -length

    def ends(self) -> list[int]:
        """Ids at which llama.cpp ends an answer."""
        return [i for i in range(self.vocab_size) if self._library.llama_vocab_is_eog(self._vocabulary, i)]

    @property
    def adds_bos(self) -> bool:
        """True if llama.cpp puts the bos token before a text."""
        return bool(self._library.llama_vocab_get_add_bos(self._vocabulary))

    def close(self) -> None:
        if self.handle:
            self._library.llama_model_free(self.handle)
            self.handle = None


@dataclass(frozen=True)
class LlamaAdapter:
    """An adapter that llama.cpp has loaded."""

    handle: int
    _library: Any

    def key(self, name: str) -> str | None:
        """Value of a metadata key as text; None for an absent key."""
        buffer = ctypes.create_string_buffer(256)
        length = self._library.llama_adapter_meta_val_str(self.handle, name.encode(), buffer, len(buffer))
        return None if length < 0 else buffer.value.decode(errors="replace")


class LlamaContext:
    """A KV cache of a model in float16, and the calls that fill it.

    Args:
        model: must stay open.
        context_length: tokens in the cache.
        threads: number of compute threads.
        flash_attention: True for llama.cpp's own choice, as apps have it. False for attention in three products.
        watched: called with the name and the values of each tensor of the graph whose name is in `names`.
        names: names of tensors.
    """

    def __init__(
        self,
        model: LlamaModel,
        context_length: int,
        threads: int,
        *,
        flash_attention: bool = False,
        watched: Callable[[str, npt.NDArray[np.float32]], None] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self._library, self.vocab_size = model._library, model.vocab_size
        params = self._library.llama_context_default_params()
        params.n_ctx = params.n_batch = context_length
        params.n_ubatch = min(512, context_length)
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = -1 if flash_attention else 0
        self._watch(params, watched, frozenset(name.encode() for name in names))
        _messages.clear()
        self._handle: int | None = self._library.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise BundleError(
                f"{model.path}: llama.cpp cannot run it ({'; '.join(list(_messages)[:2]) or 'no reason given'})",
                remedy="Export again, or with a smaller --context.",
            )
        actual = self._library.llama_n_ctx(self._handle), self._library.llama_n_threads(self._handle)
        if actual[0] < context_length or actual[1] != threads:
            raise _other_version(f"a context of {context_length} on {threads} threads became {actual}")
        self._batch = self._library.llama_batch_init(context_length, 0, 1)

    def _watch(self, params: ContextParams, watched: Any, names: frozenset[bytes]) -> None:
        if watched is None:
            return
        get = self._library

        def evaluated(tensor: int, asked: bool, _: object) -> bool:
            name = get.ggml_get_name(tensor)
            if not asked and name in names:
                values = np.empty(get.ggml_nbytes(tensor) // 4, np.float32)
                get.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
                watched(name.decode(), values)
            return name in names if asked else True

        self._evaluated = EVALUATED(evaluated)  # the library calls it as long as the context lives
        params.cb_eval = self._evaluated

    def decode(self, tokens: Sequence[int], position: int, *, all_logits: bool) -> npt.NDArray[np.float32]:
        """Logits after each of `tokens`, or after the last one: float32 [T or 1, vocab_size], a copy."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.seq_id[i][0] = _SEQUENCE
            batch.logits[i] = all_logits or i + 1 == len(tokens)
        _messages.clear()
        status = self._library.llama_decode(self._handle, batch)
        if status != 0:
            raise BundleError(
                f"llama.cpp failed while running the file: code {status} ({'; '.join(_messages)})",
                remedy="Export again, or report it with the bundle's manifest.",
            )
        rows = range(len(tokens)) if all_logits else (-1,)
        pointers = (self._library.llama_get_logits_ith(self._handle, row) for row in rows)
        return np.stack([np.ctypeslib.as_array(pointer, (self.vocab_size,)) for pointer in pointers])

    def set_adapter(self, adapter: LlamaAdapter | None) -> None:
        """Computes with one adapter from now on, or with none. Raises BundleError if llama.cpp refuses it."""
        handles = () if adapter is None else (adapter.handle,)
        array, scales = (c_void_p * len(handles))(*handles), (c_float * len(handles))(*[1.0] * len(handles))
        status = self._library.llama_set_adapters_lora(self._handle, array, len(handles), scales)
        if status != 0:
            raise BundleError(
                f"llama.cpp does not take the adapter: code {status}", remedy="Take both from one bundle."
            )

    def clear(self) -> None:
        """Forgets all tokens."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._handle), True)

    def close(self) -> None:
        if self._handle:
            self._library.llama_batch_free(self._batch)
            self._library.llama_free(self._handle)
            self._handle = None
