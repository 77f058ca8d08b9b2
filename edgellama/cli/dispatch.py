"""Entry point of the command line: the table of verbs, and exit codes. Heavy imports wait until a verb runs.

Exit codes: 0 passed, 1 a check failed, 2 usage or bad input, 3 inconclusive, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

from edgellama._version import __version__
from edgellama.cli import bench, demo, diff, doctor, export, help, inspect, recipes, run, targets, validate
from edgellama.errors import EdgellamaError, UsageError

INTERRUPTED = 130


class Verb(Protocol):
    """Interface of a verb's module in this folder. `main` returns the exit code.

    Attributes:
        SUMMARY: its line in `edgellama --help`.
        CONTAINED: the verb passes untrusted files to native libraries, so it runs in a process of its own.
    """

    SUMMARY: str
    CONTAINED: bool

    def options(self, p: argparse.ArgumentParser, /) -> None: ...
    def main(self, args: argparse.Namespace, /) -> int: ...


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, remedy=f"Try '{self.prog} --help'.")


VERBS: dict[str, Verb] = {
    "export": export,
    "validate": validate,
    "run": run,
    "bench": bench,
    "inspect": inspect,
    "diff": diff,
    "recipes": recipes,
    "targets": targets,
    "doctor": doctor,
    "demo": demo,
    "help": help,
}


def build_parser() -> argparse.ArgumentParser:
    """Parser of the complete command line."""
    parser = _Parser(
        prog="edgellama",
        description="Small Llama models, quantized, lowered and proven for the device they will run on.",
        epilog="`edgellama help` lists the documentation. Exit codes: 0 passed, 1 a check failed, 2 usage or bad input, 3 inconclusive, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"edgellama {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for name, verb in VERBS.items():
        description = f"{verb.SUMMARY[0].upper()}{verb.SUMMARY[1:]}."
        verb.options(verbs.add_parser(name, help=verb.SUMMARY, description=description))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Errors of the user or the system are printed.

    argv: None for the arguments of this process. Only then may the verb run in a process of its own.
    """
    try:
        args = build_parser().parse_args(argv)
        if argv is None and VERBS[args.verb].CONTAINED:
            from edgellama.cli.isolation import run_contained

            return run_contained(lambda: main(sys.argv[1:]))
        from edgellama.host.log_filters import quiet_loggers

        quiet_loggers()
        code = VERBS[args.verb].main(args)
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
