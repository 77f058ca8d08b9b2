"""Random configurations of an export: small Llamas of any shape, with tokenizers, contexts and recipes."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.model.config import LlamaConfig
from edgellama.recipe import RECIPES, PerChannel, PerGroup, Recipe, Rule, Scheme
from edgellama.text.calibration import MIN_TOKENS, calibration_texts
from tests.helpers.tiny_models import TINY, write_hf

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WEIGHTS = ("small", "sharp", "outliers")
VOCABULARIES = (300, 512, 777, 1500, 4001)
CONTEXTS = (8, 13, 32, 64, 100, 128, 200, 257, 512, 1024, 2048)


@dataclass(frozen=True)
class Configuration:
    """One random export.

    Attributes:
        seed: seed of the weights.
        model: keys of config.json; None for the first layers of the trained tiny model.
        layers: number of layers.
        vocabulary: size of the tokenizer; config.json may have a larger vocab_size.
        weights: distribution of the weights, of `WEIGHTS` or `trained`.
        dtype: dtype in the file.
        context: length of the KV cache in tokens.
        recipe: the recipe.
        targets: names of the targets.
    """

    seed: str
    model: Mapping[str, Any] | None
    layers: int
    vocabulary: int
    weights: str
    dtype: str
    context: int
    recipe: Recipe
    targets: tuple[str, ...]

    def __str__(self) -> str:
        shape = "trained tiny model"
        if self.model is not None:
            m = self.model
            heads = f"{m['num_attention_heads']}/{m['num_key_value_heads']} heads of {m['head_dim']}"
            extras = [k for k in ("attention_bias", "mlp_bias", "tie_word_embeddings") if m[k]]
            scaling = m["rope_scaling"] and m["rope_scaling"]["rope_type"]
            shape = (
                f"{m['hidden_size']}x{m['intermediate_size']}, {heads}, vocabulary {m['vocab_size']}, "
                f"eps {m['rms_norm_eps']:g}, theta {m['rope_theta']:g}, scaling {scaling}, "
                f"{' '.join(extras) or 'no extras'}, {self.weights} {self.dtype}"
            )
        return f"{','.join(self.targets)} {self.recipe.name} context {self.context}: {self.layers} layers, {shape}"

    def write(self, directory: Path) -> Checkpoint:
        """Writes the checkpoint as a Hugging Face directory, and opens it."""
        if self.model is None:
            return open_checkpoint(write_hf(open_checkpoint(TINY).first_layers(self.layers), directory))
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(self.model), encoding="utf-8")
        (directory / "tokenizer.json").write_text(tokenizer_json(self.vocabulary), encoding="utf-8")
        shutil.copy(TINY / "tokenizer_config.json", directory)
        generator = torch.Generator().manual_seed(random.Random(self.seed).getrandbits(63))
        dtype = DTYPES[self.dtype]
        shapes = LlamaConfig.from_hf(self.model).tensor_shapes()
        tensors = {name: self._tensor(name, shape, generator).to(dtype) for name, shape in shapes.items()}
        save_file(tensors, directory / "model.safetensors")
        return open_checkpoint(directory)

    def _tensor(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            return 1 + 0.2 * values
        if len(shape) == 1:
            return 0.1 * values  # a bias
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return values * (0.05 if self.weights == "small" else 0.2)
        scale = (0.5 if self.weights == "small" else 1.0) / math.sqrt(shape[1])
        if self.weights == "outliers":  # a few channels and weights are far larger, as in trained models
            channels = torch.randperm(shape[1], generator=generator)[: max(1, shape[1] // 64)]
            values[:, channels] *= 8
            values.view(-1)[torch.randint(values.numel(), (4,), generator=generator)] *= 20
        return scale * values


def draw(seed: str, targets: tuple[str, ...]) -> Configuration:
    """The configuration of a seed, for one or two of `targets`. It may be one that an export refuses."""
    rng = random.Random(seed)
    chosen = tuple(rng.sample(targets, min(len(targets), rng.choice((1, 1, 1, 2)))))
    context, recipe, layers = rng.choice(CONTEXTS), _recipe(rng, chosen), rng.choice((1, 1, 2, 2, 3, 4, 6))
    if rng.random() < 0.25:
        trained_context = min(context, 512)
        return Configuration(
            seed, None, min(layers, 4), 512, "trained", "bfloat16", trained_context, recipe, chosen
        )
    vocabulary, weights, dtype = rng.choice(VOCABULARIES), rng.choice(WEIGHTS), rng.choice([*DTYPES])
    model = _model(rng, layers, vocabulary, context)
    return Configuration(seed, model, layers, vocabulary, weights, dtype, context, recipe, chosen)


def _model(rng: random.Random, layers: int, vocabulary: int, context: int) -> dict[str, Any]:
    kv_heads = rng.choice((1, 1, 2, 3, 4))
    heads = kv_heads * rng.choice((1, 2, 3, 4))
    scaling = rng.choice(
        (
            None,
            None,
            {"rope_type": "linear", "factor": rng.choice((1.5, 2.0, 4.0))},
            {
                "rope_type": "llama3",
                "factor": rng.choice((8.0, 32.0)),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": rng.choice((256, 8192)),
            },
        )
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": rng.choice((32, 64, 72, 96, 128, 160, 192, 256)),
        "intermediate_size": rng.choice((32, 64, 88, 96, 128, 224, 352, 512)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": rng.choice((8, 16, 16, 24, 32, 32, 48, 64)),
        "max_position_embeddings": context * rng.choice((1, 1, 2)),
        "rms_norm_eps": rng.choice((1e-6, 1e-5, 1e-5, 1e-3)),
        "rope_theta": rng.choice((100.0, 10000.0, 10000.0, 500000.0)),
        "rope_scaling": scaling,
        "tie_word_embeddings": rng.random() < 0.5,
        "attention_bias": rng.random() < 0.3,
        "mlp_bias": rng.random() < 0.3,
        "vocab_size": vocabulary + rng.choice((0, 0, 3, 64)),
        "bos_token_id": 0,
        "eos_token_id": rng.choice((2, [2, 0])),
    }


def _recipe(rng: random.Random, targets: tuple[str, ...]) -> Recipe:
    """A built-in recipe or a recipe of one's own, with options of the targets."""
    rows = Scheme(8, PerChannel(), int8_activations=False)
    recipe = rng.choice(
        (
            RECIPES["fp32"],
            RECIPES["int8"],
            RECIPES["int8"],
            RECIPES["int8-ane"],
            RECIPES["int4-fast"],
            RECIPES["int4-fast"],
            replace(RECIPES["int4"], name="quick", calibration_tokens=MIN_TOKENS),
            replace(RECIPES["int4"], name="scales", algorithm="scales", calibration_tokens=MIN_TOKENS),
            Recipe(
                "int4-g64",
                "groups of 64, weights only",
                (Rule("model.embed_tokens", rows), Rule("*", Scheme(4, PerGroup(64), False))),
                max_kl=1.0,
                max_kl_small=1.0,
            ),
            Recipe(
                "mixed-floats",
                "attention in float, MLP in int8",
                (Rule("*.mlp.*", Scheme(8, PerChannel())), Rule("*", None)),
                max_kl=1.0,
                max_kl_small=1.0,
            ),
        )
    )
    if "onnx" in targets and rng.random() < 0.5:
        recipe = replace(recipe, onnx_form="portable")
    if targets == ("xnnpack",) and rng.random() < 0.25:
        recipe = replace(recipe, kv_cache="int8")
    return recipe


@cache
def tokenizer_json(size: int) -> str:
    """A byte-level BPE of `size` tokens, trained on the calibration texts: the tiny model's but for its merges."""
    data = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    if len(data["model"]["vocab"]) == size:
        return json.dumps(data)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[token["content"] for token in data["added_tokens"]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([text.content for text in calibration_texts()], trainer)
    data["model"] = json.loads(trained.to_str())["model"]
    return json.dumps(data)
