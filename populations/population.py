"""The protocol of populations, and the elitist archive that keeps the best scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ecotone.populations.ranking import Extremes
from ecotone.populations.trial import Evaluation, Goal, Member, Outcome, Trial, oriented


class Population(Protocol):
    """The members that a search keeps. It takes an evaluation first, and returns the outcome; then the search learns.

    ``state()`` is a value (arrays, numbers and text) that ``restore()`` of a population built with the same
    arguments takes back exactly.
    """

    @property
    def capacity(self) -> int:
        """The most members it holds."""

    @property
    def members(self) -> Sequence[Member]:
        """Its members, oldest first."""

    def add(self, trial: Trial, evaluation: Evaluation) -> Outcome:
        """Take an evaluation; a failed one is never accepted."""

    def may_accept(self, best: Evaluation) -> bool:
        """False only if a new trial that is no better than ``best`` in any objective or example cannot be accepted."""

    def state(self) -> dict[str, Any]:
        """Everything that later calls depend on."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""


def climbed(goals: Sequence[Goal]) -> str:
    """A clause that says what a scalar search climbs where directions differ; empty where they do not."""
    if len({goal.direction for goal in goals}) < 2:
        return ""
    return "; it climbs the mean of ranges: each score as a share of its range over everything scored so far"


class ElitistArchive:
    """Keeps the ``capacity`` candidates of highest mean (``ecotone.populations.ranking``); of equals the older stays.

    Where the mean is one of ranges, these are ranges over everything offered, members or not.

    Args:
        goals: The objectives, for their directions.
        capacity: The most members it holds.
    """

    def __init__(self, goals: Sequence[Goal], capacity: int = 20) -> None:
        self.capacity = capacity
        self.goals: tuple[Goal, ...] = tuple(goals)
        self._members: list[Member] = []
        self._points: list[list[float]] = []  # oriented scores of the members
        self._means: list[float] = []
        self._offered = Extremes(goals)

    @property
    def members(self) -> Sequence[Member]:
        """Members, oldest first."""
        return tuple(self._members)

    def add(self, trial: Trial, evaluation: Evaluation) -> Outcome:
        """Accept while there is room or when better than the worst member, which then leaves."""
        if not evaluation.ok:
            return Outcome(accepted=False)
        point: list[float] = oriented(evaluation.scores, self.goals).tolist()
        wider = self._offered.take(point)
        self._members.append(Member(trial, evaluation))
        self._points.append(point)
        again = wider and self._offered.scale.unit == "ranges"
        self._means = self._measured(self._points) if again else self._means + self._measured([point])
        if len(self._members) <= self.capacity:
            return Outcome(accepted=True)
        # Among equals the youngest leaves.
        worst = min(range(len(self._means)), key=lambda i: (self._means[i], -i))
        gone = self._members.pop(worst).trial.number
        del self._points[worst], self._means[worst]
        return Outcome(gone != trial.number, () if gone == trial.number else (gone,))

    def may_accept(self, best: Evaluation) -> bool:
        """While there is room, or when it would be better than the worst member.

        By the ranges as they now are: of the trials that are told before the one asked about, one may widen them.
        """
        if len(self._members) < self.capacity:
            return True
        point = oriented(best.scores, self.goals)
        scale = self._offered.with_also([point])
        if scale.unit == "ranges" and bool((point > self._offered.points[1]).any()):
            return True  # how wide the ranges become, and so the members' means, depends on how good it really is
        # A worse trial may widen ranges downwards only. There its share is 0, and no member loses more than it does.
        *means, mean = scale.means(np.array([*self._points, point])).tolist()
        return bool(mean > min(means))

    def state(self) -> dict[str, Any]:
        """The members, and the extremes of what was offered."""
        return {"members": list(self._members), "offered": self._offered.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._members = list(state["members"])
        self._offered.restore(state["offered"])
        self._points = [oriented(m.evaluation.scores, self.goals).tolist() for m in self._members]
        self._means = self._measured(self._points)

    def _measured(self, points: Sequence[Sequence[float]]) -> list[float]:
        means: list[float] = self._offered.scale.means(np.array(points).reshape(len(points), len(self.goals))).tolist()
        return means
