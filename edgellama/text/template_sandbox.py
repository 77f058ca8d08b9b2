"""Sandbox for chat templates, which are untrusted programs: a process with limits on time, memory and output.

Jinja's immutable sandbox keeps a template from objects that it must not reach. It does not stop
`{{ "x" * 10**10 }}`, nested loops, or work that jinja does while it compiles (it folds constants). Nothing
inside a process can stop one long call into C. So a child process compiles and renders. It holds no model and
may be killed at any time. One child serves all templates of a process, and a new one starts after a kill.

A child that cannot start, or has less memory or time than the limits here, says nothing about a template. That is
an error of the machine.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from edgellama.errors import ResourceError

MAX_OUTPUT = 1 << 24  # characters of a rendered conversation
CPU_SECONDS = 2  # per template, independent of other load; the longest in use needs some milliseconds
WALL_SECONDS = 60  # per template; reached only if the child gets no processor
MAX_MEMORY = 1 << 29  # bytes of address space; Python with jinja takes a tenth
START_SECONDS = 120  # until the child is ready; reached only if it gets no processor

# Variables without which some Pythons do not start: libpython beside no search path, Windows' system folder.
_NEEDED = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "SYSTEMROOT")
_READY = b"ready\n"


class TemplateFailed(Exception):
    """Failure of a template or of its sandbox, in one sentence.

    cause: `refused` if the template itself raised it, `undefined` for a name that is not defined, else `failed`.
    """

    def __init__(self, reason: str, cause: str = "failed") -> None:
        super().__init__(reason)
        self.cause = cause


def compile_template(source: str) -> None:
    """Raises TemplateFailed if `source` is not valid jinja or does not compile within the limits."""
    _ask({"source": source})


def render_template(source: str, variables: Mapping[str, Any], now: datetime | None = None) -> str:
    """Text of the template for JSON variables. Raises TemplateFailed if it fails or exceeds a limit.

    now: time that `strftime_now` formats; None leaves this function undefined.
    """
    return _ask({"source": source, "variables": variables, "now": now and now.isoformat()})


_lock = threading.Lock()
_child: _Child | None = None


@atexit.register
def _end() -> None:
    global _child
    if _child is not None and _child.alive():
        _child.kill()
    _child = None


def _ask(request: Mapping[str, Any]) -> str:
    global _child
    with _lock:
        for _ in range(
            2
        ):  # a second child, if the first has used up a processor time that the machine limits
            if _child is None or not _child.alive():
                if _child is not None:
                    _child.close()
                _child = _Child()
            try:
                answer = _child.ask(request)
            except BaseException:
                _child.kill()
                _child = None
                raise
            if "machine" not in answer:
                break
            _child.kill()
            _child = None
    if "machine" in answer:
        _refuse(answer["machine"])
    if "error" in answer:
        raise TemplateFailed(str(answer["error"]), str(answer.get("cause", "failed")))
    return str(answer["text"])


class _Child:
    """Process that runs templates, one request at a time."""

    def __init__(self) -> None:
        # The child is isolated from the rest of the environment and the working directory. Its modules come from the same
        # places as here.
        paths = [path for path in sys.path if path and os.path.isdir(path)]
        program = (
            "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
            "from edgellama.text.template_sandbox import serve; serve()"
        )
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", program, json.dumps(paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment_of_child(),
            close_fds=True,
        )
        if self._line(time.monotonic() + START_SECONDS) != _READY:
            self.kill()
            _refuse(_reason_for_no_start())

    def alive(self) -> bool:
        """True if it still runs and this process started it, not the one that this was forked from."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._line(time.monotonic() + WALL_SECONDS)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise TemplateFailed(_cause_of_death(self._process))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _line(self, deadline: float) -> bytes:
        """Next line of its answers, or the part received before it dies or the time is up."""
        assert self._process.stdout is not None
        descriptor, received = self._process.stdout.fileno(), bytearray()
        while not received.endswith(b"\n"):
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(descriptor, 1 << 20) if ready else b""
            if not piece or len(received) > 7 * MAX_OUTPUT:  # JSON takes up to six bytes for a UTF-16 unit
                break
            received += piece
        return bytes(received)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.close()

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # unwritten data is of no use to a dead process


def _cause_of_death(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return f"it did not end within {WALL_SECONDS} seconds"
    import signal

    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"it did not end within {CPU_SECONDS} seconds of processor time"
    return f"the process that ran it ended with {code}"


def _environment_of_child() -> dict[str, str]:
    return {"PYTHONHASHSEED": "0", **{name: os.environ[name] for name in _NEEDED if name in os.environ}}


def _reason_for_no_start() -> str:
    """Last line that a Python in the child's environment prints when it imports nothing but jinja2."""
    program = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import jinja2"
    try:
        tried = subprocess.run(
            [sys.executable, "-I", "-c", program, json.dumps([path for path in sys.path if path])],
            env=_environment_of_child(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=START_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    said = tried.stderr.decode(errors="replace").strip().splitlines()
    return f"it ended before it was ready ({said[-1]:.200})" if said else "it ended before it was ready"


def _refuse(reason: str) -> NoReturn:
    raise ResourceError(
        f"the process that runs chat templates could not work: {reason}",
        remedy=f"It needs {MAX_MEMORY >> 20} MiB of address space and {CPU_SECONDS + 1} seconds of processor time "
        "(see `ulimit -v` and `ulimit -t`), and a Python that starts with these variables alone: "
        f"{', '.join(_NEEDED)}.",
    )


class _Refused(Exception):
    """Message that a template raises by `raise_exception`."""


_CAUSES = {"_Refused": "refused", "UndefinedError": "undefined"}


def serve() -> None:
    """Loop of the child: answers requests, a line of JSON each, until standard input ends."""
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _environment()
    sys.stdout.buffer.write(_READY)
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        memory = _limited(resource, resource.RLIMIT_AS, MAX_MEMORY) if sys.platform == "linux" else MAX_MEMORY
        if not _restart_clock(resource):
            answer = {"machine": "the limit of its processor time is nearly used up"}
            sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
            return
        try:
            answer = {"text": _answer(request)}
        except MemoryError:
            answer = (
                {"error": f"it needs more than {MAX_MEMORY >> 20} MiB of memory"}
                if memory == MAX_MEMORY
                else {"machine": f"it may use {memory >> 20} MiB of address space"}
            )
        except RecursionError:
            answer = {"error": "nesting or recursion without end"}
        except Exception as error:  # noqa: BLE001 (a template may fail in any way)
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            answer = {"error": reason, "cause": _CAUSES.get(type(error).__name__, "failed")}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _limited(resource: Any, kind: int, most: int) -> int:
    """Limits a resource of this process to `most`, or to what the machine allows if that is less."""
    _, hard = resource.getrlimit(kind)
    allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (allowed, hard))
    return allowed


def _restart_clock(resource: Any) -> bool:
    """Makes SIGXCPU end the process after CPU_SECONDS more of processor time. False if it has less left."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    end = int(used) + 1 + CPU_SECONDS
    return _limited(resource, resource.RLIMIT_CPU, end) == end


def _answer(request: Mapping[str, Any]) -> str:
    template = _compiled(request["source"])
    if "variables" not in request:
        return ""
    variables = dict(request["variables"])
    if request.get("now") is not None:
        now = datetime.fromisoformat(request["now"])
        variables["strftime_now"] = lambda form: now.strftime(form)
    pieces, length = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_OUTPUT:
            raise ValueError(f"more than {MAX_OUTPUT} characters of output")
    return "".join(pieces)


@lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from error


@lru_cache(maxsize=1)
def _environment() -> Any:
    """Jinja environment as in transformers. A request may bring its time; the clock is not read."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """{% generation %} … {% endgeneration %}, rendered as its content.

        The tag marks the assistant's text for training.
        """

        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise _Refused(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
