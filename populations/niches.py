"""M2N2's archive: natural niches by competition for examples ("Competition and Attraction Improve Model Fusion").

Each example is a resource of limited capacity. The members that score on it share it. A member that solves examples
that few others solve stays alive although its mean score is low.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ecotone.populations.errors import InputError, SearchError
from ecotone.populations.genome import Floats
from ecotone.populations.trial import Evaluation, Goal, Member, Outcome, Trial


class NicheArchive:
    """Members compete for examples; the one with the lowest shared fitness leaves when a child comes.

    With S (P, N) the members' per-example scores and ``z_j = sum_i S_ij`` the demand for example j::

        fitness_i      = sum_j S_ij * c_j / z_j^alpha
        attraction_i|A = sum_j max(0, S_ij - S_Aj) * c_j / z_j^alpha

    An example that no member scores on counts nothing. For right-or-wrong scores ``c_j`` is 1 either way.

    Args:
        goals: The objectives; each must be maximised and give per-example scores that are not negative.
            The examples of all objectives are resources side by side.
        capacity: P, the most members.
        alpha: Strength of competition: 1 shares a resource evenly, 0 is a plain genetic algorithm.
        resource: ``max`` gives example j the capacity ``max_i S_ij`` (the paper's choice for continuous
            scores), ``one`` gives every example the capacity 1.

    Raises:
        InputError: A goal is minimised, or an argument is out of range.
    """

    def __init__(
        self,
        goals: Sequence[Goal],
        capacity: int = 20,
        alpha: float = 1.0,
        resource: Literal["max", "one"] = "max",
    ) -> None:
        if capacity < 2:
            raise InputError(f"archive: expected at least 2 members, found {capacity}.")
        if not alpha >= 0:
            raise InputError(f"alpha: expected a number of at least 0, found {alpha}.")
        for goal in goals:
            if goal.direction == "minimize":
                raise InputError(
                    f"objective {goal.name!r}: the niche archive shares out non-negative scores to maximise, "
                    "found direction minimize.",
                    "Give a score in which more is better (accuracy, exp(-loss)), or use another algorithm.",
                )
        self.goals: tuple[Goal, ...] = tuple(goals)
        self.capacity = capacity
        self.alpha = alpha
        self.resource = resource
        self._members: list[Member] = []
        self._slots: list[int] = []  # row of each member in _scores, oldest first
        self._free = list(range(capacity, -1, -1))  # rows of nobody, the next to take last
        self._scores: Floats = np.zeros((0, 0))
        self._known_worth: Floats | None = None  # of the scores as they are
        self._binary = True  # all scores so far are right or wrong

    @property
    def members(self) -> Sequence[Member]:
        """Members, oldest first."""
        return tuple(self._members)

    def add(self, trial: Trial, evaluation: Evaluation) -> Outcome:
        """Add the candidate. If there are too many, the member of lowest fitness leaves (of equals the oldest)."""
        if not evaluation.ok:
            return Outcome(accepted=False)
        row = self._row(trial, evaluation)
        if not self._members:
            self._scores = np.zeros((self.capacity + 1, row.size))
        slot = self._free.pop()
        self._scores[slot] = row
        self._known_worth = None
        self._members.append(Member(trial, evaluation))
        self._slots.append(slot)
        if len(self._members) <= self.capacity:
            return Outcome(accepted=True)
        worst = int(np.argmin(self.fitness()))
        gone = self._members.pop(worst).trial.number
        self._free.append(self._slots.pop(worst))
        self._scores[self._free[-1]] = 0.0
        self._known_worth = None
        return Outcome(gone != trial.number, () if gone == trial.number else (gone,))

    def may_accept(self, best: Evaluation) -> bool:
        """True while there is room, or if the candidate's shared fitness could reach that of a member.

        On an example with demand z that it scores s, it has ``s c / (z + s)^alpha``, which grows with s. The others
        lose by it until s exceeds their own best score; beyond that, capacity grows. So the most fitness that it can
        have is compared with the least that each of them can be left with. Above alpha 1, scores between right and
        wrong do not grow so, and nothing is ruled out.
        """
        if len(self._members) < self.capacity:
            return True
        row = self._row(Trial(-1, self._members[0].trial.genome), best)
        if not np.isfinite(row).all() or (self.alpha > 1.0 and not self._binary):
            return True
        scores = self._scores[self._slots]
        demand, top = scores.sum(axis=0), scores.max(axis=0)
        own = float(row @ self._share(np.maximum(top, row), demand + row))
        harm = row if self.resource == "one" else np.minimum(row, top)  # what of it takes most from the others
        left = scores @ self._share(top, demand + harm)
        return own >= float(left.min()) * (1.0 - 1e-9)

    def _share(self, top: Floats, demand: Floats) -> Floats:
        """(N,) ``c_j / z_j^alpha`` at the largest scores ``top`` and the demand z."""
        powered = demand**self.alpha
        worth: Floats = np.divide(1.0, powered, out=np.zeros_like(demand), where=powered > 1e-150)
        return worth * top if self.resource == "max" and not self._binary else worth

    def fitness(self) -> Floats:
        """(P,) shared fitness of the members, oldest first. At alpha 1 it sums to the worth of all solved examples."""
        shared: Floats = self._scores @ self._worth()
        return shared[self._slots]

    def attraction(self, index: int) -> Floats:
        """(P,) the gain of each member on examples where member ``index`` is weak; 0 for itself."""
        own, worth = self._scores[self._slots[index]], self._worth()
        # Of right and wrong, max(0, S_ij - S_Aj) is S_ij (1 - S_Aj): the same numbers in a sixth of the time.
        binary = self._binary
        shared: Floats = self._scores @ (worth * (1 - own)) if binary else np.maximum(self._scores - own, 0) @ worth
        return shared[self._slots]

    def state(self) -> dict[str, Any]:
        """The members and their rows in the score matrix: sums of floats depend on the order of rows."""
        return {"members": list(self._members), "slots": list(self._slots)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._members, self._slots, self._scores = list(state["members"]), [], np.zeros((0, 0))
        self._known_worth = None
        rows = [self._row(m.trial, m.evaluation) for m in self._members]
        self._slots = list(state["slots"])
        self._free = [row for row in range(self.capacity, -1, -1) if row not in self._slots]
        if rows:
            self._scores = np.zeros((self.capacity + 1, rows[0].size))
            self._scores[self._slots] = rows

    def _worth(self) -> Floats:
        """(N,) ``c_j / z_j^alpha``; 0 where no member scores, or so little that the quotient would overflow."""
        if self._known_worth is not None:
            return self._known_worth
        demand = self._scores.sum(axis=0)
        share = demand if self.alpha == 1.0 else demand**self.alpha
        worth: Floats = np.divide(1.0, share, out=np.zeros_like(demand), where=share > 1e-150)
        if self.resource == "max" and not self._binary:  # of right and wrong the largest is 1
            worth *= self._scores.max(axis=0)
        self._known_worth = worth
        return worth

    def _row(self, trial: Trial, evaluation: Evaluation) -> Floats:
        parts = [self._resources(goal, evaluation) for goal in self.goals]
        row = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self._members and row.size != (width := self._scores.shape[1] or row.size):
            raise SearchError(f"trial {trial.number}: expected {width} per-example scores, found {row.size}.")
        return row

    def _resources(self, goal: Goal, evaluation: Evaluation) -> Floats:
        given = evaluation.per_example.get(goal.name)
        values = np.asarray([evaluation.scores[goal.name]] if given is None else given)
        if values.dtype == np.bool_:
            return values.astype(np.float64)
        self._binary = False
        if (values < 0).any():
            raise SearchError(
                f"objective {goal.name!r}: the niche archive expects per-example scores of at least 0, "
                f"found {values.min():.6g}.",
                "Shift or transform the score, or use another algorithm.",
            )
        return values.astype(np.float64)
