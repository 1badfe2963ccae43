"""Every objective and every calibration loss of ours does what each must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parts import calibration, call, objective
from torch import nn

from ecotone.fitness.kinds import CalibrationSettings, ObjectiveContext, ObjectiveSettings
from ecotone.fitness.registry import LOSSES, OBJECTIVES
from ecotone.testing.objectives import CPU, Case, LossConformance, ObjectiveConformance

# -- functions that the cases name ---------------------------------------------------------------------------


def data() -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 4, generator=generator), torch.arange(24) % 3


def head() -> Any:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    return lambda outputs, inputs: outputs @ weight.T


def by_example(model: Any) -> Any:
    each = (model.weight.double() * torch.arange(4.0)).sum(1).numpy()
    return float(each.mean()), each


def number(model: Any) -> float:
    return float(model.weight.double().sum()) + float(torch.rand(()))


def net(seed: int, outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(4, outputs).eval()


# -- cases ---------------------------------------------------------------------------------------------------


def classifier(kind: str, **fields: Any) -> Any:
    settings = objective("o", kind, data=call(f"{__name__}:data"), batch=5, **fields)
    return lambda folder: Case(settings, lambda seed: net(seed, 5 if fields else 3))


def function(name: str) -> Any:
    settings = objective("o", "call", call=f"{__name__}:{name}")
    return lambda folder: Case(settings, net)


def language(kind: str, **fields: Any) -> Any:
    """A case of a tiny Llama and its tokenizer, on texts, questions and prompts."""

    def case(folder: Path) -> Case[ObjectiveSettings]:
        tiny = pytest.importorskip("tiny_language")
        rng = np.random.default_rng(0)
        records = [
            {
                "text": tiny.phrase(rng, 3, 20),
                "prompt": tiny.phrase(rng, 1, 6),
                "question": tiny.phrase(rng, 2, 8),
                "choices": [tiny.phrase(rng, 1, 3) for _ in range(4)],
                "answer": int(rng.integers(4)),
                "letters": list("aeiounrst"),
            }
            for _ in range(14)
        ]
        (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        tokenizer = tiny.save_tokenizer(folder / "tokenizer")
        settings = objective("o", kind, data=str(folder / "data.jsonl"), **fields)

        def model(seed: int) -> Any:
            made = tiny.llama(seed)
            made.generation_config.eos_token_id = list(range(seed, 400, 5))  # answers end, and not all at once
            return made

        return Case(settings, model, ObjectiveContext(CPU.device, tokenizer=tokenizer))

    return case


OURS = {
    "accuracy": classifier("accuracy"),
    "accuracy with a head": classifier("accuracy", head=call(f"{__name__}:head")),
    "entropy": classifier("entropy"),
    "entropy with a head": classifier("entropy", head=call(f"{__name__}:head")),
    "call": function("number"),
    "call by example": function("by_example"),
    "bits_per_byte": language("bits_per_byte"),
    "perplexity": language("perplexity", context=8),
    "likelihood": language("likelihood"),
    "multiple_choice": language("multiple_choice", normalise="tokens"),
    "tokens_generated": language("tokens_generated", most=7),
    "exact_match": language("exact_match", most=3, answer="letters", extract="[a-z]"),
}


def loss(kind: str, **fields: Any) -> Any:
    settings = calibration("one", call(f"{__name__}:data"), kind, batch=7, **fields)
    outputs = 5 if "head" in fields else 3

    def case(folder: Path) -> Case[CalibrationSettings]:
        return Case(settings, lambda seed: net(seed, outputs).requires_grad_(True))

    return case


LOSS_CASES = {
    "entropy": loss("entropy"),
    "entropy with a head": loss("entropy", head=call(f"{__name__}:head")),
    "cross_entropy": loss("cross_entropy"),
    "distillation": loss("distillation", hidden=0.0, temperature=2.0),
    "distillation of outputs": loss("distillation", head=call(f"{__name__}:head"), expert="two"),
}


class TestOurObjectives(ObjectiveConformance):
    cases = OURS


class TestOurLosses(LossConformance):
    cases = LOSS_CASES


def test_all_of_ours_have_cases() -> None:
    """lm-eval's tasks have theirs where its files are made, in ``test_language.py``."""
    assert {name.split(" ")[0] for name in OURS} | {"lm_eval"} == set(OBJECTIVES.usable())
    assert {name.split(" ")[0] for name in LOSS_CASES} == set(LOSSES.usable())
