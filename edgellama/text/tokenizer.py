"""Tokenizer: the checkpoint's tokenizer.json, run by the `tokenizers` library, and the files a bundle ships.

Encoding and decoding give exactly the results of transformers with the same tokenizer.json. Special tokens
written in the text are recognised, nothing is truncated or padded, and decoding leaves spaces unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from edgellama.errors import TokenizerError
from edgellama.files import is_lfs_pointer, is_unicode
from edgellama.model.config import LlamaConfig
from edgellama.text.added_tokens import complete, special_tokens, text_of, without
from edgellama.text.token_stream import TokenStream, byte_of_piece
from edgellama.text.tokenizer_clients import client_notes, readable
from edgellama.text.tokenizer_growth import check_growth

SHIPPED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
_PAD = re.compile(r"[<\[|]+(right_|left_)?pad(ding)?(_token)?[>\]|]+", re.IGNORECASE)

_REMEDY = "Take tokenizer.json and the files beside it again from the model's original repository."


class Tokenizer:
    """Text to token ids and back.

    `files` (name -> bytes) are the files that a bundle ships and `from_directory` reads again.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        *,
        chat_template: str | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Loads a tokenizer from the bytes of its files.

        Args:
            files: bytes by file name, with `tokenizer.json`. A missing tokenizer_config.json is generated.
            chat_template: jinja source, shipped as chat_template.jinja.
            bos_token, eos_token: texts of the special tokens, which are variables of the chat template.
            special_tokens: text by name of further special tokens, such as `pad_token`.
            notes: sentences for the user about the way that the files were read.

        Raises TokenizerError if tokenizer.json is missing or cannot be run, or for text that is not Unicode.
        """
        if "tokenizer.json" not in files:
            raise TokenizerError(f"no tokenizer.json among {sorted(files)}", remedy=_REMEDY)
        self._tokenizer = _load(files["tokenizer.json"])
        self.chat_template, self.bos_token, self.eos_token = chat_template, bos_token, eos_token
        self.special_tokens: Mapping[str, str] = MappingProxyType(dict(special_tokens or {}))
        self.notes = notes
        for role, text in (
            ("chat template", chat_template),
            ("bos_token", bos_token),
            ("eos_token", eos_token),
        ):
            if text is not None and not is_unicode(text):
                raise TokenizerError(f"the {role} holds an unpaired surrogate", remedy=_REMEDY)
        shipped = dict(files)
        if "tokenizer_config.json" not in shipped:
            shipped["tokenizer_config.json"] = _config_json(bos_token, eos_token)
        if chat_template is not None:
            shipped["chat_template.jinja"] = chat_template.encode()
        self.files: Mapping[str, bytes] = MappingProxyType(shipped)

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Reads the tokenizer of a Hugging Face model directory or of a bundle's `tokenizer/`.

        A directory with only a SentencePiece or tiktoken `tokenizer.model` gets a tokenizer.json that is
        proven equal to it. Raises TokenizerError if files are missing or damaged.
        """
        path = Path(path)
        files = {name: _read(path / name) for name in SHIPPED if (path / name).is_file()}
        special_of_model: dict[str, Any] = {}
        hugging_face, flags = False, None
        if "tokenizer.json" not in files:
            if not (path / "tokenizer.model").is_file():
                raise TokenizerError(
                    f"{path}: no tokenizer.json and no tokenizer.model in this directory",
                    remedy="Put the model's tokenizer.json beside its weights.",
                )
            from edgellama.text.tokenizer_model import (  # only these checkpoints pay for the import
                Flags,
                rebuild,
            )

            _read_start(path / "tokenizer.model")
            hugging_face = (path / "config.json").is_file()
            flags = Flags.of(_json(path / "tokenizer_config.json")) if hugging_face else Flags()
            rebuilt = rebuild(path / "tokenizer.model", flags)
            files["tokenizer.json"] = rebuilt.json
            special_of_model = {"bos_token": rebuilt.bos_token, "eos_token": rebuilt.eos_token}
        config = _json(path / "tokenizer_config.json")
        special = special_of_model | _json(path / "special_tokens_map.json")
        with _library("tokenizer.json cannot be read"):
            files["tokenizer.json"], notes = complete(
                files["tokenizer.json"],
                config,
                special,
                _json(path / "added_tokens.json"),
                normalized=False if special_of_model else None,
            )
        if (
            special_of_model
            and hugging_face
            and flags
            and not flags.add_bos
            and special_of_model["bos_token"]
        ):
            notes += (f"no {special_of_model['bos_token']} precedes a text: add_bos_token is not true",)
        return cls(
            files,
            chat_template=_chat_template(path, config),
            bos_token=_token_text(path, config, special, "bos_token"),
            eos_token=_token_text(path, config, special, "eos_token"),
            special_tokens=special_tokens(config, special),
            notes=notes,
        )

    @cached_property
    def added_tokens(self) -> tuple[str, ...]:
        """Texts of the tokens that are found in a text before it is split, in the order of their ids."""
        tokens = self._tokenizer.get_added_tokens_decoder()
        return tuple(tokens[i].content for i in sorted(tokens))

    @cached_property
    def size(self) -> int:
        """Highest token id + 1."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in it become their ids.

        `add_special_tokens` adds the tokens of tokenizer.json's post-processor, often bos. A rendered chat
        has its own special tokens and needs False. Raises TokenizerError for text that is not valid Unicode.
        """
        return self._encoding(text, add_special_tokens=add_special_tokens).ids

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of `text` without added special tokens, and the span of characters of each.

        Raises TokenizerError for text that is not valid Unicode.
        """
        encoding = self._encoding(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _encoding(self, text: str, *, add_special_tokens: bool) -> tokenizers.Encoding:
        if not is_unicode(text):
            raise TokenizerError(
                "the text to encode holds an unpaired surrogate",
                remedy="Read the text as UTF-8 and replace undecodable bytes.",
            )
        with _library("the tokenizer cannot encode this text"):
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids without a token (padding of the vocabulary) give no text."""
        with _library("the tokenizer cannot decode these ids"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self) -> TokenStream:
        """Decoder for ids that arrive one by one; special tokens are skipped."""
        return TokenStream(self._tokenizer, self._decoder)

    @cached_property
    def _decoder(self) -> dict[str, Any] | None:
        """Decoder section of tokenizer.json."""
        decoder: dict[str, Any] | None = json.loads(self.files["tokenizer.json"]).get("decoder")
        return decoder

    def token_id(self, token: str) -> int | None:
        """Id of the token with this text in the vocabulary, None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    def fitted(self, config: LlamaConfig) -> Tokenizer:
        """The tokenizer for a model of this config, with notes on where the two differ harmlessly.

        A pad token beyond the embedding is left out, because a text that spells it would end the run. Embedding
        rows without a token are padding. Raises TokenizerError if tokenizer and model cannot belong together.
        """
        fitted = self._without_pad_beyond(config.vocab_size)._for_clients()
        fitted.check_fits(config)
        unused = config.vocab_size - fitted._tokenizer.get_vocab_size(with_added_tokens=True)
        if unused > 0:
            fitted.notes += (f"{unused} of {config.vocab_size} embedding rows have no token (padding)",)
        bos = None if fitted.bos_token is None else fitted.token_id(fitted.bos_token)
        if None not in (bos, config.bos_token_id) and bos != config.bos_token_id:
            fitted.notes += (
                f"bos_token_id is {config.bos_token_id}, and the tokenizer's bos_token {fitted.bos_token!r} has id {bos}",
            )
        return fitted

    def with_generation_config(self, other: Tokenizer) -> Tokenizer:
        """This tokenizer with the generation_config.json of `other`: the file belongs to the weights."""
        name = "generation_config.json"
        data = other.files.get(name)
        return self if data is None or name in self.files else self._with({name: data}, self.notes)

    def _for_clients(self) -> Tokenizer:
        """This tokenizer in a form that the bundle's clients read, with notes on those that cannot."""
        data = self.files["tokenizer.json"]
        rewritten = readable(data)
        notes = (*self.notes, *client_notes(rewritten))
        return (
            self
            if (rewritten, notes) == (data, self.notes)
            else self._with({"tokenizer.json": rewritten}, notes)
        )

    def _with(
        self,
        files: Mapping[str, bytes],
        notes: tuple[str, ...],
        special_tokens: Mapping[str, str] | None = None,
    ) -> Tokenizer:
        """A tokenizer of other files, with the rest of this one."""
        shipped = {name: data for name, data in self.files.items() if name != "chat_template.jinja"}
        return Tokenizer(
            {**shipped, **files},
            chat_template=self.chat_template,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            special_tokens=self.special_tokens if special_tokens is None else special_tokens,
            notes=notes,
        )

    def _without_pad_beyond(self, vocab_size: int) -> Tokenizer:
        """This tokenizer, or one without the pad tokens whose ids are at or above `vocab_size`."""
        pad = self.special_tokens.get("pad_token")
        tokens = self._tokenizer.get_added_tokens_decoder()
        beyond = {i: token.content for i, token in tokens.items() if i >= vocab_size}
        pads = {text for text in beyond.values() if text == pad or _PAD.fullmatch(text)}
        if not pads or pads != set(beyond.values()) or pads & {self.bos_token, self.eos_token}:
            return self
        files = without(
            self.files["tokenizer.json"],
            self.files["tokenizer_config.json"],
            self.files.get("special_tokens_map.json"),
            pads,
        )
        ids = ", ".join(map(str, beyond))
        note = f"the pad token {', '.join(sorted(pads))} ({ids}) has no embedding (there are {vocab_size}): left out"
        others = {name: text for name, text in self.special_tokens.items() if text not in pads}
        return self._with(files, (*self.notes, note), others)

    def check_fits(self, config: LlamaConfig) -> None:
        """Raises TokenizerError if the tokenizer and the model's vocabulary cannot belong together."""
        remedy = "Take tokenizer and weights from the same model."
        if self.size > config.vocab_size:
            raise TokenizerError(
                f"the tokenizer has token ids up to {self.size - 1}, the model only {config.vocab_size} embeddings",
                remedy=remedy,
            )
        count = self._tokenizer.get_vocab_size(with_added_tokens=True)
        bos = () if config.bos_token_id is None else (config.bos_token_id,)
        for role, ids in (("bos_token_id", bos), ("eos_token_id", config.eos_token_ids)):
            for token in ids:
                if not 0 <= token < config.vocab_size or self._tokenizer.id_to_token(token) is None:
                    raise TokenizerError(
                        f"{role} is {token}, and the tokenizer ({count} tokens) has no token of that id",
                        remedy="Correct the id in config.json or generation_config.json, or use the model's own tokenizer.",
                    )
        for role, text in (("bos_token", self.bos_token), ("eos_token", self.eos_token)):
            if text is not None and self.token_id(text) is None:
                raise TokenizerError(
                    f"{role} is {text!r}, and tokenizer.json has no such token", remedy=_REMEDY
                )


def missing_merges(tokenizer_json: bytes) -> list[str]:
    """Tokens of a BPE vocabulary that no merge produces, although they are longer than one symbol.

    A sound tokenizer has none: a merge list that lost a line still loads, and encodes some words differently.
    Added tokens and byte tokens need no merge. With `ignore_merges` such a token is still found as a whole
    word, and is lost only inside longer words. The list is empty for models other than BPE.
    """
    data = json.loads(tokenizer_json)
    model = data["model"]
    if model.get("type") != "BPE":
        return []
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    reached = {"".join(pair) for pair in pairs} | {
        token["content"] for token in data.get("added_tokens") or ()
    }
    return [
        token
        for token in model["vocab"]
        if len(token) > 1
        and token not in reached
        and byte_of_piece(token) is None
        and token != model.get("unk_token")
    ]


def _load(data: bytes) -> tokenizers.Tokenizer:
    with _library("tokenizer.json cannot be read"):
        check_growth(json.loads(data))
        tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        # A tokenizer.json may carry the truncation of somebody's training run.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


@contextmanager
def _library(what: str) -> Iterator[None]:
    """Turns the exceptions of `tokenizers` into TokenizerError.

    The library raises plain Exception for every kind of damage. If its Rust code panics (0.22: a regex that
    gives up, an empty pattern), the exception is not even an Exception.
    """
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what}: {error}", remedy=_REMEDY) from error


def _config_json(bos_token: str | None, eos_token: str | None) -> bytes:
    """Content of a tokenizer_config.json that transformers reads too."""
    config: dict[str, Any] = {
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if bos_token is not None:
        config["bos_token"] = bos_token
    if eos_token is not None:
        config["eos_token"] = eos_token
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror}", remedy="Check the file's permissions.") from error
    if is_lfs_pointer(data):
        raise TokenizerError(
            f"{path}: a Git LFS pointer and not the file itself", remedy="Run `git lfs pull`."
        )
    return data


def _read_start(path: Path) -> None:
    """Raises TokenizerError for a Git LFS pointer."""
    if path.stat().st_size < 1024:
        _read(path)


def _json(path: Path) -> dict[str, Any]:
    """Object in a JSON file, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(_read(path).decode())
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not JSON: {error}", remedy=_REMEDY) from error
    if not isinstance(data, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(data).__name__}", remedy=_REMEDY)
    return data


def _token_text(path: Path, config: Mapping[str, Any], special: Mapping[str, Any], key: str) -> str | None:
    """Text of `bos_token` or `eos_token`, which is a string, an object with `content`, or absent."""
    value = config.get(key) if config.get(key) is not None else special.get(key)
    if value is not None and text_of(value) is None:
        raise TokenizerError(f"{path}: {key} must be a string, found {value!r}", remedy=_REMEDY)
    return text_of(value)


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """Jinja source from chat_template.jinja, else chat_template.json, else tokenizer_config.json."""
    if (path / "chat_template.jinja").is_file():
        try:
            return _read(path / "chat_template.jinja").decode()
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path / 'chat_template.jinja'}: not UTF-8", remedy=_REMEDY) from error
    value = _json(path / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(value, list):
        named = (t for t in value if isinstance(t, Mapping) and isinstance(t.get("name"), str))
        sources_by_name = {t["name"]: t.get("template") for t in named}
        if "default" not in sources_by_name:
            raise TokenizerError(
                f"{path}: none of the chat templates is called 'default', found {sorted(sources_by_name)}",
                remedy="Write the one to use into chat_template.jinja beside tokenizer.json.",
            )
        value = sources_by_name["default"]
    if value is not None and not isinstance(value, str):
        raise TokenizerError(
            f"{path}: chat_template must be a string, found {type(value).__name__}", remedy=_REMEDY
        )
    return value
