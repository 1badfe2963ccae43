"""A Gaussian process whose mean is a quadratic: how much the quadratic is trusted is learned from the data.

The surrogate of Bayesian MAP, of one score in link space. Its kernel is a sum,

    k(x, y) = 1 + l x.y + q (x.y)^2 + a matern(|p(x) - p(y)| / lengths) + noise

A Gaussian prior on the coefficients of a quadratic is the same as the first three terms, so a draw of this
process is a random quadratic plus a random smooth residual (Rasmussen and Williams 2006, section 2.7). The
variances ``l``, ``q`` of the linear and quadratic parts, ``a`` of the residual, one length a variable and the
scale of the noise maximise the marginal likelihood times a prior: where a quadratic explains the scores the
residual shrinks, where it does not the quadratic is a rough trend. The residual may see the inputs in coordinates
``p`` of its own. The noise is known up to its scale: the share
of N examples solved has a variance of ``y (1 - y) / N``, which the link stretches (delta method).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy  # its parts are imported when they are used

from ecotone.populations.genome import Floats

ROOT5 = np.sqrt(5.0)
SHAPE = 3  # linear, quadratic and residual variances come first among the hyperparameters; the noise comes last


@dataclass(frozen=True, eq=False)
class Inputs:
    """The coordinates of the scores, about within [-1, 1].

    Args:
        points: (N, D) coordinates of the quadratic.
        places: (N, E) coordinates of the residual.
    """

    points: Floats
    places: Floats

    def __len__(self) -> int:
        return len(self.points)

    def last(self, count: int) -> Inputs:
        """The last ``count`` of them."""
        return Inputs(self.points[-count:], self.places[-count:])


@dataclass(frozen=True)
class Prior:
    """Normal priors of the logarithms of the hyperparameters, for inputs in [-1, 1] and values of variance one.

    Args:
        mean: (E+4,) of the variances (linear, quadratic, residual), the E lengths and the variance of the noise.
        deviation: (E+4,) their standard deviations.
    """

    mean: Floats
    deviation: Floats

    @classmethod
    def of(cls, variables: int, noise: float) -> Prior:
        """The prior for a residual over ``variables`` variables and noise of variance ``noise``.

        Lengths grow with the root of E, as distances do (Hvarfner et al. 2024).
        """
        length = np.log(np.sqrt(variables))
        mean = [0.0, np.log(0.3), np.log(0.3), *[length] * variables, np.log(noise)]
        deviation = [1.5, 1.5, 1.5, *[0.7] * variables, 1.5]
        return cls(np.array(mean), np.array(deviation))


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """The process given the data.

    Args:
        inputs: N of them.
        values: (N,) what was observed there.
        weights: (N,) relative variances of the noise.
        logs: (E+4,) logarithms of the hyperparameters, in the order of ``Prior``.
        centre: The number subtracted from the values.
        scale: The number that the values are then divided by.
    """

    inputs: Inputs
    values: Floats
    weights: Floats
    logs: Floats
    centre: float
    scale: float

    @classmethod
    def fit(
        cls,
        inputs: Inputs,
        values: Floats,
        weights: Floats,
        noise: float,
        start: Floats | None = None,
        steps: int = 30,
        most: int = 256,
    ) -> GaussianProcess:
        """The process of highest marginal likelihood times prior that ``steps`` evaluations of it lead to.

        Args:
            inputs: N of them.
            values: (N,) observations.
            weights: (N,) relative variances of their noise.
            noise: About the variance of an observation of weight 1.
            start: (E+4,) logarithms of hyperparameters to begin at; None means the prior's mean.
            steps: Evaluations of the likelihood, each of which costs ``O(N^3)``.
            most: Hyperparameters are fitted to the last so many observations.
        """
        trust = 1.0 / (weights + np.median(weights))
        centre = float(np.average(values, weights=trust))
        scale = float(np.sqrt(np.average((values - centre) ** 2, weights=trust))) or 1.0
        prior = Prior.of(inputs.places.shape[1], noise / scale**2)
        begin = prior.mean if start is None else start
        standard = (values[-most:] - centre) / scale
        logs = _climb(inputs.last(most), standard, weights[-most:], prior, begin, steps)
        return cls(inputs, values, weights, logs, centre, scale)

    @cached_property
    def root(self) -> Floats:
        """(N, N) lower Cholesky factor of the covariance of the observations."""
        covariance = kernel(self.inputs, self.inputs, self.logs)
        covariance[np.diag_indices(len(covariance))] += self.noise
        return np.asarray(scipy.linalg.cholesky(covariance, lower=True, overwrite_a=True, check_finite=False))

    @property
    def noise(self) -> Floats:
        """(N,) variances of the noise, in units of ``scale`` squared."""
        return _noise(self.logs, self.weights)

    @cached_property
    def _alpha(self) -> Floats:
        return self._solve((self.values - self.centre) / self.scale)

    def _solve(self, right: Floats) -> Floats:
        return np.asarray(scipy.linalg.cho_solve((self.root, True), right, check_finite=False))

    def mean(self, inputs: Inputs) -> Floats:
        """(n,) expected values at n inputs."""
        return np.asarray(self.centre + self.scale * (kernel(inputs, self.inputs, self.logs) @ self._alpha))

    def variance(self, inputs: Inputs) -> Floats:
        """(n,) variances of the noise-free values at n inputs."""
        cross = scipy.linalg.solve_triangular(
            self.root, kernel(self.inputs, inputs, self.logs), lower=True, check_finite=False
        )
        variances = kernel_diagonal(inputs, self.logs) - np.einsum("ij,ij->j", cross, cross)
        return np.asarray(self.scale**2 * np.maximum(variances, 0.0))

    @cached_property
    def left_out(self) -> Floats:
        """(N,) the mean of each observation given all others (Rasmussen and Williams 2006, eq. 5.12)."""
        return np.asarray(self.values - self.scale * self._alpha / np.diag(_inverse(self.root)))

    def paths(self, count: int, features: int, rng: np.random.Generator) -> Paths:
        """``count`` functions drawn from the process given the data, each a function of any point.

        A draw of the prior plus the update that makes it meet the data (Wilson et al. 2020). The prior's quadratic
        is exact; its residual has ``features`` random Fourier features (Rahimi and Recht 2007).
        """
        # The spectral density of a Matern kernel of smoothness 5/2 is a t distribution of 5 degrees of freedom.
        stretch = np.sqrt(5.0 / rng.chisquare(5.0, (features, 1)))
        waves = rng.standard_normal((features, self.inputs.places.shape[1])) * stretch / _lengths(self.logs)
        weights = rng.standard_normal((_basis_size(self.inputs.points.shape[1]) + 2 * features, count))
        noise = rng.standard_normal((len(self.values), count)) * np.sqrt(self.noise)[:, None]
        drawn = _features(self.inputs, self.logs, waves) @ weights + noise
        update = self._solve((self.values - self.centre)[:, None] / self.scale - drawn)
        return Paths(self, waves, weights, update)


@dataclass(frozen=True, eq=False)
class Paths:
    """Functions drawn from a Gaussian process given its data.

    Args:
        process: The process to draw from.
        waves: (F, E) frequencies of the residual's features.
        weights: (P, S) weights of the prior's features.
        update: (N, S) weights of the data's kernels.
    """

    process: GaussianProcess
    waves: Floats
    weights: Floats
    update: Floats

    def __call__(self, inputs: Inputs) -> Floats:
        """(n, S) values of the S functions at n inputs."""
        process = self.process
        prior = _features(inputs, process.logs, self.waves) @ self.weights
        values = prior + kernel(inputs, process.inputs, process.logs) @ self.update
        return np.asarray(process.centre + process.scale * values)


def kernel(left: Inputs, right: Inputs, logs: Floats) -> Floats:
    """(n, m) covariances of noise-free values at n and m inputs."""
    linear, quadratic, residual = np.exp(logs[:SHAPE])
    inner = left.points @ right.points.T
    smooth = _matern(_distances(left.places, right.places, logs))
    return np.asarray(1.0 + inner * (linear + quadratic * inner) + residual * smooth)


def kernel_diagonal(inputs: Inputs, logs: Floats) -> Floats:
    """(n,) prior variances at n inputs."""
    linear, quadratic, residual = np.exp(logs[:SHAPE])
    squares = np.einsum("ij,ij->i", inputs.points, inputs.points)
    return np.asarray(1.0 + squares * (linear + quadratic * squares) + residual)


def quadratic_basis(points: Floats) -> Floats:
    """(n, (D+1)(D+2)/2) functions whose inner products are 1, x.y and (x.y)^2, in that order."""
    rows, columns = np.triu_indices(points.shape[1])
    products = points[:, rows] * points[:, columns] * np.where(rows == columns, 1.0, np.sqrt(2.0))
    return np.concatenate([np.ones((len(points), 1)), points, products], axis=1)


def log_evidence(
    inputs: Inputs, values: Floats, weights: Floats, logs: Floats, prior: Prior | None = None
) -> tuple[float, Floats]:
    """The log marginal likelihood, plus the log prior where one is given, and its (E+4,) gradient in ``logs``.

    Rasmussen and Williams 2006, eq. 5.8 and 5.9; ``-inf`` where the covariance is not positive definite.
    """
    linear, quadratic, residual = np.exp(logs[:SHAPE])
    lengths, noise = _lengths(logs), _noise(logs, weights)
    inner = inputs.points @ inputs.points.T
    distances = _distances(inputs.places, inputs.places, logs)
    decay = np.exp(-distances)
    matern = residual * (1.0 + distances + distances**2 / 3.0) * decay
    covariance = 1.0 + inner * (linear + quadratic * inner) + matern
    covariance[np.diag_indices(len(covariance))] += noise
    try:
        root = scipy.linalg.cholesky(covariance, lower=True, check_finite=False)
    except np.linalg.LinAlgError:
        return -np.inf, np.zeros_like(logs)
    alpha = scipy.linalg.cho_solve((root, True), values, check_finite=False)
    value = -0.5 * values @ alpha - np.log(np.diag(root)).sum() - 0.5 * len(values) * np.log(2.0 * np.pi)  # (eq. 5.8)
    push = np.outer(alpha, alpha) - _inverse(root)
    slope = push * (residual * (5.0 / 3.0) * (1.0 + distances) * decay)  # by the squared scaled distance
    scaled = inputs.places / lengths
    by_length = 2.0 * (slope.sum(axis=1) @ scaled**2 - np.einsum("id,id->d", scaled, slope @ scaled))
    gradient = 0.5 * np.concatenate(  # (eq. 5.9)
        [
            [linear * np.vdot(push, inner), quadratic * np.vdot(push, inner**2), np.vdot(push, matern)],
            by_length,
            [np.diag(push) @ noise],
        ]
    )
    if prior is not None:
        away = (logs - prior.mean) / prior.deviation
        value, gradient = value - 0.5 * away @ away, gradient - away / prior.deviation
    return float(value), gradient


def _climb(inputs: Inputs, values: Floats, weights: Floats, prior: Prior, start: Floats, steps: int) -> Floats:
    """Hyperparameters of high posterior density, within five deviations of the prior's mean."""
    best, seen = (-np.inf, start), 0

    def downhill(logs: Floats) -> tuple[float, Floats]:
        nonlocal best, seen
        if seen == steps:
            raise _SpentError
        seen += 1
        value, gradient = log_evidence(inputs, values, weights, logs, prior)
        if value > best[0]:
            best = (value, logs.copy())
        return (-value, -gradient) if np.isfinite(value) else (1e10, np.zeros_like(logs))

    reach = 5.0 * prior.deviation
    begin = np.clip(start, prior.mean - reach, prior.mean + reach)
    with suppress(_SpentError):  # the library looks at its own limits only between line searches
        scipy.optimize.minimize(
            downhill,
            begin,
            jac=True,
            method="L-BFGS-B",
            bounds=np.stack([prior.mean - reach, prior.mean + reach], axis=1),
        )
    return best[1]


class _SpentError(Exception):
    """The likelihood has been evaluated as often as it may be."""


def _inverse(root: Floats) -> Floats:
    """The inverse of the matrix whose lower Cholesky factor is ``root``."""
    half, _ = scipy.linalg.lapack.dpotri(root, lower=1)  # only the lower triangle is computed
    return np.asarray(np.tril(half) + np.tril(half, -1).T)


def _lengths(logs: Floats) -> Floats:
    return np.asarray(np.exp(logs[SHAPE:-1]))


def _noise(logs: Floats, weights: Floats) -> Floats:
    return np.asarray(np.exp(logs[-1]) * weights + 1e-8)


def _distances(left: Floats, right: Floats, logs: Floats) -> Floats:
    """(n, m) distances in lengths, times the root of five."""
    lengths = _lengths(logs) / ROOT5
    one, other = left / lengths, right / lengths
    squares = np.einsum("ij,ij->i", one, one)[:, None] + np.einsum("ij,ij->i", other, other) - 2.0 * one @ other.T
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))


def _matern(distances: Floats) -> Floats:
    """The Matern kernel of smoothness 5/2, of distances in lengths times the root of five."""
    return np.asarray((1.0 + distances + distances**2 / 3.0) * np.exp(-distances))


def _basis_size(variables: int) -> int:
    return (variables + 1) * (variables + 2) // 2


def _features(inputs: Inputs, logs: Floats, waves: Floats) -> Floats:
    """(n, P) features whose inner products are the kernel: exact for the quadratic, in expectation for the rest."""
    variables = inputs.points.shape[1]
    deviations = np.exp(0.5 * logs[:SHAPE])
    parts = [1, variables, _basis_size(variables) - variables - 1]
    quadratic = quadratic_basis(inputs.points) * np.repeat([1.0, deviations[0], deviations[1]], parts)
    angles = inputs.places @ waves.T
    residual = deviations[2] / np.sqrt(len(waves))
    return np.concatenate([quadratic, residual * np.cos(angles), residual * np.sin(angles)], axis=1)
