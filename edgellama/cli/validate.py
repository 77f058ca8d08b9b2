"""Verb `validate` of the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgellama.cli.arguments import (
    VERDICT_CODES,
    adapter_option,
    checkpoint_path,
    count,
    download_option,
    json_option,
    report_options,
    swappable_option,
    write_json,
)
from edgellama.cli.classify_options import validate_options
from edgellama.errors import UsageError


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "bundle",
        metavar="BUNDLE",
        type=Path,
        help="or a GGUF file of anybody's, of which the quality is measured",
    )
    p.add_argument(
        "--reference",
        metavar="CHECKPOINT",
        help="full-precision checkpoint that the bundle was made from: a path or OWNER/NAME[@REVISION]",
    )
    adapter_option(p, purpose="merged into the reference, as for the export")
    swappable_option(p, purpose="of the bundle, by the name of the export, judged against base and adapter")
    download_option(p)
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
        type=count,
        help="tokens to score first; more if an interval straddles a limit (default: 4096). "
        "With --emulate it is also the number to score there (default: none)",
    )
    p.add_argument(
        "--max-kl", metavar="X", type=float, help="mean KL, nats per token (default: the recipe's)"
    )
    p.add_argument("--min-top1", metavar="X", type=float, help="share of positions whose top token agrees")
    p.add_argument(
        "--max-ppl-ratio", metavar="X", type=float, help="perplexity of the artifact over the reference's"
    )
    p.add_argument("--layers", action="store_true", help="also attribute the error to layers")
    p.add_argument(
        "--cross-check",
        action="store_true",
        help="also compare the checkpoint with transformers' reading of it",
    )
    p.add_argument(
        "--layers-plot", metavar="FILE", type=Path, help="plot the result of --layers: .svg, .png or .pdf"
    )
    p.add_argument(
        "--device-log",
        metavar="FILE",
        type=Path,
        action="append",
        help="result file of an app that replayed the golden vectors; may be repeated",
    )
    p.add_argument(
        "--device",
        metavar="NAME",
        help="device that the logs and the response must come from, or part of its name",
    )
    p.add_argument(
        "--challenge",
        metavar="FILE",
        type=Path,
        help="the file that `edgellama challenge` wrote, with --response",
    )
    p.add_argument("--response", metavar="FILE", type=Path, help="the device's answer to --challenge")
    p.add_argument(
        "--emulate",
        metavar="arm64[:CPU]",
        action="append",
        default=[],
        help="also run the artifacts on an emulated Arm processor, cortex-a76 without CPU; may be repeated",
    )
    p.add_argument(
        "--baseline",
        metavar="REPORT",
        type=Path,
        help="earlier report of the same text (--json), or a bundle, to compare with window by window",
    )
    p.add_argument(
        "--max-kl-increase",
        metavar="X",
        type=float,
        help="largest allowed increase of the mean KL over the baseline, nats per token (default: 5 %% of it)",
    )
    validate_options(p)
    report_options(p)
    p.add_argument(
        "--bench", metavar="FILE", type=Path, help="result of `bench --json`, shown on the --html page"
    )
    json_option(p)


def main(args: argparse.Namespace) -> int:
    """Runs the gate on each target and prints the reports. Returns the exit code of the worst verdict."""
    from edgellama.bundle import Bundle
    from edgellama.checkpoints import open_checkpoint
    from edgellama.checkpoints.adapters import with_adapters
    from edgellama.cli.report_files import Outputs
    from edgellama.commands.challenge import read_pair, with_response
    from edgellama.commands.validate import validate as run
    from edgellama.commands.validate_gguf import is_foreign
    from edgellama.gate.agreement import with_agreement
    from edgellama.gate.attribution import describe
    from edgellama.gate.device import read_device_logs, with_device_logs
    from edgellama.gate.emulation import Emulation, ScoredText, with_emulation
    from edgellama.gate.labelled import LabelLimits
    from edgellama.host.progress import Progress
    from edgellama.report.matplotlib_plots import check_plot, plot_layers
    from edgellama.runtimes.classify import refuse_classifier
    from edgellama.text.labelled import read_labelled
    from edgellama.text.windows import read_texts

    if args.layers_plot is not None:
        check_plot(args.layers_plot)
    outputs = Outputs.of(args)
    if is_foreign(args.bundle):
        return _foreign(args)
    bundle = Bundle.open(args.bundle)
    progress = Progress(sys.stderr)
    texts = read_texts(args.text) if args.text else None
    targets = list(dict.fromkeys(args.target or bundle.targets))
    logs = read_device_logs(args.device_log or (), targets)
    pair = read_pair(args.challenge, args.response, targets)
    emulation = Emulation.of(args.emulate, targets) if args.emulate else None
    if emulation is not None or pair is not None:
        refuse_classifier(bundle)
    labelled = None if args.data is None else read_labelled(args.data)
    tune = None if args.tune is None else read_labelled(args.tune)
    reference = open_checkpoint(checkpoint_path(args.reference, args)) if args.reference else None
    if args.adapter:
        if reference is None:
            raise UsageError("an adapter was given without its base", remedy="Add --reference CHECKPOINT.")
        reference = with_adapters(reference, args.adapter)
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
            cross_check=args.cross_check and target == targets[0],
            baseline=args.baseline,
            max_kl_increase=args.max_kl_increase,
            swappable_adapters=args.adapters or (),
            labelled=labelled,
            label_limits=LabelLimits(args.max_flips, args.max_fpr_increase),
            tune=tune,
            progress=progress,
        )
        for target in targets
    ]
    reports = with_agreement(bundle, reports, texts, progress)
    reports = with_device_logs(bundle, reports, logs, args.device)
    if pair is not None:
        reports = with_response(bundle, reports, pair, reference, device=args.device, progress=progress)
    if emulation is not None:
        scored = None
        if reference is not None and args.tokens is not None:
            scored = ScoredText.of(bundle, reference, texts, args.tokens, args.max_kl)
        reports = with_emulation(bundle, reports, emulation, progress, scored)
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


# Options that ask for what a GGUF file without a bundle does not have.
_OF_BUNDLES = (
    "target",
    "layers",
    "cross_check",
    "layers_plot",
    "device_log",
    "challenge",
    "emulate",
    "baseline",
    "adapters",
    "data",
    "tune",
    "html",
    "markdown",
    "junit",
)


def _foreign(args: argparse.Namespace) -> int:
    """Measures a GGUF file that is no bundle. Returns the exit code of its verdict."""
    from edgellama.commands.validate import DEFAULT_TOKENS
    from edgellama.commands.validate_gguf import NOTE, validate_gguf
    from edgellama.host.progress import Progress
    from edgellama.text.windows import read_texts

    refused = [f"--{name.replace('_', '-')}" for name in _OF_BUNDLES if getattr(args, name)]
    if args.reference is None or refused:
        raise UsageError(
            f"{args.bundle} is a GGUF file and no bundle, "
            + (
                f"so there is nothing for {refused[0]}"
                if refused
                else "and no checkpoint to compare it with is given"
            ),
            remedy="Leave the option out." if refused else "Add --reference CHECKPOINT.",
        )
    report = validate_gguf(
        args.bundle,
        reference=checkpoint_path(args.reference, args),
        texts=read_texts(args.text) if args.text else None,
        tokens=args.tokens or DEFAULT_TOKENS,
        max_kl=args.max_kl,
        min_top1=args.min_top1,
        max_ppl_ratio=args.max_ppl_ratio,
        progress=Progress(sys.stderr),
    )
    print(report.to_text(), file=sys.stderr if args.json == "-" else sys.stdout)
    print(NOTE, file=sys.stderr)
    write_json(args.json, report.to_dict())
    return VERDICT_CODES[report.verdict]
