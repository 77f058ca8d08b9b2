"""Tests of lm-evaluation-harness on an artifact, offline. They are skipped without lm_eval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from edgellama.bundle import Bundle
from edgellama.lm_eval import likelihood
from edgellama.runtimes.load import load

pytestmark = pytest.mark.slow

TASKS = {
    "choice": """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
    "generation": """
task: generation
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
DOCUMENTS = [
    {
        "question": "The cat sat on the",
        "choices": [" mat", " zebra of doubt"],
        "answer": 0,
        "text": "A cat. " * 60,
    },
    {
        "question": "She opened the",
        "choices": [" door", " qqqq"],
        "answer": 0,
        "text": "It was late, and it rained.",
    },
    {"question": "", "choices": ["He", "The"], "answer": 1, "text": "Nobody came."},
]


@pytest.fixture(scope="module")
def harness_results(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Output of the harness's command line: scores under `results`, and samples under the name of each task."""
    if find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed: pip install 'edgellama[lm-eval]'")
    work = tmp_path_factory.mktemp("lm_eval")
    data = work / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, text in TASKS.items():
        (work / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "edgellama.lm_eval", "--model", "edgellama"),
            *("--model_args", f"bundle={tiny_bundle.path},target=xnnpack", "--tasks", ",".join(TASKS)),
            *("--include_path", str(work), "--output_path", str(work / "out"), "--log_samples"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(work / "home"),
        },
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    samples: dict[str, Any] = {}
    for name in TASKS:
        (file,) = (work / "out").rglob(f"samples_{name}_*.jsonl")
        samples[name] = [json.loads(line) for line in file.read_text().splitlines()]
    (file,) = (work / "out").rglob("results_*.json")
    return samples | {"results": json.loads(file.read_text())["results"]}


def test_choices_have_the_likelihoods_of_the_artifact(
    harness_results: dict[str, Any], tiny_bundle: Bundle
) -> None:
    with load(tiny_bundle, "xnnpack") as runtime:
        for sample in harness_results["choice"][:2]:
            document = sample["doc"]
            for answer, choice in zip(sample["resps"], document["choices"], strict=True):
                pair = likelihood.encode_pair(tiny_bundle.tokenizer, document["question"], choice)
                total, _ = likelihood.log_likelihood(runtime, *pair)
                assert float(answer[0][0]) == pytest.approx(total, abs=1e-4)
    assert len(harness_results["choice"]) == len(DOCUMENTS)
    assert 0 <= harness_results["results"]["choice"]["acc,none"] <= 1


def test_rolling_likelihood_reads_texts_longer_than_the_context(
    harness_results: dict[str, Any], tiny_bundle: Bundle
) -> None:
    config = tiny_bundle.config
    prefix = config.bos_token_id if config.bos_token_id is not None else config.eos_token_ids[0]
    longest = tiny_bundle.tokenizer.encode(DOCUMENTS[0]["text"], add_special_tokens=False)  # type: ignore[arg-type]
    assert len(longest) > tiny_bundle.context_length
    with load(tiny_bundle, "xnnpack") as runtime:
        for sample in harness_results["rolling"]:
            text = sample["doc"]["text"]
            ids = tiny_bundle.tokenizer.encode(text, add_special_tokens=False)
            windows = likelihood.rolling_windows(ids, prefix, runtime.context_length)
            expected = sum(likelihood.log_likelihood(runtime, *window)[0] for window in windows)
            assert float(sample["resps"][0][0]) == pytest.approx(expected, abs=1e-3)
    assert harness_results["results"]["rolling"]["word_perplexity,none"] > 1


def test_generation_ends_at_the_stop_of_the_task(harness_results: dict[str, Any]) -> None:
    texts = [sample["resps"][0][0] for sample in harness_results["generation"]]
    assert len(texts) == len(DOCUMENTS) and any(texts)
    assert not any("." in text for text in texts)


def test_the_tokenizers_name_follows_the_tokenizer(tiny_bundle: Bundle) -> None:
    """Bundles that differ in their artifact alone share the harness's caches of tokens."""
    if find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed: pip install 'edgellama[lm-eval]'")
    from edgellama.lm_eval.model import EdgellamaLM

    def name(altered: str | None) -> str:
        manifest = json.loads(json.dumps(tiny_bundle.manifest))
        if altered is not None:
            manifest["files"][altered]["sha256"] = "0" * 64
        model = EdgellamaLM.__new__(EdgellamaLM)
        model.bundle = Bundle(tiny_bundle.path, manifest)
        return model.tokenizer_name

    assert name(None) == name("xnnpack/model.pte") != name("tokenizer/tokenizer.json")


@pytest.fixture(scope="module")
def model(tiny_bundle: Bundle) -> Any:
    pytest.importorskip("lm_eval")
    from edgellama.lm_eval import EdgellamaLM

    return EdgellamaLM(str(tiny_bundle.path), target="xnnpack")


@pytest.mark.parametrize("beginning", ["The best answer is", " It is\n"])
def test_an_answer_that_a_task_begins_stays_open(model: Any, beginning: str) -> None:
    asked = [{"role": "user", "content": "Which?"}]
    text = model.apply_chat_template([*asked, {"role": "assistant", "content": beginning}], False)
    assert text.endswith(beginning)
    prompt = model.apply_chat_template(asked)
    assert text.startswith(prompt) or prompt.rstrip() in text


def test_a_batch_size_is_taken_as_one_with_a_warning(
    tiny_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("lm_eval")
    from edgellama.lm_eval.model import EdgellamaLM

    EdgellamaLM(str(tiny_bundle.path), batch_size=8)
    assert "one sequence at a time" in caplog.text


def test_the_command_without_the_harness_names_the_extra() -> None:
    hidden = "import sys; sys.modules['lm_eval'] = None; sys.argv = ['x']\n"
    hidden += "import importlib.util as u; find = u.find_spec\n"
    hidden += "u.find_spec = lambda name, *a: None if name == 'lm_eval' else find(name, *a)\n"
    hidden += "import runpy; runpy.run_module('edgellama.lm_eval', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pip install 'edgellama[lm-eval]'" in done.stderr, done.stderr
