"""The Pareto front of everything scored so far, kept up to date one candidate at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ecotone.populations.genome import Floats
from ecotone.populations.trial import Goal


class ParetoFront:
    """Numbers and scores of the candidates that no other candidate dominates.

    A candidate dominates another when it is at least as good in every objective and better in one. Of
    candidates with equal scores the one of lowest number stays, in whatever order they come. With one
    objective the front is the best candidate.

    Args:
        goals: The objectives, M of them.
    """

    def __init__(self, goals: Sequence[Goal]) -> None:
        self.goals: tuple[Goal, ...] = tuple(goals)
        self.numbers: list[int] = []
        self._points: Floats = np.zeros((0, len(self.goals)))

    @property
    def points(self) -> Floats:
        """(F, M) oriented scores of the front's candidates: larger is better."""
        return self._points

    def takes(self, number: int, point: Floats) -> bool:
        """True when a candidate of oriented scores ``point`` (M,) belongs on the front."""
        above = np.flatnonzero((self._points >= point).all(axis=1))
        return not any(self.numbers[i] < number or (self._points[i] > point).any() for i in above)

    def add(self, number: int, point: Floats) -> bool:
        """Take the oriented scores ``point`` (M,) of a candidate; True when it is on the front now."""
        if not self.takes(number, point):
            return False
        keep: list[int] = np.flatnonzero(~(point >= self._points).all(axis=1)).tolist()
        self.numbers = [*(self.numbers[i] for i in keep), number]
        self._points = np.concatenate([self._points[keep], point[None]])
        return True
