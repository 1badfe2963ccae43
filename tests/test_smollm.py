"""The SmolLM2 recipes on a tiny model: what their preparation step writes, whole runs with an adapter as an expert, and
the benchmark that compares them."""

import importlib
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_language import llama, save_tokenizer

from ecotone import launch
from ecotone.experiments import compose, preparation
from ecotone.experiments.examples.smollm import experts
from ecotone.experiments.recipe import Recipe
from ecotone.populations.errors import InputError

RECIPES = Path(__file__).parents[1] / "experiments" / "recipes"
NAMES = ("m2n2", "map", "cma_es")
DOMAINS = {"glosses": "smollm_toys:first", "packages": "smollm_toys:second", "fortunes": "smollm_toys:third"}
TOYS = """
import sys
import numpy as np
from ecotone.experiments.examples.text import Example
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


def recipe_of(name, settings=None):
    return Recipe.from_yaml(RECIPES / f"smollm2-{name}.yaml", settings)


def tiny_settings(model):
    """What makes the recipes those of a tiny model."""
    sizes = {f"prepare.arguments.{key}": value for key, value in SIZES.items()}
    return {**sizes, "prepare.arguments.domains": DOMAINS, "prepare.arguments.model": model, "merge.dtype": "float32"}


def test_the_recipes_differ_in_the_search_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path))
    recipes = [recipe_of(name) for name in NAMES]
    assert [recipe.name for recipe in recipes] == [f"smollm2-{name}" for name in NAMES]
    assert [recipe.search.algorithm for recipe in recipes] == ["m2n2", "bayesian_map", "cma_es"]
    rest = [{key: value for key, value in one.record().items() if key not in ("name", "search")} for one in recipes]
    assert rest[0] == rest[1] == rest[2]
    preparation.prepared_folder(recipes[1]).mkdir(parents=True)
    assert len({preparation.prepared_folder(recipe) for recipe in recipes}) == 1
    for recipe in recipes:
        compose.check_search(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m2n2", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_the_recipe_on_a_tiny_model(tiny, tmp_path, name):
    settings = {"budget.evaluations": 26, "runtime.pool": "serial", "tracking.mlflow": False}
    run = launch(recipe_of(name, {**tiny_settings(tiny), **settings}), tmp_path / "run")
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


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES.parents[1] / "benchmarks")
    return importlib.import_module("smollm2")


@pytest.mark.slow
def test_the_benchmark_on_a_tiny_model(tiny, tmp_path, benchmark, monkeypatch):
    given = [
        argument for pair in tiny_settings(tiny).items() for argument in ("--set", f"{pair[0]}={json.dumps(pair[1])}")
    ]
    arguments = ["--evaluations", "10", "--seeds", "1,2", "--cache", str(tmp_path / "kept"), *given]
    names = "base,glosses,packages,fortunes,experts,average,lambda,m2n2,cma_es"
    monkeypatch.setattr(benchmark, "LAMBDAS", [0.2, 0.5])
    benchmark.main([*arguments, "--methods", names, "--out", str(tmp_path / "first.json")])
    record = json.loads((tmp_path / "first.json").read_text())
    rows = {(one["method"], one["seed"]): one for one in record["rows"]}
    seeded = [(name, seed) for name in ("m2n2", "cma_es") for seed in (1, 2)]
    assert list(rows) == [(name, None) for name in names.split(",")[:-2]] + seeded
    assert [rows[key]["evaluations"] for key in seeded] == [10] * 4
    assert rows["lambda", None]["evaluations"] == 2
    assert rows["lambda", None]["coefficients"] in ([0.2] * 3, [0.5] * 3)
    assert rows["m2n2", 1]["digest"] != rows["m2n2", 2]["digest"]
    for name in DOMAINS:
        assert rows["experts", None]["test"][name] == rows[name, None]["test"][name]
    for one in rows.values():
        assert all(0 < value < 1 for value in one["search"].values())
        assert all(value > 1 for value in one["test"].values())  # bits per byte, not likelihoods
    lines = {line["method"]: line for line in record["summary"]}
    assert "below" not in lines["lambda"]
    assert lines["base"]["mean"][1] is None  # no seeds, no error
    assert lines["average"]["below"][1] > 0
    assert "| base |" in (tmp_path / "first.md").read_text()

    merges = importlib.import_module("merges")
    merges._judge.cache_clear()
    monkeypatch.setattr(merges, "Worker", None)
    monkeypatch.setattr(benchmark, "finished", None)
    benchmark.main([*arguments, "--methods", names, "--out", str(tmp_path / "second.json")])
    assert (tmp_path / "second.json").read_text() == (tmp_path / "first.json").read_text()


def test_a_method_is_compared_document_by_document(benchmark):
    reference = {"glosses": [1.0, 3.0], "packages": [2.0, 2.0], "fortunes": [4.0, 5.0]}
    better = {"glosses": [0.9, 2.9], "packages": [1.7, 1.9], "fortunes": [4.0, 5.0]}
    other = {"glosses": [0.7, 2.7], "packages": [1.9, 1.7], "fortunes": [4.0, 5.0]}
    value, error = benchmark.below([{"documents": better}, {"documents": other}], reference)
    assert value == pytest.approx((0.2 + 0.2 + 0.0) / 3)
    assert error == pytest.approx(0.0)
    value, error = benchmark.below([{"documents": better}], reference)
    assert value == pytest.approx((0.1 + 0.2 + 0.0) / 3)
    assert error == pytest.approx(0.1 / 3)
