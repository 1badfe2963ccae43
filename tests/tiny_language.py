"""Tiny language models and a tokenizer trained in memory, for tests of language objectives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from ecotone.fitness.protocol import Divisible

CPU = torch.device("cpu")
WORDS = (Path(__file__).parents[1] / "LICENSE").read_text("utf-8").split()
CONTEXT = 256


def save_tokenizer(folder: Path, *, bos: str | None = "<s>", eos: str | None = "</s>") -> str:
    """A byte-level BPE of 400 tokens, beside the config.json of a model with a context of 256."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [token for token in (bos, eos) if token is not None]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(WORDS, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": CONTEXT}))
    return str(folder)


def spread(model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """``model`` with weights large enough for its predictions to differ."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval().requires_grad_(False)


SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def llama(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    return spread(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)), seed, dtype)


def gpt2(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    config = transformers.GPT2Config(
        vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, bos_token_id=0, eos_token_id=1
    )
    return spread(transformers.GPT2LMHeadModel(config), seed, dtype)


def gemma2(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Logits with a soft cap, sliding windows in half of the layers."""
    config = transformers.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, sliding_window=CONTEXT
    )
    return spread(transformers.Gemma2ForCausalLM(config), seed, dtype)


def bloom(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Positions by distance in the row (ALiBi), which a packed row cannot have."""
    config = transformers.BloomConfig(
        vocab_size=400, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1, pad_token_id=0
    )
    return spread(transformers.BloomForCausalLM(config), seed, dtype)


def qwen3_moe(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A mixture of four experts, two a token."""
    config = transformers.Qwen3MoeConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )
    made = spread(transformers.Qwen3MoeForCausalLM(config), seed, dtype)
    if dtype == torch.float64:  # which torch's grouped product of matrices does not take
        made.set_experts_implementation("eager")
    return made


def phrase(rng: np.random.Generator, least: int, most: int) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(least, most + 1)))


def write_lines(file: Path, records: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(file)


def check_parts(objective: Any, model: Any, varied: bool = True) -> None:
    """The scores of an objective's examples are the same asked in parts, and pooled they are its score."""
    assert isinstance(objective, Divisible)
    whole = objective.score(model)
    assert whole.per_example is not None
    numbers = np.random.default_rng(4).permutation(objective.count)
    parts = np.array_split(numbers, 3)
    found = [objective.subset(part).score(model) for part in parts]
    for part, score in zip(parts, found, strict=True):
        assert score.items == len(part)
        assert score.per_example == pytest.approx(whole.per_example[part], rel=1e-6)
        value, error = objective.pooled(score.per_example, part)
        assert value == pytest.approx(score.value, rel=1e-6)
        assert error > 0 or not varied
    assert len({score.value for score in found}) > 1 or not varied
    value, error = objective.pooled(whole.per_example, np.arange(objective.count))
    assert value == pytest.approx(whole.value, rel=1e-12)
    assert error == 0
