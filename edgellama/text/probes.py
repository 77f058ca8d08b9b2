"""Texts on which tokenizers disagree: spaces, line ends, digits, accents, other scripts, emoji, code."""

from __future__ import annotations

PROBES = (
    "",
    " ",
    "a",
    "Hello, world! It's 1234567 o'clock, we'll see.",
    " leading and trailing ",
    "\n\n\ttabs and\r\n line ends\n ",
    *(" " * n + "x" for n in range(2, 34)),
    *("\n" * n for n in range(2, 10)),
    "def f(x):\n    if x > 0:\n        return {'a': [1, 2.5e-3]}  # done\n",
    "naïve café — “quotes” … ½ × Ångström",
    "e\u0301 combining, \u200bzero width, \u00a0no-break",
    "你好，世界。日本語のテキスト 한국어 ไทย हिन्दी עברית العربية",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 emoji 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa ------------------- ============ ........",
    "https://example.com/path?q=1&r=%20#frag <b>tag</b> \\n $x_{i}^2$",
)
