"""Sampling designs: in the box, of the seed alone, and able to determine a quadratic."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from ecotone.populations.errors import InputError
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.designs import DESIGNS, design, sobol
from ecotone.search.surrogates import Link, Quadratic, features, minimum

every_design = pytest.mark.parametrize("kind", DESIGNS)


def box(sources: int, segments: int = 1, low: float = 0.0, high: float = 1.5) -> CoefficientBox:
    return CoefficientBox(np.arange(segments + 1), sources, low, high)


def test_the_fewest_points() -> None:
    assert [minimum(d) for d in (1, 2, 3, 4, 8)] == [3, 6, 10, 15, 45]
    assert [features(np.zeros((1, d))).shape[1] for d in (1, 2, 3, 4, 8)] == [3, 6, 10, 15, 45]


@every_design
@pytest.mark.parametrize("count", [1, 5, 33])
@pytest.mark.parametrize("sources", [1, 2, 3, 8])
def test_points_are_in_the_box_and_of_the_seed_alone(kind: str, count: int, sources: int) -> None:
    within = box(sources, low=-0.5, high=1.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # scipy has opinions about the number of points
        points = design(kind, count, within, 4)
    assert points.shape == (count, sources)
    assert points.min() >= -0.5
    assert points.max() <= 1.25
    assert design(kind, count, within, 4).tolist() == points.tolist()
    if count > 5:  # of five points in eight dimensions all may be models themselves
        assert design(kind, count, within, 5).tolist() != points.tolist()


@pytest.mark.parametrize("kind", ["mixed", "sobol", "random"])
@pytest.mark.parametrize("dimension", [2, 3, 4, 8])
def test_the_fewest_points_determine_a_quadratic(kind: str, dimension: int) -> None:
    for seed in range(5):
        points = design(kind, minimum(dimension), box(dimension), seed)
        assert np.linalg.matrix_rank(features(points)) == minimum(dimension)
        beta = np.random.default_rng(seed).standard_normal(minimum(dimension))
        found = Quadratic.fit(points, features(points) @ beta, Link("identity"), ridge=0.0)
        assert found.coefficients == pytest.approx(beta, abs=1e-6)


def test_mixed_designs_are_conditioned_better_than_random_ones() -> None:
    def condition(kind: str) -> float:
        drawn = [design(kind, 10, box(3), seed) for seed in range(20)]
        return float(np.median([np.linalg.cond(features(points)) for points in drawn]))

    assert condition("mixed") < 0.5 * condition("random")


def test_a_mixed_design_has_the_models_equal_and_jittered_points() -> None:
    points = design("mixed", 53, box(3), 0)
    assert points[:3].tolist() == np.eye(3).tolist()
    equal = np.ptp(points, axis=1) == 0
    assert equal.sum() == 3  # of the ten isotropic ones these are exactly so
    assert np.ptp(points[equal][:, 0]) > 0.4  # and at different levels
    away = np.linalg.norm(points[:, None] - np.eye(3), axis=2).min(axis=1)
    assert 8 <= np.sum((away > 0) & (away < 0.35)) <= 20


def test_models_may_have_any_coefficients_and_fill_every_segment() -> None:
    seeds = np.array([[0.5, 0.5], [0.0, 2.0], [1.0, 0.0]])
    points = design("mixed", 40, box(2, segments=2), 0, seeds)
    assert points[:3].tolist() == [[0.5, 0.5, 0.5, 0.5], [0.0, 1.5, 0.0, 1.5], [1.0, 0.0, 1.0, 0.0]]
    with pytest.raises(InputError, match="3 coefficients a model, found 2"):
        design("mixed", 40, box(3), 0, seeds)


def test_a_grid_is_regular_and_distinct() -> None:
    points = design("grid", 10, box(2, high=1.5), 0)
    assert len(np.unique(points, axis=0)) == 10
    assert set(np.round(points.ravel(), 9)) <= {0.0, 0.5, 1.0, 1.5}
    assert len(np.unique(design("grid", 16, box(2), 0), axis=0)) == 16  # the whole of it
    large = design("grid", 400, box(16), 0)
    assert len(np.unique(large, axis=0)) == 400
    assert set(np.unique(large)) == {0.0, 0.75, 1.5}


def test_sobol_points_are_even() -> None:
    points = sobol(64, 3, np.random.default_rng(0))
    counts = np.zeros((4, 4, 4), int)
    np.add.at(counts, tuple((points * 4).astype(int).T), 1)
    assert (counts.sum(axis=(1, 2)) == 16).all()
    assert (counts.sum(axis=2) == 4).all()


def test_an_unknown_design_is_named() -> None:
    with pytest.raises(InputError, match=r"sobl.*'sobol'"):
        design("sobl", 4, box(2), 0)  # type: ignore[arg-type]
