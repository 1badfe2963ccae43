"""Bayesian MAP: Pareto fronts of merges from few evaluations, one batch of proposals after another.

Each score is modelled, through its link, by a Gaussian process whose mean is a quadratic (``ecotone.search.gaussian``).
A proposal draws functions from these processes and adds, one point after another, the one that is expected to
enlarge the hypervolume of the front most, the points still in flight counting with what each draw says they will
score (Daulton et al. 2020, "Differentiable expected hypervolume improvement"). Hypervolumes are means over random
directions (Golovin and Zhang 2020, "Random hypervolume scalarizations"), so any number of objectives will do.

The form of the public code (Li et al. 2024, "MAP: Low-compute model merging with amortized Pareto fronts via
quadratic approximation") is ``acquisition: bins``: it looks where the error of a plain quadratic is large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from threadpoolctl import threadpool_limits

from ecotone.populations.errors import InputError
from ecotone.populations.fronts import non_dominated, ranks
from ecotone.populations.genome import Floats
from ecotone.populations.population import ElitistArchive
from ecotone.populations.trial import Evaluation, Goal, Outcome, Trial
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.designs import sobol
from ecotone.search.gaussian import SHAPE, GaussianProcess, Inputs, Paths
from ecotone.search.kinds import Context, Pair
from ecotone.search.protocol import Search, trial_rng
from ecotone.search.surrogates import (
    Link,
    SurrogateSettings,
    checked_links,
    features,
    flat,
    minimum,
    tamed,
    warnings_of,
)

Acquisition: TypeAlias = Literal["hypervolume", "bins"]
Singles: TypeAlias = NDArray[np.float32]

LARGEST = 32  # coefficients beyond which a quadratic with a few hundred evaluations says nothing
AGAIN = 1  # designs that are added while an objective is the same at all points
REMEMBERED = 400  # evaluations a model is conditioned on: most of them of the best ranks
CLIP = 0.005  # how near to 0 or 1 a share of solved examples is taken at its word
EXAMPLES = 300.0  # about how many examples a share is of; how noisy it is, is learned
FIRST_STEPS, STEPS = 40, 8  # evaluations of the likelihood: in the first proposal, and from there on
FEATURES = 256  # random features of a drawn residual
DIRECTIONS = 32  # of the hypervolume, for each draw
HIGHEST_POWER = 4  # of the scalarisations; the number of objectives up to there
PROMISING = 128  # candidates that a batch is picked from
ROUNDS, PARENTS, CHILDREN = 2, 8, 8  # refinement of the candidates before each pick
BLOCK = 64  # members of a front seen at a time
TEMPERATURE, REPEATS, RADII = 0.07, 30, (0.2, 0.8)  # of angular bins
STEP_SIZES = (0.01, 0.03, 0.1)  # of candidates around the front, in widths of the box


class BayesianMapSettings(SurrogateSettings):
    """Bayesian MAP: a front by batches of proposals, over surrogates that say how sure they are.

    Attributes:
        algorithm: ``bayesian_map``: batches of proposals from surrogates that know their uncertainty.
        samples: Candidates scored before the first surrogate is fitted. None means the smaller of ``2 D + 2`` and
            ``(D+1)(D+2)/2`` for D variables.
        acquisition: How proposals are chosen: by the expected growth of the front's ``hypervolume``, or by the paper's
            angular ``bins`` (at most six coefficients).
        reference: For each objective, the score from which hypervolume is measured, in the objective's own units. None
            means the worst score of the models for objectives with the sigmoid link. For others it lies a tenth of the
            front's extent beyond the worst score on the front.
        patience: Stop when the front's hypervolume has grown by less than ``tolerance`` in this many evaluations after
            the design; None means never.
        tolerance: The relative growth of the hypervolume below which the search stops after ``patience`` evaluations.
        paths: Random functions drawn from each surrogate for a proposal. More functions estimate the expected growth
            better and take longer.
        candidates: Points drawn for each proposal, of which the most promising are refined.
    """

    algorithm: Literal["bayesian_map"] = "bayesian_map"
    acquisition: Acquisition = "hypervolume"
    reference: dict[str, float] | None = None
    patience: int | None = Field(default=120, ge=1)
    tolerance: float = Field(default=1e-3, ge=0)
    paths: int = Field(default=32, ge=1)
    candidates: int = Field(default=512, ge=8)

    def make(self, context: Context) -> Pair:
        """The search, and an archive of the best."""
        box = self.box(context)
        starts = self.first(box, context)
        search = BayesianMap(box, context.goals, context.seed, self, context.space.seeds, starts)
        if not context.starts or context.joined:
            _check_budget(search.design, context.evaluations)
        return search, ElitistArchive(context.goals, self.archive)

    def describe(self, search: Search | None, context: Context) -> str:
        """The bounds, and how many samples the design has."""
        samples = f"; {search.design} samples before it proposes anything" if isinstance(search, BayesianMap) else ""
        return f"{super().describe(search, context)}{samples}"


class BayesianMap:
    """Sequential batches over a surrogate that says how sure it is.

    The first ``design`` trials are one-hot points, isotropic ones and a Sobol sequence. After them every ``ask`` fits
    the models to all scores that were told, and proposes as many points as are asked for. The time of a proposal is
    bounded however much was told: 8 points take about 0.2 s in three variables, 1 s in 16. A failed candidate counts
    as the worst score seen of each objective, so that the search leaves its neighbourhood.

    While an objective is the same at all points, no more is proposed than even points, up to as many again as the
    design has. An objective that is still the same guides nothing, and the report says so; if all are, the search ends.

    Args:
        box: The bounds of the coefficients.
        goals: The M objectives, two at least.
        seed: The recipe's seed.
        settings: The design's size, how proposals are chosen, and when to stop; None means the defaults.
        seeds: (J, K) coefficients of the models themselves, for the design; None means one-hot vectors.
        starts: (n, D) points to score before the design, which has as many more; those outside the box are left out.

    Raises:
        InputError: One objective only, too many coefficients, or links or a reference of other objectives.

    Example::

        from ecotone.populations.population import ElitistArchive
        from ecotone.search.bayesian_map import BayesianMap, BayesianMapSettings

        archive = ElitistArchive(goals, capacity=20)
        search = BayesianMap(box, goals, 0, BayesianMapSettings(samples=8))
        for _ in range(10):
            for trial in search.ask(4):
                evaluation = score(trial.genome)
                search.tell(trial, evaluation, archive.add(trial, evaluation))
        errors = search.report()["leave_one_out"]  # of the models, in score units
    """

    settings: BayesianMapSettings

    def __init__(
        self,
        box: CoefficientBox,
        goals: Sequence[Goal],
        seed: int,
        settings: BayesianMapSettings | None = None,
        seeds: Floats | None = None,
        starts: ArrayLike | None = None,
    ) -> None:
        self.box = box
        self.goals: tuple[Goal, ...] = tuple(goals)
        self.seed = seed
        self.settings = settings = settings or BayesianMapSettings()
        self.links: list[Link | None] = _links(settings, goals)
        self.reference: Floats | None = _reference(settings.reference, goals)
        self._check()
        first = box.inside(starts)
        count = min(2 * box.size + 2, minimum(box.size)) if settings.samples is None else settings.samples
        self._opening = np.vstack([first, opening(box, count, seed, seeds)])
        self._alone = self._opening[len(first) :][: box.sources if seeds is None else len(np.atleast_2d(seeds))]
        self.design: int = len(self._opening)
        self._next = 0
        self._flying: dict[int, Floats] = {}  # by trial number
        self._points: list[Floats] = []  # told, in the order they were
        self._scores: list[Floats] = []  # (M,) each, in the objectives' units; NaN where the candidate failed
        self._logs: Floats | None = None  # (M, E+4) hyperparameters of the latest models
        self._varied = False  # whether some objective is known to differ between points

    def _check(self) -> None:
        size, objectives = self.box.size, len(self.goals)
        if objectives < 2:
            raise InputError(
                f"search.algorithm: bayesian_map expects two objectives or more, found {objectives}.",
                "For one objective use cma_es.",
            )
        if size > LARGEST:
            raise InputError(
                f"search.granularity: bayesian_map expects at most {LARGEST} coefficients, found {size}: a quadratic "
                f"in {size} variables has {minimum(size)} coefficients of its own.",
                "Use granularity: model, or groups with few groups; or nsga2, which has no surrogate.",
            )
        if self.settings.acquisition == "bins" and size > 6:
            raise InputError(
                f"search.acquisition: bins expects at most 6 coefficients, found {size}.", "Use hypervolume."
            )

    # -- the protocol ------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """True when the front has stopped growing, or never began to, and nothing is in flight."""
        if self._is_hopeless():
            return not self._flying
        patience = self.settings.patience
        if patience is None or self._flying or len(self._points) < self.design + patience:
            return False
        known = self._known(len(self._points))
        if len(known.points) < 2:
            return False
        volumes = Volume.fixed(len(self.goals)).of(self._frame(known).scaled(known.scores)[:, None])
        before = float(volumes[:-patience].max(axis=0).mean())
        return float(volumes.max(axis=0).mean()) <= (1.0 + self.settings.tolerance) * before

    def ask(self, n: int) -> list[Trial]:
        """Up to ``n`` points: of the design, or proposed; none while the first half of the design is unknown.

        None either once all objectives have been the same for too long.
        """
        if self._next < self.design:
            points = self._opening[self._next : self._next + n]
        elif 2 * (self._next - len(self._flying)) < self.design or self._is_hopeless():
            return []
        else:
            with threadpool_limits(limits=1, user_api="blas"):  # as in the manager: the same bits, and faster
                points = self._propose(n)
        trials = [Trial(self._next + i, self.box.genome(point)) for i, point in enumerate(points)]
        self._flying |= {trial.number: point for trial, point in zip(trials, points, strict=True)}
        self._next += len(trials)
        return trials

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        """Add the point and its scores. The death of a worker says nothing about the point."""
        point = self._flying.pop(trial.number)
        if evaluation.failure is not None and evaluation.failure.kind == "worker died":
            return
        self._points.append(point)
        unknown = np.full(len(self.goals), np.nan)
        raw = np.array([evaluation.scores[goal.name] for goal in self.goals]) if evaluation.ok else unknown
        self._scores.append(raw)

    def state(self) -> dict[str, Any]:
        """The points asked for, the scores told, and the latest hyperparameters."""
        return {
            "next": self._next,
            "flying": {number: point.copy() for number, point in self._flying.items()},
            "points": [point.copy() for point in self._points],
            "scores": [scores.copy() for scores in self._scores],
            "logs": None if self._logs is None else self._logs.copy(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._next = state["next"]
        self._flying = {number: point.copy() for number, point in state["flying"].items()}
        self._points = [point.copy() for point in state["points"]]
        self._scores = [scores.copy() for scores in state["scores"]]
        self._logs = None if state["logs"] is None else state["logs"].copy()

    def report(self) -> dict[str, Any]:
        """The errors of the models, as plain values.

        By objective: its ``links``, the root mean squared ``leave_one_out`` error in score units, and ``residual``, the
        share of the variance that the model expects beyond the quadratic's. ``warnings`` name objectives that guided
        nothing.
        """
        names = [goal.name for goal in self.goals]
        head = {"algorithm": "bayesian_map", "objectives": names, "design": list(range(min(self.design, self._next)))}
        known = self._known(failures=False)
        if len(known.points) < 2:
            return head
        links, models = self._chosen(known), self._models(known)
        left_out = [link.forward(model.left_out) for link, model in zip(links, models, strict=True)]
        errors = np.sqrt(np.mean((np.array(left_out).T - known.raw) ** 2, axis=0))
        parts = np.array([np.exp(model.logs[:SHAPE]) for model in models])
        told = np.array(self._scores).reshape(-1, len(names))
        reasons = flat(told[np.isfinite(told).all(axis=1)], self.goals)
        return (
            head
            | ({"warnings": warnings_of(reasons)} if reasons else {})
            | {
                "links": {name: link.name for name, link in zip(names, links, strict=True)},
                "leave_one_out": dict(zip(names, errors.tolist(), strict=True)),
                "residual": dict(zip(names, (parts[:, -1] / parts.sum(axis=1)).tolist(), strict=True)),
            }
        )

    def _is_hopeless(self) -> bool:
        """Whether all objectives are the same at all points, of the design and of those that were added to it."""
        if self._varied or len(self._points) < (1 + AGAIN) * self.design:
            return False
        raw = self._known().raw
        self._varied = not len(raw) or len(flat(raw, self.goals)) < len(self.goals)
        return not self._varied

    # -- proposing ---------------------------------------------------------------------------------------

    def _propose(self, n: int) -> Floats:
        """(n, D) new points: even ones while there is nothing to learn from."""
        rng = trial_rng(self.seed, self._next)
        known = self._known()
        if len(known.points) < 2 or self._is_blind(known):
            return self.box.low + (self.box.high - self.box.low) * sobol(n, self.box.size, rng)
        if self.settings.acquisition == "bins":
            return Bins(self.box, known, self._chosen(known)).points(n, rng)
        drawn = self._drawn(known, rng)
        volume = Volume.drawn(drawn.frame.scaled(known.front), self.settings.paths, rng)
        if self._flying:
            volume.add(drawn(np.array(list(self._flying.values()))))
        return self._picked(n, drawn, volume, known, rng)

    def _is_blind(self, known: Known) -> bool:
        """Whether an objective is the same at all points, which even ones may change."""
        enough = len(known.points) >= minimum(self.box.size)
        return enough and len(self._points) < (1 + AGAIN) * self.design and bool(flat(known.raw, self.goals))

    def _drawn(self, known: Known, rng: np.random.Generator) -> Drawn:
        """Functions drawn of the model of each objective; keeps the hyperparameters for the next proposal."""
        models = self._models(known)
        self._logs = np.array([model.logs for model in models])
        functions = [model.paths(self.settings.paths, FEATURES, rng) for model in models]
        return Drawn(self.box, self._chosen(known), known.signs, functions, self._frame(known))

    def _models(self, known: Known) -> list[GaussianProcess]:
        """The model of each objective, from the hyperparameters of the latest proposal on."""
        inputs, models = coordinates(self.box, known.points), []
        for index, link in enumerate(self._chosen(known)):
            values, weights, noise = observations(link, known.raw[:, index])
            start = None if self._logs is None else self._logs[index]
            steps = FIRST_STEPS if start is None else STEPS
            models.append(GaussianProcess.fit(inputs, values, weights, noise, start, steps))
        return models

    def _picked(self, n: int, drawn: Drawn, volume: Volume, known: Known, rng: np.random.Generator) -> Floats:
        """(n, D) points that one after another add most; each is looked for anew around the best candidates."""
        taken = np.concatenate([known.points, *(point[None] for point in self._flying.values())])
        points = self._candidates(known, rng)
        points, values, _ = self._promising(points, drawn, volume, taken, PROMISING)
        for _ in range(n):
            gains = volume.gains(values) * self._is_new(points, taken)
            for size in np.repeat(STEP_SIZES[1::-1], ROUNDS // 2):
                best = np.argsort(-gains, kind="stable")[:PARENTS]
                near = self._near(np.repeat(points[best], CHILDREN, axis=0), size, rng)
                near, reached, added = self._promising(near, drawn, volume, taken, PARENTS)
                points, values = np.concatenate([points, near]), np.concatenate([values, reached])
                gains = np.concatenate([gains, added])
            index = int(np.argmax(gains))
            volume.take(values[index])
            taken = np.concatenate([taken, points[[index]]])
            points, values = np.delete(points, index, axis=0), np.delete(values, index, axis=0)
        return taken[-n:]

    def _promising(
        self, points: Floats, drawn: Drawn, volume: Volume, taken: Floats, count: int
    ) -> tuple[Floats, Singles, Floats]:
        """The ``count`` points that add most, how far they reach in every draw, and their gains."""
        values = volume.of(drawn(points))
        gains = volume.gains(values) * self._is_new(points, taken)
        kept = np.argsort(-gains, kind="stable")[:count]
        return points[kept], values[kept], gains[kept]

    def _is_new(self, points: Floats, taken: Floats) -> NDArray[np.bool_]:
        """(n,) False for points (n, D) that are the same, but for a thousandth of the box, as one already taken."""
        apart = np.abs(points[:, None] - taken[None]).max(axis=2)
        return np.asarray(apart.min(axis=1) > 1e-3 * (self.box.high - self.box.low))

    def _candidates(self, known: Known, rng: np.random.Generator) -> Floats:
        """(C, D): a quarter even in the box, half around the front, a quarter on lines through two of its points."""
        count, width = self.settings.candidates, self.box.high - self.box.low
        quarter = count // 4
        even = self.box.low + width * sobol(quarter, self.box.size, rng)
        front = known.points[known.on_front]
        around = front[rng.integers(len(front), size=count - 2 * quarter)]
        around = self._near(around, rng.choice(STEP_SIZES, (len(around), 1)), rng)
        one, other = front[rng.integers(len(front), size=(2, quarter))]
        between = one + rng.uniform(-0.2, 1.2, (quarter, 1)) * (other - one)
        return np.concatenate([even, around, self._near(between, STEP_SIZES[0], rng)])

    def _near(self, points: Floats, size: float | Floats, rng: np.random.Generator) -> Floats:
        """The points moved by normal steps of ``size`` widths, in the box."""
        steps = rng.standard_normal(points.shape) * size * (self.box.high - self.box.low)
        return self.box.clip(points + steps)

    # -- what is known -----------------------------------------------------------------------------------

    def _known(self, most: int | None = None, failures: bool = True) -> Known:
        """The evaluations told so far, at most ``most`` of them (by default ``REMEMBERED``).

        Of more, three quarters are those of the best ranks and the rest even among the others, in order of time, so
        that the models do not forget where scores are poor.
        """
        most = most or REMEMBERED
        raw = tamed(np.array(self._scores).reshape(-1, len(self.goals)))
        failed = np.isnan(raw).any(axis=1)
        signs = np.array([goal.sign for goal in self.goals])
        if failed.all():
            return Known(np.zeros((0, self.box.size)), raw[:0], signs)
        raw[failed] = (signs * raw[~failed]).min(axis=0) * signs
        points = np.array(self._points)
        if not failures:
            points, raw = points[~failed], raw[~failed]
        if len(raw) > most:
            best, others = np.split(np.lexsort([-np.arange(len(raw)), ranks(signs * raw)]), [3 * most // 4])
            even = np.linspace(0, len(others) - 1, most - len(best)).astype(np.int64)
            kept = np.sort(np.concatenate([best, np.sort(others)[even]]))
            points, raw = points[kept], raw[kept]
        return Known(points, raw, signs)

    def _chosen(self, known: Known) -> list[Link]:
        """The link of each objective."""
        columns = zip(self.links, self.goals, known.raw.T, strict=True)
        return [link or Link.suited(values, goal.direction) for link, goal, values in columns]

    def _frame(self, known: Known) -> Frame:
        """The reference and the units in which hypervolume is measured."""
        front = known.front
        low, high = front.min(axis=0), front.max(axis=0)
        extent = np.where(high > low, high - low, np.ptp(known.scores, axis=0))
        reference = low - 0.1 * extent
        shares = [link.name == "sigmoid" for link in self._chosen(known)]
        reference = np.where(shares, self._worst_of_models(known), reference)
        if self.reference is not None:
            reference = known.signs * self.reference
        return Frame(reference, np.where(high > reference, high - reference, 1.0))

    def _worst_of_models(self, known: Known) -> Floats:
        """(M,) oriented scores that each of the models alone reaches, as far as they are told; 0 for shares else."""
        points, scores = np.array(self._points), tamed(np.array(self._scores))
        alone = (points[:, None] == self._alone).all(axis=2).any(axis=1)
        scores = known.signs * scores[alone & np.isfinite(scores).all(axis=1)]
        return np.asarray(scores.min(axis=0)) if len(scores) else np.zeros(len(self.goals))


@dataclass(frozen=True, eq=False)
class Known:
    """Points and their scores.

    Args:
        points: (N, D) coefficients.
        raw: (N, M) scores in the objectives' units.
        signs: (M,) +1 where larger is better, -1 where smaller is.
    """

    points: Floats
    raw: Floats
    signs: Floats

    @property
    def scores(self) -> Floats:
        """(N, M) oriented: larger is better."""
        return self.signs * self.raw

    @cached_property
    def on_front(self) -> NDArray[np.bool_]:
        """(N,) where no other point is better."""
        return non_dominated(self.scores)

    @property
    def front(self) -> Floats:
        """(F, M) oriented scores of the front."""
        return np.asarray(self.scores[self.on_front])


@dataclass(frozen=True, eq=False)
class Frame:
    """Oriented scores as shares of the way from the reference to the best seen.

    Args:
        reference: (M,) where hypervolume counts from.
        extent: (M,) from there to the best score of each objective.
    """

    reference: Floats
    extent: Floats

    def scaled(self, scores: Floats) -> Floats:
        """The scores (..., M) above the reference, in extents; 0 below it."""
        return np.asarray(np.maximum((scores - self.reference) / self.extent, 0.0))


@dataclass(frozen=True, eq=False)
class Drawn:
    """S functions drawn of every objective, given the known scores."""

    box: CoefficientBox
    links: Sequence[Link]
    signs: Floats
    functions: Sequence[Paths]
    frame: Frame

    def __call__(self, points: Floats) -> Floats:
        """(n, S, M) scaled scores at ``points`` (n, D)."""
        inputs = coordinates(self.box, points)
        scores = [link.forward(function(inputs)) for link, function in zip(self.links, self.functions, strict=True)]
        return self.frame.scaled(self.signs * np.stack(scores, axis=-1))


class Volume:
    """Hypervolume as a mean over directions, one set of them for each of S draws.

    A point y reaches ``min_m y_m / d_m`` in direction d; the M-th power of how far a front reaches, averaged over
    directions that are even on the sphere, is its hypervolume but for a constant (Golovin and Zhang 2020,
    lemma 5). Beyond ``HIGHEST_POWER`` objectives few directions would decide all, and the power stays there.

    Args:
        directions: (S, L, M), positive and of unit length.
    """

    def __init__(self, directions: Floats) -> None:
        self.inverse: NDArray[np.float32] = (1.0 / np.maximum(directions, 1e-6)).astype(np.float32)
        self.power: Any = min(directions.shape[-1], HIGHEST_POWER)
        self.best: Singles = np.zeros(directions.shape[:2], np.float32)

    @classmethod
    def drawn(cls, front: Floats, draws: int, rng: np.random.Generator) -> Volume:
        """The hypervolume of ``front`` (F, M), scaled scores, in ``DIRECTIONS`` directions for each draw."""
        volume = cls(spread(rng, (draws, DIRECTIONS, front.shape[1])))
        for start in range(0, len(front), BLOCK):
            volume.add(front[start : start + BLOCK, None])
        return volume

    @classmethod
    def fixed(cls, objectives: int) -> Volume:
        """Of nothing yet, in directions that are always the same: one draw."""
        return cls(spread(np.random.default_rng(0), (1, 1024, objectives)))

    def of(self, values: Floats) -> Singles:
        """(n, S, L) powers of how far scaled scores (n, S or 1, M) reach."""
        single = values.astype(np.float32)
        reach = single[:, :, None, 0] * self.inverse[None, :, :, 0]  # min_m y_m / d_m
        for index in range(1, self.inverse.shape[-1]):
            np.minimum(reach, single[:, :, None, index] * self.inverse[None, :, :, index], out=reach)
        return np.asarray(reach**self.power)  # its mean over d is the hypervolume, but for a constant (lemma 5)

    def gains(self, reached: Singles) -> Floats:
        """(n,) the gain of each point of ``reached`` (n, S, L) alone."""
        return np.asarray(np.maximum(reached - self.best, 0.0).mean(axis=(1, 2), dtype=np.float64))

    def take(self, reached: Singles) -> None:
        """Let a point that reaches (S, L) belong to the front."""
        self.best = np.maximum(self.best, reached)

    def add(self, values: Floats) -> None:
        """Let points of scaled scores (n, S or 1, M) belong to the front."""
        self.take(self.of(values).max(axis=0))


@dataclass(frozen=True, eq=False)
class Bins:
    """The paper's acquisition: angular bins are visited the more often the larger the surrogate's error in them.

    Points are seen in hyperspherical coordinates of the unit box. A bin's score is the mean squared error of a
    quadratic in link space plus half the standard deviation it has when a fifth of the points is left out, over
    30 repeats, each from all points. An empty bin scores as the highest, so that none is never visited.

    Args:
        box: The bounds of the coefficients; at most six.
        known: The points and scores told so far.
        links: A link for each objective.
    """

    box: CoefficientBox
    known: Known
    links: Sequence[Link]

    def points(self, n: int, rng: np.random.Generator) -> Floats:
        """(n, D): bins drawn by their scores, angles evenly in the bin, radii evenly in 0.2 to 0.8."""
        size, side = self.box.size, self._side
        scores = self.scores(rng)
        shares = np.exp((scores - scores.max()) / TEMPERATURE)
        chosen = rng.choice(len(scores), n, p=shares / shares.sum())
        cells = np.stack(np.unravel_index(chosen, (side,) * (size - 1)), axis=1) if size > 1 else np.zeros((n, 0))
        turns = (cells + rng.random(cells.shape)) * (0.5 * np.pi / side)
        unit = from_angles(turns) * rng.uniform(*RADII, (n, 1))
        return self.box.clip(self.box.low + (self.box.high - self.box.low) * unit)

    def scores(self, rng: np.random.Generator) -> Floats:
        """(B,) of the bins."""
        unit = (self.known.points - self.box.low) / (self.box.high - self.box.low)
        width = 0.5 * np.pi / self._side
        cells = np.minimum((angles(unit) / width).astype(np.int64), self._side - 1)
        size = self.box.size
        bins = (
            np.ravel_multi_index(tuple(cells.T), (self._side,) * (size - 1)) if size > 1 else cells[:, :0].sum(axis=1)
        )
        count, total = self._side ** (size - 1), len(unit)
        filled = np.bincount(bins, minlength=count)
        phi = features(2.0 * unit - 1.0)
        everyone = np.arange(total)
        kept = [rng.permutation(total)[: max(1, round(0.8 * total))] for _ in range(REPEATS)]
        errors = [self._errors(phi, rows) for rows in [everyone, *kept]]
        means = np.array([np.bincount(bins, error, count) for error in errors]) / np.maximum(filled, 1)
        scores = means[0] + 0.5 * means[1:].std(axis=0)
        return np.asarray(np.where(filled > 0, scores, scores[filled > 0].max()))

    @property
    def _side(self) -> int:
        return 4 if self.box.size < 4 else 2

    def _errors(self, phi: Floats, rows: NDArray[np.int64]) -> Floats:
        """(N,) squared errors, added over objectives, of quadratics fitted to some ``rows`` in link space."""
        total = np.zeros(len(phi))
        for link, raw in zip(self.links, self.known.raw.T, strict=True):
            latent = link.inverse(raw)
            trust = link.derivative(latent)[rows, None]
            slim = 1e-3 * np.eye(phi.shape[1])  # a little ridge: there may be fewer points than coefficients
            left = np.concatenate([trust * phi[rows], slim])
            right = np.concatenate([trust[:, 0] * latent[rows], np.zeros(len(slim))])
            total += (link.forward(phi @ np.linalg.lstsq(left, right, rcond=None)[0]) - raw) ** 2
        return total


def opening(box: CoefficientBox, count: int, seed: int, seeds: Floats | None = None) -> Floats:
    """(count, D) points to begin with: each model alone, two levels of all models alike, and a Sobol sequence."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, 1)))
    width = box.high - box.low
    models = box.filled(np.tile(np.eye(box.sources) if seeds is None else np.atleast_2d(seeds), (1, box.rows)))
    alike = box.low + width * np.array([[1.0], [2.0]]) / 3.0 * np.ones(box.size)
    first = box.clip(np.concatenate([models, alike]))[: max(count - 1, 1)]
    rest = box.low + width * sobol(max(count - len(first), 0), box.size, rng)
    return np.concatenate([first, rest])[:count]


def coordinates(box: CoefficientBox, points: Floats) -> Inputs:
    """Points (n, D) as the model sees them: the quadratic in the box scaled to [-1, 1], the residual in other terms.

    For the residual each part's coefficients are told by their direction, their norm, and what each is above
    their mean: what a merge solves depends on the proportions of the models far more than on their common scale.
    The operator's settings are told as they are.
    On digit specialists from a random start that halves the error of predictions from 30 to 120 evaluations.
    """
    half, reach = 0.5 * (box.high - box.low), max(abs(box.low), abs(box.high))
    parts = points[:, : box.coefficients].reshape(len(points), box.rows, box.sources)
    norms = np.sqrt(np.sum(parts**2, axis=2, keepdims=True))
    directions = 2.0 * parts / np.sqrt(norms**2 + (0.1 * reach) ** 2)
    above = (parts - parts.mean(axis=2, keepdims=True)) / half
    sizes = 2.0 * norms / (reach * np.sqrt(box.sources))
    places = np.concatenate([directions, above, sizes], axis=2).reshape(len(points), -1)
    even = (points - box.low) / half - 1.0
    return Inputs(even, np.concatenate([places, even[:, box.coefficients :]], axis=1))


def observations(link: Link, scores: Floats) -> tuple[Floats, Floats, float]:
    """(N,) latent values, (N,) relative variances of their noise, and about the variance at weight 1.

    The share of n examples solved varies by ``y (1 - y) / n``, other scores by about the same everywhere; the
    variance of the latent value is that over the link's slope squared.
    """
    if link.name == "sigmoid":
        share = np.clip(scores, CLIP, 1.0 - CLIP)
        return link.inverse(scores, CLIP), 1.0 / (share * (1.0 - share)), 1.0 / EXAMPLES
    latent = link.inverse(scores)
    return latent, link.derivative(latent) ** -2.0, 1e-3 * float(np.var(scores)) + 1e-12


def spread(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Directions (..., M), even on the positive part of the unit sphere."""
    drawn = np.abs(rng.standard_normal(shape))
    return np.asarray(drawn / np.linalg.norm(drawn, axis=-1, keepdims=True))


def angles(points: Floats) -> Floats:
    """(n, D-1) hyperspherical angles, in [0, pi/2], of points (n, D) with no negative coordinate."""
    beyond = np.sqrt(np.cumsum(points[:, ::-1] ** 2, axis=1))[:, ::-1]  # norm of coordinates d, d+1, ...
    return np.arctan2(beyond[:, 1:], points[:, :-1])


def from_angles(turns: Floats) -> Floats:
    """(n, D) points of norm 1 with the hyperspherical angles ``turns`` (n, D-1)."""
    ones = np.ones((len(turns), 1))
    return np.concatenate([np.cos(turns), ones], axis=1) * np.cumprod(
        np.concatenate([ones, np.sin(turns)], axis=1), axis=1
    )


# -- settings and refusals -----------------------------------------------------------------------------------


def _links(settings: BayesianMapSettings, goals: Sequence[Goal]) -> list[Link | None]:
    """The link of each objective; None where it is left to the scores."""
    names = checked_links(settings.links, goals).values()
    return [None if name == "auto" else Link(name) for name in names]  # type: ignore[arg-type]


def _reference(reference: Mapping[str, float] | None, goals: Sequence[Goal]) -> Floats | None:
    """(M,) scores from which hypervolume counts; None where they are left to the search."""
    names = [goal.name for goal in goals]
    if reference is None:
        return None
    if sorted(reference) != sorted(names):
        raise InputError(
            f"search.reference: expected a score for each of the objectives {names}, found {list(reference)}."
        )
    return np.array([reference[name] for name in names], np.float64)


def _check_budget(design: int, evaluations: int | None) -> None:
    """Refuse a budget that is spent before a model of the objectives can be of use."""
    if evaluations is not None and evaluations <= design:
        raise InputError(
            f"budget.evaluations: expected more than {design}, the samples that bayesian_map takes before it proposes "
            f"anything, found {evaluations}.",
            "Raise the budget, take fewer samples (search.samples), or use nsga2.",
        )
