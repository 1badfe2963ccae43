"""Four views of a digit: what each shows, that labels stay out of calibration, and the family that is tuned on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ecotone.experiments import preparation
from ecotone.experiments.checks import validate
from ecotone.experiments.examples import digit_views
from ecotone.experiments.examples.digits import shuffled
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch
from ecotone.fitness.objectives import CallSettings
from ecotone.populations.errors import InputError

pytest.importorskip("sklearn")
RECIPE = Path(__file__).parent.parent / "experiments" / "recipes" / "digits-apart.yaml"
VIEWS = tuple(digit_views.VIEWS)
FIRST = [47, 14, 15, 18, 0, 40, 63, 9]  # where the first scrambled pixels come from


def accuracy(folder: Path, encoder: str, view: str) -> float:
    """The share of a view's test images that an encoder's file tells right with the view's head."""
    model = digit_views.encoder()
    model.load_state_dict(load_file(folder / f"{encoder}.safetensors"))
    head = digit_views.head(str(folder / "heads.safetensors"), view)  # type: ignore[arg-type]
    pixels, digits = digit_views.seen("test", view)  # type: ignore[arg-type]
    with torch.inference_mode():
        return float((head(model(torch.from_numpy(pixels)), None).argmax(-1).numpy() == digits).mean())


def test_a_view_shows_the_same_digits_in_a_way_of_its_own() -> None:
    plain, digits = digit_views.seen("search", "plain")
    images, labels = shuffled("search")
    assert np.array_equal(plain, images)
    seen = {view: digit_views.seen("search", view) for view in digit_views.VIEWS}
    for view, (pixels, own) in seen.items():
        assert (pixels.shape, pixels.dtype) == ((449, 64), np.float32)
        assert (pixels.min(), pixels.max()) == (0, 1)
        assert np.array_equal(own, labels)
        assert np.array_equal(digits, own)
        assert np.array_equal(digit_views.images("search", view), pixels)
        assert all(not np.array_equal(pixels, other) for name, (other, _) in seen.items() if name != view)


def test_views_are_what_they_are_called() -> None:
    plain = digit_views.images("test", "plain").reshape(-1, 8, 8)
    turned = digit_views.images("test", "turned").reshape(-1, 8, 8)
    for row in range(8):
        for column in range(8):
            assert np.array_equal(turned[:, 7 - column, row], plain[:, row, column])
    assert np.array_equal(digit_views.images("test", "negative"), 1 - plain.reshape(-1, 64))
    scrambled = digit_views.images("test", "scrambled")
    assert np.array_equal(np.sort(scrambled), np.sort(plain.reshape(-1, 64)))
    assert np.array_equal(scrambled[:, np.argsort(digit_views.ORDER)], plain.reshape(-1, 64))
    assert digit_views.ORDER[:8].tolist() == FIRST  # in every process


def test_the_search_s_images_are_not_those_that_train_or_test() -> None:
    parts = [digit_views.images(part, "scrambled") for part in ("train", "search", "test")]
    assert list(map(len, parts)) == [898, 449, 450]
    assert len(np.unique(np.concatenate(parts), axis=0)) == 1797


@pytest.mark.parametrize("function", [digit_views.seen, digit_views.images])
def test_an_unknown_view(function: object) -> None:
    with pytest.raises(InputError, match=r"view: expected one of plain, turned, negative, scrambled, found 'torned'.*"):
        function("search", "torned")  # type: ignore[operator]
    with pytest.raises(InputError, match=r"part: expected .*found 'held-out'"):
        function("held-out", "plain")  # type: ignore[operator]


def test_models_depend_on_the_seed_alone(tmp_path: Path) -> None:
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    for folder, seed, epochs in ((first, 3, 1), (again, 3, 1), (other, 4, 0)):
        folder.mkdir()
        digit_views.experts(str(folder), seed=seed, epochs=epochs, pretraining=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    names = {f"{name}.safetensors" for name in ("base", "heads", *VIEWS)}
    assert {file.name for file in first.iterdir()} == names
    for name in names:
        assert (first / name).read_bytes() == (again / name).read_bytes() != (other / name).read_bytes()
    base = load_file(first / "base.safetensors")
    for view in VIEWS:
        expert = load_file(first / f"{view}.safetensors")
        assert {key: tensor.shape for key, tensor in expert.items()} == {k: tensor.shape for k, tensor in base.items()}
        assert all(not torch.equal(tensor, base[key]) for key, tensor in expert.items())
    heads = load_file(first / "heads.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in heads.items()} == {
        f"{view}.{part}": shape for view in VIEWS for part, shape in (("weight", (10, 64)), ("bias", (10,)))
    }


def test_the_recipe_has_a_task_an_expert_with_its_own_inputs_and_no_labels() -> None:
    recipe = Recipe.from_yaml(RECIPE)
    experts = [expert.removeprefix("prepared:").removesuffix(".safetensors") for expert in recipe.models.experts]
    assert tuple(experts) == VIEWS
    for group, function, part in (
        (recipe.calibration, "images", "search"),
        (recipe.objectives.search, "seen", "search"),
        (recipe.objectives.held_out, "seen", "test"),
    ):
        assert tuple(one.name for one in group) == VIEWS
        for one in group:
            assert not isinstance(one, CallSettings)
            assert one.data.call == f"ecotone.experiments.examples.digit_views:{function}"
            assert one.data.arguments == {"part": part, "view": one.name}
            assert one.head is not None
            assert one.head.arguments == {"file": "prepared:heads.safetensors", "view": one.name}
    assert {task.loss for task in recipe.calibration} == {"entropy"}
    assert isinstance(digit_views.images("search", "plain"), np.ndarray)  # inputs alone


@pytest.mark.slow
def test_experts_know_their_own_view_best_and_the_base_knows_all(tmp_path: Path) -> None:
    digit_views.experts(str(tmp_path), seed=0)
    own = [accuracy(tmp_path, view, view) for view in VIEWS]
    base = [accuracy(tmp_path, "base", view) for view in VIEWS]
    others = [accuracy(tmp_path, one, view) for one in VIEWS for view in VIEWS if one != view]
    assert min(own) > 0.93
    assert 0.88 < min(base) <= max(base) < 0.93
    assert np.mean(others) < np.mean(base) < np.mean(own) - 0.03


@pytest.mark.slow
def test_the_recipe_runs(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(RECIPE, {"tracking.mlflow": False})
    preparation.prepare(recipe)
    found = {finding.subject: finding.text for finding in validate(recipe)}
    assert found["layout"].startswith("31,072 parameters, 8 tensors, 4 blocks")
    assert found["search[0]"].startswith("bayesian_map: 4 coefficients (1 x 4 models)")
    run = launch(recipe, tmp_path / "run")
    status = run.status()
    assert (status["state"], status["failures"]) == ("finished", 0)
    best, average = run.best(), run.references()[-1]
    assert best is not None
    assert best.scores is not None
    assert average.scores is not None
    assert np.mean(list(best.scores.values())) > np.mean(list(average.scores.values())) + 0.03
    assert best.held_out is not None
    assert tuple(best.held_out) == VIEWS
