"""The verbs as the command line calls them: options in, library call, result out, exit code."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from edgellama.errors import UsageError
from edgellama.progress import Progress
from edgellama.recipe import RECIPES, find_recipe
from edgellama.report import to_json
from edgellama.targets import TARGETS

VERDICT_CODES = {"pass": 0, "fail": 1, "inconclusive": 3}


def export(args: argparse.Namespace) -> int:
    from edgellama import build

    progress = Progress(sys.stderr)
    bundle = build.export(
        args.checkpoint,
        args.output,
        targets=args.target or build.DEFAULT_TARGETS,
        recipe=args.recipe,
        context=args.context,
        max_bytes=args.max_bytes,
        max_kl=args.max_kl,
        validate=not args.no_validate,
        force=args.force,
        progress=progress,
    )
    for artifact in bundle.manifest["artifacts"]:
        print(f"{bundle.path / artifact['path']}: {artifact['bytes'] / 1e6:.1f} MB", file=sys.stderr)
    write_json(
        args.json,
        {
            "bundle": str(bundle.path),
            "seconds": progress.seconds,
            "stages": progress.stages,
            "manifest": bundle.manifest,
        },
    )
    return 0


def validate(args: argparse.Namespace) -> int:
    from edgellama.agreement import with_agreement
    from edgellama.bundle import Bundle
    from edgellama.checkpoint import open_checkpoint
    from edgellama.text import read_texts
    from edgellama.validate import validate as run

    bundle = Bundle.open(args.bundle)
    progress = Progress(sys.stderr)
    texts = read_texts(args.text) if args.text else None
    reference = open_checkpoint(args.reference) if args.reference else None
    reports = [
        run(
            bundle,
            reference=reference,
            target=target,
            texts=texts,
            tokens=args.tokens,
            max_kl=args.max_kl,
            min_top1=args.min_top1,
            max_ppl_ratio=args.max_ppl_ratio,
            progress=progress,
        )
        for target in dict.fromkeys(args.target or bundle.targets)
    ]
    reports = with_agreement(bundle, reports, texts, progress)
    for report in reports:
        print(report.to_text(), file=sys.stderr if args.json == "-" else sys.stdout)
    if not reports:
        raise UsageError(f"{bundle.path} holds no artifact", remedy="Export the bundle again.")
    data = [r.to_dict() for r in reports]
    write_json(args.json, data[0] if len(data) == 1 else data)
    if reference is None:
        print(
            "not compared with a checkpoint: give --reference to measure parity and quality", file=sys.stderr
        )
    verdicts = {r.verdict for r in reports}
    return next(VERDICT_CODES[v] for v in ("fail", "inconclusive", "pass") if v in verdicts)


def recipes(args: argparse.Namespace) -> int:
    if args.name:
        recipe = find_recipe(args.name)
        write_json(args.json or "-", recipe.to_dict())
        return 0
    for recipe in RECIPES.values():
        print(f"{recipe.name:<12} {recipe.summary}", file=sys.stderr if args.json == "-" else sys.stdout)
    write_json(args.json, [recipe.to_dict() for recipe in RECIPES.values()])
    return 0


def targets(args: argparse.Namespace) -> int:
    for target in TARGETS.values():
        print(f"{target.name:<12} {target.summary}", file=sys.stderr if args.json == "-" else sys.stdout)
    write_json(
        args.json, [{"name": t.name, "summary": t.summary, "artifact": t.artifact} for t in TARGETS.values()]
    )
    return 0


def write_json(where: str | None, data: Any) -> None:
    """To the file named, to standard output for `-`, nowhere for None."""
    if where is None:
        return
    # A file name that is not Unicode stays valid JSON, as the escape \udcXX.
    text = to_json(json.loads(json.dumps(data))).encode("utf-8", "backslashreplace").decode("utf-8")
    if where == "-":
        sys.stdout.write(text)
    else:
        Path(where).write_text(text, encoding="utf-8")
