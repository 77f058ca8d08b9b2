"""Adapters that a runtime switches: each is judged with the base, and the base without one.

The artifact runs with the adapter. Its logits are compared with those of the merged full-precision model, under the
limits of quality, and with those of the quantized torch model plus the adapter, under the limit of parity.

Three questions need no noise floor:

- `file`: the file holds what the adapter's directory gives in the basis of the quantized model.
- `function`: in float32, the base in that basis plus the adapter is the merged model.
- `basis`: the quantized weights lie in that basis, column by column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.adapters.swappable import Swappable, open_swappables
from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.errors import BundleError, InputError
from edgellama.export.quantization.adapter_basis import AdapterBasis, float_model
from edgellama.gate import parity
from edgellama.gate.adapted_reference import AdaptedReference
from edgellama.gate.differences import claim, differences
from edgellama.gate.limits import ADAPTER_FOLD, ADAPTER_KL, ADAPTER_NOISE, TUNED_SLACK, Limits
from edgellama.gate.metrics import kl_and_top1, kl_divergence
from edgellama.gate.quality import Scores, quality_checks, score, score_windows
from edgellama.gate.subject import Section, Subject
from edgellama.host.adapter_files import swappable_places
from edgellama.host.progress import Progress
from edgellama.model.adapted import Pairs, adapted
from edgellama.model.layer_pass import dense
from edgellama.model.llama import Llama
from edgellama.report import Check, below, check
from edgellama.targets import Target
from edgellama.text.windows import Text, Window

_TOKENS = 48  # of the forward passes in float32
_PROBE = 16  # tokens of the comparison of the base with itself


def given_adapters(
    bundle: Bundle, checkpoint: Checkpoint, places: Mapping[str, Any] | Sequence[str]
) -> tuple[Swappable, ...]:
    """The bundle's adapters whose directories the user gives.

    Raises InputError for a name that the bundle does not have, and for the directory of another adapter.
    """
    opened = open_swappables(checkpoint, swappable_places(places))
    recorded = {entry["name"]: entry for entry in bundle.manifest.get("adapters", ())}
    for swappable in opened:
        entry = recorded.get(swappable.name)
        if entry is None:
            known = ", ".join(recorded) or "none"
            raise InputError(
                f"{bundle.path} has no adapter {swappable.name!r} (it has {known})",
                remedy="Give the names of the export.",
            )
        if entry["sha256"] != swappable.sha256:
            raise InputError(
                f"{swappable.path} is not the adapter that {bundle.path} has as {swappable.name!r} "
                f"(sha256 {swappable.sha256[:12]}…, the manifest says {entry['sha256'][:12]}…)",
                remedy="Give the directory that was exported under this name.",
            )
    return opened


def examine_adapters(
    subject: Subject,
    swappables: Sequence[Swappable],
    texts: Sequence[Text],
    tokens: int,
    limits: Limits,
    progress: Progress,
) -> Section:
    """The checks named `adapters.*` and the field `adapters` of a report.

    Args:
        subject: the target and its references. Its artifact runs with each adapter, and without one at the end.
        swappables: the adapters to judge.
        texts: evaluation texts.
        tokens: number of tokens to score first, for each adapter.
        limits: limits of quality, those of the base.
        progress: reporter of stages.
    """
    entries = {entry["name"]: entry for entry in subject.bundle.manifest.get("adapters", ())}
    if not entries:
        return Section()
    basis = AdapterBasis(subject.checkpoint, subject.bundle.recipe.rotation, subject.quantized)
    checks, rows = list(examine_adapter_files(subject.bundle, subject.target).checks), []
    probe = subject.bundle.tokenizer.encode("The base is what it was before. " * 8)[:_PROBE]
    subject.artifact.reset()
    before = subject.artifact.forward_all(probe)
    floats = (
        float_model(subject.checkpoint, subject.bundle.recipe.rotation, subject.quantized)
        if swappables
        else None
    )
    for swappable in swappables:
        assert floats is not None
        name, pairs = f"adapters.{swappable.name}", basis.moved(swappable.pairs())
        checks.append(_check_entry(name, swappable, entries[swappable.name], subject))
        with progress.stage("adapters"):
            checks += [
                _check_file(name, swappable, pairs, subject),
                _check_function(name, swappable, pairs, floats, subject),
                _check_basis(name, pairs, floats, subject),
            ]
        try:
            row, judged = _judged(name, swappable, pairs, subject, texts, tokens, limits, progress)
        except BundleError as error:
            row = {"name": swappable.name, "judged": False}
            judged = [check(f"{name}.runs", False, detail=error.message)]
        checks += judged
        rows.append(row)
    subject.artifact.use(None)
    after = subject.artifact.forward_all(probe)
    unequal = int((before != after).any(1).sum())
    if swappables:
        detail = "logits without an adapter, before and after"
        checks.append(check("adapters.base", unequal == 0, value=unequal, limit=0, detail=detail))
    rows += [{"name": name, "judged": False} for name in entries if name not in {s.name for s in swappables}]
    return Section(tuple(checks), {"adapters": tuple(rows)})


def examine_adapter_files(bundle: Bundle, target: Target) -> Section:
    """Check that each adapter's file can be read and belongs to the artifact of `target`. Needs no checkpoint."""
    checks = []
    for name, path in bundle.adapter_files(target.name).items():
        try:
            stored = target.read_adapter(path)
            expected = target.planned_adapter({}, bundle.config, target.provenance(bundle.manifest)).base
            problems = [] if stored.base == expected else ["the file belongs to another base"]
        except BundleError as error:
            problems = [error.message]
        checks.append(claim(f"adapters.{name}.owner", problems))
    return Section(tuple(checks))


def _check_entry(name: str, swappable: Swappable, entry: Mapping[str, Any], subject: Subject) -> Check:
    """Check of the manifest's entry against the adapter's directory."""
    expected = swappable.to_dict({})
    actual = {key: value for key, value in entry.items() if key != "files"}
    problems = differences(actual, {k: v for k, v in expected.items() if k != "files"}, "adapters")
    if subject.target.name not in entry["files"]:
        problems.append(f"adapters.files has nothing for {subject.target.name}")
    return claim(f"{name}.manifest", problems)


def _check_file(name: str, swappable: Swappable, pairs: Pairs, subject: Subject) -> Check:
    """Check that the file holds the two matrices of each linear, bit for bit."""
    target, bundle = subject.target, subject.bundle
    try:
        stored = target.read_adapter(bundle.adapter_files(target.name)[swappable.name])
    except (BundleError, KeyError) as error:
        return check(f"{name}.file", False, detail=str(error))
    planned = target.planned_adapter(pairs, bundle.config, target.provenance(bundle.manifest))
    return claim(f"{name}.file", planned.differences(stored))


@torch.inference_mode()
def _check_function(name: str, swappable: Swappable, pairs: Pairs, floats: Llama, subject: Subject) -> Check:
    """Check that float base and adapter in the quantized model's basis compute the merged model's function."""
    text = "An adapter in another basis is the same change. " * 8
    tokens = subject.bundle.tokenizer.encode(text)[: min(_TOKENS, subject.bundle.context_length)]
    wanted = StreamedLlama(swappable.merged).logits(tokens)
    with adapted(floats, pairs):
        actual = floats(torch.tensor([tokens]))[0]
    kl = float(np.max(kl_divergence(wanted, actual)))
    return below(f"{name}.function", kl, ADAPTER_KL, detail=f"largest KL of {len(tokens)} tokens in float32")


# Sides of linears that calibration may scale without a trace in a norm: 1 for rows, 0 for columns.
_FOLDED = {"v_proj": 1, "up_proj": 1, "o_proj": 0, "down_proj": 0}


@torch.inference_mode()
def _check_basis(name: str, pairs: Pairs, floats: Llama, subject: Subject) -> Check:
    """Check that the quantized weights have the folds of the adapter's basis, as shares of what rounding explains.

    Folds of norms follow from the norms, which other checks compare.
    """
    slack = ADAPTER_FOLD + (TUNED_SLACK if subject.bundle.recipe.algorithm == "recover" else 0.0)
    worst, where = 0.0, ""
    for linear in pairs:
        axis = _FOLDED.get(linear.rpartition(".")[2])
        if axis is None:
            continue
        own, wanted = (dense(model.get_submodule(linear))[0] for model in (subject.quantized, floats))
        found, noise = _typical_ratio(own, wanted, axis)
        if found / (slack + ADAPTER_NOISE * noise) > worst:
            worst, where = found / (slack + ADAPTER_NOISE * noise), f"{('columns', 'rows')[axis]} of {linear}"
    return below(f"{name}.basis", worst, 1.0, detail=where)


def _typical_ratio(own: Tensor, wanted: Tensor, axis: int) -> tuple[float, float]:
    """(median |ln ratio| of the columns (axis 0) or rows (1) of `own` along those of `wanted`, its standard error).

    A factor of the whole weight is left out: rounding makes weights a little shorter.
    """
    power = (wanted * wanted).sum(axis)
    along = (own * wanted).sum(axis)
    kept = (power > 0) & (along > 0)
    if not bool(kept.any()):
        return 0.0, 0.0
    logs = (along[kept] / power[kept]).log()
    error = ((own - wanted) ** 2).sum(axis)[kept] / power[kept]
    return float((logs - logs.median()).abs().median()), float((error.median() / own.shape[axis]).sqrt())


def _judged(
    name: str,
    swappable: Swappable,
    pairs: Pairs,
    subject: Subject,
    texts: Sequence[Text],
    tokens: int,
    limits: Limits,
    progress: Progress,
) -> tuple[dict[str, Any], list[Check]]:
    """The adapter's row in the report, and the checks of quality and parity."""
    count = -(-tokens // subject.window_length)
    expected = AdaptedReference(subject.quantized, subject.bundle.recipe, subject.target, pairs)
    subject = replace(subject, full=StreamedLlama(swappable.merged), expected=expected)
    subject.artifact.use(swappable.name)
    scores = score(subject, subject.windows(texts), count, limits, progress)
    subject.artifact.use(None)
    without = _without(subject, scores.windows[: parity.WINDOWS])
    quality, figures = scores.summary(), parity.summarize(scores.parity, scores.floor)
    checks = [_renamed(c, "quality.", f"{name}.") for c in quality_checks(quality, limits)]
    checks += [
        _renamed(c, "parity.", f"{name}.parity_") for c in parity.checks(figures, subject.target.parity_kl)
    ]
    entry = next(e for e in subject.bundle.manifest["adapters"] if e["name"] == swappable.name)
    path = entry["files"].get(subject.target.name)
    row = {
        "name": swappable.name,
        "judged": True,
        "bytes": subject.bundle.manifest["files"][path]["bytes"],
        "rank": entry["rank"],
        "parameters": entry["parameters"],
        "tokens": sum(len(w.kl) for w in scores.quality),
        **{key: quality[key] for key in _SHOWN},
        "parity_kl_mean": figures["kl_mean"],
        "noise_floor_kl": figures["noise_floor_kl"],
        "without": without,
    }
    return row, checks


_SHOWN = ("kl_mean", "kl_mean_ci95", "top1_agreement", "top1_agreement_ci95", "ppl_reference", "ppl_artifact")


def _without(subject: Subject, windows: Sequence[Window]) -> dict[str, Any]:
    """KL and top-1 agreement of the artifact without the adapter to the merged model, on some windows."""
    scores: Scores = score_windows(subject.artifact, subject.full, windows)
    return {
        "tokens": sum(len(w.kl) for w in scores.quality),
        **kl_and_top1(scores.quality, [w.domain for w in windows]),
    }


def _renamed(check: Check, prefix: str, new: str) -> Check:
    return replace(check, name=new + check.name.removeprefix(prefix))
