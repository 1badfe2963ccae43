"""What a search was worth, step by step: its evaluations turned into metrics."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.tracking.names import CURSOR, metric_names
from populations.journal import Row
from populations.pareto import ParetoFront
from populations.population import mean_score
from populations.trial import Goal, oriented


@dataclass(frozen=True)
class Line:
    """The metrics of one step: after ``step`` evaluations, at ``time`` (unix milliseconds)."""

    step: int
    time: int
    values: Mapping[str, float]


class Scoreboard:
    """Turns evaluations, in order, into the metrics of a search; what it says depends on the journal alone.

    Args:
        goals: The objectives.
        stride: A line every so many evaluations; None: every one at first, every other from 1,024 on, every fourth
            from 2,048 on, ... for a search whose budget is not a number of evaluations.
        created: When the run began (unix seconds).
    """

    def __init__(self, goals: Sequence[Goal], stride: int | None, created: float) -> None:
        self.goals = tuple(goals)
        self.stride = stride
        self.count = 0
        self.failures = 0
        self.time = created
        self.best: Row | None = None
        self.front = ParetoFront(goals)
        self.members: dict[int, Row] = {}
        self._best_mean = -math.inf
        self._records: dict[str, float] = {}
        self._window: list[Mapping[str, float]] = []
        self._arrivals: deque[tuple[int, float]] = deque([(0, created)])
        self._names = metric_names([goal.name for goal in goals])

    def add(self, row: Row) -> Line | None:
        """Take the next evaluation; the metrics, when a step is due."""
        self.count += 1
        self.time = max(self.time, row.time)
        self._arrivals.append((self.count, self.time))
        if row.failure is not None or row.scores is None:
            self.failures += 1
        else:
            self._score(row, row.scores)
        if not self.on_border:
            return None
        line = self.line()
        self._window.clear()
        return line

    def line(self) -> Line:
        """The metrics as they stand."""
        values: dict[str, float] = {}
        for goal in self.goals:
            name = self._names[goal.name]
            scores = [scores[goal.name] for scores in self._window]
            if scores:
                values[name] = math.fsum(scores) / len(scores)
            if goal.name in self._records:
                values[f"best/{name}"] = self._records[goal.name]
        if self.best is not None:
            values["best/mean"] = self._best_mean
        values["front_size"] = len(self.front.numbers)
        values["failures"] = self.failures
        rate = self._rate()
        if rate is not None:
            values["evaluations_per_second"] = rate
        values[CURSOR] = self.count  # last: what is before it is logged when it is
        return Line(self.count, round(self.time * 1000), values)

    @property
    def on_border(self) -> bool:
        """True when a step ends at the latest evaluation."""
        stride = self.stride if self.stride is not None else 1 << max(0, self.count.bit_length() - 10)
        return self.count % stride == 0

    def _score(self, row: Row, scores: Mapping[str, float]) -> None:
        self._window.append(scores)
        for goal in self.goals:
            record = self._records.get(goal.name)
            if record is None or goal.sign * scores[goal.name] > goal.sign * record:
                self._records[goal.name] = scores[goal.name]
        point = oriented(scores, self.goals)
        mean = mean_score(scores, self.goals)
        if mean > self._best_mean:
            self._best_mean, self.best = mean, row
        if self.front.add(row.number, point):
            self.members = {n: row if n == row.number else self.members[n] for n in self.front.numbers}

    def _rate(self) -> float | None:
        """Evaluations a second since 100 evaluations and 1 s ago, or since the run began."""
        arrivals = self._arrivals
        while len(arrivals) > 1 and self._long_ago(*arrivals[1]):
            arrivals.popleft()
        number, when = arrivals[0]
        return (self.count - number) / (self.time - when) if self.time > when else None

    def _long_ago(self, number: int, when: float) -> bool:
        return self.count - number >= 100 and self.time - when >= 1.0
