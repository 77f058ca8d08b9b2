"""Verb `bench` of the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from edgellama.cli.arguments import count, json_option, output_file, write_json
from edgellama.errors import UsageError


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "bundle",
        metavar="BUNDLE",
        type=Path,
        nargs="+",
        help="one bundle, or several to compare in turns; also GGUF files of anybody's",
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
        type=count,
        action="append",
        help="length of the prompt, and the depth of the cache where decoding starts; may be repeated "
        "(default: 32, 128 and 512, as far as they fit)",
    )
    p.add_argument(
        "--decode-tokens",
        metavar="N",
        type=count,
        help="tokens to decode after each prompt (default: 64)",
    )
    p.add_argument("--repeat", metavar="N", type=count, help="number of turns (default: 7)")
    p.add_argument(
        "--threads", metavar="N", type=count, help="threads of the runtime (default: its own number)"
    )
    p.add_argument(
        "--emulate",
        metavar="arm64[:CPU]",
        action="append",
        default=[],
        help="count instructions on an emulated Arm processor, in one thread, instead of measuring time; "
        "may be repeated (default: a prompt of 32 tokens, and 4 decoded ones)",
    )
    p.add_argument(
        "--profile",
        action="store_true",
        help="show where the time of a decoded token goes, by part of the model, for target xnnpack "
        "(default: 16 decoded tokens, 5 turns)",
    )
    p.add_argument("--html", metavar="FILE", type=output_file, help="write the result as a page with plots")
    json_option(p)


def main(args: argparse.Namespace) -> int:
    """Measures the bundles and prints the result. Returns 0."""
    if args.emulate:
        return count_instructions(args)
    if args.profile:
        return profile(args)
    from edgellama.bundle import Bundle
    from edgellama.commands.bench import DECODE_TOKENS, PROMPT_TOKENS, REPEAT, bench, candidates
    from edgellama.commands.validate_gguf import is_foreign
    from edgellama.files import write_text
    from edgellama.host.progress import Progress
    from edgellama.report.page import PageData, render
    from edgellama.report.tables import to_text

    files = [path for path in args.bundle if is_foreign(path)]
    bundles = [Bundle.open(path) for path in args.bundle if path not in files]
    data = bench(
        candidates(bundles, args.target, files),
        prompt_tokens=args.prompt_tokens or PROMPT_TOKENS,
        decode_tokens=args.decode_tokens or DECODE_TOKENS,
        repeat=args.repeat or REPEAT,
        threads=args.threads,
        progress=Progress(sys.stderr),
    )
    print(to_text(shown(data)), file=sys.stderr if args.json == "-" else sys.stdout)
    if args.html is not None:
        name = ", ".join(dict.fromkeys(path.name for path in args.bundle))
        write_text(args.html, render(PageData(name, bench=data)))
    write_json(args.json, data)
    return 0


def count_instructions(args: argparse.Namespace) -> int:
    """Counts the instructions of the bundles on emulated processors, and prints them. Returns 0."""
    from edgellama.bundle import Bundle
    from edgellama.commands.bench import candidates
    from edgellama.commands.bench_emulated import DECODE_TOKENS, PROMPT_TOKENS, count_instructions
    from edgellama.host.progress import Progress
    from edgellama.report.tables import to_text

    given = [name for name in ("repeat", "threads", "html", "profile") if getattr(args, name)]
    if given:
        raise UsageError(
            f"--{given[0]} has no meaning for counts of instructions",
            remedy="Leave it out: emulation has one thread, and a count needs no repeats.",
        )
    data = count_instructions(
        candidates([Bundle.open(path) for path in args.bundle], args.target),
        args.emulate,
        prompt_tokens=args.prompt_tokens or PROMPT_TOKENS,
        decode_tokens=args.decode_tokens or DECODE_TOKENS,
        progress=Progress(sys.stderr),
    )
    rows = [
        {
            "artifact": row["name"],
            "processor": row["processor"],
            "prompt": row["prompt_tokens"],
            "prefill, millions": f"{row['prefill_instructions'] / 1e6:.1f}",
            "a decoded token, millions": f"{row['decode_instructions']['median'] / 1e6:.1f}"
            f" ({row['decode_instructions']['low'] / 1e6:.1f}-{row['decode_instructions']['high'] / 1e6:.1f})",
        }
        for row in data["rows"]
    ]
    text = to_text({"emulator": f"qemu {data['qemu']}", "instructions": rows})
    print(text, file=sys.stderr if args.json == "-" else sys.stdout)
    write_json(args.json, data)
    return 0


def profile(args: argparse.Namespace) -> int:
    """Prints the time of a decoded token by part of the model. Returns 0."""
    from edgellama.bundle import Bundle
    from edgellama.commands.bench import PROMPT_TOKENS, candidates
    from edgellama.commands.bench_profile import DECODE_TOKENS, REPEAT, profile
    from edgellama.files import write_text
    from edgellama.host.progress import Progress
    from edgellama.report.page import PageData, render
    from edgellama.report.tables import to_text

    data = profile(
        candidates([Bundle.open(path) for path in args.bundle], args.target),
        prompt_tokens=args.prompt_tokens or PROMPT_TOKENS,
        decode_tokens=args.decode_tokens or DECODE_TOKENS,
        repeat=args.repeat or REPEAT,
        threads=args.threads,
        progress=Progress(sys.stderr),
    )
    print(to_text(shown_profile(data)), file=sys.stderr if args.json == "-" else sys.stdout)
    if args.html is not None:
        name = ", ".join(dict.fromkeys(path.name for path in args.bundle))
        write_text(args.html, render(PageData(name, profile=data)))
    write_json(args.json, data)
    return 0


def shown_profile(data: dict[str, Any]) -> dict[str, Any]:
    """The profile for the terminal: milliseconds of a decoded token, medians with their ranges."""

    def spread(value: dict[str, float]) -> str:
        median, low, high = (1000 * value[key] for key in ("median", "low", "high"))
        return f"{median:.2f} ({low:.2f}-{high:.2f})"

    return {
        "machine": f"{data['machine']['processor']}, {data['machine']['cores']} cores",
        "executorch": data["executorch"],
        "decoded token": [
            {
                "artifact": row["name"],
                "prompt": row["prompt_tokens"],
                "threads": row["threads"],
                "ms": spread(row["decode_s"]),
                "ms with tracer": spread(row["traced_decode_s"]),
                "in the method": f"{row['covered']:.1%}",
            }
            for row in data["rows"]
        ],
        "parts": [
            {
                "artifact": row["name"],
                "prompt": row["prompt_tokens"],
                "part": part["part"],
                "ms": spread(part["seconds"]),
                "share": f"{part['share']:.1%}",
            }
            for row in data["rows"]
            for part in row["parts"]
        ],
    }


def shown(data: dict[str, Any]) -> dict[str, Any]:
    """The result for the terminal: one line for each run, medians with their ranges."""

    def spread(value: dict[str, float], scale: float = 1.0, digits: int = 1) -> str:
        low, high = value["low"] * scale, value["high"] * scale
        return f"{value['median'] * scale:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"

    def interval(value: dict[str, Any]) -> str:
        return f"{value['mean']:.3f} [{value['ci95'][0]:.3f}, {value['ci95'][1]:.3f}]"

    return {
        "machine": f"{data['machine']['processor']}, {data['machine']['cores']} cores",
        "bandwidth": f"{spread(data['bandwidth'], 1e-9)} GB/s",
        "artifacts": [
            {
                "artifact": row["name"],
                "threads": row["threads"],
                "load ms": round(1000 * row["load_s"]),
                "peak MB": round(row["peak_resident_bytes"] / 1e6),
            }
            for row in data["candidates"]
        ],
        "speed": [
            {
                "artifact": row["name"],
                "prompt": line["prompt_tokens"],
                "first token ms": spread(line["time_to_first_token_s"], 1000),
                "prefill tok/s": spread(line["prefill_tok_s"]),
                "decode tok/s": spread(line["decode_tok_s"]),
                "MB/token": f"{line['bytes_per_token'] / 1e6:.1f}" if line["bytes_per_token"] else "",
                "of bandwidth": f"{line['bandwidth_share']:.0%}" if line["bandwidth_share"] else "",
            }
            for row in data["candidates"]
            for line in row["runs"]
        ],
        "ratios": [
            {
                "artifact": f"{row['name']} / {row['over']}",
                "prompt": row["prompt_tokens"],
                "prefill": interval(row["prefill"]),
                "decode": interval(row["decode"]),
            }
            for row in data["ratios"]
        ],
    }
