"""Runs a .pte for a process without ExecuTorch: tokens on standard input, logits on standard output.

    python -m tests.helpers.logits_server model.pte

All values are little-endian int32 and float32. The server first writes vocabulary size, context length and the number
of logits. A request is position, count and tokens. The answer is logits. The server ends at the end of its input.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from typing import BinaryIO

from edgellama.runtimes.xnnpack import PteRuntime


def serve(path: Path, source: BinaryIO, sink: BinaryIO) -> None:
    """Answers requests from `source` on `sink` until `source` ends."""
    runtime = PteRuntime(path)
    sink.write(struct.pack("<3i", runtime.vocab_size, runtime.context_length, runtime.output_size))
    sink.flush()
    while head := source.read(8):
        position, count = struct.unpack("<2i", head)
        tokens = struct.unpack(f"<{count}i", source.read(4 * count))
        runtime.position = position
        sink.write(runtime.forward(tokens).astype("<f4").tobytes())
        sink.flush()


if __name__ == "__main__":
    # Prints of libraries go to standard error, so that standard output holds numbers only.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(Path(sys.argv[1]), sys.stdin.buffer, output)
