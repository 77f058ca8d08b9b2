"""Golden vectors, the part that needs no runtime: which sequences, and how they are written.

Eight sequences: from each evaluation text its beginning, a passage, and a long passage (whose last positions read
far back into the KV cache), and two conversations. The last 16 positions of each are scored.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgellama.bundle.golden import TOP_K, GoldenSequence
from edgellama.errors import TokenizerError
from edgellama.text.chat import ChatFormat, ChatTemplate, Message
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.windows import Text

SCORED = 16  # positions of a sequence; with 8 sequences, 4 targets and a vocabulary of 128k below 1.5 MB
LENGTHS = {"beginning": 16, "passage": 48, "long passage": 128}  # tokens

# Digits, contractions, accents, other scripts, emoji, code and line ends: what tokenizers disagree about.
CONVERSATIONS: Mapping[str, tuple[Message, ...]] = {
    "question": ({"role": "user", "content": "What is the capital of France, and what is it known for?"},),
    "conversation": (
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": "We'll pay 1234567 + 89 = ? €. Grüße, naïve café 🙂"},
        {"role": "assistant", "content": "That's 1,234,656 €."},
        {
            "role": "user",
            "content": "  def f(x):\n\treturn x ** 2  # 你好，世界\r\n\nWhat does it return for 12?",
        },
    ),
}


def choose_sequences(
    tokenizer: Tokenizer, chat_format: ChatFormat | None, texts: list[Text], context_length: int
) -> list[GoldenSequence]:
    """The sequences for a model with this tokenizer, none longer than `context_length`."""
    found = []
    for text in texts:
        paragraphs = [p for p in text.content.split("\n\n") if len(p) > 200]
        for number, (name, length) in enumerate(LENGTHS.items()):
            start = text.content.index(paragraphs[number * len(paragraphs) // len(LENGTHS)])
            content = text.content[start : start + 16 * length]
            found.append(_plain(f"{text.name}, {name}", tokenizer, content, min(length, context_length)))
    for name, messages in CONVERSATIONS.items():
        found.append(_chat(name, tokenizer, chat_format, messages, context_length))
    return found


def top_k(vocab_size: int) -> int:
    """How many tokens a position keeps: TOP_K, fewer where the vocabulary is that small."""
    return min(TOP_K, vocab_size - 1)


def _plain(name: str, tokenizer: Tokenizer, content: str, length: int) -> GoldenSequence:
    """The beginning of `content`, at most `length` tokens: cut where the text that is left encodes to them."""
    ids = tokenizer.encode(content)[:length]
    while True:
        text = tokenizer.decode(ids)
        tokens = tokenizer.encode(text)
        if len(tokens) <= length:
            return GoldenSequence(name, text, True, None, tuple(tokens), max(0, len(tokens) - SCORED))
        ids.pop()


def _chat(
    name: str,
    tokenizer: Tokenizer,
    chat_format: ChatFormat | None,
    messages: tuple[Message, ...],
    context_length: int,
) -> GoldenSequence:
    """A conversation as the model's template writes it; its last message alone where that cannot be had."""
    text = _rendered(tokenizer, messages)
    tokens = [] if text is None else tokenizer.encode(text, add_special_tokens=False)
    if text is None or not 0 < len(tokens) <= context_length:
        return _plain(name, tokenizer, messages[-1]["content"], context_length)
    flat = chat_format is not None and chat_format.render(messages, add_generation_prompt=True) == text
    return GoldenSequence(
        name, text, False, messages if flat else None, tuple(tokens), max(0, len(tokens) - SCORED)
    )


def _rendered(tokenizer: Tokenizer, messages: tuple[Message, ...]) -> str | None:
    if tokenizer.chat_template is None:
        return None
    try:
        template = ChatTemplate(
            tokenizer.chat_template, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
        )
        return template.render(messages, add_generation_prompt=True)
    except TokenizerError:  # a template that knows no system message, say
        return None
