"""Entry point of the command line: the table of verbs, and exit codes. Heavy imports wait until a verb runs.

Exit codes: 0 passed, 1 a check failed, 2 usage or bad input, 3 inconclusive, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Protocol, cast

from edgellama._version import __version__
from edgellama.errors import EdgellamaError, UsageError

INTERRUPTED = 130
ON_WINDOWS = ("help", "recipes", "targets")  # verbs that need nothing of Linux or macOS


class VerbModule(Protocol):
    """Interface of a verb's file in this folder, `edgellama/cli/NAME.py`. `main` returns the exit code."""

    def options(self, p: argparse.ArgumentParser, /) -> None: ...
    def main(self, args: argparse.Namespace, /) -> int: ...


class Verb(NamedTuple):
    """A row of the table. No dataclass, whose import would cost a tenth of the time of `--help`.

    Attributes:
        summary: its line in `edgellama --help`.
        contained: the verb passes untrusted files to native libraries, so it runs in a process of its own.
    """

    summary: str
    contained: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, remedy=f"Try '{self.prog} --help'.")


VERBS: dict[str, Verb] = {
    "export": Verb("quantize and lower a checkpoint to a validated bundle"),
    "validate": Verb("compare a bundle with its checkpoint, with verdicts", contained=True),
    "run": Verb("generate text from a bundle", contained=True),
    "classify": Verb("label texts with a bundle of --task classify or guard", contained=True),
    "bench": Verb("measure speed and memory on this machine"),
    "challenge": Verb("make a challenge for a device, or answer one", contained=True),
    "inspect": Verb("show what is in a bundle, a checkpoint or an artifact", contained=True),
    "diff": Verb("show what changed between two bundles or reports", contained=True),
    "sign": Verb("sign a bundle with your key"),
    "verify": Verb("verify who signed a bundle, and that nothing was altered", contained=True),
    "sbom": Verb("write a bundle's bill of materials (CycloneDX)"),
    "delta": Verb("write what changed between two bundles to a small file"),
    "apply": Verb("make the new bundle from the old one and a delta", contained=True),
    "recipes": Verb("list the recipes"),
    "targets": Verb("list the targets"),
    "emulator": Verb("install the Arm emulator, or show it"),
    "doctor": Verb("examine this machine: packages, memory, and each target"),
    "demo": Verb("export, validate and run SmolLM2-135M-Instruct"),
    "help": Verb("read the documentation, by topic"),
}


def load_verb(name: str) -> VerbModule:
    """Imports the file of a verb. Only the verb that was typed is imported, which keeps `--help` fast."""
    return cast(VerbModule, import_module(f"edgellama.cli.{name}"))


if TYPE_CHECKING:  # Every file of a verb has the interface.
    from edgellama.cli import (
        apply,
        bench,
        challenge,
        classify,
        delta,
        demo,
        diff,
        doctor,
        emulator,
        export,
        help,
        inspect,
        recipes,
        run,
        sbom,
        sign,
        targets,
        validate,
        verify,
    )

    _FILES: tuple[VerbModule, ...]
    _FILES = (
        *(apply, bench, challenge, classify, delta, demo, diff, doctor, emulator, export),
        *(help, inspect, recipes, run, sbom, sign, targets, validate, verify),
    )


def _not_on_windows(verb: str) -> UsageError:
    return UsageError(
        f"`edgellama {verb}` does not run on Windows itself; it needs file locks, and processes with limits, as Linux and "
        "macOS have them",
        remedy="Run it in WSL 2, which is Linux. Its onnx and gguf artifacts then run on Windows, in ONNX Runtime and "
        "llama.cpp.",
    )


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Parser of the command line. only: the one verb whose options are needed, None for those of all."""
    parser = _Parser(
        prog="edgellama",
        description="Small Llama models, quantized, lowered and proven for the device they will run on.",
        epilog="`edgellama help` lists the documentation. Exit codes: 0 passed, 1 a check failed, 2 usage or bad input, 3 inconclusive, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"edgellama {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for name, verb in VERBS.items():
        description = f"{verb.summary[0].upper()}{verb.summary[1:]}."
        verb_parser = verbs.add_parser(name, help=verb.summary, description=description)
        if only in (None, name):
            load_verb(name).options(verb_parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Errors of the user or the system are printed.

    argv: None for the arguments of this process. Only then may the verb run in a process of its own.
    """
    try:
        if argv is None:
            # Torch reads it at its first allocation. Large pages cost a tenth of the time of small ones.
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        words = sys.argv[1:] if argv is None else argv
        # The verb is the first word, or the line is `--help`, `--version` or an error.
        args = build_parser(only=words[0] if words else "").parse_args(words)
        if sys.platform == "win32" and args.verb not in ON_WINDOWS:
            raise _not_on_windows(args.verb)
        if argv is None and VERBS[args.verb].contained:
            from edgellama.cli.isolation import run_contained

            return run_contained(lambda: main(sys.argv[1:]))
        from edgellama.host.log_filters import quiet_loggers

        quiet_loggers()
        code = load_verb(args.verb).main(args)
        sys.stdout.flush()  # raises BrokenPipeError here and not while Python exits
        return code
    except EdgellamaError as error:
        print(f"edgellama: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nedgellama: interrupted", file=sys.stderr)
        return INTERRUPTED
    except MemoryError:
        return _out_of_memory()
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch raises a RuntimeError
            raise
        return _out_of_memory()
    except BrokenPipeError:
        # The reader of the output has closed it (`| head`). Python would raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        print(
            f"edgellama: error: input or output that is not {error.encoding} ({error.reason})",
            file=sys.stderr,
        )
        print("  Use UTF-8 on both sides: PYTHONUTF8=1 makes Python do so.", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"edgellama: error: {error.filename or 'the system'}: {error.strerror}", file=sys.stderr)
        print("  Check the path, its permissions, and the free space of the disk.", file=sys.stderr)
        return 2


def _out_of_memory() -> int:
    print("edgellama: error: out of memory", file=sys.stderr)
    print(
        "  End other programs, choose a shorter --context, or use a machine with more memory.",
        file=sys.stderr,
    )
    return 2
