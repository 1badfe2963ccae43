"""Gradient descent on merge coefficients: the machinery of searches that learn on calibration tasks.

``Descent`` runs Adam along one or several independent lines. A trial with a calibration batch comes back with the
losses of some tasks and their gradient by the coefficients; other trials score each line's merge by the objectives now
and then. An algorithm is a subclass of ``Descent`` with its settings, a subclass of ``GradientSettings``. It says how
the coefficients follow from the numbers that Adam moves. M2N2's refinement needs ``Adam`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from pydantic import Field, model_validator

from ecotone.populations.errors import InputError, nearest
from ecotone.populations.genome import Floats, Genome, Integers
from ecotone.populations.ranking import Scale
from ecotone.populations.trial import Evaluation, Goal, Gradient, Outcome, Trial, oriented
from ecotone.search.coefficients import Granularity, Parts
from ecotone.search.kinds import Begins, Context, Needs, Segmented
from ecotone.search.protocol import Search, trial_rng
from ecotone.search.simplex import lattice

LINES = 4
"""Merges that a descent begins with unless the recipe says otherwise: it follows each of them."""

_CHECK = -1  # stands where a gradient trial has its task's position
_FALL = 0.01  # share of its best by which a score must have fallen for a warning
_COLLAPSE = 0.5  # share of its first value below which a task's diversity is warned of


class GradientSettings(Segmented):
    """Settings of searches that follow the gradient of the calibration tasks' losses.

    Attributes:
        granularity: The parts of the model that have their own coefficients: the whole ``model``, ``groups`` of
            consecutive blocks, ``components`` (all attention tensors, all feed-forward tensors, and so on), each
            ``block`` (the tensors of one layer), or each ``tensor``.
        steps: Steps of Adam. Each step uses ``accumulate`` batches of every calibration task.
        accumulate: Batches of each task in one step, which uses their mean gradient.
        together: The most tasks that one worker differentiates at once. With 1, several workers share a step. With
            more, one worker sums the tasks' gradients, then takes the inner products with the models once. This is
            faster where there are fewer workers than tasks, and takes the memory of one more model.
        weights: For each calibration task, the weight of its loss; 1 where not given. A task of weight 0 is left out.
        sweep: The most weightings of the tasks to learn with, spread evenly. Each weighting leads to another point of a
            front. None learns with ``weights`` alone.
        restarts: Runs for each start and weighting. The first run begins at the start itself, the others near it.
        check_every: Steps between two checks. At a check, the objectives score the merge.
        patience: Checks without a better mean score after which a run ends; None means never.
        init: The first value of every coefficient, unless the search begins with given merges.
        rate: Adam's step size.
        spread: Standard deviation of the noise added to the start of every restart but the first.
    """

    granularity: Granularity = "tensor"
    steps: int = Field(default=500, ge=1)
    accumulate: int = Field(default=1, ge=1)
    together: int = Field(default=1, ge=1)
    weights: dict[str, float] | None = None
    sweep: int | None = Field(default=None, ge=2)
    restarts: int = Field(default=1, ge=1)
    check_every: int = Field(default=25, ge=1)
    patience: int | None = Field(default=None, ge=1)
    init: float | None
    rate: float
    spread: float

    @model_validator(mode="after")
    def _restarts_differ(self) -> GradientSettings:
        if self.restarts > 1 and self.spread == 0:
            raise ValueError(f"spread: with 0 all {self.restarts} restarts would be the same; raise it")
        return self

    @model_validator(mode="after")
    def _weighted_once(self) -> GradientSettings:
        if self.sweep is not None and self.weights is not None:
            raise ValueError("weights: a sweep chooses the weights of the tasks; give weights or sweep, not both")
        return self

    @property
    def most_steps(self) -> int:
        """Steps of a run that takes them all."""
        return self.steps

    def needs(self) -> Needs:
        """It needs gradients on calibration tasks, and merges linear in their coefficients."""
        return Needs(gradients=True, affine=True)

    def begins(self) -> Begins:
        """It can begin with several merges, each of which begins runs of its own."""
        return Begins(most=LINES)

    def describe(self, search: Search | None, context: Context) -> str:
        """The number of runs, steps and checks."""
        if not isinstance(search, Descent):  # it is made when the models are read
            return ""
        steps = f"{search.lines} x {self.most_steps} steps on {len(context.tasks)} tasks"
        return f"; {steps}, scored {search.evaluations} times"


Settings = TypeVar("Settings", bound=GradientSettings)


class Adam:
    """Adam without weight decay (Kingma and Ba 2015, algorithm 1) on one array.

    Args:
        start: The first point, of any shape.
        rate: Step size alpha, in units of the point.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    t: int

    def __init__(self, start: Floats, rate: float) -> None:
        self.rate = rate
        self.point: Floats = np.array(start, np.float64)
        self.m: Floats = np.zeros_like(self.point)
        self.v: Floats = np.zeros_like(self.point)
        self.t = 0

    def step(self, gradient: Floats) -> None:
        """Move the point once, against ``gradient`` (of the point's shape)."""
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * gradient  # m_t, the biased first moment
        self.v = self.beta2 * self.v + (1 - self.beta2) * gradient**2  # v_t, the biased second raw moment
        slope = self.m / (1 - self.beta1**self.t)  # m_t without its bias
        scale = np.sqrt(self.v / (1 - self.beta2**self.t))  # the root of v_t without its bias
        self.point = self.point - self.rate * slope / (scale + self.eps)

    def state(self) -> dict[str, Any]:
        """Point, moments and count."""
        return {"point": self.point.copy(), "m": self.m.copy(), "v": self.v.copy(), "t": self.t}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``."""
        self.point, self.m, self.v = (state[key].copy() for key in ("point", "m", "v"))
        self.t = state["t"]


@dataclass(eq=False)
class Line:
    """One run of Adam: its start, its present point, and the results of its checks.

    Of the running step, ``waiting`` counts the trials that are not told, ``told`` has losses and diversities (2, tasks)
    and the gradient (R, K) by batch, and ``check`` the number and oriented scores of the check (None on failure).
    ``sums`` (2, T) adds up losses and diversities by task over the ``summed`` steps since the last check.
    """

    index: int
    start: Floats
    weights: Floats
    last: int  # the step at which it ends
    borders: Integers
    adam: Adam
    genome: Genome
    sums: Floats
    exact: Floats | None = None  # coefficients at the start, where Adam's point gives them but for a last bit
    before: int = 0  # steps before this Adam's first
    grown: bool = False  # has more coefficients than it began with
    held: list[int] = field(default_factory=list)  # segments that stay as they are
    summed: int = 0
    waiting: int = 0
    told: dict[int, tuple[Floats, Floats]] = field(default_factory=dict)
    check: tuple[int, list[float] | None] | None = None
    checks: list[dict[str, Any]] = field(default_factory=list)
    stale: int = 0  # checks since the best
    parent: int | None = None  # the last scored trial
    ended: str = ""  # why; empty while it runs

    _PLAIN = ("last", "before", "grown", "waiting", "summed", "stale", "parent", "ended")

    @property
    def step(self) -> int:
        """Steps done."""
        return self.before + self.adam.t

    @property
    def tasks(self) -> list[int]:
        """Positions of the tasks that have a weight."""
        return [int(task) for task in np.flatnonzero(self.weights)]

    def state(self) -> dict[str, Any]:
        """Everything but the genome, which follows from it."""
        return {
            **{name: getattr(self, name) for name in self._PLAIN},
            "start": self.start.copy(),
            "borders": self.borders.copy(),
            "held": list(self.held),
            "adam": self.adam.state(),
            "told": {batch: list(told) for batch, told in self.told.items()},
            "check": None if self.check is None else list(self.check),
            "sums": self.sums.copy(),
            "checks": [dict(check) for check in self.checks],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; the genome is not made."""
        for name in self._PLAIN:
            setattr(self, name, state[name])
        self.start, self.borders, self.held = state["start"].copy(), state["borders"].copy(), list(state["held"])
        self.adam.restore(state["adam"])
        self.told = {batch: (known, gradient) for batch, (known, gradient) in state["told"].items()}
        self.check = None if state["check"] is None else (state["check"][0], state["check"][1])
        self.sums = state["sums"].copy()
        self.checks = [dict(check) for check in state["checks"]]


class Descent(Generic[Settings]):
    """Adam on the coefficients, in one or several independent lines of descent.

    A step of a line asks for one gradient trial (or ``accumulate``) of each task, or of each ``together`` tasks, at the
    line's coefficients. When all are told, Adam moves against the sum of the gradients, weighted by task. Lines take
    turns, so that several keep several workers busy; while every line waits, nothing is proposed.

    At step 0, every ``check_every`` steps and at its end a line is checked: the objectives score its merge. Only these
    trials reach the population and the front, and only they count for the budget. A failed gradient trial ends its
    line, after a last check. A check that fails counts as one without a better score. The score is the mean
    (``ecotone.populations.ranking``); where it is one of ranges, these are ranges over the line's own checks.

    There is one line for each start, weighting of the tasks and restart. All lines see the same batches at the same
    steps. A line's path depends on no other line and not on the order of results, also with ``order: arrival``.

    A subclass says how coefficients follow from Adam's point: ``_point``, ``_used``, ``_pulled`` and, where it needs
    them, ``_exact`` and ``_grown``.

    Args:
        borders: (S+1,) segment borders in the flat parameter vector.
        sources: K.
        tasks: Names of the T calibration tasks.
        goals: The objectives of the checks.
        seed: The recipe's seed, for restarts.
        settings: Steps, weights, restarts and checks.
        starts: (R, K) coefficients of each merge to start from; None for ``settings.init`` everywhere.
        owners: (S,) for each segment, which of R rows of coefficients it has; None where each has its own (R = S).

    Raises:
        InputError: There are no tasks, two have one name, weights name no task or are all zero, a sweep has fewer
            weightings than tasks, or starts do not fit.
    """

    borders: Integers
    tasks: tuple[str, ...]
    goals: tuple[Goal, ...]
    seed: int

    def __init__(
        self,
        borders: Integers,
        sources: int,
        tasks: Sequence[str],
        goals: Sequence[Goal],
        seed: int,
        settings: Settings,
        starts: Sequence[Floats] | None = None,
        owners: Integers | None = None,
    ) -> None:
        _check_tasks(tasks, settings.algorithm)
        parts = Parts(np.asarray(borders), owners)
        self.borders, self.tasks, self.goals, self.seed = parts.borders, tuple(tasks), tuple(goals), seed
        self.settings = settings
        self._parts = parts
        self._next = 0
        self._queue: list[tuple[int, int]] = []  # (line, batch or check) to ask for, in this order
        self._flying: dict[int, tuple[int, int]] = {}  # by trial number
        self._lines: list[Line] = []
        begins = _starts(starts, settings.init, (len(parts), sources))
        weightings = _weightings(self.tasks, settings.weights, settings.sweep)
        for start, weighting in ((start, weighting) for start in begins for weighting in weightings):
            for restart in range(settings.restarts):
                first = len(self._queue)  # the number that the line's first trial will have
                noise = trial_rng(seed, first).normal(0, settings.spread, start.shape) if restart else 0.0
                self._add(self._point(start) + noise, weighting, None if restart else self._exact(start))

    @property
    def lines(self) -> int:
        """How many lines there are."""
        return len(self._lines)

    @property
    def evaluations(self) -> int:
        """Checks of all lines, if each takes all its steps: the evaluations that a complete run needs."""
        every, steps, most = self.settings.check_every, self.settings.steps, self.settings.most_steps
        return self.lines * len({*range(0, most, every), *range(steps, most + 1, steps)})

    @property
    def done(self) -> bool:
        """True when all lines have ended and everything is told."""
        return not (self._flying or self._queue) and all(line.ended for line in self._lines)

    def ask(self, n: int) -> list[Trial]:
        """Up to ``n`` trials of the lines' running steps, in the order in which steps began; none while all wait."""
        chosen, self._queue = self._queue[:n], self._queue[n:]
        trials = [self._proposed(self._next + i, *request) for i, request in enumerate(chosen)]
        self._flying |= {trial.number: request for trial, request in zip(trials, chosen, strict=True)}
        self._next += len(trials)
        return trials

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        """Note a check's score or a task's gradient; with the last of a step, move the line."""
        index, batch = self._flying.pop(trial.number)
        line = self._lines[index]
        line.waiting -= 1
        if batch == _CHECK:
            line.check = trial.number, oriented(evaluation.scores, self.goals).tolist() if evaluation.ok else None
        else:
            self._differentiated(line, batch, evaluation)
        if not line.waiting:
            self._complete(line)

    def state(self) -> dict[str, Any]:
        """The lines, the trials to ask for next, and the trials in flight."""
        return {
            "next": self._next,
            "queue": [list(request) for request in self._queue],
            "flying": {number: list(request) for number, request in self._flying.items()},
            "lines": [line.state() for line in self._lines],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._next = state["next"]
        self._queue = [(line, batch) for line, batch in state["queue"]]
        self._flying = {number: (line, batch) for number, (line, batch) in state["flying"].items()}
        for line, found in zip(self._lines, state["lines"], strict=True):
            line.restore(found)
            line.genome = self._genome(line)

    # -- steps -------------------------------------------------------------------------------------------

    def _add(self, start: Floats, weights: Floats, exact: Floats | None) -> None:
        adam, sums = Adam(start, self.settings.rate), np.zeros((2, len(self.tasks)))
        genome = Genome(self.borders, self._parts.expanded(self._used(start) if exact is None else exact))
        line = Line(len(self._lines), start, weights, self.settings.steps, self.borders, adam, genome, sums, exact)
        self._lines.append(line)
        self._begin(line)

    def _begin(self, line: Line) -> None:
        """Queue the line's trials at its coefficients: a check when one is due, and gradients for the next step."""
        last, checked = line.step == line.last, bool(line.checks) and line.checks[-1]["step"] == line.step
        wanted = [_CHECK] if (last or line.step % self.settings.check_every == 0) and not checked else []
        wanted += [] if last else list(range(self.settings.accumulate * len(self._groups(line))))
        line.waiting, line.told, line.check = len(wanted), {}, None
        self._queue += [(line.index, batch) for batch in wanted]

    def _groups(self, line: Line) -> list[list[int]]:
        """Positions of the tasks of each gradient trial. Batch b of a step is of group b modulo their number."""
        tasks, together = line.tasks, self.settings.together
        return [tasks[start : start + together] for start in range(0, len(tasks), together)]

    def _group(self, line: Line, batch: int) -> list[int]:
        groups = self._groups(line)
        return groups[batch % len(groups)]

    def _proposed(self, number: int, index: int, batch: int) -> Trial:
        line = self._lines[index]
        parents = () if line.parent is None else (line.parent,)
        if batch == _CHECK:
            return Trial(number, line.genome, parents)
        groups = self._groups(line)
        again, group = divmod(batch, len(groups))
        tasks = groups[group]
        weights = tuple(float(line.weights[task]) for task in tasks)
        step = line.step * self.settings.accumulate + again
        wanted = Gradient(tuple(self.tasks[task] for task in tasks), step, weights)
        return Trial(number, line.genome, parents, wanted)

    def _differentiated(self, line: Line, batch: int, evaluation: Evaluation) -> None:
        """Keep a batch's losses and gradient; without them the line ends, and asks for nothing more."""
        names = [self.tasks[task] for task in self._group(line, batch)]
        wrong = problem(evaluation, names, line.genome.coefficients.shape)
        if wrong:
            where = f"task{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"
            line.ended = line.ended or f"failed at step {line.step}, {where}: {wrong}"
            waiting = len(self._queue)
            self._queue = [request for request in self._queue if request[0] != line.index]
            line.waiting -= waiting - len(self._queue)
            return
        assert evaluation.gradient is not None
        diversities = [evaluation.details.get(Evaluation.detail_of(name, "diversity"), math.nan) for name in names]
        known = np.array([[evaluation.scores[name] for name in names], diversities], np.float64)
        gradient = np.array(evaluation.gradient, np.float64)
        line.told[batch] = known, gradient if line.grown else self._parts.summed(gradient)

    def _complete(self, line: Line) -> None:
        """Record a step that is told as a whole and its check, and move on unless this was the end."""
        if line.told and not line.ended:
            for batch in sorted(line.told):
                line.sums[:, self._group(line, batch)] += line.told[batch][0] / self.settings.accumulate
            line.summed += 1
        if line.check is not None:
            self._judge(line, *line.check)
        if line.ended and line.step and line.checks[-1]["step"] != line.step:
            line.waiting = 1  # what was learned since the last check
            self._queue.append((line.index, _CHECK))
            return
        reason = line.ended or self._end(line)
        if reason and (line.ended or not self._grown(line)):
            line.ended = reason
            return
        if not reason:
            line.adam.step(self._gradient(line))
        line.genome = self._genome(line)
        self._begin(line)

    def _judge(self, line: Line, number: int, point: list[float] | None) -> None:
        better = point is not None and self._better(line, point)
        line.checks.append(self._record(line, number, point))
        line.sums, line.summed = np.zeros_like(line.sums), 0
        line.parent = line.parent if point is None else number
        line.stale = 0 if better else line.stale + 1

    def _better(self, line: Line, point: list[float]) -> bool:
        """Whether a check is better than all before it, by the ranges of these and its own."""
        points = np.array([*_points(line.checks), point])
        *before, mean = Scale.of(self.goals, points).means(points).tolist()
        return bool(mean > max(before, default=-math.inf))

    def _record(self, line: Line, number: int, point: list[float] | None) -> dict[str, Any]:
        losses, diversity = (self._means(line, row) for row in line.sums)
        return {"step": line.step, "number": number, "point": point, "losses": losses, "diversity": diversity}

    def _means(self, line: Line, sums: Floats) -> dict[str, float]:
        """Means by task over the steps since the last check, where they are known."""
        means = {self.tasks[task]: float(sums[task]) / line.summed for task in line.tasks} if line.summed else {}
        return {name: mean for name, mean in means.items() if math.isfinite(mean)}

    def _end(self, line: Line) -> str:
        """Why the line ends here; empty when it goes on."""
        if line.step == line.last:
            return "all steps done"
        if line.check is not None and self.settings.patience is not None and line.stale >= self.settings.patience:
            return f"no better score in {line.stale} checks"
        return ""

    def _gradient(self, line: Line) -> Floats:
        """(R, K) gradient of the loss by Adam's point."""
        total = np.zeros_like(line.adam.point)
        for batch in sorted(line.told):
            total += line.told[batch][1]
        pulled = self._pulled(line, total / self.settings.accumulate)
        pulled[line.held] = 0.0
        return pulled

    def _genome(self, line: Line) -> Genome:
        begins = None if line.step or line.grown else line.exact
        rows = self._used(line.adam.point) if begins is None else begins
        return Genome(line.borders, rows if line.grown else self._parts.expanded(rows))

    # -- the coefficients at Adam's point, for subclasses -----------------------------------------------------

    def _point(self, coefficients: Floats) -> Floats:
        """Adam's point (R, K) for coefficients (R, K) to begin with; by default the coefficients."""
        return coefficients

    def _exact(self, coefficients: Floats) -> Floats | None:
        """Coefficients (R, K) that a line begins with, kept because ``_used`` of its point may round them."""
        return None

    def _used(self, point: Floats) -> Floats:
        """(R, K) coefficients at Adam's point; by default the point."""
        return point

    def _pulled(self, line: Line, gradient: Floats) -> Floats:
        """The gradient by Adam's point for the weighted tasks' ``gradient`` by the coefficients."""
        return gradient

    def _grown(self, line: Line) -> bool:
        """Whether the line, which has come to its end, goes on with more coefficients."""
        return False

    # -- report ------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """The course of every line (``lines``), and ``warnings``: sentences about failures and collapse; plain values.

        A line has its ``start`` and final ``coefficients`` (R, K), ``weights`` by task, the number of ``steps`` done,
        the reason why it ``ended`` ("unfinished" when the run stopped first) and its ``checks``. A check has its
        ``step``, the trial's ``number``, its ``scores`` by objective (None on failure), their mean ``score`` (None also
        where there is nothing to measure by), and by task ``losses`` and ``diversity``: means over the steps since the
        check before (at step 0, of its one batch). ``unit`` says what the mean is of, as that of
        ``ecotone.populations.ranking.Scale``; ranges are those over the checks of all lines.
        """
        return {
            "algorithm": self.settings.algorithm,
            "tasks": list(self.tasks),
            "objectives": [goal.name for goal in self.goals],
            "unit": self._scale().unit,
            "lines": [self._told(line) for line in self._lines],
            "warnings": [text for line in self._lines for text in self._warnings(line)],
        }

    def _told(self, line: Line) -> dict[str, Any]:
        return {
            "start": line.start.copy(),
            "weights": dict(zip(self.tasks, line.weights.tolist(), strict=True)),
            "steps": line.step,
            "ended": line.ended or "unfinished",
            "checks": [{name: check[name] for name in check if name != "point"} for check in self._scored(line)],
            "coefficients": self._used(line.adam.point).copy(),
        }

    def _checks(self, line: Line) -> list[dict[str, Any]]:
        """The line's checks, with one whose step lacks gradients because the run stopped there."""
        last = [self._record(line, *line.check)] if line.check is not None and line.waiting else []
        return [*(dict(check) for check in line.checks), *last]

    def _scale(self) -> Scale:
        """The scale of the checks of all lines, for the report alone."""
        return Scale.of(self.goals, [point for line in self._lines for point in _points(self._checks(line))])

    def _scored(self, line: Line) -> list[dict[str, Any]]:
        """The line's checks with their ``scores`` and the mean of them, ``score``."""
        checks, scale = self._checks(line), self._scale()
        means = iter(scale.means(np.array(_points(checks)).reshape(-1, len(self.goals))).tolist())
        for check in checks:
            point, check["scores"], check["score"] = check["point"], None, None
            if point is not None:
                mean, pairs = next(means), zip(self.goals, point, strict=True)
                check["scores"] = {goal.name: goal.sign * value for goal, value in pairs}
                check["score"] = mean if scale.known else None
        return checks

    def _warnings(self, line: Line) -> Iterator[str]:
        where = f"line {line.index}"
        if line.ended.startswith("failed"):
            yield f"{where} {line.ended}"
        yield from (f"{where}: {text}" for text in _fallen(self._scored(line), self._loss_of(line), self._scale()))
        yield from (f"{where}, task {task!r}: {text}" for task, text in _narrowed(self._checks(line)))

    def _loss_of(self, line: Line) -> Callable[[Mapping[str, float]], float]:
        weights = dict(zip(self.tasks, line.weights.tolist(), strict=True))
        return lambda losses: sum(weights[name] * loss for name, loss in losses.items())


def _fallen(
    checks: Sequence[Mapping[str, Any]], loss_of: Callable[[Mapping[str, float]], float], scale: Scale
) -> Iterator[str]:
    """Warn when the loss fell over the checks, and the score fell from its best too."""
    known = [check for check in checks if check["score"] is not None and check["losses"]]
    if len(known) < 2:
        return
    first, last = loss_of(known[0]["losses"]), loss_of(known[-1]["losses"])
    best = max(known, key=lambda check: float(check["score"]))
    fell = _fell(best, known[-1], scale) if last < first else []
    if fell:
        yield (
            f"the loss fell from {first:.4g} to {last:.4g}, and yet {' and '.join(fell)}: the merge collapses "
            f"or overfits; trial {best['number']} is its best."
        )


def _fell(best: Mapping[str, Any], last: Mapping[str, Any], scale: Scale) -> list[str]:
    """Clauses that say what fell from its best by a share of that: the score, or each of several that have ranges.

    Of a mean of ranges no share can be taken: in the range of a few checks any difference is large.
    """
    pairs = [("the score", "fell", 1.0, best["score"], last["score"])]
    if scale.unit == "ranges":
        points = zip(scale.goals, best["point"], last["point"], strict=True)
        pairs = [(goal.name, "went", goal.sign, one, now) for goal, one, now in points]
    return [
        f"{name} {verb} from {sign * one:.4g} (step {best['step']}) to {sign * now:.4g} (step {last['step']})"
        for name, verb, sign, one, now in pairs
        if best["score"] > last["score"] and one - now > _FALL * abs(one)
    ]


def _points(checks: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Oriented scores of the checks that have them."""
    return [check["point"] for check in checks if check["point"] is not None]


def _narrowed(checks: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Tasks whose predictions came to favour few classes, and a sentence on each."""
    for task in dict.fromkeys(name for check in checks for name in check["diversity"]):
        known = [(check["diversity"][task], check["step"]) for check in checks if task in check["diversity"]]
        lowest, step = min(known)
        if lowest < _COLLAPSE * known[0][0]:
            yield (
                task,
                f"the diversity of the predictions fell from {known[0][0]:.3g} to {lowest:.3g} (step {step}): "
                "the merge may predict few classes for everything.",
            )


def problem(evaluation: Evaluation, tasks: Sequence[str], shape: tuple[int, ...]) -> str:
    """Why the evaluation of a gradient trial cannot be used; empty when it can."""
    if evaluation.failure is not None:
        return f"{evaluation.failure.kind}: {evaluation.failure.message}"
    gradient = evaluation.gradient
    if gradient is None or any(task not in evaluation.scores for task in tasks):
        return "the worker returned no loss with its gradient."
    if np.shape(gradient) != shape:
        return f"expected a gradient of shape {shape}, found {np.shape(gradient)}."
    if not (np.isfinite(gradient).all() and all(math.isfinite(evaluation.scores[task]) for task in tasks)):
        return "not finite: the loss or its gradient is NaN or infinite."
    return ""


# -- arguments -----------------------------------------------------------------------------------------------


def _starts(starts: Sequence[Floats] | None, init: float | None, shape: tuple[int, int]) -> list[Floats]:
    """Coefficients (S, K) of each start."""
    if starts is None and init is not None:
        return [np.full(shape, init)]
    tables = [np.array(start, np.float64) for start in starts or ()]
    if not tables:
        raise InputError("search.start: expected one start or more, found none.")
    for table in tables:
        if table.shape != shape:
            raise InputError(
                f"search.start: expected coefficients of shape {shape}, one a segment and source, found {table.shape}."
            )
        if not np.isfinite(table).all():
            raise InputError("search.start: expected finite coefficients, found NaN or infinity.")
    return tables


def _weightings(tasks: tuple[str, ...], weights: Mapping[str, float] | None, sweep: int | None) -> list[Floats]:
    """Weights (T,) of the tasks: one vector, or the vectors of a sweep."""
    if sweep is None:
        return [_given(tasks, weights or {})]
    if len(tasks) < 2:
        raise InputError(
            "search.sweep: expected two calibration tasks or more to weigh, found one.", "Leave sweep out."
        )
    if sweep < len(tasks):
        raise InputError(
            f"search.sweep: expected at least {len(tasks)} weightings, one a calibration task, found {sweep}."
        )
    return list(len(tasks) * lattice(len(tasks), sweep))


def _given(tasks: tuple[str, ...], weights: Mapping[str, float]) -> Floats:
    for name, weight in weights.items():
        if name not in tasks:
            raise InputError(f"search.weights: there is no calibration task {name!r}.", nearest(name, tasks))
        if not 0 <= weight < math.inf:
            raise InputError(f"search.weights.{name}: expected a number of at least 0, found {weight}.")
    table = np.array([float(weights.get(name, 1.0)) for name in tasks])
    if not table.any():
        raise InputError("search.weights: all are 0; nothing would be learned.", "Give one task a weight above 0.")
    return table


def _check_tasks(tasks: Sequence[str], algorithm: str) -> None:
    if not tasks:
        raise InputError(
            f"calibration: {algorithm} learns from calibration tasks, and there are none.", "Give one task or more."
        )
    twice = [name for i, name in enumerate(tasks) if name in tasks[:i]]
    if twice:
        raise InputError(f"calibration: there are two tasks named {twice[0]!r}.", "Give each its own name.")
