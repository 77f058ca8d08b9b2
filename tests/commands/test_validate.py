"""Tests of the gate on a healthy bundle: the three verdicts, refusals, and the report."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.cli.dispatch import main
from edgellama.commands import validate_phases
from edgellama.commands.validate import validate
from edgellama.errors import BundleError, InputError, TextError, UsageError
from edgellama.gate.metrics import compare, summarize
from edgellama.host.progress import Progress
from edgellama.report import Report
from edgellama.runtimes.load import load
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.windows import Text, default_texts, read_texts, windows
from tests.helpers.paths import TINY
from tests.helpers.tiny_models import CONTEXT

# Mean KL of the tiny bundle on the default texts. The interval of eight windows is 0.021 to 0.028.
KL = 0.0244


@pytest.fixture(scope="module")
def short_text(tiny_checkpoint: Checkpoint) -> Text:
    """A text of exactly three windows."""
    ids = tiny_checkpoint.tokenizer.encode(default_texts()[0].content[:4000])
    text = Text("short", tiny_checkpoint.tokenizer.decode(ids[: 3 * (CONTEXT + 1)]))
    assert len(list(windows([text], tiny_checkpoint.tokenizer, CONTEXT))) == 3
    return text


@pytest.fixture(scope="module")
def report(tiny_bundle: Bundle, tiny_checkpoint: Checkpoint) -> Report:
    return validate(tiny_bundle, reference=tiny_checkpoint, tokens=1024)


def verdicts(report: Report) -> Mapping[str, str]:
    return {c.name: c.verdict for c in report.checks}


def test_a_healthy_bundle_passes_every_check(report: Report) -> None:
    assert set(verdicts(report).values()) == {"pass"} and report.passed
    # One check is there only where this machine's noise floor is low.
    assert sorted(set(verdicts(report)) - {"parity.top1"}) == [
        "claims.accuracy",
        "claims.artifact",
        "claims.build",
        "claims.manifest",
        "claims.recipe",
        "claims.scores",
        "claims.tensors",
        "consistency.after_calls",
        "consistency.chunked_prefill",
        "consistency.context_overflow",
        "consistency.last_position",
        "consistency.prefill_decode",
        "consistency.reset",
        "golden.accuracy",
        "golden.limits",
        "golden.reference",
        "golden.sequences",
        "golden.xnnpack",
        "parity.depths",
        "parity.kl",
        "parity.kl_first_positions",
        "parity.kl_long",
        "parity.kl_long_typical",
        "parity.parts",
        "quality.kl",
        "structure.bytes",
        "structure.chat",
        "structure.codes",
        "structure.constants",
        "structure.files",
        "structure.graphs",
        "structure.layout",
        "structure.licenses",
        "structure.metadata",
        "structure.norms",
        "structure.operators",
        "structure.relowered",
        "structure.schemes",
        "structure.tokenizer",
        "structure.tokenizer_files",
        "structure.zero_points",
        "weights.codes",
        "weights.floats",
        "weights.scales",
    ]
    assert report.quality["kl_mean"] == pytest.approx(KL, rel=0.2)
    assert (report.tokens, report.windows) == (1024, 8)


def test_the_report_has_the_keys_that_phones_and_baselines_read(
    report: Report, tiny_checkpoint: Checkpoint
) -> None:
    data = json.loads(report.to_json())
    assert data["schema"] == "edgellama.report/1" and data["verdict"] == "pass"
    assert data["target"] == "xnnpack" and data["runtime"] == "executorch-xnnpack"
    assert data["reference"]["sha256"] == tiny_checkpoint.sha256()
    assert set(data["quality"]) >= {
        "kl_mean",
        "kl_mean_ci95",
        "kl_median",
        "kl_p99",
        "kl_p999",
        "top1_agreement",
        "top1_agreement_ci95",
        "ppl_reference",
        "ppl_artifact",
        "ln_ppl_ratio",
        "ln_ppl_ratio_ci95",
        "rms_dp",
        "greedy_prefix_agreement",
    }
    assert set(data["parity"]) >= {
        "kl_mean",
        "kl_max",
        "kl_first_positions",
        "noise_floor_kl",
        "top1_agreement",
        "prefill_decode_max_abs",
    }
    assert {"name", "value", "limit", "verdict", "detail"} == set(data["checks"][0])
    assert data["structure"]["codes"] == "pass"


def test_quality_compares_the_artifact_with_the_checkpoint(
    report: Report, tiny_bundle: Bundle, tiny_checkpoint: Checkpoint
) -> None:
    """The same figures computed here: the artifact token by token, the reference model in one pass."""
    model = load_llama(tiny_checkpoint, CONTEXT)
    compared = []
    with load(tiny_bundle) as runtime, torch.inference_mode():
        for window in islice(windows(default_texts(), tiny_bundle.tokenizer, CONTEXT), 8):
            reference = model(torch.tensor([window.tokens]))[0]
            runtime.reset()
            artifact = torch.stack([torch.from_numpy(runtime.forward([t])) for t in window.tokens])
            compared.append(compare(reference, artifact, window.targets))
    expected = summarize(compared)
    for key in ("kl_mean", "top1_agreement", "ppl_reference", "ppl_artifact"):
        assert report.quality[key] == pytest.approx(expected[key], rel=1e-9)


@pytest.mark.slow
def test_two_validations_give_the_same_bytes(
    short_text: Text, tiny_bundle: Bundle, tiny_checkpoint: Checkpoint
) -> None:
    first, second = (
        validate(
            tiny_bundle, reference=tiny_checkpoint, texts=[short_text], tokens=256, relower=False
        ).to_json()
        for _ in range(2)
    )
    assert first == second


@pytest.mark.slow
def test_every_text_is_a_domain(report: Report, tiny_bundle: Bundle, tiny_checkpoint: Checkpoint) -> None:
    assert set(report.domains) == {"evaluation_persuasion", "evaluation_python_tutorial"}
    mean = sum(d["kl_mean"] for d in report.domains.values()) / 2  # four windows of each
    assert mean == pytest.approx(report.quality["kl_mean"])
    alone = validate(
        tiny_bundle, reference=tiny_checkpoint, texts=default_texts()[:1], tokens=256, relower=False
    )
    assert alone.domains == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "check", "verdict"),
    [
        ({"max_kl": KL * 3}, "quality.kl", "pass"),
        ({"max_kl": KL / 3}, "quality.kl", "fail"),
        ({"min_top1": 0.6}, "quality.top1", "pass"),
        ({"min_top1": 0.995}, "quality.top1", "fail"),
        ({"max_ppl_ratio": 1.3}, "quality.ppl_ratio", "pass"),
        ({"max_ppl_ratio": 0.8}, "quality.ppl_ratio", "fail"),
    ],
)
def test_a_limit_far_from_the_value_is_decided(
    limits: dict[str, Any], check: str, verdict: str, tiny_bundle: Bundle, tiny_checkpoint: Checkpoint
) -> None:
    report = validate(tiny_bundle, reference=tiny_checkpoint, tokens=512, relower=False, **limits)
    assert verdicts(report)[check] == verdict == report.verdict


@pytest.mark.slow
def test_more_text_is_read_until_the_verdict_is_clear(
    tiny_bundle: Bundle, tiny_checkpoint: Checkpoint
) -> None:
    log = io.StringIO()
    report = validate(
        tiny_bundle, reference=tiny_checkpoint, tokens=256, max_kl=KL * 1.5, progress=Progress(log)
    )
    # Two windows have an interval twelve standard errors wide on either side.
    assert "quality.kl: the interval straddles the limit after 2 windows; reading more text" in log.getvalue()
    assert report.passed and report.windows in (4, 8, 16)
    low, high = report.quality["kl_mean_ci95"]
    assert high <= KL * 1.5 and low > 0


@pytest.mark.slow
def test_the_verdict_is_inconclusive_at_the_end_of_the_text(
    short_text: Text, tiny_bundle: Bundle, tiny_checkpoint: Checkpoint
) -> None:
    report = validate(tiny_bundle, reference=tiny_checkpoint, texts=[short_text], tokens=256, relower=False)
    value = report.quality["kl_mean"]
    report = validate(
        tiny_bundle, reference=tiny_checkpoint, texts=[short_text], tokens=256, relower=False, max_kl=value
    )
    assert report.verdict == "inconclusive" and not report.passed
    assert report.windows == 3, "all of the text was read before giving up"


@pytest.mark.slow
def test_one_window_alone_is_inconclusive(
    tiny_bundle: Bundle, tiny_checkpoint: Checkpoint, short_text: Text
) -> None:
    ids = tiny_checkpoint.tokenizer.encode(short_text.content)
    single = Text("single", tiny_checkpoint.tokenizer.decode(ids[: CONTEXT + 8]))
    report = validate(tiny_bundle, reference=tiny_checkpoint, texts=[single], tokens=256, relower=False)
    assert report.windows == 1 and report.verdict == "inconclusive"
    assert json.loads(report.to_json())["quality"]["kl_mean_ci95"] == [0.0, None]


def test_without_a_reference_the_artifact_must_agree_with_itself(tiny_bundle: Bundle) -> None:
    report = validate(tiny_bundle)
    assert report.passed and report.reference is None and report.quality == {}
    assert {name.partition(".")[0] for name in verdicts(report)} == {"structure", "claims", "consistency"}
    assert report.parity["prefill_decode_kl"] <= 1e-4


def run_validate(*arguments: str | Path) -> int:
    """Exit code of `edgellama validate`."""
    return main(["validate", *map(str, arguments)])


@pytest.mark.slow
def test_exit_codes(
    tiny_bundle: Bundle, short_text: Text, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, result = tmp_path / "short.txt", tmp_path / "report.json"
    text.write_text(short_text.content, encoding="utf-8")
    common = (tiny_bundle.path, "--reference", TINY, "--text", text, "--tokens", 256, "--json", result)
    assert run_validate(*map(str, common), "--max-kl", "0.2") == 0
    value = json.loads(result.read_text())["quality"]["kl_mean"]
    assert "verdict: pass" in capsys.readouterr().out
    assert run_validate(*map(str, common), "--max-kl", "0.001") == 1
    assert "FAIL quality.kl" in capsys.readouterr().out
    assert run_validate(*map(str, common), "--max-kl", str(value)) == 3
    assert "verdict: inconclusive" in capsys.readouterr().out
    assert run_validate(tiny_bundle.path) == 0
    assert "give --reference" in capsys.readouterr().err
    assert run_validate(tiny_bundle.path, "--max-kl", "0.1") == 2
    assert run_validate(tmp_path / "nowhere") == 2


@pytest.mark.slow
def test_another_checkpoint_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    changed = tmp_path / "model"
    shutil.copytree(TINY, changed)
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, changed / "model.safetensors")
    with pytest.raises(InputError, match=r"is not the checkpoint that .* was made from"):
        validate(tiny_bundle, reference=changed)
    copy = tmp_path / "elsewhere"
    shutil.copytree(TINY, copy)
    assert validate(tiny_bundle, reference=copy, tokens=512).passed, "the path does not matter"


@pytest.mark.parametrize("limit", ["max_kl", "min_top1", "max_ppl_ratio"])
def test_a_limit_without_a_reference_is_refused(limit: str, tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="without a reference"):
        validate(tiny_bundle, **{limit: 0.5})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_kl": 0.0},
        {"max_kl": -1.0},
        {"max_kl": float("nan")},
        {"max_kl": float("inf")},
        {"min_top1": 1.5},
        {"min_top1": 0.0},
        {"max_ppl_ratio": -2.0},
        {"tokens": 255},
        {"target": "xnpack"},
    ],
)
def test_values_out_of_range_are_refused(
    wrong: dict[str, Any], tiny_bundle: Bundle, tiny_checkpoint: Checkpoint
) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        validate(tiny_bundle, reference=tiny_checkpoint, **wrong)


def test_a_directory_without_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        validate(tmp_path)


@pytest.mark.slow
def test_a_text_too_short_for_one_window_is_refused(
    tiny_bundle: Bundle, tiny_checkpoint: Checkpoint, short_text: Text
) -> None:
    scrap = Text("scrap", "A few words.")
    with pytest.raises(TextError, match=r"scrap.* fewer than 129 tokens"):
        validate(tiny_bundle, reference=tiny_checkpoint, texts=[scrap], tokens=256)
    with pytest.raises(TextError, match=r"scrap.* fewer than 129 tokens"):  # never skipped silently
        validate(tiny_bundle, reference=tiny_checkpoint, texts=[short_text, scrap], tokens=256)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n\t ", "is empty"), (b"caf\xe9", "not UTF-8"), (None, "No such file")],
)
def test_texts_that_cannot_be_read_are_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError, match=rf"text\.txt: .*{message}"):
        read_texts([path])
    with pytest.raises(TextError, match="Is a directory"):
        read_texts([tmp_path])


def place_of(tokens: Sequence[int], ids: Sequence[int]) -> int:
    """Index in `ids` at which `tokens` begin."""
    return next(i for i in range(len(ids)) if ids[i : i + len(tokens)] == list(tokens))


def test_windows_alternate_and_cover_every_text(tiny_checkpoint: Checkpoint) -> None:
    tokenizer = tiny_checkpoint.tokenizer
    content = default_texts()[0].content[:3000]
    ids = tokenizer.encode(content)
    other = default_texts()[1].content[:500]
    both = list(windows([Text("a", content), Text("b", other)], tokenizer, 32))
    windows_of_b = len(tokenizer.encode(other)) // 33
    assert [w.domain for w in both[: 2 * windows_of_b + 2]] == ["a", "b"] * windows_of_b + ["a", "a"]
    windows_of_a = sorted((w for w in both if w.domain == "a"), key=lambda w: place_of(w.tokens, ids))
    assert len(windows_of_a) == len(ids) // 33
    for i, window in enumerate(windows_of_a):
        assert [*window.tokens, window.targets[-1]] == ids[33 * i : 33 * (i + 1)]
        assert window.tokens[1:] == window.targets[:-1]


def test_every_window_starts_with_the_bos_of_the_tokenizer(tiny_checkpoint: Checkpoint) -> None:
    data = json.loads(tiny_checkpoint.tokenizer.files["tokenizer.json"])
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    tokenizer = Tokenizer({"tokenizer.json": json.dumps(data).encode()})
    content = default_texts()[0].content[:2000]
    ids = tokenizer.encode(content, add_special_tokens=False)
    assert tokenizer.encode("") == [0]
    pieces = set()
    for window in windows([Text("a", content)], tokenizer, 16):
        assert len(window.tokens) == len(window.targets) == 16
        assert window.tokens[0] == 0
        pieces.add((*window.tokens[1:], window.targets[-1]))
    assert pieces == {tuple(ids[i : i + 16]) for i in range(0, len(ids) - 15, 16)}


def test_the_reference_may_be_a_path(tiny_bundle: Bundle, short_text: Text) -> None:
    report = validate(str(tiny_bundle.path), reference=str(TINY), texts=[short_text], tokens=256)
    assert report.reference is not None
    assert report.reference["parameters"] == open_checkpoint(TINY).config.parameters


def test_the_artifact_is_loaded_when_the_references_have_read(
    tiny_bundle: Bundle, tiny_checkpoint: Checkpoint, short_text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of a layer in float32 and the runtime's own copy of the model are not in memory together."""
    progress = Progress()

    def refuse(*_: Any) -> None:
        raise BundleError("loaded", remedy="")

    monkeypatch.setattr(validate_phases, "load", refuse)
    with pytest.raises(BundleError, match="loaded"):
        validate(tiny_bundle, reference=tiny_checkpoint, texts=[short_text], tokens=256, progress=progress)
    assert {"references", "structure", "weights"} <= progress.seconds.keys()
    assert "score" not in progress.seconds
