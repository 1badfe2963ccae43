"""CMA-ES and separable CMA-ES over merge coefficients, from the ``cmaes`` library, behind our protocol.

Hansen and Ostermeier 2001; Ros and Hansen 2008 for the separable form, which learns a diagonal covariance only
and so scales to thousands of coefficients. It optimises one number: the mean of the objectives' scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from cmaes import CMA, SepCMA
from numpy.typing import ArrayLike

from ecotone.populations.population import quality
from ecotone.populations.trial import Evaluation, Goal, Outcome, Trial
from ecotone.search.coefficients import CoefficientBox


class CmaEs:
    """CMA-ES; a generation is told as a whole, so at most one generation is in flight.

    The library's optimiser draws from one stream, which its pickles drop. Here every trial draws from its own
    stream (of the recipe's seed and its number), so a search rebuilt by replay or from ``state()`` goes on with
    the same points. A failed candidate counts as the worst of its generation.

    Args:
        box: Where coefficients lie.
        goals: The objectives; their oriented mean is maximised.
        seed: The recipe's seed.
        start: Initial value of every coefficient, or a point (D,), moved into the box; None means 1/K, the plain
            average. Settings start at their defaults.
        sigma: Initial step size, in units of the coefficients.
        population_size: Candidates a generation; None means ``4 + floor(3 ln D)``.
        separable: Learn a diagonal covariance only.
    """

    def __init__(
        self,
        box: CoefficientBox,
        goals: Sequence[Goal],
        seed: int,
        start: ArrayLike | None = None,
        sigma: float = 0.2,
        population_size: int | None = None,
        separable: bool = False,
    ) -> None:
        self.box = box
        self.goals = tuple(goals)
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
        kind = SepCMA if separable else CMA
        self._optimiser = kind(mean, sigma, bounds=bounds, population_size=population_size, seed=0)
        self._next = 0
        self._asked: list[Any] = []  # points of this generation, in trial order
        self._values: dict[int, float | None] = {}  # by position in the generation; None is a failure

    @property
    def done(self) -> bool:
        """True when the optimiser's own stopping rules say that it has converged."""
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
        """Note the score; with the last of the generation, update the distribution."""
        position = trial.number - (self._next - len(self._asked))
        self._values[position] = -quality(evaluation, self.goals) if evaluation.ok else None
        if len(self._values) == self._optimiser.population_size:
            worst = max((v for v in self._values.values() if v is not None), default=0.0)
            values = [self._values[i] for i in range(len(self._asked))]
            self._optimiser.tell([(x, worst if v is None else v) for x, v in zip(self._asked, values, strict=True)])
            self._asked, self._values = [], {}

    def state(self) -> dict[str, Any]:
        """The optimiser's fields and the running generation."""
        fields = {k: v for k, v in vars(self._optimiser).items() if k != "_rng"}
        copied = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in fields.items()}
        return {
            "next": self._next,
            "asked": [x.copy() for x in self._asked],
            "values": dict(self._values),
            "optimiser": copied,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._next, self._values = state["next"], dict(state["values"])
        self._asked = [x.copy() for x in state["asked"]]
        copied = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in state["optimiser"].items()}
        vars(self._optimiser).update(copied)

    def _draw(self, number: int) -> Any:
        words = np.random.SeedSequence(self.seed, spawn_key=(number,)).generate_state(8)
        self._optimiser.reseed_rng(words)
        return self._optimiser.ask()
