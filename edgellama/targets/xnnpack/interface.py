"""Interface of a .pte for XNNPACK: the tokens that one call takes."""

from __future__ import annotations

LONGEST_CALL = 2048  # tokens


def longest_call(context_length: int) -> int:
    """Number of tokens that one call takes at most.

    ExecuTorch plans its buffers for the longest call when it loads the file. For a context of 32,768 tokens, those of
    Llama 3.2 1B would take 1.2 GB. The apps feed 512 tokens at a time, and ExecuTorch's runner as many as the file says.

    >>> longest_call(128), longest_call(32768)
    (128, 2048)
    """
    return min(context_length, LONGEST_CALL)
