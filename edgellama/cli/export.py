"""Verb `export` of the command line."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from edgellama.cli.arguments import (
    adapter_option,
    checkpoint_path,
    count,
    download_option,
    json_option,
    report_options,
    size,
    swappable_option,
    write_json,
)
from edgellama.cli.classify_options import export_options, task_of
from edgellama.errors import UsageError


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="Hugging Face or Meta directory, .gguf file, or OWNER/NAME[@REVISION]",
    )
    adapter_option(p, purpose="merged into the checkpoint first")
    swappable_option(p, purpose="that lies beside the base and is switched at run time (onnx, gguf)")
    download_option(p)
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
        "--context", metavar="N", type=count, help="KV cache in tokens (default: the model's, at most 2048)"
    )
    p.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        action="append",
        help="text for a calibrated recipe, UTF-8; may be repeated (default: texts that ship with edgellama)",
    )
    p.add_argument(
        "--max-bytes", metavar="SIZE", type=size, help="fail if an artifact is larger; 120MB, 1.5GiB, …"
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
        help="print the expected bytes, memory and time, and the choices of recipe `auto`; export nothing",
    )
    p.add_argument(
        "--plan-plot",
        metavar="FILE",
        type=Path,
        help="plot the choices of `-r auto`: .svg, .png or .pdf",
    )
    p.add_argument(
        "--stop-token",
        metavar="TEXT",
        action="append",
        help="a token that ends an answer, besides those of the checkpoint; may be repeated; "
        "`none` accepts a chat model without any",
    )
    p.add_argument(
        "--date",
        metavar="YYYY-MM-DD",
        help="date for a chat template that writes one (default: the template's own, else the day of the chat)",
    )
    export_options(p)
    p.add_argument("--no-validate", action="store_true", help="do not run the gate at the end")
    p.add_argument("--force", action="store_true", help="replace an existing bundle")
    report_options(p)
    json_option(p)


def main(args: argparse.Namespace) -> int:
    """Exports a bundle, or prints a forecast for `--plan`. Returns 0."""
    if args.output is None and not (args.plan or args.plan_plot):
        raise UsageError(
            "the following arguments are required: -o/--output", remedy="Give -o BUNDLE, or --plan."
        )
    from edgellama.bundle.publish import temporary_files
    from edgellama.bundle.record import DEFAULT_TARGETS
    from edgellama.bundle.reports import stored_reports
    from edgellama.cli.report_files import Outputs
    from edgellama.commands.export import export
    from edgellama.host.progress import Progress
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
    with temporary_files(args.output):
        bundle = export(
            args.checkpoint,
            args.output,
            targets=args.target or DEFAULT_TARGETS,
            recipe=args.recipe,
            context=args.context,
            calibration=read_texts(args.calibration) if args.calibration else None,
            max_bytes=args.max_bytes,
            max_kl=args.max_kl,
            validate=not args.no_validate,
            stop_tokens=_stop_tokens(args.stop_token),
            date=args.date,
            adapters=args.adapter or (),
            swappable_adapters=args.adapters or (),
            task=task_of(args),
            force=args.force,
            download=args.download,
            progress=progress,
            on_reports=outputs.write if outputs else None,
        )
    if progress.stages:
        progress.say(progress.summary())
    if outputs and not outputs.written():  # up to date, so the gate did not run
        outputs.write(bundle, list(stored_reports(bundle).values()))
    for artifact in bundle.manifest["artifacts"]:
        print(f"{bundle.path / artifact['path']}: {artifact['bytes'] / 1e6:.1f} MB", file=sys.stderr)
    write_json(
        args.json,
        {
            "bundle": str(bundle.path),
            "up_to_date": not progress.stages,
            "seconds": progress.seconds,
            "stages": progress.stages,
            "manifest": bundle.manifest,
        },
    )
    return 0


def _stop_tokens(texts: list[str] | None) -> list[str] | None:
    return None if texts is None else [text for text in texts if text != "none"]


def _plan(args: argparse.Namespace) -> int:
    """Prints a forecast of bytes, memory and time (`--plan`), and the choices of a budgeted recipe."""
    from edgellama.bundle.record import DEFAULT_TARGETS
    from edgellama.checkpoints import open_checkpoint
    from edgellama.commands.classify_task import check_task, for_task
    from edgellama.commands.export import forecast, frontier
    from edgellama.host.progress import Progress
    from edgellama.recipe import BUDGETED, find_recipe
    from edgellama.report.matplotlib_plots import check_plot, plot_frontier
    from edgellama.report.tables import to_text
    from edgellama.text.windows import read_texts

    budgeted = find_recipe(args.recipe).algorithm in BUDGETED
    if args.plan_plot is not None:
        if not budgeted:
            raise UsageError(
                f"--plan-plot draws the choices of recipe `auto`, and the recipe is {args.recipe!r}",
                remedy="Add -r auto, or use --plan.",
            )
        check_plot(args.plan_plot)
    # A budgeted recipe is measured, which needs the weights.
    path = checkpoint_path(args.checkpoint, args, weights=budgeted)
    checkpoint = open_checkpoint(path, weights=budgeted)
    if args.adapter:
        from edgellama.checkpoints.adapters import with_adapters

        checkpoint = with_adapters(checkpoint, args.adapter)
    task = task_of(args)
    checkpoint = for_task(checkpoint, task)
    options = {"targets": args.target or DEFAULT_TARGETS, "context": args.context}
    if task is not None:
        check_task(task, options["targets"], find_recipe(args.recipe), swappable={}, gate=True)
    data = forecast(checkpoint, recipe=args.recipe, validate=not args.no_validate, **options)
    if budgeted:
        choices = frontier(
            checkpoint,
            recipe=args.recipe,
            calibration=read_texts(args.calibration) if args.calibration else None,
            progress=Progress(sys.stderr),
            **options,
        )
        data |= {"points": choices.to_dict()["points"]}
    print(to_text(_plan_table(data)), file=sys.stderr if args.json == "-" else sys.stdout)
    if args.plan_plot is not None:
        plot_frontier(data["points"], args.plan_plot, title=Path(args.checkpoint).name)
    write_json(args.json, data)
    return 0


def _plan_table(data: dict[str, Any]) -> dict[str, Any]:
    """The forecast for the terminal."""
    table: dict[str, Any] = {
        "artifacts": [
            {"target": row["target"], "bytes": row["bytes"], **row["memory"]} for row in data["artifacts"]
        ],
        "export": data["export"],
    }
    if "points" in data:
        table["choices"] = [
            {
                "MB": f"{point['bytes'] / 1e6:.1f}",
                "expected KL": f"{point['kl']:.4f}",
                "schemes": ", ".join(
                    f"{n} {s}" for s, n in sorted(Counter(point["schemes"].values()).items())
                ),
            }
            for point in data["points"]
        ]
    return table
