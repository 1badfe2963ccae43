"""A recipe by components, end to end: what validate says, what is learned, what the page shows, and mergekit's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from ecotone.experiments.checks import validate
from ecotone.experiments.compare import compare
from ecotone.experiments.pages import page
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch, resume
from ecotone.experiments.runs import Run

TOYS = """
import numpy as np
import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)

    def forward(self, hidden):
        return torch.tanh(self.mlp(torch.tanh(self.attn(hidden)))) + hidden


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.norm = nn.ModuleList([Layer(), Layer()]), nn.LayerNorm(6)

    def forward(self, inputs):
        for layer in self.layers:
            inputs = layer(inputs)
        return self.norm(inputs)


def encoder():
    return Encoder()


def examples(task):
    rng = np.random.default_rng(10 + task)
    inputs = rng.standard_normal((40, 6)).astype(np.float32)
    return inputs, (inputs[:, task] > 0).astype(np.int64)


def head(task):
    weight = torch.from_numpy(np.random.default_rng(20 + task).standard_normal((2, 6)).astype(np.float32))
    return lambda outputs, inputs: outputs @ weight.T
"""
TENSORS = {
    "layers.0.attn.weight": (6, 6),
    "layers.0.mlp.weight": (6, 6),
    "layers.1.attn.weight": (6, 6),
    "layers.1.mlp.weight": (6, 6),
    "norm.bias": (6,),
    "norm.weight": (6,),
}
BORDERS = np.cumsum([0, *(np.prod(shape) for shape in TENSORS.values())])
OWNERS = [0, 1, 0, 1, 2, 2]  # attention, mlp, norms
STEPS = 3


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "component_toys.py").write_text(TOYS)
    monkeypatch.syspath_prepend(str(tmp_path))
    for number, name in enumerate(("base", "left", "right")):
        rng = np.random.default_rng(number)
        folder = tmp_path / name
        folder.mkdir()
        save_file(
            {key: rng.standard_normal(shape).astype(np.float32) for key, shape in TENSORS.items()},
            folder / "model.safetensors",
        )
    data = [{"call": "component_toys:examples", "arguments": {"task": task}} for task in (0, 1)]
    heads = [{"call": "component_toys:head", "arguments": {"task": task}} for task in (0, 1)]
    tasks = [
        {"name": f"task {n}", "data": one, "head": head} for n, (one, head) in enumerate(zip(data, heads, strict=True))
    ]
    record = {
        "name": "toy",
        "models": {"base": "base", "experts": ["left", "right"], "architecture": {"call": "component_toys:encoder"}},
        "merge": {"operator": "task_arithmetic"},
        "calibration": [{**task, "loss": "cross_entropy", "batch": 8} for task in tasks],
        "objectives": {"search": [{**task, "type": "accuracy"} for task in tasks]},
        "search": {
            "algorithm": "adamerging",
            "granularity": "components",
            "rate": 0.05,
            "steps": STEPS,
            "check_every": 1,
        },
        "budget": {"evaluations": 8},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(record))
    return path


def checks(run: Run) -> list[Any]:
    """(3, K) coefficients of attention, feed-forward layers and norms at each check, which all their tensors have."""
    with run.journal() as journal:
        numbers = [row.number for row in journal.rows()]
    found = []
    for number in numbers:
        rows = run.trial(number).genome.refined(BORDERS)
        first = rows[[OWNERS.index(component) for component in range(3)]]
        assert (rows == first[OWNERS]).all()
        found.append(first)
    return found


def test_adam_follows_the_sum_of_the_gradients_of_a_components_tensors(recipe: Path, tmp_path: Path) -> None:
    by_tensor = launch(Recipe.from_yaml(recipe, {"search.granularity": "tensor"}), tmp_path / "tensors")
    with by_tensor.journal() as journal:
        first = [found.gradient for _, found in journal.evaluations() if found.gradient is not None][:2]
    slopes = np.sum(first, axis=0)  # of the two tasks, at the start
    sums = np.array([slopes[[i for i, owner in enumerate(OWNERS) if owner == one]].sum(axis=0) for one in range(3)])
    run = launch(Recipe.from_yaml(recipe), tmp_path / "run")
    before, after, *_ = checks(run)
    assert (before == 0.3).all()
    assert after - before == pytest.approx(-0.05 * np.sign(sums), rel=1e-4)  # Adam's first step
    (line,) = (run.report() or {})["lines"]
    assert np.shape(line["coefficients"]) == (3, 2)


def test_stopped_and_resumed_it_is_the_same(recipe: Path, tmp_path: Path) -> None:
    whole = checks(launch(Recipe.from_yaml(recipe), tmp_path / "whole"))
    launch(Recipe.from_yaml(recipe, {"budget.evaluations": 2}), tmp_path / "run")
    assert len(checks(Run(tmp_path / "run"))) == 2
    again = checks(resume(tmp_path / "run", {"budget.evaluations": 8}))
    np.testing.assert_array_equal(again, whole)


def test_validate_names_the_components(recipe: Path) -> None:
    told = {finding.subject: finding.text for finding in validate(Recipe.from_yaml(recipe))}
    assert told["search"].startswith("adamerging: 6 coefficients (3 components x 2 models) of attention, mlp, norms; ")
    settings = {"search": {"algorithm": "random", "granularity": "components", "groups": 2}, "calibration": []}
    told = {finding.subject: finding.text for finding in validate(Recipe.from_yaml(recipe, settings))}
    assert "of attention 1, attention 2, mlp 1, mlp 2, norms 2" in told["search"]


def test_the_page_shows_coefficients_by_component(recipe: Path, tmp_path: Path) -> None:
    settings = {"search": {"algorithm": "nsga2", "granularity": "components"}, "calibration": []}
    run = launch(Recipe.from_yaml(recipe, settings), tmp_path / "run")
    text = page(compare([run]))
    for component in ("attention", "mlp", "norms"):
        assert f"{component}: left " in text.replace("\\u003c", "<")
        assert f"right\\u003cbr\\u003e{component}" in text
    assert "mean coefficients" not in text
