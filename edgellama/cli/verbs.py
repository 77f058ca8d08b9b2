"""The verbs as the command line calls them: options in, library call, result out, exit code."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from edgellama.errors import UsageError
from edgellama.host.progress import Progress
from edgellama.recipe import BUDGETED, RECIPES, find_recipe
from edgellama.report.report import to_json
from edgellama.targets.base import TARGETS

VERDICT_CODES = {"pass": 0, "fail": 1, "inconclusive": 3}


def export(args: argparse.Namespace) -> int:
    from edgellama.bundle.bundle import Bundle
    from edgellama.bundle.record import DEFAULT_TARGETS, SHORT_TOKENS, Request, differences
    from edgellama.bundle.reports import stored_reports
    from edgellama.cli.report_files import Outputs
    from edgellama.text.windows import read_texts

    outputs = Outputs.of(args)
    if outputs and (args.plan or args.plan_plot is not None or args.no_validate):
        raise UsageError(
            "--html, --markdown and --junit show the gate's report, and the gate was not asked for",
            remedy="Leave out --plan or --no-validate, or the files.",
        )
    if args.plan or args.plan_plot is not None:
        return _plan(args)
    progress = Progress(sys.stderr)
    targets = args.target or DEFAULT_TARGETS
    calibration = read_texts(args.calibration) if args.calibration else None
    request = Request.of(
        recipe=args.recipe,
        targets=targets,
        context=args.context,
        calibration=calibration,
        max_bytes=args.max_bytes,
        max_kl=args.max_kl,
        validation_tokens=None if args.no_validate else SHORT_TOKENS,
    )
    up_to_date = differences(args.output, args.checkpoint, request) == []
    if up_to_date:  # found out before torch is imported, which takes seconds
        progress.say(f"{args.output} is up to date")
        bundle = Bundle.open(args.output)
    else:
        from edgellama.bundle.publish import temporary_files
        from edgellama.commands import export as build

        with temporary_files(args.output):
            bundle = build.export(
                args.checkpoint,
                args.output,
                targets=targets,
                recipe=args.recipe,
                context=args.context,
                calibration=calibration,
                max_bytes=args.max_bytes,
                max_kl=args.max_kl,
                validate=not args.no_validate,
                force=args.force,
                progress=progress,
                on_reports=outputs.write if outputs else None,
            )
    if outputs and not outputs.written():  # the bundle was there already: nothing was measured again
        outputs.write(bundle, list(stored_reports(bundle).values()))
    for artifact in bundle.manifest["artifacts"]:
        print(f"{bundle.path / artifact['path']}: {artifact['bytes'] / 1e6:.1f} MB", file=sys.stderr)
    write_json(
        args.json,
        {
            "bundle": str(bundle.path),
            "up_to_date": up_to_date,
            "seconds": progress.seconds,
            "stages": progress.stages,
            "manifest": bundle.manifest,
        },
    )
    return 0


def _plan(args: argparse.Namespace) -> int:
    from edgellama.bundle.record import DEFAULT_TARGETS
    from edgellama.checkpoints.checkpoint import open_checkpoint
    from edgellama.commands import export as build
    from edgellama.report.matplotlib_plots import check_plot, plot_frontier
    from edgellama.report.tables import to_text
    from edgellama.text.windows import read_texts

    auto = find_recipe(args.recipe).algorithm in BUDGETED
    if args.plan_plot is not None:
        if not auto:
            raise UsageError(
                f"--plan-plot draws what recipe `auto` can choose between, and the recipe is {args.recipe!r}",
                remedy="Add -r auto, or use --plan.",
            )
        check_plot(args.plan_plot)
    checkpoint = open_checkpoint(args.checkpoint)
    options = {"targets": args.target or DEFAULT_TARGETS, "context": args.context}
    data = build.forecast(checkpoint, recipe=args.recipe, validate=not args.no_validate, **options)
    shown: dict[str, Any] = {
        "artifacts": [
            {"target": row["target"], "bytes": row["bytes"], **row["memory"]} for row in data["artifacts"]
        ],
        "export": data["export"],
    }
    if auto:
        found = build.plan(
            checkpoint,
            recipe=args.recipe,
            calibration=read_texts(args.calibration) if args.calibration else None,
            progress=Progress(sys.stderr),
            **options,
        ).to_dict()
        data |= {"points": found["points"]}
        shown["choices"] = [
            {
                "MB": f"{point['bytes'] / 1e6:.1f}",
                "expected KL": f"{point['kl']:.4f}",
                "schemes": ", ".join(
                    f"{n} {s}" for s, n in sorted(Counter(point["schemes"].values()).items())
                ),
            }
            for point in data["points"]
        ]
    print(to_text(shown), file=sys.stderr if args.json == "-" else sys.stdout)
    if args.plan_plot is not None:
        plot_frontier(data["points"], args.plan_plot, title=Path(args.checkpoint).name)
    write_json(args.json, data)
    return 0


def validate(args: argparse.Namespace) -> int:
    from edgellama.bundle.bundle import Bundle
    from edgellama.checkpoints.checkpoint import open_checkpoint
    from edgellama.cli.report_files import Outputs
    from edgellama.commands.validate import validate as run
    from edgellama.gate.agreement import with_agreement
    from edgellama.gate.attribution import describe
    from edgellama.gate.device import read_device_logs, with_device_logs
    from edgellama.report.matplotlib_plots import check_plot, plot_layers
    from edgellama.text.windows import read_texts

    if args.layers_plot is not None:
        check_plot(args.layers_plot)
    outputs = Outputs.of(args)
    bundle = Bundle.open(args.bundle)
    progress = Progress(sys.stderr)
    texts = read_texts(args.text) if args.text else None
    targets = list(dict.fromkeys(args.target or bundle.targets))
    logs = read_device_logs(args.device_log or (), targets)
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
            layers=args.layers or args.layers_plot is not None,
            baseline=args.baseline,
            max_kl_increase=args.max_kl_increase,
            progress=progress,
        )
        for target in targets
    ]
    reports = with_agreement(bundle, reports, texts, progress)
    reports = with_device_logs(bundle, reports, logs)
    for report in reports:
        print(report.to_text(), file=sys.stderr if args.json == "-" else sys.stdout)
        if report.layers:
            print(f"\n{describe(report.layers)}", file=sys.stderr if args.json == "-" else sys.stdout)
    if args.layers_plot is not None and reports and reports[0].layers:
        plot_layers(reports[0].layers, args.layers_plot, title=f"{args.bundle.name}, {reports[0].target}")
    if not reports:
        raise UsageError(f"{bundle.path} holds no artifact", remedy="Export the bundle again.")
    outputs.write(bundle, reports)
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
