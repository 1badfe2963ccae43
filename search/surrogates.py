"""Quadratic surrogates of merge scores: what a score is over the coefficients, learned from a few dozen merges.

    y(c) = link(e + b.c + c^T A c)

Near the base model a loss is a quadratic form of the coefficients (Taylor to second order); a link keeps an
accuracy within (0, 1) and a loss above 0 (Li et al. 2024, "MAP: Low-compute model merging with amortized Pareto
fronts via quadratic approximation"). A fit starts from least squares in link space, where the problem is linear,
and goes on with Levenberg-Marquardt on the scores themselves. Coordinates are centred and scaled inside, so that
neither the box nor the units of a score matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ecotone.populations.errors import InputError, nearest
from ecotone.populations.genome import Floats
from ecotone.populations.trial import Direction, Goal
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.kinds import Begins, Context, FrontBox, Needs

LinkName: TypeAlias = Literal["sigmoid", "softplus", "identity"]
LINKS: tuple[LinkName, ...] = ("sigmoid", "softplus", "identity")
RIDGES = (1.0, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)  # tried by leave-one-out, besides none
USUAL = 1e-2  # the ridge that fits accuracies of real merges best (digit specialists, 15 to 80 points)
DOUBT = 1.5  # how many times smaller the leave-one-out error must be to go a decade away from it
CLIP = 1e-3  # how near to the ends of a link's range a score is taken at its word
LARGEST = 1e50  # of scores; squared errors are squared again, and those of larger ones are soon no numbers
POOR = 1e7  # condition number of the scaled design from which it needs a ridge


Links: TypeAlias = str | Mapping[str, str]  # for all objectives, or by objective; ``auto`` besides the names


class SurrogateSettings(FrontBox):
    """Settings that all searches with a quadratic surrogate of each objective have.

    Attributes:
        samples: Candidates scored before the first surrogate is fitted; None leaves their number to the algorithm.
        links: The transformation of scores before a quadratic is fitted: ``sigmoid``, ``softplus``, ``identity`` or
            ``auto``, for all objectives or by objective. ``auto`` is sigmoid for maximised scores within [0, 1],
            softplus for minimised scores of at least 0, and identity for all others.
    """

    samples: int | None = Field(default=None, ge=1)
    links: str | dict[str, str] = "auto"

    def needs(self) -> Needs:
        """Two objectives, to trade off, whose scores differ between merges."""
        return Needs(objectives=2, varied=True)

    def begins(self) -> Begins:
        """With merges that are scored before the design."""
        return Begins()

    def first(self, box: CoefficientBox, context: Context) -> list[Floats] | None:
        """Points (D,) to score before the design: the merges to begin with, or the operator's published; or None."""
        return [box.point(start) for start in context.starts or context.own] or None


@dataclass(frozen=True)
class Link:
    """From the latent quadratic to the score's range.

    Args:
        name: ``sigmoid`` for scores in (0, 1), ``softplus`` for positive ones, ``identity`` for any.

    Raises:
        InputError: There is no such link.
    """

    name: LinkName

    def __post_init__(self) -> None:
        if self.name not in LINKS:
            raise InputError(f"search.links: there is no link {self.name!r}.", nearest(self.name, LINKS))

    @classmethod
    def suited(cls, values: Floats, direction: Direction) -> Link:
        """Sigmoid for maximised scores within [0, 1], softplus for minimised ones of at least 0, else identity."""
        known = values[np.isfinite(values)]
        if direction == "maximize" and known.size and known.min() >= 0 and known.max() <= 1:
            return cls("sigmoid")
        if direction == "minimize" and known.size and known.min() >= 0:
            return cls("softplus")
        return cls("identity")

    def forward(self, latent: Floats) -> Floats:
        """The score at a latent value."""
        if self.name == "sigmoid":
            return sigmoid(latent)
        return np.logaddexp(0.0, latent) if self.name == "softplus" else np.asarray(latent, np.float64)

    def inverse(self, score: Floats, clip: float = CLIP) -> Floats:
        """The latent value of a score, first moved ``clip`` inside (0, 1) for sigmoid, above 0 for softplus."""
        known = np.asarray(score, np.float64)
        if self.name == "sigmoid":
            inside = np.clip(known, clip, 1 - clip)
            return np.asarray(np.log(inside) - np.log1p(-inside))
        above = np.maximum(known, clip)
        return np.asarray(above + np.log(-np.expm1(-above))) if self.name == "softplus" else known

    def derivative(self, latent: Floats) -> Floats:
        """Derivative of ``forward``."""
        if self.name == "sigmoid":
            return np.asarray(sigmoid(latent) * sigmoid(-np.asarray(latent)))
        return sigmoid(latent) if self.name == "softplus" else np.ones_like(latent, np.float64)


def checked_links(links: Links, goals: Sequence[Goal]) -> dict[str, str]:
    """The name of each objective's link, ``auto`` where it is left to the scores.

    Raises:
        InputError: An unknown link or objective.
    """
    known = ("auto", *LINKS)
    names = [goal.name for goal in goals]
    by_goal = dict.fromkeys(names, links) if isinstance(links, str) else {**dict.fromkeys(names, "auto"), **links}
    for name, link in by_goal.items():
        if name not in names:
            raise InputError(f"search.links: there is no objective {name!r}.", nearest(name, names))
        if link not in known:
            raise InputError(f"search.links: there is no link {link!r}.", nearest(link, known))
    return by_goal


def sigmoid(latent: Floats) -> Floats:
    """1 / (1 + exp(-u)), exact in both tails, without overflow."""
    small = np.exp(-np.abs(latent))
    return np.asarray(np.where(np.asarray(latent) >= 0, 1.0, small) / (1.0 + small))


def minimum(dimension: int) -> int:
    """(D+1)(D+2)/2, the coefficients of a quadratic in D variables and so the fewest points that determine it."""
    return (dimension + 1) * (dimension + 2) // 2


def is_constant(values: Floats) -> bool:
    """True when the known values do not differ beyond rounding."""
    known = values[np.isfinite(values)]
    return bool(known.size == 0 or np.ptp(known) <= 1e-12 * max(1.0, float(np.abs(known).max())))


def tamed(values: Floats) -> Floats:
    """The scores (N, M), with zeros for an objective that has scores which are too large to be fitted."""
    return np.where(_too_large(values), 0.0, values)


def flat(values: Floats, goals: Sequence[Goal]) -> dict[str, str]:
    """By objective, why no surrogate can be fitted to its scores (N, M); the others are left out.

    A score that is the same everywhere, or too large to be fitted, says nothing about the coefficients.
    """
    reasons = {}
    for goal, column, large in zip(goals, np.asarray(values).T, _too_large(values), strict=True):
        known = column[np.isfinite(column)]
        if large:
            reasons[goal.name] = f"scores as large as {float(np.abs(known).max()):.3g} are too large to be fitted"
        elif is_constant(column):
            shown = f"{known[0]:.6g}" if known.size else "unknown"
            reasons[goal.name] = f"the score is the same ({shown}) at all {known.size} points"
    return reasons


def warnings_of(reasons: Mapping[str, str]) -> list[str]:
    """Sentences for a report, of what ``flat`` found."""
    return [
        f"objectives.search.{name}: {reason}, so no surrogate of it could be fitted and it guided nothing. Widen "
        "search.low and search.high, score more examples, or leave this objective out."
        for name, reason in reasons.items()
    ]


def _too_large(values: Floats) -> NDArray[np.bool_]:
    """(M,) whether an objective has a score beyond ``LARGEST``."""
    known = np.where(np.isfinite(values), np.abs(values), 0.0)
    return np.asarray(known.max(axis=0, initial=0.0) > LARGEST)


@dataclass(frozen=True, eq=False)
class Quadratic:
    """Surrogate of one score; made by ``fit``.

    Args:
        link: From the latent quadratic to the score.
        centre: (D,) middle of the points it was fitted to.
        scale: (D,) half their extent; scaled coordinates are ``z = (c - centre) / scale``.
        scaled: (m,) coefficients over the features of ``z``: 1, z_i, z_i z_j for i <= j.
        scaled_covariance: (m, m) their covariance, in squared latent units.
        ridge: Strength of the penalty it was fitted with, relative to the mean diagonal of the normal matrix.
        noise: Standard deviation of the residuals for the degrees of freedom left, in score units.
        left_out: (N,) for each point, its score predicted without it; NaN where the point failed or where
            without it the quadratic would not be determined.
        leave_one_out: Root mean squared error of ``left_out``, in score units; NaN when no point can be left out.
    """

    link: Link
    centre: Floats
    scale: Floats
    scaled: Floats
    scaled_covariance: Floats
    ridge: float
    noise: float
    left_out: Floats
    leave_one_out: float

    @classmethod
    def fit(
        cls,
        points: Floats,
        values: Floats,
        link: Link,
        weights: Floats | None = None,
        ridge: float | None = None,
    ) -> Quadratic:
        """Weighted non-linear least squares on the scores, from the weighted least-squares solution in link space.

        Args:
            points: (N, D) coefficients.
            values: (N,) scores; one that is not finite (a failed trial) is left out.
            link: Its link.
            weights: (N,) importance of each point (inverse variance of its noise); None means equal.
            ridge: Penalty on all coefficients but the constant, in scaled coordinates, relative to the mean
                diagonal of the normal matrix; None means none where the design determines the quadratic and fits
                it exactly, else chosen by leave-one-out, with some preference for 0.01.

        Raises:
            InputError: Shapes do not fit, or no value is finite.
        """
        points, values = np.asarray(points, np.float64), np.asarray(values, np.float64)
        weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
        known = np.isfinite(values)
        _check(points, values, weights, known)
        centre, scale = _frame(points[known])
        weights = weights[known] / weights[known].mean()
        problem = _Problem(features((points[known] - centre) / scale), values[known], weights, link)
        return problem.solved(ridge, centre, scale, known)

    @property
    def dimension(self) -> int:
        """D, the number of variables."""
        return len(self.centre)

    @property
    def coefficients(self) -> Floats:
        """(m,) coefficients over the features of the points themselves: 1, c_i, c_i c_j for i <= j."""
        return np.asarray(_unscaled(self.scaled[None], self.centre, self.scale)[0])

    @property
    def covariance(self) -> Floats:
        """(m, m) covariance of ``coefficients``, in squared latent units."""
        change = _unscaled(np.eye(len(self.scaled)), self.centre, self.scale)
        return np.asarray(change.T @ self.scaled_covariance @ change)

    def latent(self, points: Floats) -> Floats:
        """(N,) the quadratic at (N, D) points."""
        return np.asarray(self._features(points) @ self.scaled)

    def predict(self, points: Floats) -> Floats:
        """(N,) scores at (N, D) points."""
        return self.link.forward(self.latent(points))

    def latent_std(self, points: Floats) -> Floats:
        """(N,) standard error of ``latent``."""
        phi = self._features(points)
        return np.asarray(np.sqrt(np.maximum(np.einsum("ij,ij->i", phi @ self.scaled_covariance, phi), 0.0)))

    def std(self, points: Floats) -> Floats:
        """(N,) standard error of ``predict``, in score units: half the way from one latent error below to one above."""
        middle, error = self.latent(points), self.latent_std(points)
        return np.asarray(0.5 * (self.link.forward(middle + error) - self.link.forward(middle - error)))

    def _features(self, points: Floats) -> Floats:
        return features((np.atleast_2d(np.asarray(points, np.float64)) - self.centre) / self.scale)


def features(points: Floats) -> Floats:
    """(N, m) columns 1, z_i, z_i z_j (i <= j) of (N, D) points."""
    first, second = np.triu_indices(points.shape[1])
    return np.hstack([np.ones((len(points), 1)), points, points[:, first] * points[:, second]])


def _check(points: Floats, values: Floats, weights: Floats, known: NDArray[np.bool_]) -> None:
    if points.ndim != 2 or values.shape != (len(points),) or weights.shape != values.shape:
        raise InputError(
            f"surrogate: expected (N, D) points with N values and weights, found {points.shape}, {values.shape} "
            f"and {weights.shape}.",
        )
    if not known.any() or not np.isfinite(points).all():
        raise InputError("surrogate: expected finite points and at least one finite value.")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights[known].sum() > 0):
        raise InputError("surrogate: expected weights of at least 0, not all of them 0.")


def _frame(points: Floats) -> tuple[Floats, Floats]:
    low, high = points.min(axis=0), points.max(axis=0)
    half = 0.5 * (high - low)
    return 0.5 * (high + low), np.where(half > 0, half, 1.0)


def _unscaled(rows: Floats, centre: Floats, scale: Floats) -> Floats:
    """(R, m) coefficients over features of z = (c - centre) / scale, as coefficients over features of c."""
    size = len(centre)
    first, second = np.triu_indices(size)
    square = np.zeros((len(rows), size, size))
    square[:, first, second] = 0.5 * rows[:, 1 + size :] / (scale[first] * scale[second])
    square = square + square.transpose(0, 2, 1)  # the symmetric A
    slope = rows[:, 1 : 1 + size] / scale
    linear = slope - 2.0 * square @ centre
    constant = rows[:, 0] - slope @ centre + np.einsum("rij,i,j->r", square, centre, centre)
    mixed = square[:, first, second] * np.where(first == second, 1.0, 2.0)
    return np.hstack([constant[:, None], linear, mixed])


@dataclass(frozen=True, eq=False)
class _Problem:
    """min over beta of sum_i w_i (y_i - link(phi_i beta))^2 + sum_j penalty_j beta_j^2.

    ``phi`` (N, m) features, ``values`` (N,), ``weights`` (N,) of mean 1, ``penalty`` (m,).
    """

    phi: Floats
    values: Floats
    weights: Floats
    link: Link
    penalty: Floats | None = None

    def solved(self, ridge: float | None, centre: Floats, scale: Floats, known: NDArray[np.bool_]) -> Quadratic:
        """The fit with the given ridge, or with the one that leave-one-out prefers."""
        poor = len(self.values) < self.phi.shape[1] or np.linalg.cond(self.phi) > POOR
        if ridge is None:
            ridge, beta = self.preferred(poor)
        else:
            problem = self.penalised(ridge)
            beta = problem.refined(problem.start())
        return self.penalised(ridge).described(beta, ridge, centre, scale, known)

    def preferred(self, poor: bool) -> tuple[float, Floats]:
        """A ridge and its fit: none where that fits exactly, else by leave-one-out.

        Of few points that error is noisy, so a ridge far from the usual one must be better by a margin.
        """
        if not poor:
            problem = self.penalised(0.0)
            beta = problem.refined(problem.start())
            if problem.misfit(beta) <= 1e-9 * np.std(self.values):
                return 0.0, beta
        found = []
        beta = self.penalised(RIDGES[0]).start()
        for ridge in RIDGES if poor else (*RIDGES, 0.0):  # from strong to none, each from where the last one ended
            problem = self.penalised(ridge)
            beta = problem.refined(problem.better(beta, problem.start()))
            decades = abs(float(np.log10(max(ridge, 1e-6) / USUAL)))
            found.append((problem.left_out_cost(beta) * DOUBT ** (2 * decades), ridge, beta))
        _, ridge, beta = min(found, key=lambda one: one[0])
        return ridge, beta

    def penalised(self, ridge: float) -> _Problem:
        """With a penalty of ``ridge`` times the normal matrix's mean diagonal in link space; none on the constant."""
        slopes = self.weights * self.link.derivative(self.link.inverse(self.values)) ** 2
        size = ridge * float(np.mean(slopes @ self.phi**2))
        penalty = np.full(self.phi.shape[1], size)
        penalty[0] = 0.0
        return replace(self, penalty=penalty)

    def cost(self, beta: Floats) -> float:
        """The objective."""
        assert self.penalty is not None
        errors = self.values - self.link.forward(self.phi @ beta)
        return float(self.weights @ errors**2 + self.penalty @ beta**2)

    def misfit(self, beta: Floats) -> float:
        """Weighted root mean squared residual."""
        errors = self.values - self.link.forward(self.phi @ beta)
        return float(np.sqrt(np.mean(self.weights * errors**2)))

    def better(self, *candidates: Floats) -> Floats:
        """The candidate with the lowest cost."""
        return min(candidates, key=self.cost)

    def start(self) -> Floats:
        """Least squares in link space: the better of equal weights and of the delta method's, w link'(u)^2.

        The second hardly sees scores at the ends of the range, so these need no clip to speak of.
        """
        even, exact = self.link.inverse(self.values), self.link.inverse(self.values, 1e-12)
        trusting = self._linear(exact, self.weights * self.link.derivative(exact) ** 2)
        return self.better(trusting, self._linear(even, self.weights))

    def _linear(self, latent: Floats, trust: Floats) -> Floats:
        assert self.penalty is not None
        root = np.sqrt(trust)
        rows = np.vstack([self.phi * root[:, None], np.diag(np.sqrt(self.penalty))])
        target = np.concatenate([latent * root, np.zeros(len(self.penalty))])
        return np.asarray(np.linalg.lstsq(rows, target, rcond=None)[0])

    def refined(self, beta: Floats, iterations: int = 100) -> Floats:
        """Levenberg-Marquardt from ``beta``; every accepted step lowers the cost, so it never ends above its start."""
        cost, damping = self.cost(beta), 1e-3
        rounding = len(self.values) * (4e-16 * float(np.abs(self.values).max())) ** 2
        for _ in range(iterations):
            before, normal, gradient = cost, *self._normal(beta)
            diagonal = np.maximum(np.diag(normal), 1e-12 * np.diag(normal).max() + 1e-300)
            while damping < 1e8:
                step = np.linalg.solve(normal + np.diag(damping * diagonal), gradient)
                tried = self.cost(beta + step)
                if tried < cost:
                    beta, cost, damping = beta + step, tried, max(0.1 * damping, 1e-12)
                    break
                damping *= 10.0
            if cost <= rounding or cost >= before * (1 - 1e-9):
                break
        return beta

    def _normal(self, beta: Floats) -> tuple[Floats, Floats]:
        """(m, m) Gauss-Newton matrix J^T W J + penalty and (m,) downhill gradient."""
        assert self.penalty is not None
        latent = self.phi @ beta
        errors = self.values - self.link.forward(latent)
        jacobian = self.phi * self.link.derivative(latent)[:, None]
        weighted = jacobian * self.weights[:, None]
        return weighted.T @ jacobian + np.diag(self.penalty), weighted.T @ errors - self.penalty * beta

    def left_out_cost(self, beta: Floats) -> float:
        """Sum of squares with each point left out of the fit ``beta``; an undetermined one errs by the spread."""
        errors, pinned = self.leaving_out(beta)
        spread = np.std(self.values)
        return float(self.weights @ np.where(pinned, spread, np.clip(errors, -10 * spread, 10 * spread)) ** 2)

    def leaving_out(self, beta: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """(N,) residuals each point of the fit would have without it, to first order, and where it is undetermined."""
        normal, _ = self._normal(beta)
        latent = self.phi @ beta
        jacobian = self.phi * self.link.derivative(latent)[:, None]
        leverage = self.weights * np.einsum("ij,ij->i", jacobian, _solved(normal, jacobian.T).T)
        errors = self.values - self.link.forward(latent)
        pinned = leverage > 1 - 1e-9
        return errors / np.where(pinned, 1.0, 1.0 - np.minimum(leverage, 1 - 1e-9)), pinned

    def described(
        self, beta: Floats, ridge: float, centre: Floats, scale: Floats, known: NDArray[np.bool_]
    ) -> Quadratic:
        """The surrogate with its errors."""
        normal, _ = self._normal(beta)
        errors, pinned = self.leaving_out(beta)
        left_out = np.full(len(known), np.nan)
        left_out[known] = np.where(pinned, np.nan, self.values - errors)
        free = errors[~pinned]
        noise = self._noise(beta, normal)
        return Quadratic(
            self.link,
            centre,
            scale,
            beta,
            noise**2 * _solved(normal, np.eye(len(beta))),
            ridge,
            noise,
            left_out,
            float(np.sqrt(np.mean(free**2))) if free.size else float("nan"),
        )

    def _noise(self, beta: Floats, normal: Floats) -> float:
        """Residual standard deviation; with no degree of freedom left, the spread of the scores stands for it."""
        assert self.penalty is not None
        used = float(np.trace(_solved(normal, normal - np.diag(self.penalty))))
        free = len(self.values) - used
        if free < 0.5:
            return float(np.std(self.values))
        return self.misfit(beta) * float(np.sqrt(len(self.values) / free))


def _solved(normal: Floats, right: Floats) -> Floats:
    """``normal^-1 right`` of a symmetric matrix that may be singular: directions nothing was seen of stay uncertain."""
    diagonal = np.diag(normal)
    root = np.sqrt(np.maximum(diagonal, max(1e-20 * diagonal.max(), 1e-200)))
    values, vectors = np.linalg.eigh(normal / np.outer(root, root))
    inverse = 1.0 / np.maximum(values, max(1e-13 * values[-1], 1e-100))
    scaled = (right.T / root).T
    return np.asarray(((vectors @ ((inverse * (vectors.T @ scaled).T).T)).T / root).T)
