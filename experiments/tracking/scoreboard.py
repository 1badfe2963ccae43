"""The metrics of a search, step by step, computed from its evaluations."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from ecotone.experiments.runs import best_row, points_of, reference_point
from ecotone.experiments.tracking.names import CURSOR, HYPERVOLUME, acceptable, metric_names
from ecotone.experiments.tracking.protocol import Line
from ecotone.populations.fronts import hypervolume, hypervolume_over
from ecotone.populations.genome import Floats
from ecotone.populations.journal import Row
from ecotone.populations.pareto import ParetoFront
from ecotone.populations.ranking import Leader, Scale
from ecotone.populations.trial import Goal, oriented

BEST_MEAN = "best/mean"


class Volumes:
    """The hypervolume of the front over evaluations.

    It is live, measured from 0 as the search goes on, when the objectives are up to five, all maximised, and the first
    candidate scores in [0, 1] in each. Otherwise it is known only at the end, when the reference merges are measured
    from which its reference point follows (``ecotone.experiments.runs.reference_point``).

    Args:
        goals: The objectives.
    """

    def __init__(self, goals: Sequence[Goal]) -> None:
        self._goals = tuple(goals)
        self._live: bool | None = None if 2 <= len(goals) <= 5 else False
        self._numbers: list[int] = []
        self._known: dict[str, float] = {}
        self._counts = array("q")
        self._points = array("d")
        self._steps: list[tuple[int, int]] = []

    def add(self, count: int, point: Floats) -> None:
        """Take the oriented scores (M,) of candidate number ``count``."""
        if self._live is None:
            self._live = all(goal.sign > 0 for goal in self._goals) and bool(((point >= 0) & (point <= 1)).all())
        if not self._live and len(self._goals) > 1:
            self._counts.append(count)
            self._points.extend(point.tolist())

    def live(self, front: ParetoFront) -> dict[str, float]:
        """The metric as it stands; empty when it is not live."""
        if self._live and self._numbers != front.numbers:
            self._numbers = list(front.numbers)
            self._known = {HYPERVOLUME: hypervolume(front.points, np.zeros(len(self._goals)))}
        return self._known

    def step(self, count: int, time: int) -> None:
        """Note that the metrics have a step here."""
        if self._points:
            self._steps.append((count, time))

    def late(self, references: Sequence[Mapping[str, float]], means: bool) -> list[Line]:
        """The whole history when it was not live, given the scores of reference merges.

        Args:
            references: Their scores.
            means: Also the best mean, which was not live.
        """
        if not self._points:
            return []
        points, compared = np.array(self._points).reshape(-1, len(self._goals)), points_of(references, self._goals)
        series = {HYPERVOLUME: hypervolume_over(points, reference_point(points, compared, self._goals))}
        scale = Scale.of(self._goals, points, compared)
        if means and scale.known:
            series[BEST_MEAN] = np.maximum.accumulate(scale.means(points))
        indices = np.searchsorted(np.array(self._counts), [count for count, _ in self._steps], side="right") - 1
        return [
            Line(count, time, {name: float(values[index]) for name, values in series.items()})
            for index, (count, time) in zip(indices, self._steps, strict=True)
        ]


class Scoreboard:
    """Turns evaluations, in order, into the metrics of a search. The metrics depend on the journal alone.

    Args:
        goals: The objectives.
        stride: A line every so many evaluations; None: every one at first, every other from 1,024 on, every fourth
            from 2,048 on, ... for a search whose budget is not a number of evaluations.
        created: When the run began (unix seconds).
        known: Evaluations whose metrics nobody will ask for: what takes long is left out of them.

    Attributes:
        recent: The scores of the latest candidates.
    """

    count: int
    failures: int
    time: float

    def __init__(self, goals: Sequence[Goal], stride: int | None, created: float, known: int = 0) -> None:
        self.goals: tuple[Goal, ...] = tuple(goals)
        self.known = known
        self.stride = stride
        self.count = 0
        self.failures = 0
        self.time = created
        self.front: ParetoFront = ParetoFront(goals)
        self.volumes: Volumes = Volumes(goals)
        self.recent: deque[list[float]] = deque(maxlen=2000)
        self.members: dict[int, Row] = {}
        self._leader = Leader(goals)
        self._shown_mean = False
        self._stepped = 0
        self._records: dict[str, float] = {}
        self._window: list[Mapping[str, float]] = []
        self._losses: dict[str, list[float]] = {}
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
        return self._step()

    def learn(self, row: Row) -> None:
        """Take the losses of calibration tasks, which the next step shows: means since the step before."""
        if row.failure is None:
            for task, loss in (row.scores or {}).items():
                self._losses.setdefault(task, []).append(loss)

    def last(self) -> Line | None:
        """The metrics of a last step that is shorter than the others; None when there is none."""
        return None if self.on_border or self.count == self._stepped else self._step()

    def _step(self) -> Line:
        line = self.line()
        self._stepped = self.count
        self.volumes.step(line.step, line.time)
        self._window.clear()
        self._losses.clear()
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
        for task, losses in self._losses.items():
            values[f"loss/{acceptable(task)}"] = math.fsum(losses) / len(losses)
        if self._leader.number is not None and self._leader.scale.unit != "ranges":  # those are known at the end
            values[BEST_MEAN], self._shown_mean = self._leader.mean, True
        values["front_size"] = len(self.front.numbers)
        if self.count > self.known:
            values.update(self.volumes.live(self.front))
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
        self.recent.append([scores[goal.name] for goal in self.goals])
        for goal in self.goals:
            record = self._records.get(goal.name)
            if record is None or goal.sign * scores[goal.name] > goal.sign * record:
                self._records[goal.name] = scores[goal.name]
        point = oriented(scores, self.goals)
        self.volumes.add(self.count, point)
        if self.front.add(row.number, point):
            self.members = {n: row if n == row.number else self.members[n] for n in self.front.numbers}
        self._leader.take(row.number, point, self.front)

    def best(self, references: Sequence[Mapping[str, float]]) -> Row | None:
        """The best candidate, given the search scores of the reference merges; None while none has scores."""
        scale = Scale.of(self.goals, self._leader.extremes, points_of(references, self.goals))
        return best_row([self.members[number] for number in sorted(self.members)], scale)

    def late(self, references: Sequence[Mapping[str, float]]) -> list[Line]:
        """The metrics that are known only at the end, given the search scores of the reference merges."""
        return self.volumes.late(references, not self._shown_mean)

    def _rate(self) -> float | None:
        """Evaluations a second since 100 evaluations and 1 s ago, or since the run began."""
        arrivals = self._arrivals
        while len(arrivals) > 1 and self._long_ago(*arrivals[1]):
            arrivals.popleft()
        number, when = arrivals[0]
        return (self.count - number) / (self.time - when) if self.time > when else None

    def _long_ago(self, number: int, when: float) -> bool:
        return self.count - number >= 100 and self.time - when >= 1.0
