"""CMA-ES and separable CMA-ES over merge coefficients, from the ``cmaes`` library, behind our protocol.

Hansen and Ostermeier 2001. The separable form (Ros and Hansen 2008) learns a diagonal covariance only, and so scales to
thousands of coefficients. Both optimise one number: the mean of the scores (``ecotone.populations.ranking``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from cmaes import CMA, SepCMA
from numpy.typing import ArrayLike
from pydantic import Field, model_validator

from ecotone.populations.population import ElitistArchive, climbed
from ecotone.populations.ranking import Extremes
from ecotone.populations.trial import Evaluation, Goal, Outcome, Trial, oriented
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.kinds import Begins, Box, Context, Needs, Pair
from ecotone.search.protocol import Search
from ecotone.search.racing import RaceSettings, raced
from ecotone.search.starts.registry import NumberOrBeginning


class CmaEsSettings(Box):
    """CMA-ES, or its separable form, on the mean of the objectives.

    Attributes:
        algorithm: ``cma_es``: evolution with a learned covariance matrix; ``sep_cma_es``: the same with a diagonal
            matrix, for many coefficients.
        start: The first mean of every coefficient. None means 1/K for K models, the plain average; halfway for
            operators that go from one model to another. Searched settings of the operator begin at their defaults. A
            solver, such as ``{solve: model_stock}``, gives the first mean by its merge.
        sigma: The first step size, in units of the coefficients.
        population_size: Candidates in a generation. None means ``4 + floor(3 ln D)`` for D coefficients.
        race: Score every candidate on some of the examples first, and only the promising candidates on all
            (``ecotone.search.racing``). None scores every candidate on all examples.
    """

    algorithm: Literal["cma_es", "sep_cma_es"] = "cma_es"
    start: NumberOrBeginning | None = None  # type: ignore[assignment]
    sigma: float = Field(default=0.2, gt=0)
    population_size: int | None = Field(default=None, ge=2)
    race: RaceSettings | None = None

    @model_validator(mode="after")
    def _start_inside(self) -> CmaEsSettings:
        number = self._number
        if number is not None and not self.low <= number <= self.high:
            raise ValueError(f"start: expected between {self.low} and {self.high}, found {number}")
        return self

    @property
    def _number(self) -> float | None:
        """The first mean of every coefficient, where ``start`` is a number."""
        return self.start if isinstance(self.start, int | float) else None

    def needs(self) -> Needs:
        """It needs no more than one objective."""
        return Needs()

    def begins(self) -> Begins:
        """It can begin with the best merge, which is its first mean."""
        return Begins(most=1, fixed=True, placed=self._number is not None)

    def describe(self, search: Search | None, context: Context) -> str:
        """The bounds, and what it climbs where directions differ."""
        return f"{super().describe(search, context)}{climbed(context.goals)}"

    def make(self, context: Context) -> Pair:
        """The search, and an archive of the best."""
        box = self.box(context)
        start: ArrayLike | None = box.point(context.starts[0]) if context.starts else self._number
        if start is None and context.own:
            start = box.point(context.own[0])
        if start is None and not context.affine:
            start = (self.low + self.high) / 2  # halfway from one model to the other
        search = CmaEs(box, context.goals, context.seed, self, start)
        return raced((search, ElitistArchive(context.goals, self.archive)), context, self.race)


class CmaEs:
    """CMA-ES, or its separable form, over the coefficients of a box.

    The optimiser learns from whole generations, so at most one generation is in flight. A failed candidate counts as
    the worst of its generation.

    Where the mean is one of ranges, a generation is ranked by those of everything told when its last score arrives.

    The library's optimiser draws from one stream, which its pickles drop. Here every trial draws from a stream of its
    own, of the recipe's seed and its number. So a search rebuilt by replay or from ``state()`` goes on with the same
    points.

    Args:
        box: The bounds of the coefficients.
        goals: The objectives; their mean (``ecotone.populations.ranking``) is maximised.
        seed: The recipe's seed.
        settings: Step size, population size, and whether the covariance is diagonal; None for the defaults.
        start: Initial value of every coefficient, or a point (D,), moved into the box; None means 1/K, the plain
            average.

    Example::

        from ecotone.populations.population import ElitistArchive
        from ecotone.search.cma_es import CmaEs, CmaEsSettings

        archive = ElitistArchive(goals, capacity=20)
        search = CmaEs(box, goals, 0, CmaEsSettings(sigma=0.3, population_size=8))
        for _ in range(20):  # generations
            for trial in search.ask(8):
                evaluation = score(trial.genome)
                search.tell(trial, evaluation, archive.add(trial, evaluation))
    """

    def __init__(
        self,
        box: CoefficientBox,
        goals: Sequence[Goal],
        seed: int,
        settings: CmaEsSettings | None = None,
        start: ArrayLike | None = None,
    ) -> None:
        settings = settings or CmaEsSettings()
        self.box = box
        self.goals: tuple[Goal, ...] = tuple(goals)
        self.seed = seed
        size = box.size
        middle = np.asarray(1.0 / box.sources if start is None else start, np.float64)
        mean = middle if middle.ndim else box.filled(np.full(box.coefficients, middle))
        if start is not None:
            mean = box.clip(np.broadcast_to(mean, (size,)))
        bounds = np.tile(np.array([box.low, box.high]), (size, 1))
        self._optimiser: Any
        if size == 1:  # the library asks for two dimensions at least; the second is idle
            mean, bounds = np.append(mean, mean), np.tile(bounds, (2, 1))
        kind = SepCMA if settings.algorithm == "sep_cma_es" else CMA
        self._optimiser = kind(mean, settings.sigma, bounds=bounds, population_size=settings.population_size, seed=0)
        self._next = 0
        self._asked: list[Any] = []  # points of this generation, in trial order
        self._points: dict[int, list[float] | None] = {}  # oriented scores by position in it; None is a failure
        self._told = Extremes(goals)

    @property
    def done(self) -> bool:
        """True when the optimiser has converged by its own stopping rules."""
        return not self._asked and bool(self._optimiser.should_stop())

    def ask(self, n: int) -> list[Trial]:
        """Up to ``n`` points of the running generation; none while it waits for the rest of its scores."""
        count = min(n, self._optimiser.population_size - len(self._asked))
        trials = []
        for number in range(self._next, self._next + count):
            point = self._draw(number)
            self._asked.append(point)
            trials.append(Trial(number, self.box.genome(point[: self.box.size])))
        self._next += count
        return trials

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        """Note the score; with the last one of the generation, update the distribution."""
        position = trial.number - (self._next - len(self._asked))
        self._points[position] = None
        if evaluation.ok:
            self._points[position] = point = oriented(evaluation.scores, self.goals).tolist()
            self._told.take(point)
        if len(self._points) == self._optimiser.population_size:
            self._optimiser.tell(list(zip(self._asked, self._losses(), strict=True)))
            self._asked, self._points = [], {}

    def _losses(self) -> list[float]:
        """What the optimiser minimises, of the whole generation: negated means under the present scale."""
        points = {position: point for position, point in self._points.items() if point is not None}
        means = self._told.scale.means(np.array(list(points.values())).reshape(-1, len(self.goals)))
        losses = dict(zip(points, (-means).tolist(), strict=True))
        worst = max(losses.values(), default=0.0)
        return [losses.get(position, worst) for position in range(len(self._asked))]

    def state(self) -> dict[str, Any]:
        """The optimiser's fields, the running generation, and the extremes of the scores."""
        fields = {k: v for k, v in vars(self._optimiser).items() if k != "_rng"}
        copied = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in fields.items()}
        return {
            "next": self._next,
            "asked": [x.copy() for x in self._asked],
            "points": dict(self._points),
            "told": self._told.state(),
            "optimiser": copied,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._next, self._points = state["next"], dict(state["points"])
        self._told.restore(state["told"])
        self._asked = [x.copy() for x in state["asked"]]
        copied = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in state["optimiser"].items()}
        vars(self._optimiser).update(copied)

    def _draw(self, number: int) -> Any:
        words = np.random.SeedSequence(self.seed, spawn_key=(number,)).generate_state(8)
        self._optimiser.reseed_rng(words)
        return self._optimiser.ask()
