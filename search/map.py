"""MAP: a front of merges from a few dozen evaluations, by way of quadratic surrogates.

Li et al. 2024, "MAP: Low-compute model merging with amortized Pareto fronts via quadratic approximation". It has
three steps, which the code names:

1. Measure a sampling design.
2. Fit a quadratic with a link to every objective.
3. Let NSGA-III (Deb and Jain 2014, from pymoo) find the front of these surrogates.

Beyond the paper, a well-spread part of the predicted front is scored, so that the report has the front both as
predicted and as measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import scipy  # its parts are imported when they are used
from numpy.typing import ArrayLike
from pydantic import Field
from threadpoolctl import threadpool_limits

from ecotone.populations.errors import InputError
from ecotone.populations.fronts import farthest_first, non_dominated
from ecotone.populations.genome import Floats, Integers
from ecotone.populations.population import ElitistArchive
from ecotone.populations.trial import Evaluation, Goal, Outcome, Trial
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.designs import DesignName, sobol
from ecotone.search.designs import design as planned
from ecotone.search.kinds import Context, Pair
from ecotone.search.protocol import Search
from ecotone.search.simplex import lattice
from ecotone.search.surrogates import (
    Link,
    Quadratic,
    SurrogateSettings,
    checked_links,
    flat,
    minimum,
    tamed,
    warnings_of,
)

Predict: TypeAlias = Callable[[Floats], Floats]  # (N, D) points to (N, M) oriented scores

FRONT = 20  # members of the predicted front evaluated where there is no budget to fill
GENERATIONS = 50  # of NSGA-III
FILLING = 18  # rounds of filling the gaps that it leaves
LARGEST = 1000  # coefficients a surrogate may have
LARGEST_GAP = 1e150  # between what is predicted and measured; the square of a larger one is no number
OPTIMISER = 2_654_435_769  # spawn key of the optimiser's generator, with the number of its first trial


class MapSettings(SurrogateSettings):
    """MAP: a design, a quadratic surrogate of each objective, the predicted front, and the members of it to score.

    Attributes:
        algorithm: ``map``: score a design of points, fit a quadratic surrogate to each objective, and score the
            predicted front.
        samples: Points of the design, which are scored before the surrogates are fitted. None means (D+1)(D+2) for D
            variables, twice as many as determine a quadratic.
        design: How the points of the design are chosen: ``mixed``, ``sobol``, ``grid`` or ``random``
            (``ecotone.search.designs``).
        front: Members of the predicted front to score. None means the rest of the budget, or 20 without a budget of
            evaluations.
        margin: How far beyond the range of the scored points the front may be predicted, as a share of that range.
            Predictions never leave ``low`` to ``high``.
        caution: Standard errors subtracted from each predicted score before fronts are compared. With 0, the front lies
            where the surrogates err most. Surrogates that fit exactly have no error.
    """

    algorithm: Literal["map"] = "map"
    design: DesignName = "mixed"
    front: int | None = Field(default=None, ge=1)
    margin: float = Field(default=0.1, ge=0)
    caution: float = Field(default=1.0, ge=0)

    def make(self, context: Context) -> Pair:
        """The search, and an archive of the best."""
        box, space = self.box(context), context.space
        starts = self.first(box, context)
        budget, counted = context.evaluations, context.joined or not context.starts
        search = MapSearch(box, context.goals, context.seed, self, budget, space.seeds, starts, counted)
        return search, ElitistArchive(context.goals, self.archive)

    def describe(self, search: Search | None, context: Context) -> str:
        """The bounds, and how many samples the design has."""
        samples = f"; {search.samples} samples before it proposes anything" if isinstance(search, MapSearch) else ""
        return f"{super().describe(search, context)}{samples}"


class MapSearch:
    """Plain MAP: a design, surrogates, their front, and the members of that front that are evaluated.

    Failed points of the design are left out. When fewer than (D+1)(D+2)/2 points remain, points drawn evenly replace
    them. While an objective is the same at all points, more are drawn evenly, up to as many again as the design has, or
    to half of what is left of the budget. One that is still the same guides nothing, and the report says so.
    Members of the front are scored in an order that is well spread wherever it is cut, so a larger budget
    continues where a smaller one stopped.

    Args:
        box: The bounds of the coefficients.
        goals: The objectives, two at least.
        seed: The recipe's seed.
        settings: The design, the surrogates' links, and how the predicted front is found; None means the defaults.
        evaluations: The budget, which must leave room beyond the design; None means no limit.
        seeds: (J, K) coefficients of the models themselves, for the mixed design; None means one-hot vectors.
        starts: (n, D) points to measure before the design, besides ``samples``; those outside the box are left out.
        counted: Whether the starts are measured within ``evaluations``, not besides them.
        generations: Generations of NSGA-III.
        filling: Rounds that fill the gaps in NSGA-III's front; with none, predicted hypervolumes are percents short.

    Raises:
        InputError: One objective only, too many variables, too few samples or evaluations, or links of no objective.

    Example::

        from ecotone.populations.population import ElitistArchive
        from ecotone.search.map import MapSearch, MapSettings

        archive = ElitistArchive(goals, capacity=20)
        search = MapSearch(box, goals, 0, MapSettings(samples=20), evaluations=40, generations=20, filling=2)
        while not search.done:
            for trial in search.ask(4):
                evaluation = score(trial.genome)
                search.tell(trial, evaluation, archive.add(trial, evaluation))
        members, gap = search.report()["members"], search.report()["gap"]  # as predicted and as measured
    """

    box: CoefficientBox
    goals: tuple[Goal, ...]
    seed: int
    settings: MapSettings
    generations: int
    filling: int

    def __init__(
        self,
        box: CoefficientBox,
        goals: Sequence[Goal],
        seed: int,
        settings: MapSettings | None = None,
        evaluations: int | None = None,
        seeds: Floats | None = None,
        starts: ArrayLike | None = None,
        counted: bool = False,
        generations: int = GENERATIONS,
        filling: int = FILLING,
    ) -> None:
        self.box, self.goals, self.seed = box, tuple(goals), seed
        self.settings = settings = settings or MapSettings()
        first = box.inside(starts)
        spent = len(first) if counted else 0
        self.samples: int = enough_samples(box, goals, settings.samples, evaluations, spent)
        self.links: dict[str, str] = checked_links(settings.links, goals)
        self.generations, self.filling = generations, filling
        rest = FRONT if evaluations is None else evaluations - self.samples - spent
        self.front: int = rest if settings.front is None else settings.front
        self._again = min(self.samples, max(0, rest // 2))  # the most points to add to the design
        self._design = np.vstack([first, planned(settings.design, self.samples, box, seed, seeds)])
        self._points: list[Floats] = []  # by trial number
        self._scores: dict[int, Floats | None] = {}  # (M,) as measured, by trial number; None is a failure
        self._measured = -1  # trials that the surrogates are fitted to; -1 before
        self._chosen: Floats | None = None  # (F, D) members of the predicted front to evaluate
        self._model: Surrogates | None = None

    @property
    def done(self) -> bool:
        """True when the chosen part of the predicted front has been evaluated."""
        return self._chosen is not None and len(self._scores) == self._measured + len(self._chosen)

    def ask(self, n: int) -> list[Trial]:
        """Up to ``n`` points of the design, then of the predicted front; none while results of a step are missing."""
        first = len(self._points)
        points = [point for point, _ in zip(self._next(), range(n), strict=False)]
        self._points += points
        return [Trial(first + i, self.box.genome(point)) for i, point in enumerate(points)]

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        """Note the scores."""
        self._scores[trial.number] = measured_scores(evaluation, self.goals)

    def state(self) -> dict[str, Any]:
        """Points, scores and the chosen front; surrogates follow from them."""
        return {
            "points": [point.copy() for point in self._points],
            "scores": copied(self._scores),
            "measured": self._measured,
            "chosen": None if self._chosen is None else self._chosen.copy(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._points = [point.copy() for point in state["points"]]
        self._scores = copied(state["scores"])
        self._measured = state["measured"]
        self._chosen = None if state["chosen"] is None else state["chosen"].copy()
        self._model = None

    def report(self) -> dict[str, Any]:
        """The front as predicted and as measured, and how far the surrogates can be trusted; plain values.

        ``members`` have ``number``, and by objective ``predicted``, ``std`` and ``measured`` (None where not); ``gap``
        has, by objective, the mean of measured minus predicted and the root of its mean square; ``leave_one_out``
        is each surrogate's error over the design. Scores are as the objectives give them.
        """
        design = [number for number in self._scores if self._measured < 0 or number < self._measured]
        head = {"algorithm": "map", "objectives": [goal.name for goal in self.goals], "design": sorted(design)}
        if self._chosen is None or not len(self._chosen):
            return head
        numbers = range(self._measured, self._measured + len(self._chosen))
        measured = [self._scores.get(number) for number in numbers]
        return head | self._surrogates().report(self._chosen, measured, numbers)

    def _next(self) -> Iterator[Floats]:
        """The points that may be asked for now, in order."""
        asked = len(self._points)
        if asked < len(self._design):
            yield from self._design[asked:]  # (step 1)
        elif self._chosen is not None:
            yield from self._chosen[asked - self._measured :]
        elif len(self._scores) == asked:
            known = np.array([scores for scores in self._scores.values() if scores is not None])
            missing = minimum(self.box.size) - len(known)
            if missing <= 0 and flat(known, self.goals):
                missing = len(self._design) + self._again - asked
            if missing > 0:
                yield from (self.box.draw(self.seed, asked + i) for i in range(missing))
            else:
                self._measured = asked
                self._chosen = self._choose(asked)
                yield from self._chosen

    def _surrogates(self) -> Surrogates:
        if self._model is None:
            numbers = [n for n in range(self._measured) if self._scores[n] is not None]
            points = np.array([self._points[n] for n in numbers])
            values = np.array([self._scores[n] for n in numbers])
            self._model = Surrogates.fit(points, values, self.goals, self.links)  # (step 2)
        return self._model

    def _choose(self, measured: int) -> Floats:
        """(F, D) the part of the predicted front to evaluate."""
        model = self._surrogates()
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(measured, OPTIMISER)))
        low, high = reach(model.points, self.box, self.settings.margin)
        points, scores = predicted_front(  # (step 3)
            lambda c: model.cautious(c, self.settings.caution), low, high, rng, self.generations, self.filling
        )
        return np.asarray(points[spread(scores, self.front)])


def measured_scores(evaluation: Evaluation, goals: Sequence[Goal]) -> Floats | None:
    """(M,) scores as the objectives gave them; None for a failure."""
    return np.array([evaluation.scores[goal.name] for goal in goals]) if evaluation.ok else None


def copied(scores: Mapping[int, Floats | None]) -> dict[int, Floats | None]:
    """The scores by trial number, for a state that later results leave as it is."""
    return {number: None if row is None else row.copy() for number, row in scores.items()}


# -- refusals ------------------------------------------------------------------------------------------------


def enough_samples(
    box: CoefficientBox, goals: Sequence[Goal], samples: int | None, evaluations: int | None, spent: int = 0
) -> int:
    """The number of samples, by default twice the fewest; ``spent`` evaluations are taken before them.

    Raises:
        InputError: One objective only, too many variables, or too few samples or evaluations.
    """
    if len(goals) < 2:
        raise InputError(
            f"search.algorithm: MAP trades two or more objectives off, found {len(goals)}.",
            "Use cma_es, or optuna with sampler tpe or gp, for a single objective, or add a second one.",
        )
    fewest = few_enough(box)
    count = 2 * fewest if samples is None else samples
    if count < fewest:
        raise InputError(
            f"search.samples: expected at least {fewest}, the coefficients of a quadratic in {box.size} variables, "
            f"found {count}.",
            f"Use {2 * fewest} or more; the error of the surrogates is then known too.",
        )
    if evaluations is not None and evaluations <= count + spent:
        begins = f" and the {spent} merge{'s' * (spent > 1)} to begin with" if spent else ""
        raise InputError(
            f"budget.evaluations: expected more than the {count} samples of the design{begins}, found {evaluations}.",
            f"Raise the budget, or lower search.samples to no less than {fewest}: members of the predicted front "
            "are evaluated with what is left.",
        )
    return count


def few_enough(box: CoefficientBox) -> int:
    """(D+1)(D+2)/2.

    Raises:
        InputError: More than 1000, so that a quadratic would take thousands of merges to fit.
    """
    fewest = minimum(box.size)
    if fewest > LARGEST:
        settings = f" and {len(box.settings)} settings" if box.settings else ""
        raise InputError(
            f"search.algorithm: a quadratic surrogate in {box.size} variables ({box.parts.count} x "
            f"{box.sources} sources{settings}) has {fewest} coefficients and needs at least as many merges; at most "
            f"{LARGEST} are allowed.",
            "Use granularity: model, or granularity: groups with few groups, or an algorithm that scales to many "
            "variables: nsga2, cma_es or sep_cma_es.",
        )
    return fewest


# -- surrogates of all objectives ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Surrogates:
    """One quadratic an objective.

    Args:
        points: (N, D) the points they were fitted to.
        goals: The M objectives.
        models: M surrogates of the scores as the objectives give them.
        warnings: What could not be fitted as it was asked for, in sentences.
    """

    points: Floats
    goals: tuple[Goal, ...]
    models: tuple[Quadratic, ...]
    warnings: tuple[str, ...] = ()

    @classmethod
    def fit(cls, points: Floats, values: Floats, goals: Sequence[Goal], links: Mapping[str, str]) -> Surrogates:
        """Fit (N, M) ``values`` at (N, D) ``points``.

        An objective that is the same everywhere, or too large, has a flat surrogate. Scores outside the range of the
        link that was asked for get the one that suits them. ``warnings`` say so.
        """
        models, warnings = [], warnings_of(flat(values, goals))
        with threadpool_limits(1, user_api="blas"):  # the same bits however many cores there are, and sooner
            for goal, column in zip(goals, tamed(values).T, strict=True):
                wanted, suited = links[goal.name], Link.suited(column, goal.direction)
                link = suited if wanted == "auto" else Link(wanted)  # type: ignore[arg-type]
                if outside := _outside(column, link):
                    warnings.append(f"search.links.{goal.name}: {outside}, so {suited.name} was used.")
                    link = suited
                models.append(Quadratic.fit(points, column, link))
        return cls(points, tuple(goals), tuple(models), tuple(warnings))

    def predict(self, points: Floats) -> Floats:
        """(N, M) scores as the objectives would give them."""
        return np.stack([model.predict(points) for model in self.models], axis=1)

    def std(self, points: Floats) -> Floats:
        """(N, M) standard errors of ``predict``."""
        return np.stack([model.std(points) for model in self.models], axis=1)

    def cautious(self, points: Floats, caution: float = 0.0) -> Floats:
        """(N, M) oriented predictions, less ``caution`` standard errors."""
        scores = self.predict(points) * np.array([goal.sign for goal in self.goals])
        return np.asarray(scores - caution * self.std(points) if caution else scores)

    def leave_one_out(self) -> dict[str, float | None]:
        """By objective the surrogate's error, in score units; None where no point could be left out."""
        errors = [model.leave_one_out for model in self.models]
        return {g.name: float(e) if np.isfinite(e) else None for g, e in zip(self.goals, errors, strict=True)}

    def report(self, points: Floats, measured: Sequence[Floats | None], numbers: Sequence[int]) -> dict[str, Any]:
        """The predicted and the measured scores at (F, D) ``points``, and the errors of the models."""
        names = [goal.name for goal in self.goals]
        predicted, errors = self.predict(points), self.std(points)
        members = [
            {
                "number": number,
                "predicted": by_objective(self.goals, predicted[i]),
                "std": by_objective(self.goals, errors[i]),
                "measured": by_objective(self.goals, measured[i]),
            }
            for i, number in enumerate(numbers)
        ]
        told = [i for i, scores in enumerate(measured) if scores is not None]
        gaps = np.array([measured[i] - predicted[i] for i in told]).reshape(len(told), len(names))
        return {
            "links": {name: model.link.name for name, model in zip(names, self.models, strict=True)},
            "leave_one_out": self.leave_one_out(),
            "ridge": {name: model.ridge for name, model in zip(names, self.models, strict=True)},
            "members": members,
            "gap": {name: _gap(gaps[:, j]) for j, name in enumerate(names)},
            **({"warnings": list(self.warnings)} if self.warnings else {}),
        }


def _outside(values: Floats, link: Link) -> str:
    """A clause about scores that the link is not for; empty where it is for all."""
    low, high = {"sigmoid": (0.0, 1.0), "softplus": (0.0, np.inf)}.get(link.name, (-np.inf, np.inf))
    outside = values[(values < low) | (values > high)]
    if not len(outside):
        return ""
    return f"{link.name} is for scores between {low:g} and {high:g}, found {outside[0]:.6g}"


def by_objective(goals: Sequence[Goal], row: Floats | None) -> dict[str, float] | None:
    """The scores ``row`` (M,) by objective, as plain numbers; None stays None."""
    return None if row is None else {goal.name: float(value) for goal, value in zip(goals, row, strict=True)}


def _gap(differences: Floats) -> dict[str, float | None]:
    if not len(differences) or np.abs(differences).max() > LARGEST_GAP:
        return {"mean": None, "rms": None}
    return {"mean": float(differences.mean()), "rms": float(np.sqrt(np.mean(differences**2)))}


# -- the front of the surrogates -----------------------------------------------------------------------------

SAMPLES = 4096  # Sobol points that show where the front lies
DIRECTIONS = 140  # the most reference directions (Das and Dennis 1998)
CHILDREN = 8000  # a round of filling gaps
CROWDED = 5  # objectives beyond which nearly everything is on the front, and gaps are left


def reach(points: Floats, box: CoefficientBox, margin: float) -> tuple[Floats, Floats]:
    """(D,) lowest and (D,) highest coefficients of ``points``, widened by a margin, in the box."""
    low, high = points.min(axis=0), points.max(axis=0)
    room = margin * (high - low)
    return box.clip(low - room), box.clip(high + room)


def predicted_front(
    predict: Predict,
    low: Floats,
    high: Floats,
    rng: np.random.Generator,
    generations: int = GENERATIONS,
    filling: int = FILLING,
) -> tuple[Floats, Floats]:
    """The front of a cheap function: NSGA-III from a Sobol sample, then its gaps filled.

    All points that NSGA-III ever tried compete, not its last population alone, which has one a direction.

    Args:
        predict: (N, D) points to (N, M) scores, larger is better.
        low: (D,) lowest coefficients.
        high: (D,) highest coefficients.
        rng: All randomness comes from it.
        generations: Generations of NSGA-III.
        filling: Rounds of filling gaps; none beyond five objectives, where nearly everything is on the front.

    Returns:
        (F, D) points and their (F, M) scores, none of which dominates another.
    """
    with threadpool_limits(1, user_api="blas"):
        start = low + (high - low) * sobol(SAMPLES, len(low), rng)
        points, scores = _kept(start, predict(start))
        if scores.shape[1] > 1:
            bred = _nsga3(predict, low, high, _first(points, scores, start), rng, generations)
            points, scores = _kept(np.vstack([points, bred]), np.vstack([scores, predict(bred)]))
        for _ in range(filling if 1 < scores.shape[1] <= CROWDED else 0):
            children = _between(points, scores, low, high, rng)
            points, scores = _kept(np.vstack([points, children]), np.vstack([scores, predict(children)]))
    return points, scores


def spread(scores: Floats, count: int) -> Integers:
    """Positions of up to ``count`` well-spread rows of (N, M) ``scores``, in an order that may be cut anywhere.

    The best of each objective, then always the row farthest from those taken, in ranges of the scores.
    """
    extent = np.ptp(scores, axis=0)
    scaled = (scores - scores.min(axis=0)) / np.where(extent > 0, extent, 1.0)
    # of several rows that are best in one objective, the one that is best in the others
    ends = [int(np.argmax(scaled[:, j] + 1e-6 * scaled.mean(axis=1))) for j in range(scaled.shape[1])]
    return np.array(farthest_first(scaled, ends, count, apart=1e-9), np.int64)


def _kept(points: Floats, scores: Floats) -> tuple[Floats, Floats]:
    keep = non_dominated(scores)
    return points[keep], scores[keep]


def _first(points: Floats, scores: Floats, sample: Floats) -> Floats:
    """The first population: spread members of the sample's front, filled up with the sample."""
    size = len(lattice(scores.shape[1], DIRECTIONS))
    chosen = points[spread(scores, size)]
    return np.vstack([chosen, sample[: size - len(chosen)]])


def _nsga3(
    predict: Predict, low: Floats, high: Floats, first: Floats, rng: np.random.Generator, generations: int
) -> Floats:
    """Every point that NSGA-III tries, from the population ``first`` (R, D)."""
    from pymoo.algorithms.moo.nsga3 import NSGA3
    from pymoo.core.problem import Problem
    from pymoo.problems.static import StaticProblem

    objectives = predict(first[:1]).shape[1]
    problem = Problem(n_var=len(low), n_obj=objectives, xl=low, xu=high)
    algorithm = NSGA3(lattice(objectives, DIRECTIONS), pop_size=len(first), sampling=first)
    algorithm.setup(problem, termination=("n_gen", generations), seed=int(rng.integers(2**31)), verbose=False)
    tried = []
    while algorithm.has_next():
        population = algorithm.ask()
        points = np.asarray(population.get("X"), np.float64)
        algorithm.evaluator.eval(StaticProblem(problem, F=-predict(points)), population)
        algorithm.tell(infills=population)
        tried.append(points)
    return np.vstack(tried)


def _between(points: Floats, scores: Floats, low: Floats, high: Floats, rng: np.random.Generator) -> Floats:
    """(CHILDREN, D) points between and around neighbours on the front, most of them where it is sparse."""
    count, objectives = scores.shape
    if count < 3:
        near = points[rng.integers(count, size=CHILDREN)]
        return np.clip(near + 0.02 * (high - low) * rng.normal(size=near.shape), low, high)
    extent = np.ptp(scores, axis=0)
    scaled = scores / np.where(extent > 0, extent, 1.0)
    distances, neighbours = scipy.spatial.KDTree(scaled).query(scaled, k=min(count, objectives + 1))
    weights = (distances[:, -1] + 1e-12) ** (objectives - 1)
    parents = rng.choice(count, CHILDREN, p=weights / weights.sum())
    around = points[neighbours[parents]] - points[parents][:, None]  # (CHILDREN, neighbours, D)
    step = around[np.arange(CHILDREN), rng.integers(1, around.shape[1], size=CHILDREN)]
    noise = rng.choice([0.0, 0.1, 0.5, 1.0], size=(CHILDREN, 1)) * rng.normal(size=step.shape)
    moved = points[parents] + rng.uniform(-1, 1, (CHILDREN, 1)) * step + noise * np.abs(around).max(axis=1)
    return np.asarray(np.clip(moved, low, high))
