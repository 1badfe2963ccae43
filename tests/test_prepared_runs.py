"""Runs with operators that prepare: from the recipe to the export, killed and resumed, and with other bits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ecotone.experiments import compose
from ecotone.experiments.exports import export, verify
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch, resume
from ecotone.merging.basis import RECORD, Bases
from ecotone.populations import facts
from ecotone.populations.contents import contents
from ecotone.populations.errors import EcotoneError, InputError

TOYS = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

def rows(name, labels=False):
    generator = torch.Generator().manual_seed(len(name))
    inputs = torch.randn(64, 4, generator=generator) * torch.arange(1.0, 5.0)
    answers = (inputs[:, 0] > 0).long() + (inputs[:, len(name) % 4] > 1).long()
    return (inputs, answers) if labels else inputs
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))


def recipe_of(folder: Path, **changes) -> Recipe:
    (folder / "prepared_toys.py").write_text(TOYS)
    for number, name in enumerate(("base", "one", "three")):
        torch.manual_seed(0)
        tensors = {"0.weight": torch.randn(6, 4), "0.bias": torch.randn(6), "2.weight": torch.randn(3, 6)}
        tensors["2.bias"] = torch.randn(3)
        torch.manual_seed(number)
        tensors = {key: value + (0.3 * torch.randn_like(value) if number else 0) for key, value in tensors.items()}
        save_file(tensors, folder / f"{name}.safetensors")

    def data(name, **arguments):
        return {"call": "./prepared_toys.py:rows", "arguments": {"name": name, **arguments}}

    record = {
        "name": "toy",
        "models": {
            "base": "base.safetensors",
            "experts": ["one.safetensors", "three.safetensors"],
            "architecture": {"call": "./prepared_toys.py:net"},
        },
        "merge": {"operator": "kfac"},
        "calibration": [{"name": name, "data": data(name)} for name in ("one", "three")],
        "objectives": {
            "search": [{"name": n, "type": "accuracy", "data": data(n, labels=True)} for n in ("one", "three")],
            "held_out": [{"name": n, "type": "accuracy", "data": data(n, labels=True)} for n in ("one", "three")],
        },
        "search": {"algorithm": "nsga2", "population": 4},
        "budget": {"evaluations": 12},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
        **changes,
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(record))
    return Recipe.from_yaml(folder / "toy.yaml")


def test_a_run_is_prepared_searched_resumed_exported_and_verified(tmp_path):
    run = launch(recipe_of(tmp_path), tmp_path / "run")
    with run.journal() as journal:
        hashes = journal.fact(facts.CONTENTS)
        first = journal.trial(0).genome
        names = [name for name, _ in journal.references()]
    assert {"merge.operator: one", "merge.operator: three"} <= set(hashes)
    assert names == ["base", "one (kfac)", "three (kfac)", "at 1 (kfac)"]
    assert first.coefficients.tolist() == [[1.0, 1.0]]  # the search begins with the published merge
    (basis,) = Bases().all()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    straight = resume(tmp_path / "copy", {"budget.evaluations": 16})
    Bases().remove(basis.key)  # as after a move to another machine
    resumed = resume(tmp_path / "run", {"budget.evaluations": 16})
    assert resumed.status()["evaluations"] == 16
    assert resumed.status()["digest"] == straight.status()["digest"]
    export(resumed, "best", tmp_path / "merged.safetensors")
    assert all(one.recorded == one.found for one in verify(tmp_path / "merged.safetensors"))


def test_another_bit_in_what_was_prepared_is_refused(tmp_path):
    recipe = recipe_of(tmp_path)
    launch(recipe, tmp_path / "run")
    (basis,) = Bases().all()
    path = basis.paths[0]
    tensors = load_file(path)
    tensors["2.bias"] = tensors["2.bias"] + 1e-6
    path.unlink()
    save_file(tensors, path)
    record = dict(basis.record)
    record["files"] = {one.name: found.digest for one, found in contents(basis.paths).items()}
    (basis.folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(EcotoneError, match=r"merge\.operator: one"):
        resume(tmp_path / "run", {"budget.evaluations": 16})


def test_what_validate_refuses(tmp_path):
    recipe = recipe_of(tmp_path)
    changes = [
        ({"calibration": []}, "the operator kfac reads inputs of each expert's own task, found none"),
        ({"models.architecture": None}, "the operator kfac gathers statistics of layers"),
        ({"merge.operator": "kfak"}, "Did you mean 'kfac'"),
        ({"merge.ridge": -1}, "ridge"),
    ]
    for settings, message in changes:
        with pytest.raises(InputError, match=message):
            Recipe.from_yaml(tmp_path / "toy.yaml", settings)
    lacking = replace_tasks(recipe)
    with pytest.raises(InputError, match="found none for 'three'"):
        compose.check_search(lacking)


def replace_tasks(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"calibration": recipe.calibration[:1]})


def test_a_basis_takes_part_in_nothing_else(tmp_path):
    """Of the same models under another operator nothing is prepared."""
    launch(recipe_of(tmp_path, merge={"operator": "task_arithmetic"}, calibration=[]), tmp_path / "run")
    assert Bases().all() == []
