"""Stochastic hill climbing: step from the best merge so far, keep what is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ecotone.populations.population import ElitistArchive
from ecotone.populations.ranking import Extremes
from ecotone.populations.trial import Evaluation, Goal, Outcome, Trial, oriented
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.kinds import Begins, Box, Context, Needs, Pair
from ecotone.search.protocol import trial_rng


class HillClimbingSettings(Box):
    """Stochastic hill climbing from the average of the models.

    Attributes:
        algorithm: ``hill_climbing``.
        step: Standard deviation of a step, as a share of the box.
    """

    algorithm: Literal["hill_climbing"] = "hill_climbing"
    step: float = Field(default=0.1, gt=0)

    def needs(self) -> Needs:
        """One objective."""
        return Needs()

    def begins(self) -> Begins:
        """With the best one."""
        return Begins(most=1, fixed=True)

    def make(self, context: Context) -> Pair:
        """The search, and an archive of the best."""
        box = self.box(context)
        start = (
            box.point(context.starts[0]) if context.starts else box.filled(np.full(box.coefficients, 1 / box.sources))
        )
        search = HillClimbing(box, context.goals, context.seed, self, start)
        return search, ElitistArchive(context.goals, self.archive)


class HillClimbing:
    """The search: every trial is a step from the best merge that was told when it was asked for."""

    done = False

    def __init__(
        self,
        box: CoefficientBox,
        goals: Sequence[Goal],
        seed: int,
        settings: HillClimbingSettings,
        start: np.ndarray[Any, np.dtype[np.float64]],
    ) -> None:
        self.box, self.goals, self.seed, self.settings = box, tuple(goals), seed, settings
        self._best = box.clip(start)
        self._top: list[float] = []  # oriented scores of the best
        self._told = Extremes(goals)
        self._next = 0

    def ask(self, n: int) -> list[Trial]:
        """Steps from the best."""
        trials = [Trial(number, self.box.genome(self._step(number))) for number in range(self._next, self._next + n)]
        self._next += n
        return trials

    def _step(self, number: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        scale = self.settings.step * (self.box.high - self.box.low)
        return self.box.clip(self._best + scale * trial_rng(self.seed, number).standard_normal(self.box.size))

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        """Keep it if it is better."""
        if evaluation.ok:
            point = oriented(evaluation.scores, self.goals).tolist()
            self._told.take(point)
            if not self._top or self._told.scale.better(point, self._top):
                self._best, self._top = self.box.point(trial.genome), point

    def state(self) -> dict[str, Any]:
        """The best, the extremes of the scores, and the counter."""
        best = {"best": self._best.copy(), "top": list(self._top)}
        return {**best, "told": self._told.state(), "next": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._best, self._top, self._next = state["best"].copy(), list(state["top"]), state["next"]
        self._told.restore(state["told"])
