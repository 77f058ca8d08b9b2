"""Process in which `bench` runs one artifact, and its client `Worker`. A message is one line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from edgellama.errors import BundleError, EdgellamaError
from edgellama.host.progress import peak_resident_bytes

if TYPE_CHECKING:
    from edgellama.runtimes.base import Runtime
    from edgellama.runtimes.load import Opener
    from edgellama.targets import Target


@dataclass(frozen=True)
class Measured:
    """Times of one prompt and of the decode steps after it."""

    prefill_seconds: float
    decode_seconds: float
    decode_tokens: int


class Worker:
    """An artifact loaded in a process of its own.

    Raises BundleError if the process cannot load it or ends.

    Attributes:
        runtime: name of the runtime.
        threads: number of threads that it uses.
        load_seconds: time to load the artifact, with the runtime's library already imported.
    """

    def __init__(self, bundle: Path, target: str, threads: int | None) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        command = [
            sys.executable,
            "-m",
            "edgellama.commands.bench_worker",
            str(bundle),
            target,
            str(threads or 0),
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        try:
            first = self._answer()
        except EdgellamaError:
            self.close()
            raise
        self.runtime: str = first["runtime"]
        self.threads: int = first["threads"]
        self.load_seconds: float = first["load_seconds"]

    def measure(self, prompt_tokens: int, decode_tokens: int) -> Measured:
        """Measures one prefill of `prompt_tokens`, then `decode_tokens` decode steps of one token each."""
        return Measured(**self._ask({"prompt_tokens": prompt_tokens, "decode_tokens": decode_tokens}))

    def peak_bytes(self) -> int:
        """Peak resident memory of the process so far, in bytes."""
        return int(self._ask({})["peak_bytes"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process ended", "remedy": ""}
        if "error" in answer:
            raise BundleError(
                answer["error"], remedy=answer["remedy"] or "Run it with `edgellama run` to see why."
            )
        return answer

    def close(self) -> None:
        """Ends the process and waits for it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(bundle: Path, target: str, threads: int | None) -> None:
    """Loads the artifact, then answers requests until standard input ends.

    threads: None for the runtime's own number.
    """
    try:
        runtime, seconds = _load(bundle, target, threads)
    except EdgellamaError as error:
        _say({"error": error.message, "remedy": error.remedy})
        return
    _say({"runtime": runtime.name, "threads": threads or runtime.threads, "load_seconds": seconds})
    vocabulary = runtime.vocab_size
    for line in sys.stdin:
        request = json.loads(line)
        if not request:
            _say({"peak_bytes": peak_resident_bytes()})
            continue
        runtime.reset()
        # Speed does not depend on the tokens, but they should read different rows of the embedding.
        tokens = [(7919 * i + 11) % vocabulary for i in range(request["prompt_tokens"])]
        start = time.perf_counter()
        logits = runtime.forward(tokens)
        prefilled = time.perf_counter()
        for _ in range(request["decode_tokens"]):
            logits = runtime.forward([int(logits.argmax())])
        done = time.perf_counter()
        _say(asdict(Measured(prefilled - start, done - prefilled, request["decode_tokens"])))


def _load(path: Path, target: str, threads: int | None) -> tuple[Runtime, float]:
    from edgellama.bundle import Bundle
    from edgellama.targets import find_target

    # A file is a GGUF file without a bundle.
    artifact = path if path.is_file() else Bundle.open(path).artifact(target)
    opener = _opener(find_target(target))
    # The first call imports the runtime's library and reads the file. Apps wait only for the second.
    opener(artifact, threads=threads).close()
    start = time.perf_counter()
    return opener(artifact, threads=threads), time.perf_counter() - start


def _opener(target: Target) -> Opener:
    """Opener of the form that apps run."""
    from edgellama.runtimes.load import open_device_form, opener_for

    def open_form(path: Path, *, threads: int | None = None) -> Runtime:
        return open_device_form(target, path, threads=threads) or opener(path, threads=threads)

    opener = opener_for(target)
    return open_form


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) or None)
