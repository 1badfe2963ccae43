"""The Gaussian process against textbook formulas, and what it learns."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import multivariate_normal

import ecotone.search.gaussian as gaussian
from ecotone.populations.genome import Floats
from ecotone.search.gaussian import (
    GaussianProcess,
    Inputs,
    Prior,
    kernel,
    kernel_diagonal,
    log_evidence,
    quadratic_basis,
)

LOGS = np.log([0.7, 0.4, 0.5, 0.8, 1.3, 0.6, 0.01])  # linear, quadratic, residual, three lengths, noise


def drawn(count: int, variables: int = 3, seed: int = 0) -> Inputs:
    points = np.random.default_rng(seed).uniform(-1, 1, (count, variables))
    return Inputs(points, points)


def quadratic(points: Floats) -> Floats:
    return np.asarray(1.0 + 2.0 * points[:, 0] - 3.0 * points[:, 1] ** 2 + points[:, 0] * points[:, 2])


def given(inputs: Inputs, values: Floats, logs: Floats = LOGS) -> GaussianProcess:
    return GaussianProcess(inputs, values, np.ones(len(values)), logs, centre=0.3, scale=2.0)


@pytest.mark.parametrize("variables", [1, 2, 5])
def test_the_quadratics_inner_products_are_powers(variables: int) -> None:
    points = drawn(9, variables).points
    basis = quadratic_basis(points)
    assert basis.shape == (9, (variables + 1) * (variables + 2) // 2)
    inner = points @ points.T
    parts = np.split(basis, [1, 1 + variables], axis=1)
    for part, wanted in zip(parts, [np.ones_like(inner), inner, inner**2], strict=True):
        assert part @ part.T == pytest.approx(wanted, abs=1e-12)


def test_the_kernel_is_a_polynomial_and_a_matern() -> None:
    left, right = drawn(1), drawn(1, seed=1)
    inner = float(left.points[0] @ right.points[0])
    r = np.sqrt(5 * np.sum(((left.places - right.places) / np.exp(LOGS[3:6])) ** 2))
    wanted = 1 + 0.7 * inner + 0.4 * inner**2 + 0.5 * (1 + r + r**2 / 3) * np.exp(-r)
    assert kernel(left, right, LOGS) == pytest.approx(wanted)
    many = drawn(8)
    assert kernel_diagonal(many, LOGS) == pytest.approx(np.diag(kernel(many, many, LOGS)), abs=1e-7)


def test_the_residual_has_coordinates_of_its_own() -> None:
    points = drawn(2).points
    far, near = Inputs(points, np.array([[0.0], [50.0]])), Inputs(points, np.zeros((2, 1)))
    logs = LOGS[[0, 1, 2, 3, 6]]
    assert kernel(near, near, logs)[0, 1] - kernel(far, far, logs)[0, 1] == pytest.approx(0.5)


def test_the_evidence_is_the_density_of_the_data() -> None:
    inputs, weights = drawn(12), np.linspace(0.5, 3.0, 12)
    values = np.sin(3 * inputs.points[:, 0])
    covariance = kernel(inputs, inputs, LOGS) + np.diag(0.01 * weights + 1e-8)
    wanted = multivariate_normal.logpdf(values, np.zeros(12), covariance)
    assert log_evidence(inputs, values, weights, LOGS)[0] == pytest.approx(wanted)
    prior = Prior.of(3, 0.01)
    more = log_evidence(inputs, values, weights, LOGS, prior)[0]
    assert more == pytest.approx(wanted - 0.5 * np.sum(((LOGS - prior.mean) / prior.deviation) ** 2))


@pytest.mark.parametrize("index", range(len(LOGS)))
def test_the_evidences_gradient(index: int) -> None:
    inputs, weights, prior = drawn(15), np.linspace(0.5, 3.0, 15), Prior.of(3, 0.01)
    values, step = np.sin(3 * inputs.points[:, 0]), np.eye(len(LOGS))[index] * 1e-5
    up, down = (log_evidence(inputs, values, weights, LOGS + s, prior)[0] for s in (step, -step))
    assert log_evidence(inputs, values, weights, LOGS, prior)[1][index] == pytest.approx((up - down) / 2e-5, rel=1e-5)


def test_mean_and_variance_are_the_conditional_ones() -> None:
    inputs, places = drawn(10), drawn(6, seed=1)
    values = quadratic(inputs.points)
    covariance = kernel(inputs, inputs, LOGS) + np.exp(LOGS[-1]) * np.eye(10)
    cross = kernel(places, inputs, LOGS)
    process = given(inputs, values)
    assert process.mean(places) == pytest.approx(0.3 + 2.0 * cross @ np.linalg.solve(covariance, (values - 0.3) / 2.0))
    wanted = np.diag(kernel(places, places, LOGS) - cross @ np.linalg.solve(covariance, cross.T))
    assert process.variance(places) == pytest.approx(4.0 * wanted, rel=1e-5)


def test_left_out_is_what_the_others_predict() -> None:
    inputs = drawn(10)
    values = np.sin(4 * inputs.points[:, 0])
    for index in range(10):
        rest = np.arange(10) != index
        others = given(Inputs(inputs.points[rest], inputs.places[rest]), values[rest])
        one = Inputs(inputs.points[[index]], inputs.places[[index]])
        assert given(inputs, values).left_out[index] == pytest.approx(others.mean(one)[0], rel=1e-6)


@pytest.mark.slow
def test_drawn_functions_have_the_mean_and_covariance_of_the_process() -> None:
    inputs, places = drawn(12), drawn(5, seed=1)
    process = given(inputs, quadratic(inputs.points))
    paths = process.paths(20_000, 1024, np.random.default_rng(0))(places)
    deviations = np.sqrt(process.variance(places))
    assert paths.shape == (5, 20_000)
    assert np.abs(paths.mean(axis=1) - process.mean(places)) == pytest.approx(0.0, abs=0.1 * deviations.max())
    assert paths.std(axis=1) == pytest.approx(deviations, rel=0.15)


def test_a_drawn_function_is_a_function() -> None:
    inputs, places = drawn(12), drawn(5, seed=1)
    paths = given(inputs, quadratic(inputs.points)).paths(3, 64, np.random.default_rng(0))
    one = np.concatenate([paths(Inputs(places.points[[i]], places.places[[i]])) for i in range(5)])
    assert paths(places) == pytest.approx(one, abs=1e-9)


def test_what_is_quadratic_is_trusted_to_be() -> None:
    """Far from the data a quadratic goes on, and the residual knows that it is not needed."""
    inputs = drawn(30)
    exact = GaussianProcess.fit(inputs, quadratic(inputs.points), np.ones(30), 1e-4, steps=60)
    wavy = GaussianProcess.fit(inputs, np.sin(6 * inputs.points[:, 0]), np.ones(30), 1e-4, steps=60)
    assert np.exp(exact.logs[2]) < 0.1 < np.exp(wavy.logs[2])
    outside = Inputs(3 * drawn(50, seed=1).points, 3 * drawn(50, seed=1).places)
    assert exact.mean(outside) == pytest.approx(quadratic(outside.points), abs=0.1)


def test_lengths_tell_variables_that_matter_from_those_that_do_not() -> None:
    inputs = drawn(60)
    process = GaussianProcess.fit(inputs, np.sin(6 * inputs.points[:, 1]), np.ones(60), 1e-4, steps=80)
    lengths = np.exp(process.logs[3:-1])
    assert lengths[1] < 0.5 * min(lengths[0], lengths[2])


@pytest.mark.parametrize("noise", [0.03, 0.3])
def test_noise_is_learned(noise: float) -> None:
    inputs = drawn(150)
    weights = np.linspace(0.5, 2.0, 150)
    error = noise * np.sqrt(weights) * np.random.default_rng(1).standard_normal(150)
    process = GaussianProcess.fit(inputs, quadratic(inputs.points) + error, weights, 0.01, steps=60)
    assert process.scale * np.exp(0.5 * process.logs[-1]) == pytest.approx(noise, rel=0.3)


@pytest.mark.parametrize("steps", [1, 5, 30])
def test_the_likelihood_is_evaluated_so_often_and_no_more(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: object) -> tuple[float, Floats]:
        calls.append(1)
        return log_evidence(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(gaussian, "log_evidence", counted)
    inputs = drawn(40)
    values = np.sin(6 * inputs.points[:, 0])
    process = GaussianProcess.fit(inputs, values, np.ones(40), 1e-3, steps=steps)
    assert 1 <= len(calls) <= steps
    again = GaussianProcess.fit(inputs, values, np.ones(40), 1e-3, start=process.logs, steps=1)
    assert again.logs == pytest.approx(process.logs)  # it goes on from where it stood


def test_values_that_are_all_the_same() -> None:
    process = GaussianProcess.fit(drawn(10), np.full(10, 3.0), np.ones(10), 1e-3)
    assert process.mean(drawn(4, seed=1)) == pytest.approx(np.full(4, 3.0), abs=1e-6)


def test_the_same_point_twice() -> None:
    inputs = drawn(10)
    doubled = Inputs(np.concatenate([inputs.points] * 2), np.concatenate([inputs.places] * 2))
    values = quadratic(doubled.points)
    process = GaussianProcess.fit(doubled, values, np.ones(20), 1e-6)
    assert np.isfinite(process.mean(doubled)).all()
    assert np.isfinite(process.variance(doubled)).all()
