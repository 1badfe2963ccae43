"""Merge operators and their settings in recipes: what is refused, searched, exported and verified."""

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from ecotone import launch
from ecotone.experiments import compose
from ecotone.experiments.checks import validate
from ecotone.experiments.exports import verify
from ecotone.experiments.recipe import Recipe
from ecotone.populations.errors import InputError

OBJECTIVES = """
def near(model, axis):
    return -float((model["w"][axis] - 0.3 * (axis + 1)).square().mean())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "operator_toys.py").write_text(OBJECTIVES)
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(2, 50, generator=rng)
    for number, name in enumerate(["base", "one", "two"]):
        save_file({"w": base + number * 0.3 * torch.randn(2, 50, generator=rng)}, tmp_path / f"{name}.safetensors")
    return tmp_path


def recipe_of(folder, merge, search=None, evaluations=12):
    record = {
        "name": "operators",
        "models": {"base": "base.safetensors", "experts": ["one.safetensors", "two.safetensors"]},
        "merge": merge,
        "objectives": {
            "search": [
                {"name": f"axis-{axis}", "type": "call", "call": "operator_toys:near", "arguments": {"axis": axis}}
                for axis in (0, 1)
            ]
        },
        "search": search or {"algorithm": "random", "granularity": "model"},
        "scoring": {"batch": 2},
        "budget": {"evaluations": evaluations},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(record))
    return Recipe.from_yaml(folder / "recipe.yaml")


SEARCHED = {
    "ties": {"density": {"low": 0.1, "high": 0.9}},
    "dare": {"density": {"low": 0.1, "high": 0.9, "scale": "log"}},
    "dare_ties": {"density": 0.5, "mask_seed": {"low": 0, "high": 1000, "scale": "integer"}, "combine": "sum"},
    "ties_vectors": {"density": {"low": 0.1, "high": 0.9}},
}


@pytest.mark.parametrize("operator", SEARCHED)
@pytest.mark.parametrize("algorithm", ["random", "cma_es", "nsga2"])
def test_settings_are_searched_and_exported_as_they_were_scored(folder, operator, algorithm):
    search = {"algorithm": algorithm, "granularity": "model"}
    recipe = recipe_of(folder, {"operator": operator, **SEARCHED[operator]}, search)
    validate(recipe)
    run = launch(recipe, folder / "run")
    [name] = recipe.merge.ranges
    with run.journal() as journal:
        rows = list(journal.rows())
    assert all(row.failure is None for row in rows)
    found = [run.trial(row.number).genome.parameters[name] for row in rows]
    bounds = recipe.merge.ranges[name]
    assert len(set(found)) > 1
    assert all(bounds.low <= value <= bounds.high for value in found)
    target = run.export("best", folder / "best")
    record = json.loads((target / "ecotone.json").read_text())
    assert record["operator"][name] == run.trial(run.status()["best"]["id"]).genome.parameters[name]
    assert all(one.difference == 0 for one in verify(target))


def test_two_settings_of_an_operator_are_searched(folder):
    merge = {"operator": "breadcrumbs", "density": {"low": 0.2, "high": 1.0}, "gamma": {"low": 0.0, "high": 0.3}}
    run = launch(recipe_of(folder, merge), folder / "run")
    target = run.export("best", folder / "best")
    record = json.loads((target / "ecotone.json").read_text())
    assert set(run.trial(0).genome.parameters) == {"density", "gamma"}
    assert 0.2 <= record["operator"]["density"] <= 1.0
    assert all(one.difference == 0 for one in verify(target))


@pytest.mark.parametrize("merge", [{"operator": "slerp"}, {"operator": "slerp", "per": "tensor"}, {"operator": "ties"}])
@pytest.mark.parametrize("algorithm", ["cma_es", "bayesian_map"])
def test_operators_with_settings_in_words_are_exported(folder, merge, algorithm):
    run = launch(recipe_of(folder, merge, {"algorithm": algorithm, "granularity": "model"}, 20), folder / "run")
    target = run.export("best", folder / "best")
    assert all(one.difference == 0 for one in verify(target))
    assert f"`{merge['operator']}` (" in (target / "README.md").read_text()


def test_slerp_begins_halfway_between_its_two_models(folder):
    recipe = recipe_of(folder, {"operator": "slerp"}, {"algorithm": "cma_es", "granularity": "model", "sigma": 1e-9})
    run = launch(recipe, folder / "run")
    assert run.trial(0).genome.coefficients == pytest.approx(0.5, abs=1e-6)


RANGE = {"low": 0.1, "high": 0.9}


@pytest.mark.parametrize(
    ("merge", "search", "message"),
    [
        ({"operator": "ties", "density": RANGE}, {"algorithm": "m2n2"}, "m2n2 searches coefficients alone"),
        ({"operator": "ties", "density": RANGE}, {"algorithm": "nested_map"}, "nested_map searches coefficients alone"),
        ({"operator": "ties", "density": {"low": 0.9, "high": 0.1}}, None, "merge.density: low: expected less than"),
        ({"operator": "ties", "density": {"low": 0.0, "high": 0.5}}, None, "merge.density: expected"),
        ({"operator": "ties", "density": {"lo": 0.1, "high": 0.5}}, None, "merge.density.lo: unknown key"),
        ({"operator": "ties", "density": 2}, None, "merge.density: expected a number above 0 and at most 1"),
        ({"operator": "task_arithmetic", "density": RANGE}, None, "'task_arithmetic' has no such setting"),
        ({"operator": "ties", "mask_seed": 3}, None, "'ties' has no such setting"),
        ({"operator": "slerp"}, {"algorithm": "m2n2"}, "merge.operator: m2n2 needs merges that are linear"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder, merge, search, message):
    with pytest.raises(InputError) as refused:
        compose.check_operator(recipe_of(folder, merge, search))
    assert message in str(refused.value)
