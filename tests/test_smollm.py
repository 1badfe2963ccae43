"""The SmolLM2 recipe on a tiny model: what its preparation step writes, and whole runs with adapters as experts."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_language import llama, save_tokenizer

from experiments import launch
from experiments.recipe import Recipe
from experiments.smollm import experts
from populations.errors import InputError

RECIPE = Path(__file__).parents[1] / "experiments" / "recipes" / "smollm2-m2n2.yaml"
DOMAINS = {"glosses": "smollm_toys:first", "packages": "smollm_toys:second", "fortunes": "smollm_toys:third"}
TOYS = """
import sys
import numpy as np
from experiments.text import Example
sys.path.insert(0, {tests!r})
from tiny_language import phrase

def _texts(seed):
    rng = np.random.default_rng(seed)
    return [Example(phrase(rng, 4, 9), "any", f"key-{{i}}") for i in range(600)]

def first(): return _texts(1)
def second(): return _texts(2)
def third(): return _texts(3)
"""
SIZES = {"steps": 6, "batch": 2, "tokens": 24, "search": 24, "test": 24, "rank": 4, "rate": 1e-2, "adapter_rate": 1e-2}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    (tmp_path / "smollm_toys.py").write_text(TOYS.format(tests=str(Path(__file__).parent)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "tiny"
    llama(dtype=torch.float32).requires_grad_(True).save_pretrained(model)
    save_tokenizer(model.parent / "tokenizer")
    for file in (model.parent / "tokenizer").glob("token*"):
        file.rename(model / file.name)
    return str(model)


def test_the_step_writes_models_an_adapter_and_texts_that_share_none(tiny, tmp_path):
    folder = tmp_path / "prepared"
    folder.mkdir()
    experts(str(folder), DOMAINS, ["fortunes"], model=tiny, **SIZES)
    assert {"base", *DOMAINS} <= {path.name for path in folder.iterdir()}
    assert (folder / "fortunes" / "adapter_config.json").is_file()
    assert not (folder / "fortunes" / "model.safetensors").exists()
    for name in DOMAINS:
        texts = {part: [json.loads(line)["text"] for line in (folder / f"{name}.{part}.jsonl").read_text().splitlines()]
                 for part in ("search", "test")}  # fmt: skip
        lines = {part: {line for text in each for line in text.split("\n")} for part, each in texts.items()}
        assert [len(each) for each in texts.values()] == [3, 3]
        assert not lines["search"] & lines["test"]


def test_the_same_seed_trains_the_same_experts(tiny, tmp_path):
    states = []
    for number, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        experts(str(folder), {"glosses": DOMAINS["glosses"]}, seed=seed, model=tiny, **SIZES)
        states.append((folder / "glosses" / "model.safetensors").read_bytes())
    assert states[0] == states[1] != states[2]


@pytest.mark.parametrize(
    "algorithm", ["m2n2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bayesian_map", "cma_es"))]
)
def test_the_recipe_on_a_tiny_model(tiny, tmp_path, algorithm):
    arguments = {f"prepare.arguments.{key}": value for key, value in SIZES.items()}
    arguments |= {"prepare.arguments.domains": DOMAINS, "prepare.arguments.model": tiny}
    search = {"algorithm": algorithm, "granularity": "tensor" if algorithm == "m2n2" else "model"}
    settings = {"search": search, "budget.evaluations": 26, "runtime.pool": "serial", "tracking.mlflow": False}
    recipe = Recipe.from_yaml(RECIPE, {**arguments, **settings, "merge.operator": "task_arithmetic"})
    run = launch(recipe, tmp_path / "run")
    with run.journal() as journal:
        rows = list(journal.rows())
    assert all(row.failure is None for row in rows)
    best = run.scored(run.status()["best"]["id"])
    assert all(0 < value < 1 for value in best.scores.values())
    assert all(value > 0 for value in best.held_out.values())
    alone = max(sum(row.scores.values()) for row in rows[:3])
    assert sum(best.scores.values()) >= alone


def test_an_adapter_of_no_domain_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match="adapters: expected domains, glosses, packages, fortunes, found 'verses'"):
        experts(str(tmp_path), DOMAINS, ["verses"], model=tiny)
