"""The protocol of populations, and the elitist archive that keeps the best scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ecotone.populations.trial import Evaluation, Goal, Member, Outcome, Trial


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


def mean_score(scores: Mapping[str, float], goals: Sequence[Goal]) -> float:
    """The plain mean of the oriented scores, in whatever units they are: the one number that scalar searches climb.

    The best merge for people is another thing where units differ: see ``ecotone.populations.ranking``.
    """
    return sum(goal.sign * scores[goal.name] for goal in goals) / len(goals)


def quality(evaluation: Evaluation, goals: Sequence[Goal]) -> float:
    """The plain mean of an evaluation that is ok."""
    return mean_score(evaluation.scores, goals)


def climbed(goals: Sequence[Goal]) -> str:
    """A clause that says what a scalar search adds where directions differ; empty where they do not."""
    if len({goal.direction for goal in goals}) < 2:
        return ""
    return "; it climbs the plain mean of the scores, minimised ones negative, whatever their units"


class ElitistArchive:
    """Keeps the ``capacity`` candidates of highest plain mean; the older of two equals stays.

    Args:
        goals: The objectives, for their directions.
        capacity: The most members it holds.
    """

    def __init__(self, goals: Sequence[Goal], capacity: int = 20) -> None:
        self.capacity = capacity
        self.goals: tuple[Goal, ...] = tuple(goals)
        self._members: list[Member] = []
        self._quality: list[float] = []

    @property
    def members(self) -> Sequence[Member]:
        """Members, oldest first."""
        return tuple(self._members)

    def add(self, trial: Trial, evaluation: Evaluation) -> Outcome:
        """Accept while there is room or when better than the worst member, which then leaves."""
        if not evaluation.ok:
            return Outcome(accepted=False)
        self._members.append(Member(trial, evaluation))
        self._quality.append(quality(evaluation, self.goals))
        if len(self._members) <= self.capacity:
            return Outcome(accepted=True)
        # Among equals the youngest leaves.
        worst = min(range(len(self._quality)), key=lambda i: (self._quality[i], -i))
        gone = self._members.pop(worst).trial.number
        del self._quality[worst]
        return Outcome(gone != trial.number, () if gone == trial.number else (gone,))

    def may_accept(self, best: Evaluation) -> bool:
        """While there is room, or when it would be better than the worst member."""
        if len(self._members) < self.capacity:
            return True
        return quality(best, self.goals) > min(self._quality)

    def state(self) -> dict[str, Any]:
        """The members."""
        return {"members": list(self._members)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._members = list(state["members"])
        self._quality = [quality(m.evaluation, self.goals) for m in self._members]
