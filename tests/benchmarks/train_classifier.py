"""Training of a classifier on the CPU: a head on the last hidden state of any checkpoint, which is not trained itself.

    python -m tests.benchmarks.train_classifier SMOLLM2.gguf WORK
    edgellama export WORK/model --task classify -r int8 --data WORK/judged.jsonl --tune WORK/tune.jsonl -o WORK/kinds.edgellama

Three labels, novel, manual and program, and two groups, short and long texts. The head is fitted to the calibration
texts that ship with edgellama, and judged on the evaluation texts, which are of another book and other chapters. WORK
gets a LlamaForSequenceClassification directory and two files of labelled texts, one for the calibration of the answer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.text.labelled import LabelledTexts
from tests.helpers.tiny_classifier import LABELS, halves, jsonl, labelled

LENGTHS = (80, 240)  # characters of short and long texts
STEPS, PENALTY = 100, 1e-3


def features(full: StreamedLlama, texts: LabelledTexts) -> Tensor:
    """Hidden states after the last token of each text and the final norm, float32 [N, hidden_size]."""
    rows = []
    sequences = [full.checkpoint.tokenizer.encode(row.text) for row in texts.rows]
    for start in range(0, len(sequences), 64):
        batch = sequences[start : start + 64]
        full.read_ahead(batch)
        rows += [full._states[tuple(tokens)][-1] for tokens in batch]
    return torch.stack(rows)


def fit(x: Tensor, truth: Tensor, labels: int) -> Tensor:
    """Weights float32 [labels, hidden_size] of a softmax regression without bias, by L-BFGS.

    Inputs are scaled for the fit, and the weights take the scale.
    """
    scale = x.std(0) + 1e-6
    weight = torch.zeros(labels, x.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x / scale @ weight.T, truth) + PENALTY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (weight / scale).detach()


def write_model(checkpoint: Checkpoint, head: Tensor, directory: Path) -> None:
    """Writes the checkpoint with the head as a Hugging Face directory, in bfloat16."""
    directory.mkdir(parents=True)
    config = checkpoint.config
    names = [name for name in config.tensor_shapes() if name != "lm_head.weight"]
    tensors = {name: checkpoint.tensor(name).bfloat16().contiguous() for name in names}
    save_file({**tensors, "score.weight": head.contiguous()}, directory / "model.safetensors")
    for name, content in checkpoint.tokenizer.files.items():
        (directory / name).write_bytes(content)
    data = {key: value for key, value in config.to_dict().items() if key != "eos_token_ids"}
    data |= {
        "model_type": "llama",
        "architectures": ["LlamaForSequenceClassification"],
        "eos_token_id": list(config.eos_token_ids),
        "id2label": {str(number): name for number, name in enumerate(LABELS)},
        "label2id": {name: number for number, name in enumerate(LABELS)},
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(data, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.checkpoint)
    full = StreamedLlama(checkpoint)
    # Each passage in both lengths.
    parts = (
        labelled("calibration_emma.txt", "calibration_python_tutorial.rst", 77, "train", lengths).rows
        for lengths in (LENGTHS, (LENGTHS[1], LENGTHS[0]))
    )
    train = LabelledTexts("train", tuple(row for rows in parts for row in rows))
    test = labelled("evaluation_persuasion.txt", "evaluation_python_tutorial.rst", 100, "test", LENGTHS)
    known, unknown = features(full, train), features(full, test)
    head = fit(known, torch.tensor(train.truth(LABELS)), len(LABELS))
    for texts, x in ((train, known), (test, unknown)):
        right = (x @ head.T).argmax(-1) == torch.tensor(texts.truth(LABELS))
        print(f"{texts.name}: {float(right.float().mean()):.1%} of {len(right)} texts")
    write_model(checkpoint, head, args.work / "model")
    for name, part in zip(("tune", "judged"), halves(test), strict=True):
        jsonl(part, args.work / f"{name}.jsonl")


if __name__ == "__main__":
    main()
