"""The best merge, and the mean of its scores: one definition, for tables, fronts, trackers, exports and selection.

*Best* is the member of the front with the highest mean; of equals the one of lowest number. The *mean* only adds
numbers that have one unit:

- With one objective it is the score, oriented so that larger is better.
- With several that are all maximised, and all of whose scores are shares in [0, 1], it is the mean of the scores.
- Otherwise each score counts as a share of its range, 0 the worst and 1 the best, and the mean is that of the shares.
  The range of an objective is that of the reference merges (the models and their average). While they are not scored,
  or do not differ, it is that of everything scored. An objective in which nothing differs is left out.

Searches and archives that select by one number select by this mean. Reference merges are no part of a search: the
ranges are those of everything that it was told so far (``Extremes``). So its means change as ranges grow, and means are
compared only under one scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from ecotone.populations.genome import Floats
from ecotone.populations.pareto import ParetoFront
from ecotone.populations.trial import Goal, oriented

Unit: TypeAlias = Literal["score", "shares", "ranges"]


@dataclass(frozen=True, eq=False)
class Scale:
    """The units in which scores are added; made by ``of``.

    Args:
        goals: The M objectives.
        unit: ``score`` (one objective), ``shares`` (of [0, 1], as they are) or ``ranges``.
        low: (M,) oriented scores that count as 0.
        high: (M,) oriented scores that count as 1.
        compared: Whether they are those of the reference merges, and not of everything scored.
    """

    goals: tuple[Goal, ...]
    unit: Unit
    low: Floats
    high: Floats
    compared: bool = False

    @classmethod
    def of(cls, goals: Sequence[Goal], candidates: ArrayLike, references: ArrayLike = ()) -> Scale:
        """The scale of a search.

        Args:
            goals: The M objectives, one at least.
            candidates: (N, M) oriented scores; those that are lowest and highest in each objective are enough.
            references: (R, M) oriented scores of the reference merges.
        """
        size = len(goals)
        if size == 0:
            return cls((), "score", np.zeros(0), np.zeros(0))
        compared = np.asarray(references, np.float64).reshape(-1, size)
        everything = np.concatenate([np.asarray(candidates, np.float64).reshape(-1, size), compared])
        if not len(everything):
            everything = np.zeros((1, size))
        low, high = everything.min(axis=0), everything.max(axis=0)
        if size == 1 or _are_shares(goals, low, high):
            return cls(tuple(goals), "score" if size == 1 else "shares", np.zeros(size), np.ones(size))
        if len(compared) > 1:
            differ = compared.min(axis=0) < compared.max(axis=0)
            low = np.where(differ, compared.min(axis=0), low)
            high = np.where(differ, compared.max(axis=0), high)
        return cls(tuple(goals), "ranges", low, high, len(compared) > 1)

    @property
    def known(self) -> bool:
        """False where nothing differs in any objective, so that there are no ranges to measure by."""
        return self.unit != "ranges" or bool((self.low < self.high).any())

    @property
    def title(self) -> str:
        """The mean's name in tables."""
        return "mean of\nranges" if self.unit == "ranges" else "mean"

    @property
    def words(self) -> str:
        """A sentence that says what the mean is of; empty where its name says it."""
        if self.unit != "ranges":
            return ""
        over = "the models and their average" if self.compared else "everything scored so far"
        return f"Mean of ranges: each score as a share of its range over {over}, 0 the worst and 1 the best."

    def means(self, points: Floats) -> Floats:
        """(N,) means of oriented scores (N, M), larger is better; all 0 where the scale is not ``known``, or M is 0."""
        if self.unit != "ranges":
            return np.array([sum(point) / (len(point) or 1) for point in points.tolist()])
        differ = self.low < self.high
        if not differ.any():
            return np.zeros(len(points))
        # Halves, as the range of the largest numbers is larger than any number.
        low, extent = 0.5 * self.low[differ], 0.5 * self.high[differ] - 0.5 * self.low[differ]
        shares = ((0.5 * points[:, differ] - low) / extent).tolist()
        return np.array([sum(row) / len(row) for row in shares])  # to the last bit, whatever other rows there are

    def mean(self, scores: Mapping[str, float] | None) -> float | None:
        """The mean of a merge's scores; None where one is missing, or nothing is known to measure by."""
        if not self.known or scores is None or any(goal.name not in scores for goal in self.goals):
            return None
        return float(self.means(oriented(scores, self.goals)[None])[0])

    def better(self, point: Sequence[float], than: Sequence[float]) -> bool:
        """Whether M oriented scores have a higher mean than others."""
        one, other = self.means(np.array([point, than])).tolist()
        return bool(one > other)

    def best(self, numbers: Sequence[int], points: Floats) -> int:
        """The position of the best of (F, M) oriented scores, which are a front; of equals that of lowest number.

        Args:
            numbers: F numbers of trials, in any order.
            points: Their scores.
        """
        means = self.means(points)
        first: list[int] = np.flatnonzero(means == means.max()).tolist()
        return min(first, key=lambda i: numbers[i])


class Extremes:
    """The lowest and the highest oriented scores of everything told so far, and the scale that they give.

    Args:
        goals: The objectives, M of them.

    Attributes:
        scale: The present scale; nothing is ``known`` by it before anything is told.
    """

    scale: Scale

    def __init__(self, goals: Sequence[Goal]) -> None:
        self._goals = tuple(goals)
        self.restore([])

    @property
    def points(self) -> Floats:
        """(2, M) the lowest and the highest oriented scores so far; (0, M) before the first."""
        known = [self._low, self._high] if self._goals and self._low[0] < math.inf else []
        return np.array(known).reshape(len(known), len(self._goals))

    def take(self, values: Sequence[float]) -> bool:
        """Take M oriented scores; True when they widened a range, so that means may change."""
        wider = False
        for index, value in enumerate(values):
            if value < self._low[index]:
                self._low[index], wider = value, True
            if value > self._high[index]:
                self._high[index], wider = value, True
        if wider and self.scale.unit != "score":
            self.scale = Scale.of(self._goals, self.points)
        return wider

    def with_also(self, points: ArrayLike) -> Scale:
        """The scale if (N, M) oriented scores were told, too."""
        more = np.asarray(points, np.float64).reshape(-1, len(self._goals))
        return Scale.of(self._goals, np.concatenate([self.points, more]))

    def state(self) -> list[list[float]]:
        """``points``, as plain numbers."""
        points: list[list[float]] = self.points.tolist()
        return points

    def restore(self, state: Sequence[Sequence[float]]) -> None:
        """Continue from ``state``."""
        low, high = state or ([math.inf] * len(self._goals), [-math.inf] * len(self._goals))
        self._low, self._high = list(low), list(high)  # plain numbers: they are compared for every candidate
        self.scale = Scale.of(self._goals, self.points)


class Leader:
    """The best candidate so far, candidate by candidate, while the reference merges are not scored.

    Args:
        goals: The objectives, M of them.

    Attributes:
        number: Its number; None before the first.
        point: (M,) its oriented scores.
        mean: Its mean.
    """

    number: int | None
    point: Floats
    mean: float

    def __init__(self, goals: Sequence[Goal]) -> None:
        self._told = Extremes(goals)
        self.number = None
        self.point = np.zeros(0)
        self.mean = -math.inf

    @property
    def scale(self) -> Scale:
        """The scale that it is measured by."""
        return self._told.scale

    @property
    def extremes(self) -> Floats:
        """(2, M) the lowest and the highest oriented scores so far; (0, M) before the first."""
        return self._told.points

    def take(self, number: int, point: Floats, front: ParetoFront) -> bool:
        """Take a candidate's oriented scores (M,), after the front took them; True when another one is best now."""
        values = point.tolist()
        wider = self._told.take(values)
        if self.scale.unit == "ranges":
            return (wider or number in front.numbers) and self._chosen(front)
        mean = sum(values) / len(values)
        if mean < self.mean or number not in front.numbers:
            return False
        if mean == self.mean and self.number is not None and number > self.number and self.number in front.numbers:
            return False
        self.number, self.point, self.mean = number, point, mean
        return True

    def _chosen(self, front: ParetoFront) -> bool:
        """Choose anew among the front."""
        index = self.scale.best(front.numbers, front.points)
        before, self.number, self.point = self.number, front.numbers[index], front.points[index]
        self.mean = float(self.scale.means(self.point[None])[0])
        return self.number != before


def _are_shares(goals: Sequence[Goal], low: Floats, high: Floats) -> bool:
    maximised = all(goal.direction == "maximize" for goal in goals)
    return maximised and bool((low >= 0).all() and (high <= 1).all())
