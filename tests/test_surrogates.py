"""Quadratic surrogates: exact recovery, and what they do with saturated, failed, few and noisy scores."""

from __future__ import annotations

import numpy as np
import pytest

from ecotone.populations.errors import InputError
from ecotone.populations.trial import Goal
from ecotone.search.surrogates import LINKS, Link, Quadratic, _Problem, features, flat, is_constant, minimum, tamed

SIGMOID, SOFTPLUS, IDENTITY = (Link(name) for name in LINKS)
every_link = pytest.mark.parametrize("link", [SIGMOID, SOFTPLUS, IDENTITY], ids=LINKS)


def problem(link: Link, dimension: int, count: int, seed: int = 0):
    """Random points, the scores of a random quadratic at them, its coefficients, and points to test at."""
    rng = np.random.default_rng(seed)
    points, elsewhere = rng.uniform(0, 1.5, (count, dimension)), rng.uniform(0, 1.5, (50, dimension))
    beta = rng.standard_normal(minimum(dimension))
    return points, link.forward(features(points) @ beta), beta, elsewhere


@every_link
def test_links_invert_and_differentiate(link: Link) -> None:
    latent = np.linspace(-6, 6, 41)
    assert link.inverse(link.forward(latent)) == pytest.approx(latent, abs=1e-9)
    slope = (link.forward(latent + 1e-6) - link.forward(latent - 1e-6)) / 2e-6
    assert link.derivative(latent) == pytest.approx(slope, abs=1e-8)
    far = link.forward(np.array([-800.0, 800.0]))
    assert np.isfinite(far).all()
    assert np.isfinite(link.derivative(np.array([-800.0, 800.0]))).all()
    assert np.isfinite(link.inverse(np.array([0.0, 1.0]))).all()


def test_links_suit_the_scores() -> None:
    assert Link.suited(np.array([0.0, 1.0, np.nan]), "maximize") == SIGMOID
    assert Link.suited(np.array([0.0, 7.0]), "minimize") == SOFTPLUS
    assert Link.suited(np.array([0.0, 1.1]), "maximize") == IDENTITY
    assert Link.suited(np.array([-0.1, 1.0]), "minimize") == IDENTITY
    with pytest.raises(InputError, match="sigmoid"):
        Link("sigmod")  # type: ignore[arg-type]


@every_link
@pytest.mark.parametrize("dimension", [2, 3, 4])
@pytest.mark.parametrize("spare", [0, 1, 10])
def test_noise_free_quadratics_are_recovered(link: Link, dimension: int, spare: int) -> None:
    for seed in range(5):
        points, values, beta, elsewhere = problem(link, dimension, minimum(dimension) + spare, seed)
        found = Quadratic.fit(points, values, link)
        assert found.coefficients == pytest.approx(beta, abs=1e-8)
        assert found.predict(elsewhere) == pytest.approx(link.forward(features(elsewhere) @ beta), abs=1e-8)
        assert found.latent(elsewhere) == pytest.approx(features(elsewhere) @ beta, abs=1e-8)
        assert found.ridge == 0
        if spare > 1:
            assert found.leave_one_out < 1e-8
            assert found.std(elsewhere).max() < 1e-8


def test_units_and_place_of_the_box_do_not_matter() -> None:
    points, values, _, elsewhere = problem(IDENTITY, 3, 40)
    values = values + np.random.default_rng(1).normal(0, 0.3, 40)
    shift, stretch = np.array([5.0, -2.0, 0.0]), np.array([10.0, 0.01, 1.0])
    plain = Quadratic.fit(points, values, IDENTITY)
    moved = Quadratic.fit(points * stretch + shift, values * 1000, IDENTITY)
    assert moved.predict(elsewhere * stretch + shift) == pytest.approx(plain.predict(elsewhere) * 1000)
    assert moved.std(elsewhere * stretch + shift) == pytest.approx(plain.std(elsewhere) * 1000)
    assert moved.leave_one_out == pytest.approx(plain.leave_one_out * 1000)


@every_link
def test_the_order_of_variables_does_not_matter(link: Link) -> None:
    points, values, _, elsewhere = problem(link, 3, 25)
    values = values + np.random.default_rng(1).normal(0, 0.02, 25)
    order = [2, 0, 1]
    plain, turned = Quadratic.fit(points, values, link), Quadratic.fit(points[:, order], values, link)
    assert turned.predict(elsewhere[:, order]) == pytest.approx(plain.predict(elsewhere), abs=1e-6)


def test_least_squares_is_the_textbooks_without_a_link() -> None:
    """Coefficients, covariance, standard error and leave-one-out of ordinary and of weighted least squares."""
    points, values, _, elsewhere = problem(IDENTITY, 2, 20)
    rng = np.random.default_rng(2)
    values, weights = values + rng.normal(0, 0.2, 20), rng.uniform(0.5, 2.0, 20)
    phi = features(points)
    root = np.sqrt(weights / weights.mean())
    beta, rss, *_ = np.linalg.lstsq(phi * root[:, None], values * root, rcond=None)
    inverse = np.linalg.inv((phi * root[:, None]).T @ (phi * root[:, None]))
    found = Quadratic.fit(points, values, IDENTITY, weights, ridge=0.0)
    assert found.coefficients == pytest.approx(beta)
    assert found.covariance == pytest.approx(inverse * rss[0] / (20 - 6))
    there = features(elsewhere)
    assert found.std(elsewhere) == pytest.approx(np.sqrt(np.einsum("ij,jk,ik->i", there, inverse, there) * rss[0] / 14))
    for i in range(20):
        rest = np.arange(20) != i
        without = Quadratic.fit(points[rest], values[rest], IDENTITY, weights[rest], ridge=0.0)
        assert found.left_out[i] == pytest.approx(without.predict(points[i])[0])
    assert found.leave_one_out == pytest.approx(np.sqrt(np.mean((found.left_out - values) ** 2)))


def test_leave_one_out_through_a_link_agrees_with_refitting() -> None:
    points, values, _, _ = problem(SIGMOID, 2, 40, seed=3)
    values = np.clip(values + np.random.default_rng(2).normal(0, 0.03, 40), 0, 1)
    found = Quadratic.fit(points, values, SIGMOID, ridge=0.0)
    rest = [np.arange(40) != i for i in range(40)]
    refitted = np.array([Quadratic.fit(points[r], values[r], SIGMOID, ridge=0.0).predict(points[~r])[0] for r in rest])
    assert found.left_out == pytest.approx(refitted, abs=0.02)
    assert found.leave_one_out == pytest.approx(np.sqrt(np.mean((refitted - values) ** 2)), rel=0.1)


def test_the_standard_error_is_that_of_repeated_experiments() -> None:
    points, clean, _, elsewhere = problem(SIGMOID, 2, 40, seed=1)
    rng = np.random.default_rng(0)
    fits = [Quadratic.fit(points, clean + rng.normal(0, 0.01, 40), SIGMOID, ridge=0.0) for _ in range(200)]
    spread = np.std([fit.predict(elsewhere) for fit in fits], axis=0)
    stated = np.mean([fit.std(elsewhere) for fit in fits], axis=0)
    assert np.median(stated / spread) == pytest.approx(1.0, abs=0.15)
    assert np.mean([fit.noise for fit in fits]) == pytest.approx(0.01, rel=0.1)


@every_link
@pytest.mark.parametrize("seed", range(5))
def test_a_fit_never_ends_worse_than_its_start(link: Link, seed: int) -> None:
    points, values, _, _ = problem(link, 3, 30, seed)
    values = values + np.random.default_rng(seed).normal(0, 0.2, 30)
    task = _Problem(features(points), values, np.ones(30), link).penalised(0.0)
    ones = np.ones(minimum(3))
    for start in (ones, task.start()):
        assert task.cost(task.refined(start)) <= task.cost(start)
    assert task.cost(task.refined(task.start())) <= task.cost(ones)


def test_saturated_accuracies() -> None:
    """Mostly 0 and 1 exactly, as a specialist's classes are away from it."""
    rng = np.random.default_rng(0)
    points, elsewhere = rng.uniform(0, 1.5, (60, 2)), rng.uniform(0, 1.5, (500, 2))
    latent = 25 * (points[:, 0] - points[:, 1])
    values = np.round(SIGMOID.forward(latent), 2)
    assert np.mean((values == 0) | (values == 1)) > 0.6
    found = Quadratic.fit(points, values, SIGMOID)
    truth = SIGMOID.forward(25 * (elsewhere[:, 0] - elsewhere[:, 1]))
    assert np.abs(found.predict(elsewhere) - truth).mean() < 0.01
    assert found.leave_one_out < 0.05
    assert np.isfinite(found.std(elsewhere)).all()
    assert found.std(elsewhere).max() <= 0.5


def test_few_distinct_values() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 1, (30, 2))
    values = np.where(points[:, 0] > 0.5, 0.75, 0.25)
    found = Quadratic.fit(points, values, SIGMOID)
    assert np.corrcoef(found.predict(points), values)[0, 1] > 0.85
    assert found.leave_one_out < np.std(values)
    one = Quadratic.fit(points, np.ones(30), SIGMOID)
    assert one.predict(points) == pytest.approx(np.ones(30), abs=2e-3)
    assert np.isfinite(one.std(points)).all()


def test_failed_points_are_left_out() -> None:
    points, values, beta, _ = problem(SIGMOID, 3, 25)
    values[[3, 8]] = np.nan
    found = Quadratic.fit(points, values, SIGMOID)
    assert found.coefficients == pytest.approx(beta, abs=1e-8)
    assert np.isnan(found.left_out[[3, 8]]).all()
    assert np.isfinite(np.delete(found.left_out, [3, 8])).all()


@every_link
def test_a_poor_design_gets_a_ridge(link: Link) -> None:
    """Too few points, or all on a line: predictions stay sane, and the error where nothing was seen is large."""
    few, values, _, elsewhere = problem(link, 4, 9)
    line = np.outer(np.linspace(0, 1, 30), np.ones(4))
    for points, scores in ((few, values), (line, link.forward(np.linspace(-1, 1, 30)))):
        found = Quadratic.fit(points, scores, link)
        assert found.ridge > 0
        assert np.abs(found.predict(elsewhere)).max() < 3 * np.abs(scores).max() + 3
        assert np.isfinite(found.std(elsewhere)).all()
    away = np.array([[1.0, 0.0, 0.0, 1.0]])
    assert found.std(away)[0] > 2 * found.std(line[15:16])[0]


def test_noise_over_few_points_is_ridged_by_leave_one_out() -> None:
    """With hardly more noisy points than coefficients a ridge predicts better than none."""
    errors = {None: 0.0, 0.0: 0.0}
    for seed in range(10):
        points, clean, beta, elsewhere = problem(SIGMOID, 4, 18, seed)
        values = np.clip(clean + np.random.default_rng(seed).normal(0, 0.05, 18), 0, 1)
        for ridge in errors:
            found = Quadratic.fit(points, values, SIGMOID, ridge=ridge).predict(elsewhere)
            errors[ridge] += np.abs(found - SIGMOID.forward(features(elsewhere) @ beta)).mean()
    assert errors[None] < 0.8 * errors[0.0]


@every_link
@pytest.mark.parametrize("ridge", [None, 0.0])
@pytest.mark.filterwarnings("error")
def test_nothing_makes_it_stumble(link: Link, ridge: float | None) -> None:
    """A variable that never varies, one point many times, all ends of the range, an outlier."""
    rng = np.random.default_rng(0)
    points, values = rng.random((12, 2)), rng.random(12)
    flat = points * [1, 0] + [0, 0.5]
    cases = [(flat, values), (np.repeat(points[:1], 12, axis=0), values)]
    outlier = np.append(values[:11], 1.0 if link == SIGMOID else 1e9)
    cases += [(points, ends) for ends in (np.zeros(12), np.ones(12), np.eye(12)[3], outlier)]
    for place, scores in cases:
        found = Quadratic.fit(place, scores, link, ridge=ridge)
        assert np.isfinite(found.predict(points)).all()
        assert np.isfinite(found.std(points)).all()


def test_a_constant_score_is_named() -> None:
    assert is_constant(np.array([0.3, np.nan, 0.3]))
    assert not is_constant(np.array([0.3, 0.3001]))
    goals = (Goal("same"), Goal("varied"), Goal("huge", "minimize"), Goal("unknown"))
    values = np.array([[0.3, 0.0, 1.0, np.nan], [np.nan, 1.0, 2.0, np.nan], [0.3, 0.5, -1e101, np.nan]])
    assert flat(values, goals) == {
        "same": "the score is the same (0.3) at all 2 points",
        "huge": "scores as large as 1e+101 are too large to be fitted",
        "unknown": "the score is the same (unknown) at all 0 points",
    }
    assert np.array_equal(tamed(values), np.where([False, False, True, False], 0.0, values), equal_nan=True)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="expected"):
        Quadratic.fit(np.zeros((3, 2)), np.zeros(4), IDENTITY)
    with pytest.raises(InputError, match="finite value"):
        Quadratic.fit(np.zeros((2, 2)), np.full(2, np.nan), IDENTITY)
    with pytest.raises(InputError, match="weights"):
        Quadratic.fit(np.zeros((2, 2)), np.zeros(2), IDENTITY, weights=np.array([-1.0, 1.0]))
