"""Makes tests/tiny_llama/model: a Llama of 0.8M parameters, trained to show losses of quantization.

It learns byte-level text (with a tokenizer of its own, 512 tokens) and ChatML turns from the calibration
texts. It never sees the evaluation texts, so tests may measure on those. Training takes seven minutes on one
core. It reaches 2.8 nats per token (2.1 bits per byte) on the held-out tenth of the calibration texts.

    OMP_NUM_THREADS=1 python tests/tiny_llama/train.py [DIRECTORY]

The tokenizer and the JSON files come out byte for byte the same. The weights do so on one kind of CPU with
one version of torch. Elsewhere sums are rounded in another order, and training amplifies that.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from edgellama.data import CALIBRATION, read_text
from edgellama.model.config import LlamaConfig
from edgellama.model.llama import MLP, Attention, Llama

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, IM_END = 0, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": END_OF_TEXT,
    "dtype": "bfloat16",
    "eos_token_id": IM_END,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 352,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": END_OF_TEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 512,
}
GENERATION = {"bos_token_id": END_OF_TEXT, "eos_token_id": [IM_END, END_OF_TEXT], "pad_token_id": END_OF_TEXT}

SEED, STEPS, WARMUP, BATCH, LENGTH = 0, 600, 40, 8, 512
PEAK_LR, WEIGHT_DECAY, DROPOUT = 3e-3, 0.1, 0.2


class CausalAttention(nn.Module):
    """Attention without a cache. Replaces KVCache, which holds one sequence."""

    def __init__(self, config: LlamaConfig, context_length: int) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def texts() -> tuple[list[str], list[str]]:
    """Returns (training, held out) documents. The last tenth of every calibration text is held out."""
    training, held_out = [], []
    for name in CALIBRATION:
        paragraphs = read_text(name).split("\n\n")
        cut = len(paragraphs) * 9 // 10
        training.append("\n\n".join(paragraphs[:cut]))
        held_out.append("\n\n".join(paragraphs[cut:]))
    return training, held_out


def chats(document: str) -> list[str]:
    """ChatML turns of neighbouring short paragraphs, which give the special tokens a meaning."""
    paragraphs = [p.strip() for p in document.split("\n\n")]
    pairs = zip(paragraphs[::2], paragraphs[1::2], strict=False)
    short = [(a, b) for a, b in pairs if 0 < len(a) < 240 and 0 < len(b) < 240]
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    return [turn.format(*pair) for pair in short]


def train_tokenizer(documents: list[str]) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE that splits digits one by one, as SmolLM2's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return json.loads(tokenizer.to_str())  # type: ignore[no-any-return]


def encode(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """Token ids, int64 [N]: the documents, then their chats, each ended by <|endoftext|>."""
    ids: list[int] = []
    for text in [*documents, *(chat for document in documents for chat in chats(document))]:
        ids += [*tokenizer.encode(text).ids, END_OF_TEXT]
    return torch.tensor(ids)


def new_model(config: LlamaConfig) -> Llama:
    """Normal weights. Those that write into the residual stream are smaller by sqrt(2 layers) (GPT-2)."""
    model = Llama(config, LENGTH, CausalAttention)
    model.lm_head.weight = model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = math.sqrt(2 * config.num_hidden_layers) if residual else 1.0
            nn.init.normal_(parameter, std=0.04 / scale)
    return model


def dropout(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Forward hook. The model itself has no dropout, and so little text needs it."""
    return F.dropout(output, DROPOUT, module.training)


def train(model: Llama, tokens: Tensor, held_out: Tensor) -> None:
    """Trains the model in place with AdamW and prints the loss every 50 steps."""
    for module in model.modules():
        if isinstance(module, (Attention, MLP)):
            module.register_forward_hook(dropout)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(SEED)
    for step in range(STEPS):
        decay = 0.5 * (1 + math.cos(math.pi * max(0, step - WARMUP) / (STEPS - WARMUP)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min((step + 1) / WARMUP, 0.05 + 0.95 * decay)
        starts = torch.randint(len(tokens) - LENGTH - 1, (BATCH,), generator=generator)
        windows = torch.stack([tokens[start : start + LENGTH + 1] for start in starts.tolist()])
        model.train()
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}: training {loss.item():.3f}, held out {evaluate(model, held_out):.3f} nats per token"
            )


@torch.no_grad()
def evaluate(model: Llama, tokens: Tensor) -> float:
    """Mean negative log-likelihood in nats per token, over windows of LENGTH that do not overlap."""
    model.eval()
    losses = [
        F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none")
        for window in torch.split(tokens, LENGTH)
        if len(window) > 1
    ]
    return torch.cat(losses).mean().item()


def save(directory: Path, model: Llama, tokenizer: dict[str, Any]) -> None:
    """Writes a Hugging Face directory with bfloat16 weights."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": CONFIG,
        "generation_config.json": GENERATION,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "bos_token": SPECIAL[END_OF_TEXT],
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": SPECIAL[IM_END],
            "model_max_length": CONFIG["max_position_embeddings"],
            "pad_token": SPECIAL[END_OF_TEXT],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    for name, data in files.items():
        (directory / name).write_text(json.dumps(data, sort_keys=True, indent=1) + "\n")
    weights = {name: w.bfloat16() for name, w in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # save_file makes it readable for its owner only


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    training, held_out = texts()
    tokenizer_json = train_tokenizer(training)
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json))
    tokens = encode(tokenizer, training)
    held_out_tokens = encode(tokenizer, held_out)
    print(f"{len(tokens)} tokens to train on, {len(held_out_tokens)} held out")
    model = new_model(LlamaConfig.from_hf(CONFIG, GENERATION))
    train(model, tokens, held_out_tokens)
    save(directory, model, tokenizer_json)
    model.bfloat16().float()
    for name, document in zip(CALIBRATION, held_out, strict=True):
        ids = torch.tensor(tokenizer.encode(document).ids)
        nats = evaluate(model, ids)
        bits = nats * len(ids) / len(document.encode()) / math.log(2)
        print(
            f"{name}, held-out tenth, weights as stored: {nats:.3f} nats per token, {bits:.3f} bits per byte"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "model")
