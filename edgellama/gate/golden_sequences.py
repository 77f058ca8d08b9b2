"""Choice of the golden sequences. Needs no runtime.

There are nine sequences: three from each of the two evaluation texts, two conversations, and one that is as
long as the context. A text gives its beginning, a passage and a long passage. A context of more than MIDDLE
tokens adds a tenth of that length. The last 16 positions of each sequence are scored.

The two longest sequences are texts of the gate's long window: records that are dense in digits, prose, and the
first records again. Their scored positions are digits that the model read at the beginning. Emulated Arm is too
slow for a long context, and the tenth sequence shows it the positions that the short ones lack.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from edgellama.bundle.golden import TOP_K, GoldenSequence
from edgellama.errors import TokenizerError
from edgellama.gate.limits import LONGEST
from edgellama.gate.long_window import long_text
from edgellama.text.chat import ChatFormat, ChatTemplate, Message
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.windows import Text

# Scored positions of a sequence. With 10 sequences and a vocabulary of 128k, they take 0.3 MB for each target.
SCORED = 16
LENGTHS = {"beginning": 16, "passage": 48, "long passage": 128}  # tokens
MIDDLE = 320  # tokens of the sequence between the passages and the whole context

# Text on which tokenizers disagree: digits, contractions, accents, other scripts, emoji, code and line ends.
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
    tokenizer: Tokenizer,
    chat_format: ChatFormat | None,
    texts: list[Text],
    context_length: int,
    now: datetime | None = None,
) -> list[GoldenSequence]:
    """Sequences for a model with this tokenizer, at most `context_length` tokens each.

    now: date that the bundle fixes for its chat template.
    """
    sequences = []
    for text in texts:
        paragraphs = [p for p in text.content.split("\n\n") if len(p) > 200]
        for number, (name, length) in enumerate(LENGTHS.items()):
            start = text.content.index(paragraphs[number * len(paragraphs) // len(LENGTHS)])
            content = text.content[start : start + 16 * length]
            sequences.append(_plain(f"{text.name}, {name}", tokenizer, content, min(length, context_length)))
    for name, messages in CONVERSATIONS.items():
        sequences.append(_chat(name, tokenizer, chat_format, messages, context_length, now))
    longest = {"whole context": min(context_length, LONGEST)}
    if context_length > MIDDLE:
        longest = {"middle": MIDDLE, **longest}
    for name, length in longest.items():
        content = tokenizer.decode(long_text(tokenizer, texts, length))
        sequences.append(_plain(name, tokenizer, content, length))
    return sequences


def top_k(vocab_size: int) -> int:
    """Number of tokens kept at each position: TOP_K, or fewer for a vocabulary of at most TOP_K tokens."""
    return min(TOP_K, vocab_size - 1)


def _plain(name: str, tokenizer: Tokenizer, content: str, length: int) -> GoldenSequence:
    """The beginning of `content`, at most `length` tokens, shortened until the text encodes to that many."""
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
    now: datetime | None,
) -> GoldenSequence:
    """A conversation rendered by the model's chat template.

    The last message alone, as plain text, if no template is usable or the conversation exceeds the context.
    """
    text = _rendered(tokenizer, messages, now)
    tokens = [] if text is None else tokenizer.encode(text, add_special_tokens=False)
    if text is None or not 0 < len(tokens) <= context_length:
        return _plain(name, tokenizer, messages[-1]["content"], context_length)
    flat = chat_format is not None and chat_format.render(messages, add_generation_prompt=True) == text
    return GoldenSequence(
        name, text, False, messages if flat else None, tuple(tokens), max(0, len(tokens) - SCORED)
    )


def _rendered(tokenizer: Tokenizer, messages: tuple[Message, ...], now: datetime | None) -> str | None:
    if tokenizer.chat_template is None:
        return None
    try:
        return ChatTemplate.of(tokenizer, now).render(messages, add_generation_prompt=True)
    except TokenizerError:  # for example, a template without system messages
        return None
