"""OTA merging with FFG's masks, against the formulas in numpy; its files, and what is refused of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ecotone.experiments import compose, exports, fingerprints
from ecotone.experiments.recipe import Recipe
from ecotone.fitness.preparing.prepare import basis_of
from ecotone.fitness.specs import WorkerSpec
from ecotone.merging.operators.ota import Ota
from ecotone.merging.operators.whole import Known, Layer, Report
from ecotone.populations.errors import EcotoneError, InputError

NAMES = ("one", "two", "three")
SHAPES = {"first.weight": (6, 5), "first.bias": (6,), "table.weight": (9, 4), "scale": ()}


def drawn(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {key: scale * torch.randn(shape, generator=generator).double() for key, shape in SHAPES.items()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base, three experts and their second moments, as tiny as Adam's are."""
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    base = drawn(0)
    save_file(base, tmp_path / "base.safetensors")
    for seed, name in enumerate(NAMES, 1):
        change = drawn(seed, 0.1)
        save_file({key: value + change[key] for key, value in base.items()}, tmp_path / f"{name}.safetensors")
        save_file({key: 1e-18 * one**2 for key, one in drawn(10 + seed).items()}, tmp_path / f"{name}-v.safetensors")
    return tmp_path


def spec_of(folder, names=NAMES, **settings):
    paths = {name: str(folder / f"{name}-v.safetensors") for name in names}
    experts = tuple(str(folder / f"{name}.safetensors") for name in names)
    settings = {"second_moments": paths, **settings}
    return WorkerSpec(experts, str(folder / "base.safetensors"), "ota", settings)


def merged(folder, names=NAMES, **settings):
    """The merge at c = 1, by tensor."""
    base = load_file(folder / "base.safetensors")
    vectors = basis_of(spec_of(folder, names, **settings)).models()
    return {key: (value + sum(one.tensor(key) for one in vectors)).numpy() for key, value in base.items()}


def read(folder, names=NAMES):
    """(K,) task vectors and second moments, each the whole model in one vector."""
    base = load_file(folder / "base.safetensors")
    taus = [load_file(folder / f"{name}.safetensors") for name in names]
    moments = [load_file(folder / f"{name}-v.safetensors") for name in names]

    def flat(one):
        return np.concatenate([one[key].numpy().ravel() for key in SHAPES])

    return flat(base), np.array([flat(one) - flat(base) for one in taus]), np.array([flat(one) for one in moments])


def flat(tensors):
    return np.concatenate([tensors[key].ravel() for key in SHAPES])


# -- formulas ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_it_is_the_mean_weighted_by_powers_of_second_moments(folder, power):
    """In every tensor, those without a second axis and embeddings too; moments of 1e-18 do not shrink the merge."""
    base, taus, moments = read(folder)
    weights = moments**power
    expected = base + (weights * taus).sum(0) / weights.sum(0)
    np.testing.assert_allclose(flat(merged(folder, power=power)), expected, rtol=1e-8)


@pytest.mark.parametrize("uncovered", ["base", "mean"])
@pytest.mark.parametrize("density", [0.05, 0.4])
def test_masks_keep_the_largest_of_the_whole_model(folder, density, uncovered):
    base, taus, moments = read(folder)
    scores = moments * taus**2
    count = round(density * taus.shape[1])
    kept = scores >= np.sort(scores, axis=1)[:, [-count]]
    assert (kept.sum(1) == count).all()
    weights = np.sqrt(moments) * (kept | ~kept.any(0) if uncovered == "mean" else kept)
    total = weights.sum(0)
    assert (total == 0).any() == (uncovered == "base")
    expected = base + np.divide((weights * taus).sum(0), total, out=np.zeros_like(base), where=total > 0)
    np.testing.assert_allclose(flat(merged(folder, density=density, uncovered=uncovered)), expected, rtol=1e-8)
    by_tensor = [
        part.mean() for part in np.split(kept.any(0), np.cumsum([np.prod(s, dtype=int) for s in SHAPES.values()])[:-1])
    ]
    assert len(set(by_tensor)) > 1  # the threshold is that of the whole model, not of each tensor


def test_equal_moments_give_the_mean_and_a_common_factor_changes_nothing(folder):
    before = merged(folder, power=1.0)
    for name in NAMES:
        moments = load_file(folder / f"{name}-v.safetensors")
        save_file({key: 1e9 * one for key, one in moments.items()}, folder / f"{name}-v.safetensors")
    np.testing.assert_allclose(flat(merged(folder, power=1.0)), flat(before), rtol=1e-10)
    for name in NAMES[1:]:
        (folder / f"{name}-v.safetensors").write_bytes((folder / "one-v.safetensors").read_bytes())
    base, taus, _ = read(folder)
    np.testing.assert_allclose(flat(merged(folder)), base + taus.mean(0), rtol=1e-10)


def test_the_layer_holds_what_holds_of_all_prepared_operators():
    generator = torch.Generator().manual_seed(0)
    base, *experts = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    moments = list(1e-28 * torch.rand(3, 5, 3, generator=generator, dtype=torch.float64))
    at = Layer("w", "rest", (5, 3))

    def vectors(experts, moments, **settings):
        found = Ota(**settings).layer(at, base, experts, Known(second_moments=moments), Report())
        return torch.stack(list(found))

    alone, alike = vectors(experts[:1], moments[:1], power=1.0), vectors(experts[:1] * 3, moments)
    torch.testing.assert_close(base + alone[0], experts[0])
    torch.testing.assert_close(base + alike.sum(0), experts[0])
    assert not vectors([base] * 3, moments).any()
    nothing = vectors(experts, [torch.zeros_like(base)] * 3)
    torch.testing.assert_close(nothing, torch.stack([(one - base) / 3 for one in experts]))
    turned = vectors([experts[i] for i in (2, 0, 1)], [moments[i] for i in (2, 0, 1)])
    torch.testing.assert_close(turned, vectors(experts, moments)[[2, 0, 1]])
    torch.testing.assert_close(
        vectors([base + 7 * (one - base) for one in experts], moments), 7 * vectors(experts, moments)
    )


def test_the_card_of_an_export_names_files_without_their_folders():
    told = exports._in_words({"name": "ota", "second_moments": {"one": "/home/me/one-v.safetensors"}, "ridge": None})
    assert told == "`ota` (second_moments one: one-v.safetensors)"


# -- files ---------------------------------------------------------------------------------------------------


def test_tensors_that_were_not_trained_may_be_missing(folder):
    name = "table.weight"
    tensors, moments = (load_file(folder / f"one{end}.safetensors") for end in ("", "-v"))
    del moments[name]
    save_file(moments, folder / "one-v.safetensors")
    with pytest.raises(
        InputError, match=r"table.weight: expected second moments, as one was trained on it, found none"
    ):
        basis_of(spec_of(folder))
    save_file(tensors | {name: load_file(folder / "base.safetensors")[name]}, folder / "one.safetensors")
    found = merged(folder)[name]
    base, taus, weights = (
        np.array([load_file(folder / f"{one}{end}.safetensors")[name].numpy() for one in ones])
        for ones, end in ((("base",), ""), (NAMES[1:], ""), (NAMES[1:], "-v"))
    )
    roots = np.sqrt(weights)
    np.testing.assert_allclose(found, (roots * taus).sum(0) / roots.sum(0), rtol=1e-6)
    assert np.abs(found - base[0]).max() > 0.01


def test_other_moments_are_another_basis_and_moved_ones_the_same(folder):
    first = basis_of(spec_of(folder))
    moved = folder / "moved.safetensors"
    (folder / "two-v.safetensors").rename(moved)
    paths = {**spec_of(folder).settings["second_moments"], "two": str(moved)}
    assert basis_of(replace(spec_of(folder), settings={"second_moments": paths})).key == first.key
    save_file({key: 2 * one for key, one in load_file(moved).items()}, moved)
    assert basis_of(replace(spec_of(folder), settings={"second_moments": paths})).key != first.key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"one": None}, r"merge.second_moments: expected a file for each expert, found none for 'one'"),
        ({"four": "two-v"}, r"merge.second_moments: expected names of experts, found 'four'"),
        ({"two": "nowhere"}, r"nowhere"),
        ({"two": {"first.weight": torch.ones(5, 6)}}, r"first.weight: expected the shape \[6, 5\], found \[5, 6\]"),
        ({"two": {"other": torch.ones(5, 6)}}, r"expected tensors named as the models', such as .*, found other"),
        ({"two": {key: -torch.ones(shape) for key, shape in SHAPES.items()}}, "expected finite numbers of at least 0"),
        ({"two": {key: torch.full(shape, torch.nan) for key, shape in SHAPES.items()}}, "expected finite numbers"),
    ],
)
def test_files_that_do_not_fit_are_refused(folder, change, words):
    paths = dict(spec_of(folder).settings["second_moments"])
    for name, one in change.items():
        if isinstance(one, dict):
            save_file(one, folder / "other.safetensors")
        paths[name] = str(folder / (f"{one}.safetensors" if isinstance(one, str) else "other.safetensors"))
        if one is None:
            del paths[name]
    with pytest.raises(EcotoneError, match=words):
        basis_of(replace(spec_of(folder), settings={"second_moments": paths}))


def test_recipes_name_the_files_relative_to_themselves(folder):
    paths = "\n".join(f"    {name}: {name}-v.safetensors" for name in NAMES)
    text = f"""name: ota
models:
  base: base.safetensors
  experts: [one.safetensors, two.safetensors, three.safetensors]
merge:
  operator: ota
  density: 0.5
  second_moments:
{paths}
objectives:
  search: [{{name: a, type: call, call: "builtins:len", direction: maximize}}]
budget: {{evaluations: 3}}
"""
    (folder / "recipe.yaml").write_text(text)
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    expected = {name: str(folder / f"{name}-v.safetensors") for name in NAMES}
    assert recipe.merge.settings["second_moments"] == expected
    spec = compose.worker_spec(recipe, None)
    assert spec.settings == {"density": 0.5, "second_moments": expected}
    recorded = fingerprints.fingerprints(recipe, spec)["merge.operator"]
    assert len(recorded) == 3
    save_file(drawn(3), folder / "one-v.safetensors")
    changed = fingerprints.fingerprints(recipe, spec)["merge.operator"]
    assert [name for name in recorded if recorded[name] != changed[name]] == ["one-v.safetensors"]
    made = {name: f"prepared:{name}-v.safetensors" for name in NAMES}
    there = recipe.model_copy(update={"merge": recipe.merge.with_paths(lambda path: "prepared:" + path[-16:])})
    assert there.merge.settings["second_moments"].keys() == made.keys()
    located = compose.worker_spec(there, folder / "step").settings["second_moments"]
    assert all(path.startswith(str(folder / "step")) for path in located.values())
