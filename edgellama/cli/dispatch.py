"""The command line: a table of verbs, their options, and exit codes. Nothing heavy is imported before a verb runs.

Exit codes: 0 done and passed · 1 ran, and a check failed · 2 usage or bad input · 3 inconclusive · 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from edgellama import __version__
from edgellama.errors import EdgellamaError, UsageError

INTERRUPTED = 130


@dataclass(frozen=True)
class Verb:
    """A line of `edgellama --help`; `run` is `module:function`, called with the parsed options, returning the exit code.

    contained: it hands files that may come from strangers to native libraries, and so gets a process of its own.
    """

    summary: str
    options: Callable[[argparse.ArgumentParser], None]
    run: str
    contained: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, remedy=f"Try '{self.prog} --help'.")


def _export(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="Hugging Face directory, .gguf file, or Meta directory"
    )
    p.add_argument("-o", "--output", metavar="BUNDLE", type=Path, help="the bundle to write")
    p.add_argument(
        "-t", "--target", metavar="TARGET", action="append", help="may be repeated (default: xnnpack)"
    )
    p.add_argument(
        "-r",
        "--recipe",
        default="int4",
        help="a name, or a recipe file ending in .json (default: %(default)s)",
    )
    p.add_argument(
        "--context", metavar="N", type=_count, help="KV cache in tokens (default: the model's, at most 2048)"
    )
    p.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        action="append",
        help="text for a calibrated recipe, UTF-8; may be repeated (default: texts that ship with edgellama)",
    )
    p.add_argument(
        "--max-bytes", metavar="SIZE", type=_size, help="fail when an artifact is larger; 120MB, 1.5GiB, …"
    )
    p.add_argument(
        "--max-kl",
        metavar="X",
        type=float,
        help="fail above this mean KL, nats per token (default: the recipe's)",
    )
    p.add_argument(
        "--plan",
        action="store_true",
        help="print bytes, memory and time that are expected, and what recipe `auto` can choose; export nothing",
    )
    p.add_argument(
        "--plan-plot",
        metavar="FILE",
        type=Path,
        help="the choices of `-r auto` as a picture: .svg, .png or .pdf",
    )
    p.add_argument("--no-validate", action="store_true", help="do not run the gate at the end")
    p.add_argument("--force", action="store_true", help="replace an existing bundle")
    _report_files(p)
    _json(p)


def _validate(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", metavar="BUNDLE", type=Path)
    p.add_argument(
        "--reference",
        metavar="CHECKPOINT",
        help="the full-precision checkpoint that the bundle was made from",
    )
    p.add_argument(
        "-t",
        "--target",
        metavar="TARGET",
        action="append",
        help="may be repeated (default: all in the bundle)",
    )
    p.add_argument(
        "--text", metavar="FILE", type=Path, action="append", help="evaluation text, UTF-8; may be repeated"
    )
    p.add_argument(
        "--tokens",
        metavar="N",
        type=_count,
        default=4096,
        help="tokens to score at first (default: %(default)s)",
    )
    p.add_argument(
        "--max-kl", metavar="X", type=float, help="mean KL, nats per token (default: the recipe's)"
    )
    p.add_argument("--min-top1", metavar="X", type=float, help="share of positions whose top token agrees")
    p.add_argument(
        "--max-ppl-ratio", metavar="X", type=float, help="perplexity of the artifact over the reference's"
    )
    p.add_argument("--layers", action="store_true", help="also measure where the error comes from")
    p.add_argument(
        "--layers-plot", metavar="FILE", type=Path, help="the same as a picture: .svg, .png or .pdf"
    )
    p.add_argument(
        "--device-log",
        metavar="FILE",
        type=Path,
        action="append",
        help="what an app wrote when it replayed the golden vectors; may be repeated",
    )
    p.add_argument(
        "--baseline",
        metavar="REPORT",
        type=Path,
        help="an earlier report of the same text (--json), to compare with token by token",
    )
    p.add_argument(
        "--max-kl-increase",
        metavar="X",
        type=float,
        help="what the mean KL may grow by over the baseline's, nats per token (default: 5 %% of it)",
    )
    _report_files(p)
    p.add_argument(
        "--bench", metavar="FILE", type=Path, help="a result of `bench --json` that --html shows as well"
    )
    _json(p)


def _run(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", metavar="BUNDLE", type=Path)
    p.add_argument("-t", "--target", metavar="TARGET", help="default: the bundle's first")
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("-p", "--prompt", metavar="PROMPT", help="continue this text")
    mode.add_argument("--chat", action="store_true", help="chat; reads turns from standard input")
    p.add_argument("--system", metavar="TEXT", help="system message of the chat")
    p.add_argument(
        "-n",
        "--max-tokens",
        metavar="TOKENS",
        type=_count,
        default=256,
        help="per answer (default: %(default)s)",
    )
    p.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 is greedy (default: %(default)s)"
    )
    p.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="nucleus sampling (default: %(default)s)"
    )
    p.add_argument("--seed", metavar="S", type=int, default=0, help="of the sampler (default: %(default)s)")


def _bench(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "bundle", metavar="BUNDLE", type=Path, nargs="+", help="one, or several to compare in turns"
    )
    p.add_argument(
        "-t",
        "--target",
        metavar="TARGET",
        action="append",
        help="may be repeated (default: all in the bundles)",
    )
    p.add_argument(
        "--prompt-tokens",
        metavar="N",
        type=_count,
        action="append",
        help="length of the prompt, and the depth of the cache where decoding starts; may be repeated "
        "(default: 32, 128 and 512, as far as they fit)",
    )
    p.add_argument(
        "--decode-tokens",
        metavar="N",
        type=_count,
        default=64,
        help="after each prompt (default: %(default)s)",
    )
    p.add_argument("--repeat", metavar="N", type=_count, default=7, help="turns (default: %(default)s)")
    p.add_argument("--threads", metavar="N", type=_count, help="default: the runtime's own number")
    p.add_argument("--html", metavar="FILE", type=_file, help="write the result as a page with plots")
    _json(p)


def _inspect(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "path", metavar="PATH", type=Path, help="a bundle, a checkpoint, a .pte, an .mlpackage, an .onnx"
    )
    _json(p)


def _diff(p: argparse.ArgumentParser) -> None:
    what = "a bundle, or a file that `validate --json` or `bench --json` wrote"
    p.add_argument("a", metavar="A", type=Path, help=what)
    p.add_argument("b", metavar="B", type=Path, help="another of the same kind")
    p.add_argument(
        "--max-kl-increase",
        metavar="X",
        type=float,
        help="fail when the mean KL of B is larger by more, nats per token; on the same tokens of both",
    )
    p.add_argument(
        "--max-bytes-increase",
        metavar="SIZE",
        type=_growth,
        help="fail when an artifact of B is larger by more; 0, 500KB, 2MiB, …",
    )
    p.add_argument("--identical", action="store_true", help="fail when anything differs")
    _json(p)


def _recipes(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", metavar="NAME", nargs="?", help="show one recipe whole")
    _json(p)


def _targets(p: argparse.ArgumentParser) -> None:
    _json(p)


def _doctor(p: argparse.ArgumentParser) -> None:
    _json(p)


def _demo(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "-o", "--output", metavar="BUNDLE", type=Path, default=Path("SmolLM2-135M-Instruct.edgellama")
    )
    p.add_argument("-r", "--recipe", default="int4-fast", help="default: %(default)s, which takes least time")
    p.add_argument("--context", metavar="N", type=_count, default=2048, help="default: %(default)s")
    p.add_argument("--force", action="store_true", help="replace an existing bundle")


VERBS: dict[str, Verb] = {
    "export": Verb(
        "quantize and lower a checkpoint to a validated bundle", _export, "edgellama.cli.verbs:export"
    ),
    "validate": Verb(
        "compare a bundle with its checkpoint, with verdicts",
        _validate,
        "edgellama.cli.verbs:validate",
        contained=True,
    ),
    "run": Verb("generate text from a bundle", _run, "edgellama.cli.run:run", contained=True),
    "bench": Verb("measure speed and memory on this machine", _bench, "edgellama.commands.bench:run"),
    "inspect": Verb(
        "show what is in a bundle, a checkpoint or an artifact",
        _inspect,
        "edgellama.commands.inspect:run",
        contained=True,
    ),
    "diff": Verb(
        "show what changed between two bundles or reports",
        _diff,
        "edgellama.commands.diff:run",
        contained=True,
    ),
    "recipes": Verb("list the recipes", _recipes, "edgellama.cli.verbs:recipes"),
    "targets": Verb("list the targets", _targets, "edgellama.cli.verbs:targets"),
    "doctor": Verb(
        "examine this machine: what it can export and run", _doctor, "edgellama.commands.doctor:run"
    ),
    "demo": Verb("export, validate and run SmolLM2-135M-Instruct", _demo, "edgellama.cli.demo:run"),
}


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="edgellama",
        description="Small Llama models, quantized, lowered and proven for the device they will run on.",
        epilog="Exit codes: 0 passed, 1 a check failed, 2 usage or bad input, 3 inconclusive, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"edgellama {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for name, verb in VERBS.items():
        verb.options(
            verbs.add_parser(
                name, help=verb.summary, description=f"{verb.summary[0].upper()}{verb.summary[1:]}."
            )
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: its exit code. Prints errors; never raises them.

    argv: None for this process's own, as the program `edgellama`; only then does a verb get a process of its own.
    """
    try:
        args = build_parser().parse_args(argv)
        if argv is None and VERBS[args.verb].contained:
            from edgellama.cli.isolation import run_contained

            return run_contained(lambda: main(sys.argv[1:]))
        if args.verb == "export" and args.output is None and not (args.plan or args.plan_plot):
            raise UsageError(
                "the following arguments are required: -o/--output", remedy="Give -o BUNDLE, or --plan."
            )
        from edgellama.host.log_filters import quiet_loggers

        quiet_loggers()
        module, _, function = VERBS[args.verb].run.partition(":")
        code = int(getattr(import_module(module), function)(args))
        sys.stdout.flush()  # here, so that a reader who went away is noticed below and not while Python exits
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
        if "can't allocate memory" not in str(error):  # torch's own way to say it
            raise
        return _out_of_memory()
    except BrokenPipeError:
        # The reader of our output went away (`| head`); Python would complain again while exiting.
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


def _report_files(p: argparse.ArgumentParser) -> None:
    p.add_argument("--html", metavar="FILE", type=_file, help="write the gate's report as a page with plots")
    p.add_argument(
        "--markdown", metavar="FILE", type=_file, help="write a summary in Markdown, for the page of a CI job"
    )
    p.add_argument("--junit", metavar="FILE", type=_file, help="write the checks as JUnit XML")


def _out_of_memory() -> int:
    print("edgellama: error: out of memory", file=sys.stderr)
    print(
        "  End other programs, choose a shorter --context, or use a machine with more memory.",
        file=sys.stderr,
    )
    return 2


def _json(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--json",
        metavar="FILE",
        type=_output,
        help="write the result as JSON to FILE, or to standard output for -",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _output(text: str) -> str:
    """A file that can be written: better refused here than after an export of minutes."""
    if text != "-" and (Path(text).is_dir() or not Path(text).absolute().parent.is_dir()):
        raise argparse.ArgumentTypeError(f"cannot write the file {text!r}: no such directory, or it is one")
    return text


def _file(text: str) -> Path:
    if text == "-":
        raise argparse.ArgumentTypeError("needs the name of a file; standard output is for --json")
    return Path(_output(text))


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _growth(text: str) -> int:
    return 0 if text == "0" else _size(text)


def _size(text: str) -> int:
    number = text.rstrip("BbKkMmGgIi ")
    unit = text[len(number) :].strip().upper()
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"not a size: {text!r}; use bytes, or KB, MB, GB, KiB, MiB, GiB")
    return size
