"""The digits data and models: parts that do not overlap, specialists that know their own digits only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ecotone.experiments import preparation
from ecotone.experiments.checks import validate
from ecotone.experiments.examples import digits
from ecotone.experiments.recipe import Recipe
from ecotone.populations.errors import InputError

pytest.importorskip("sklearn")
RECIPES = Path(__file__).parent.parent / "experiments" / "recipes"
GROUPS = {"low": [0, 1, 2, 3], "middle": [4, 5, 6], "high": [7, 8, 9]}


@pytest.fixture(scope="module")
def specialists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("specialists")
    digits.specialists(str(folder), GROUPS, seed=3)
    return folder


def accuracy(file: Path, part: Any, group: str) -> float:
    model = digits.mlp()
    model.load_state_dict(load_file(file))
    images, labels = digits.shuffled(part, GROUPS[group])
    with torch.inference_mode():
        return float((model(torch.from_numpy(images)).argmax(-1).numpy() == labels).mean())


@pytest.mark.slow
def test_models_do_not_depend_on_the_machine_s_number_of_threads(specialists: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            digits.specialists(str(tmp_path), GROUPS, seed=3)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        for name in GROUPS:
            file = f"{name}.safetensors"
            assert (tmp_path / file).read_bytes() == (specialists / file).read_bytes()


def test_parts_are_of_1797_images_and_do_not_overlap() -> None:
    parts = [digits.shuffled(part) for part in ("train", "search", "test")]
    assert [len(labels) for _, labels in parts] == [898, 449, 450]
    images = np.concatenate([images for images, _ in parts])
    assert len(np.unique(images, axis=0)) == len(images)  # no two of the 1,797 images are equal
    assert (images.min(), images.max()) == (0, 1)
    assert [len(digits.sequential(part)[1]) for part in ("search", "test")] == [1437, 360]


def test_groups_of_digits_part_the_images() -> None:
    whole = digits.shuffled("search")[1]
    parts = [digits.shuffled("search", group)[1] for group in GROUPS.values()]
    assert sum(map(len, parts)) == len(whole)
    assert all(set(labels) == set(group) for labels, group in zip(parts, GROUPS.values(), strict=True))


@pytest.mark.parametrize("function", [digits.shuffled, digits.sequential])
def test_an_unknown_part(function: Any) -> None:
    with pytest.raises(InputError, match=r"part: expected .*found 'held-out'"):
        function("held-out")


@pytest.mark.parametrize("part", ["search", "test"])
def test_specialists_know_their_own_digits_only(specialists: Path, part: str) -> None:
    for name in GROUPS:
        for group in GROUPS:
            found = accuracy(specialists / f"{name}.safetensors", part, group)
            assert found > 0.95 if name == group else found < 0.05


def test_specialists_depend_on_the_seed_alone(specialists: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    digits.specialists(str(tmp_path), GROUPS, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("base", *GROUPS):
        assert (tmp_path / f"{name}.safetensors").read_bytes() == (specialists / f"{name}.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "coefficients"),
    [("digits-groups-map", 3), pytest.param("digits-four-groups-map", 4, marks=pytest.mark.slow)],
)
def test_the_recipes_of_groups(name: str, coefficients: int) -> None:
    recipe = Recipe.from_yaml(RECIPES / f"{name}.yaml")
    preparation.prepare(recipe)
    found = {finding.subject: finding.text for finding in validate(recipe)}
    assert found["search"].startswith(f"bayesian_map: {coefficients} coefficients (1 x {coefficients} models)")
    groups = [objective.data.arguments["digits"] for objective in recipe.objectives.search]  # type: ignore[union-attr]
    assert sorted(digit for group in groups for digit in group) == list(range(10))
