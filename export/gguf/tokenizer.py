"""Keys of a GGUF file that describe the tokenizer, so that llama.cpp's own tokenizer gives the same ids.

llama.cpp has its own splitting of text for each name of a pre-tokenizer. So a tokenizer.json is taken apart, and
only what llama.cpp computes alike is accepted. Anything else is refused by name.

llama.cpp ends an answer at the tokens of the keys eos, eot and eom, and at tokens whose text it takes for an end.
It also takes the texts of some tokens for code infilling, and ends at these too, unless a key names another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgellama.errors import TokenizerError
from edgellama.model.config import LlamaConfig
from edgellama.targets.gguf.interface import Value
from edgellama.text.stop_tokens import TURN_ENDS
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.tokenizer_json import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    merges_of_scores,
)

# Pre-tokenizer -> names of llama.cpp without and with `ignore_merges`.
NAMES: Mapping[str, tuple[str | None, str | None]] = {
    "gpt-2": ("gpt-2", None),
    "smollm": ("smollm", None),
    "llama-bpe": ("smaug-bpe", "llama-bpe"),
    "deepseek-coder": ("deepseek-coder", None),
}
# Pre-tokenizers whose name llama.cpp has, and that it computes otherwise, with the difference.
INEXACT: Mapping[str, str] = {
    "deepseek-llm": "it leaves several digits together",
    "tekken": "it knows capitals of ASCII only, and splits a word such as Ελληνικά elsewhere",
}
# Texts that end an answer in llama.cpp whatever the keys say (src/llama-vocab.cpp, `special_eog_ids`).
END_TEXTS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
        *("<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~["),
        *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<|ifm|im_end|>"),
    }
)
# Texts that llama.cpp takes for infilling, by the key that names another token for it. It ends an answer there too.
INFILLING: Mapping[str, frozenset[str]] = {
    "fim_pad": frozenset({"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"}),
    "fim_rep": frozenset({"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"}),
    "fim_sep": frozenset({"<|file_sep|>", "<|plamo:file_separator|>"}),
}
_PREPEND = {"type": "Prepend", "prepend": "▁"}
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# edgellama's form of a regex whose gaps are matches too (edgellama.text.tokenizer_clients).
_WITH_GAPS = re.compile(r"(?P<regex>.*)\|\(\?:\(\?!(?P=regex)\)\[\\s\\S\]\)\+", re.DOTALL)
_REMEDY = "Leave out target gguf, or give a tokenizer that llama.cpp supports."


def tokenizer_keys(tokenizer: Tokenizer, config: LlamaConfig) -> dict[str, Value]:
    """Keys `tokenizer.*`, in order.

    Raises TokenizerError for a tokenizer that llama.cpp cannot be told of, and names the part.
    """
    content = json.loads(tokenizer.files["tokenizer.json"])
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise _refused(f"its model is {model.get('type')!r}, expected BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _refused(f"its model has {name} {model[name]!r}")
    added = content.get("added_tokens") or ()
    for token in added:
        flags = [name for name in ("lstrip", "rstrip", "single_word") if token.get(name)]
        if flags:
            raise _refused(
                f"token {token['content']!r} has the flag {flags[0]}, which llama.cpp has for no token"
            )
    tokens = _tokens(model["vocab"], added, config.vocab_size)
    kind = _sentencepiece if model.get("byte_fallback") else _byte_level
    keys: dict[str, Value] = {
        **kind(content, tokens),
        **_special_keys(tokenizer, config, tokens),
    }
    if tokenizer.chat_template is not None:
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    return keys


def without_tokenizer() -> dict[str, Value]:
    """Keys of a file that holds no tokenizer."""
    return {"tokenizer.ggml.model": "no_vocab"}


def _refused(reason: str) -> TokenizerError:
    return TokenizerError(f"target gguf cannot hold this tokenizer: {reason}", remedy=_REMEDY)


def _tokens(
    vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]], size: int
) -> dict[int, tuple[str, int]]:
    """(text, type) by id. Ids without a token get an unused one."""
    tokens = {i: (text, NORMAL) for text, i in vocab.items()}
    for token in added:
        tokens[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    return {i: tokens.get(i, (f"[PAD{i}]", UNUSED)) for i in range(size)}


def _byte_level(content: Mapping[str, Any], tokens: Mapping[int, tuple[str, int]]) -> dict[str, Value]:
    """Keys of a byte-level BPE."""
    if content.get("normalizer"):
        raise _refused(f"its normalizer is {content['normalizer'].get('type')}, and llama.cpp's BPE has none")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_name(content),
        **_lists(tokens),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(content)],
        "tokenizer.ggml.add_space_prefix": False,
    }


def pre_name(content: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer in a tokenizer.json. Raises TokenizerError for an unknown one."""
    actual = list(_steps(content.get("pre_tokenizer")))
    ignore_merges = bool(content["model"].get("ignore_merges"))
    for name, splitting in PRE_TOKENIZERS.items():
        if actual == list(_steps(splitting)):
            if name in INEXACT:
                raise _refused(f"llama.cpp computes its pre-tokenizer {name!r} otherwise: {INEXACT[name]}")
            known = NAMES[name][ignore_merges]
            if known is None:
                what = "with" if ignore_merges else "without"
                raise _refused(f"llama.cpp knows its pre-tokenizer {name!r} not {what} ignore_merges")
            return known
    kinds = ", ".join(json.dumps(step.get("pattern", step["type"]), ensure_ascii=False) for step in actual)
    raise _refused(
        f"its pre-tokenizer is none of {', '.join(PRE_TOKENIZERS)}: {kinds[:200] or 'nothing'}. A wrong name would "
        "split numbers and spaces differently without any error"
    )


def _steps(step: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Steps of a pre-tokenizer without what changes no split."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _steps(inner)
        return
    plain = {key: value for key, value in step.items() if key != "trim_offsets"}
    regex = plain.get("pattern", {}).get("Regex")
    if regex is not None and (match := _WITH_GAPS.fullmatch(regex)):
        plain["pattern"] = {"Regex": match["regex"]}
    if plain["type"] == "ByteLevel":
        plain.setdefault("use_regex", True)
    yield plain


def _sentencepiece(content: Mapping[str, Any], tokens: Mapping[int, tuple[str, int]]) -> dict[str, Value]:
    """Keys of a SentencePiece BPE. Its scores are ranks: tokenizer.json keeps the order only."""
    if content.get("pre_tokenizer") is not None:
        raise _refused(
            f"it falls back to bytes, and its pre-tokenizer is {content['pre_tokenizer'].get('type')}, where "
            "llama.cpp has none"
        )
    normalizer = content.get("normalizer") or {"type": "Sequence", "normalizers": []}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    if steps not in ([_PREPEND, _SPACES], [_SPACES]):
        kinds = ", ".join(str(step.get("type")) for step in steps) or "nothing"
        raise _refused(
            f"its normalizer is {kinds}, and llama.cpp puts ▁ for spaces, with or without one before the text"
        )
    unknown = content["model"].get("unk_token")
    typed = {
        i: (text, BYTE if _BYTE_PIECE.fullmatch(text) else UNKNOWN if text == unknown else kind)
        for i, (text, kind) in tokens.items()
    }
    keys: dict[str, Value] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        **_lists(typed),
        "tokenizer.ggml.scores": _scores(typed, list(_merges(content))),
        "tokenizer.ggml.add_space_prefix": steps[0] == _PREPEND,
    }
    if unknown is not None:
        keys["tokenizer.ggml.unknown_token_id"] = next(i for i, (text, _) in typed.items() if text == unknown)
    return keys


def _scores(tokens: Mapping[int, tuple[str, int]], merges: Sequence[tuple[str, str]]) -> list[float]:
    """Scores by id: a token that is merged earlier has a higher one.

    Raises TokenizerError if no scores give these merges.
    """
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    last = len(ranks)
    scores = [float(-ranks.get(text, last)) if kind == NORMAL else 0.0 for text, kind in tokens.values()]
    normal = {
        text: score for (text, kind), score in zip(tokens.values(), scores, strict=True) if kind == NORMAL
    }
    order = [ranks[left + right] for left, right in merges]
    if order != sorted(order) or set(merges) != set(merges_of_scores(normal)):
        raise _refused("its merges are not those of a score for each token, as SentencePiece has them")
    return scores


def _lists(tokens: Mapping[int, tuple[str, int]]) -> dict[str, Value]:
    return {
        "tokenizer.ggml.tokens": [text for text, _ in tokens.values()],
        "tokenizer.ggml.token_type": [kind for _, kind in tokens.values()],
    }


def _merges(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in content["model"]["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield left, right


def _special_keys(
    tokenizer: Tokenizer, config: LlamaConfig, tokens: Mapping[int, tuple[str, int]]
) -> dict[str, Value]:
    """Keys of the special tokens, and of those that are added to every text."""
    before, after = _added_around(tokenizer)
    bos = before[0] if before else config.bos_token_id
    if bos is None and tokenizer.bos_token is not None:
        bos = tokenizer.token_id(tokenizer.bos_token)
    ends = _ends(tokenizer, config, tokens, after)
    keys: dict[str, Value] = {} if bos is None else {"tokenizer.ggml.bos_token_id": bos}
    keys |= {f"tokenizer.ggml.{role}_token_id": token for role, token in ends.items()}
    for role, texts in INFILLING.items():
        if any(text in texts for text, _ in tokens.values()):
            keys[f"tokenizer.ggml.{role}_token_id"] = ends["eos"]
    return keys | {
        "tokenizer.ggml.add_bos_token": bool(before),
        "tokenizer.ggml.add_eos_token": bool(after),
    }


def _added_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that encoding adds before and after a text: none or one on each side."""
    inner, whole = (tokenizer.encode("a", add_special_tokens=add) for add in (False, True))
    start = next(i for i in range(len(whole) + 1) if whole[i : i + len(inner)] == inner)
    before, after = whole[:start], whole[start + len(inner) :]
    if len(before) > 1 or len(after) > 1:
        raise _refused(
            f"it adds {len(before)} tokens before every text and {len(after)} after it, and llama.cpp one"
        )
    return before, after


def _ends(
    tokenizer: Tokenizer, config: LlamaConfig, tokens: Mapping[int, tuple[str, int]], after: Sequence[int]
) -> dict[str, int]:
    """Ids for the keys eos, eot and eom, which together with END_TEXTS hold every stop token."""
    stops = list(config.eos_token_ids)
    if not stops:
        raise _refused("no token ends an answer, and llama.cpp would take token 11 or 2 for it")
    own = None if tokenizer.eos_token is None else tokenizer.token_id(tokenizer.eos_token)
    eos = after[0] if after else own if own in stops else stops[0]
    if eos not in stops:
        raise _refused(f"it ends every text with {tokens[eos][0]!r}, which is no stop token")
    texts = {tokens[stop][0]: stop for stop in stops}
    eot = next((texts[text] for text in TURN_ENDS if text in texts), None)
    others = [(text, stop) for text, stop in texts.items() if stop not in (eos, eot)]
    needed = [stop for text, stop in others if text not in END_TEXTS]
    # An absent key is guessed from the texts of tokens. A key that repeats eos may name another stop token.
    ends = {"eos": eos, "eot": eos if eot is None else eot, "eom": texts.get("<|eom_id|>", eos)}
    for role in ("eot", "eom"):
        if needed and (ends[role] == eos or role == "eom"):
            ends[role] = needed.pop(0)
    if needed:
        names = ", ".join(repr(tokens[stop][0]) for stop in needed)
        raise _refused(f"llama.cpp has no key for the stop tokens {names}")
    # Tokens that end an answer by their text go into keys that are left, for other readers.
    for _, stop in others:
        free = next((role for role in ("eot", "eom") if ends[role] == eos), None)
        if free is not None and stop not in ends.values():
            ends[free] = stop
    return ends
