"""Settings of the operator that a genome has of its own: from a search's vector to merged and exported weights."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ecotone.merging.memory
from ecotone.merging import operators
from ecotone.merging.export import export_file
from ecotone.merging.gradient import Slopes
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.populations.gram import GramTable
from ecotone.populations.space import Space
from ecotone.populations.trial import Goal
from ecotone.search.bayesian_map import opening
from ecotone.search.cma_es import CmaEs, CmaEsSettings
from ecotone.search.coefficients import CoefficientBox, Setting
from ecotone.search.designs import design
from ecotone.search.nested_map import NestedMapSearch

SHAPES = {"a": (40, 31), "b.0": (7,), "b.1": (13, 90)}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())
CHANGING = sorted(name for name in operators.OPERATORS if operators.get(name).searchable and name != "one_of")


def setting_of(operator, share):
    """A setting that a genome may have, at a share of the way between its bounds: the density, where there is one."""
    bounds = operators.get(operator).searchable
    name = "density" if "density" in bounds else next(iter(bounds))
    low, high = bounds[name]
    return {name: low + share * (high - low)}


def bits(tensor):
    return tensor.flatten().contiguous().view(torch.uint8)


@pytest.fixture
def paths(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    places = [tmp_path / f"model-{k}.safetensors" for k in range(4)]
    for k, place in enumerate(places):
        noise = {name: 0.1 * k * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        save_file({name: (base[name] + noise[name]).bfloat16() for name in SHAPES}, place)
    return places


def opened(paths, operator, **settings):
    return Sources.open(paths[1:], paths[0], operator, settings=settings)


# -- genomes with settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", CHANGING)
@pytest.mark.parametrize("kept", [0, 2**28])
def test_a_genomes_settings_are_the_operators(paths, operator, kept, monkeypatch, tmp_path):
    monkeypatch.setattr(ecotone.merging.memory, "RESIDENT_BYTES", kept)
    sources, row = opened(paths, operator), [0.3, -0.2, 0.8]
    genomes = [Genome.uniform(SIZE, row, **setting_of(operator, share)) for share in (0.1, 0.4, 0.1, 0.9)]
    genomes.insert(2, Genome.uniform(SIZE, row))
    out = [{name: torch.empty(shape) for name, shape in SHAPES.items()} for _ in genomes]
    sources.materialise(genomes, out)
    stacked = sources.stack(genomes, torch.float32)
    for index, genome in enumerate(genomes):
        alone = opened(paths, operator, **genome.parameters)
        expected = alone.stack([Genome.uniform(SIZE, row)], torch.float32)
        assert all(torch.equal(bits(stacked[name][index]), bits(expected[name][0])) for name in SHAPES)
        assert all(torch.equal(bits(out[index][name]), bits(expected[name][0])) for name in SHAPES)
        written = load_file(export_file(sources, genome, tmp_path / f"{index}.safetensors", {}, torch.float32))
        assert all(torch.equal(bits(written[name]), bits(expected[name][0])) for name in SHAPES)
    assert not torch.equal(stacked["a"][0], stacked["a"][1])
    assert len(sources._tuned) == ecotone.merging.memory.TUNED


@pytest.mark.parametrize("operator", CHANGING)
def test_gradients_are_along_the_vectors_of_a_genomes_settings(paths, operator):
    gradient = {name: torch.randn(shape, generator=torch.manual_seed(1)) for name, shape in SHAPES.items()}
    setting, plain = setting_of(operator, 0.7), Genome.uniform(SIZE, [0.1, 0.2, 0.3])
    genome = Genome.uniform(SIZE, [0.1, 0.2, 0.3], **setting)
    found = Slopes(opened(paths, operator), genome)
    expected = Slopes(opened(paths, operator, **setting), plain)
    other = Slopes(opened(paths, operator), plain)
    for name, values in gradient.items():
        for slopes in (found, expected, other):
            slopes.add(name, values)
    assert (found.values == expected.values).all()
    assert (found.values != other.values).any()


def test_settings_that_are_not_the_operators_are_refused(paths):
    sources = opened(paths, "dare")
    for match, parameters in {
        "has no parameter 'densty'.*'density'": {"densty": 0.2},
        "density: expected a number above 0 and at most 1, found 1.5": {"density": 1.5},
        "mask_seed: expected an integer from 0 to 4294967295, found 0.5": {"mask_seed": 0.5},
    }.items():
        with pytest.raises(InputError, match=match):
            sources.mixture(Genome.uniform(SIZE, [0.0] * 3, **parameters))
    with pytest.raises(InputError, match="has no parameter 'combine'"):
        opened(paths, "ties").mixture(Genome.uniform(SIZE, [0.0] * 3, combine="sum"))


def test_a_new_density_counts_leading_bits_but_once(paths):
    sources = opened(paths, "ties")
    sources.stack([Genome.uniform(SIZE, [0.3] * 3, density=0.2)])
    table = sources.held.pieces.leading
    sources.stack([Genome.uniform(SIZE, [0.3] * 3, density=0.6)])
    assert all(tuned.held.pieces.leading is table for tuned in sources._tuned.values())


# -- boxes with settings -------------------------------------------------------------------------------------

SPACE = Space(
    ("x", "y"),
    ("s", "t"),
    np.array([0, 6, 10]),
    ("1", "2"),
    np.array([0, 6, 10]),
    GramTable.from_vectors(np.eye(2, 10, dtype=np.float32)),
    np.eye(2),
    ("x", "y"),
)
GOALS = (Goal("one"), Goal("two"))
SETTINGS = (
    Setting("density", 0.01, 1.0, "log"),
    Setting("mask_seed", 3, 6, "integer"),
    Setting("share", 0.2, 0.6, default=0.3),
)


def test_a_point_holds_coefficients_then_settings():
    box = CoefficientBox.of(SPACE, "block", -1.0, 3.0, settings=SETTINGS)
    assert (box.coefficients, box.size) == (4, 7)
    genome = box.genome(np.array([-1.0, 3.0, 0.5, 0.7, 1.0, 3.0, 0.0]))
    assert genome.coefficients.tolist() == [[-1.0, 3.0], [0.5, 0.7]]
    assert genome.parameters == {
        "density": pytest.approx(0.1),
        "mask_seed": 6,
        "share": pytest.approx(0.3),
    }
    for number in range(20):
        point = box.draw(0, number)
        again = box.genome(box.point(box.genome(point)))
        assert again.parameters["mask_seed"] == box.genome(point).parameters["mask_seed"]
        assert box.point(again)[[0, 1, 2, 3, 4, 6]] == pytest.approx(point[[0, 1, 2, 3, 4, 6]], rel=1e-12)


def test_genomes_without_settings_stand_for_the_defaults():
    box = CoefficientBox.of(SPACE, "model", 0.0, 1.0, settings=SETTINGS)
    point = box.point(Genome.uniform(10, [0.2, 0.4]))
    assert point == pytest.approx([0.2, 0.4, 0.5, 0.5, 0.25])
    assert box.filled(np.zeros((2, 5, 2))).shape == (2, 5, 5)
    assert box.inside([box.point(Genome.uniform(10, [0.2, 0.4], density=2.0)), point]).tolist() == [point.tolist()]


def test_the_ends_of_a_box_are_the_bounds_of_its_settings():
    box = CoefficientBox.of(SPACE, "model", -0.3, 1.7, settings=SETTINGS)
    least, most = (box.genome(np.full(box.size, end)).parameters for end in (-0.3, 1.7))
    assert list(least.values()) == [0.01, 3, 0.2]
    assert list(most.values()) == [1.0, 6, 0.6]
    seeds = [box.genome(box.draw(0, number)).parameters["mask_seed"] for number in range(400)]
    assert [seeds.count(seed) > 60 for seed in (3, 4, 5, 6)] == [True] * 4


def test_without_settings_it_is_the_box_of_coefficients():
    box = CoefficientBox.of(SPACE, "block", -1.0, 3.0)
    point = box.draw(4, 2)
    assert (box.size, box.genome(point).parameters) == (4, {})
    assert (box.point(box.genome(point)) == point).all()
    assert (box.filled(point) == point).all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((1.0, 0.5), "density: expected low below high, found 1 and 0.5"),
        ((0.2, math.nan), "density: expected low below high"),
        ((0.0, 1.0, "log"), "density: expected bounds above 0 for a log scale, found 0"),
        ((0.5, 3, "integer"), "density: expected whole numbers, found 0.5 and 3"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(arguments, match):
    with pytest.raises(InputError, match=match):
        Setting("density", *arguments)


def test_searches_begin_at_the_defaults():
    box = CoefficientBox.of(SPACE, "block", 0.0, 2.0, settings=(Setting("density", 0.1, 0.9, default=0.2),))
    for start, coefficient in ((None, 0.5), (1.2, 1.2), (box.filled(np.full(4, 0.7)), 0.7)):
        genome = CmaEs(box, GOALS, 0, CmaEsSettings(sigma=1e-6), start).ask(1)[0].genome
        assert genome.coefficients == pytest.approx(np.full((2, 2), coefficient), abs=1e-4)
        assert genome.parameters["density"] == pytest.approx(0.2, abs=1e-4)
    seeds = np.array([[1.0, 0.0], [0.0, 1.0]])
    for first in (opening(box, 6, 0, seeds)[:2], design("mixed", 25, box, 0, seeds)[:2]):
        genomes = [box.genome(point) for point in first]
        assert [genome.coefficients[1].tolist() for genome in genomes] == seeds.tolist()
        assert [genome.parameters["density"] for genome in genomes] == pytest.approx([0.2, 0.2])


def test_nested_map_searches_coefficients_alone():
    box = CoefficientBox.of(SPACE, "model", 0.0, 1.5, settings=SETTINGS)
    with pytest.raises(InputError, match="nested MAP searches over coefficients alone, found bounds for density"):
        NestedMapSearch(box, GOALS, 0, SPACE.sources)
