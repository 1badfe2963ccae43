"""Races: candidates are scored on a few examples first, and only the promising ones on all.

Two rules end a candidate early, and each may be used alone:

- Successive halving (Jamieson and Talwalkar 2016). A group of candidates is scored on a small share of the examples;
  the best one in ``eta`` of them go on to a larger share, and so on. Candidates are ranked by estimates of their scores
  on all examples (``ecotone.populations.samples.estimate``): with several objectives by the front they are on, then by
  the mean (``ecotone.populations.ranking``). This is a guess, and may lose a good candidate.
- A bound. A candidate stops once no score on the remaining examples could put it in the population or on the front.
  This loses nothing, but where the mean is one of ranges: a candidate told in the meantime may widen them.

Examples come in one seeded order. So all candidates are compared on the same ones, a larger share holds the smaller,
and no example is scored twice for one candidate. Only candidates scored on all examples enter the population and the
front. The search is told that the others failed, which every search can take.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ecotone.populations.fronts import ranks
from ecotone.populations.genome import Floats, Genome
from ecotone.populations.pareto import ParetoFront
from ecotone.populations.population import Population
from ecotone.populations.ranking import Extremes
from ecotone.populations.samples import Estimate, Sample, estimate, order
from ecotone.populations.trial import Evaluation, Goal, Outcome, Scores, Trial, oriented
from ecotone.search.kinds import Context, Pair
from ecotone.search.protocol import Search
from ecotone.settings import Part

KEY = 2_246_822_519  # spawn key of the order of examples


class RaceSettings(Part):
    """How candidates race: they are scored on some of the examples first, and only the promising ones on all.

    Attributes:
        fidelities: Shares of the examples, ascending between 0 and 1. After each share, only the best candidates of a
            group go on. An empty list cuts no group.
        eta: The size of a group divided by the number of its candidates that go on after a cut (rounded up).
        group: Candidates in a group, which race one another.
        slices: Parts in which the examples after the last cut are scored. The bound is checked after each part.
        bound: Stop a candidate once no remaining score could put it in the population or on the front.
    """

    fidelities: tuple[float, ...] = (0.1,)
    eta: float = Field(default=3.0, ge=1)
    group: int = Field(default=9, ge=1)
    slices: int = Field(default=3, ge=1)
    bound: bool = True

    @model_validator(mode="after")
    def _ascending(self) -> RaceSettings:
        if not all(a < b for a, b in pairwise((0.0, *self.fidelities, 1.0))):
            raise ValueError(f"fidelities: expected ascending shares between 0 and 1, found {list(self.fidelities)}")
        return self

    @property
    def stops(self) -> tuple[float, ...]:
        """Shares of the examples after which a candidate is judged, the last of them 1."""
        last = self.fidelities[-1] if self.fidelities else 0.0
        rest = [last + (1.0 - last) * part / self.slices for part in range(1, self.slices)]
        return (*self.fidelities, *rest, 1.0)


@dataclass(eq=False)
class _Runner:
    """A candidate in a race."""

    trial: Trial
    group: int
    stop: int = 0  # position in the stops of what it is, or was last, scored up to
    seen: dict[str, NDArray[Any]] = field(default_factory=dict)
    estimates: dict[str, Estimate] = field(default_factory=dict)


@dataclass(eq=False)
class _Group:
    """Candidates that race one another. ``waiting`` counts candidates whose scores at this level are not told."""

    level: int = 0
    size: int = 0  # candidates that began
    waiting: int = 0
    ready: list[int] = field(default_factory=list)  # that wait for the others

    _PLAIN = ("level", "size", "waiting")

    def state(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in self._PLAIN}, "ready": list(self.ready)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> _Group:
        return cls(**{**state, "ready": list(state["ready"])})


class Racing:
    """A search whose candidates race. To the manager it is one search, whose trials are scored on samples.

    Samples and whole scores share one numbering of trials; the population has these numbers.

    Args:
        search: Proposes the candidates; it is told of each once, when its race is over.
        population: The manager adds to it before ``tell``.
        goals: The objectives, whose evaluations must give one score an example.
        seed: The recipe's seed.
        settings: The race; None for the defaults.
        limits: By name of an objective whose score is the mean of its examples', the least and the most that one
            example can score. Without those of an objective the bound rules nothing out.
        whole: Number of first candidates that are scored on all examples at once, such as models to breed from.
        own_parents: Whether the search names parents by its own numbers, not by those of the population's members.

    Example::

        import numpy as np

        from ecotone.populations.population import ElitistArchive
        from ecotone.populations.samples import error_of_mean
        from ecotone.populations.trial import Evaluation, Goal, Outcome
        from ecotone.search.racing import RaceSettings, Racing
        from ecotone.search.random_search import RandomSearch

        questions = np.random.default_rng(0).normal(0.2, 1.0, (200, box.size))

        def accuracy(trial):  # on the trial's sample of 200 examples
            right = questions @ box.point(trial.genome) > 0.0
            if trial.scored:
                return Evaluation({"accuracy": right.mean()}, {"accuracy": right})
            seen = right[trial.sample.then(200)]
            errors = {"accuracy": error_of_mean(seen, 200)}
            return Evaluation({"accuracy": seen.mean()}, {"accuracy": seen}, errors=errors)

        race = RaceSettings(fidelities=(0.1, 0.4), eta=2.0)
        race_goals, limits = [Goal("accuracy")], {"accuracy": (0.0, 1.0)}
        archive = ElitistArchive(race_goals, capacity=20)
        search = Racing(RandomSearch(box, seed=0), archive, race_goals, 0, race, limits)
        for _ in range(100):
            for trial in search.ask(4):
                evaluation = accuracy(trial)
                outcome = archive.add(trial, evaluation) if trial.scored else Outcome(accepted=False)
                search.tell(trial, evaluation, outcome)
        spent = search.report()["spent"]  # in evaluations on all examples
    """

    search: Search
    population: Population
    goals: tuple[Goal, ...]
    settings: RaceSettings
    whole: int
    own_parents: bool

    def __init__(
        self,
        search: Search,
        population: Population,
        goals: Sequence[Goal],
        seed: int,
        settings: RaceSettings | None = None,
        limits: Mapping[str, tuple[float, float]] | None = None,
        whole: int = 0,
        own_parents: bool = False,
    ) -> None:
        self.search, self.population, self.goals = search, population, tuple(goals)
        self.settings = settings = settings or RaceSettings()
        self.whole, self.own_parents = whole, own_parents
        self.order: int = int(np.random.SeedSequence(seed, spawn_key=(KEY,)).generate_state(1, np.uint32)[0])
        self._limits = dict(limits or {})
        self._stops = settings.stops
        self._next = 0
        self._numbers: dict[int, int] = {}  # by trial number, the search's, of those in flight
        self._runners: dict[int, _Runner] = {}  # by the search's numbers; those whose race is on
        self._groups: dict[int, _Group] = {}
        self._begun = 0  # the group that candidates join
        self._queue: deque[int] = deque()  # the search's numbers of those to ask for, in this order
        self._front = ParetoFront(goals)
        self._whole = Extremes(goals)  # of scores on all examples
        self._known: dict[int, Mapping[str, NDArray[Any]]] = {}  # scores by example of the population, by its numbers
        self._told: dict[int, int] = {}  # by the search's numbers, those of candidates that came through
        self._counts = dict.fromkeys(("candidates", "whole", "halving", "bound", "failed"), 0)
        self._spent = 0.0
        self._misses: list[float] = []  # of estimates: how many standard errors the whole score is away

    @property
    def done(self) -> bool:
        """True when the search is done and all races are over."""
        return self.search.done and not self._runners

    def ask(self, n: int) -> list[Trial]:
        """Up to ``n`` trials: the next samples of candidates in a race, then new candidates."""
        trials: list[Trial] = []
        while len(trials) < n and (self._queue or self._enter()):
            trials.append(self._proposed(self._queue.popleft()))
        return trials

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        """Let a candidate go on, wait for its group, or end."""
        number = self._numbers.pop(trial.number)
        runner = self._runners[number]
        if not evaluation.ok:
            self._leave(number, "failed", evaluation, outcome)
        elif trial.scored:
            self._note(trial, evaluation, outcome, runner)
            self._leave(number, "whole", evaluation, outcome)
        else:
            runner.seen = dict(evaluation.per_example)
            runner.estimates = self._estimates(runner.trial, evaluation)
            if self.settings.bound and not self._has_a_chance(runner, trial):
                self._leave(number, "bound", _ended(f"on {self._share(runner)} it could not enter any more"), outcome)
            elif runner.stop < len(self.settings.fidelities):
                self._groups[runner.group].ready.append(number)
                self._arrived(runner.group)
            else:
                self._go_on(number)

    def state(self) -> dict[str, Any]:
        """The search, the races under way, and the population's scores by example that estimates need."""
        runners = {
            number: {
                "genome": one.trial.genome.to_json(),
                "parents": list(one.trial.parents),
                "group": one.group,
                "stop": one.stop,
                "seen": {name: values.copy() for name, values in one.seen.items()},
                "estimates": {name: [it.value, it.error, it.items] for name, it in one.estimates.items()},
            }
            for number, one in self._runners.items()
        }
        return {
            "search": self.search.state(),
            "next": self._next,
            "numbers": dict(self._numbers),
            "runners": runners,
            "groups": {number: group.state() for number, group in self._groups.items()},
            "begun": self._begun,
            "queue": list(self._queue),
            "front": [list(self._front.numbers), self._front.points.copy()],
            "whole": self._whole.state(),
            "known": {number: dict(scores) for number, scores in self._known.items()},
            "told": dict(self._told),
            "counts": dict(self._counts),
            "spent": self._spent,
            "misses": list(self._misses),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self.search.restore(state["search"])
        self._next, self._begun, self._spent = state["next"], state["begun"], state["spent"]
        self._numbers, self._queue = dict(state["numbers"]), deque(state["queue"])
        self._runners = {
            number: _Runner(
                Trial(number, Genome.from_json(one["genome"]), tuple(one["parents"])),
                one["group"],
                one["stop"],
                {name: values.copy() for name, values in one["seen"].items()},
                {name: Estimate(*values) for name, values in one["estimates"].items()},
            )
            for number, one in state["runners"].items()
        }
        self._groups = {number: _Group.of(group) for number, group in state["groups"].items()}
        self._front = ParetoFront(self.goals)
        for number, point in zip(*state["front"], strict=True):
            self._front.add(number, np.array(point))
        self._whole.restore(state["whole"])
        self._known = {number: dict(scores) for number, scores in state["known"].items()}
        self._told, self._counts, self._misses = dict(state["told"]), dict(state["counts"]), list(state["misses"])

    def report(self) -> dict[str, Any]:
        """Counts of candidates, and the quality of the estimates; plain values.

        ``candidates`` were proposed. Of these ``whole`` were scored on all examples, ``halving`` and the ``bound``
        ended others, and some ``failed``. All together took ``spent`` evaluations on all examples. For candidates
        scored on all examples there were so many ``estimates``; ``miss`` is the root mean square of their errors in
        standard errors, about 1 when these are right, and None without estimates.
        """
        miss = math.sqrt(sum(one * one for one in self._misses) / len(self._misses)) if self._misses else None
        texts = []
        if miss is not None and len(self._misses) >= 10 and miss > 2.0:
            texts.append(f"scores on all examples were {miss:.1f} standard errors away from their estimates")
        inner = getattr(self.search, "report", None)
        counts = {"algorithm": "race", **self._counts, "spent": self._spent}
        return {
            **counts,
            "estimates": len(self._misses),
            "miss": miss,
            "search": inner() if inner else None,
            "warnings": texts,
        }

    # -- the race ------------------------------------------------------------------------------------------

    def _enter(self) -> bool:
        """Let the search's next candidate begin; False when there is nothing to ask for."""
        for trial in () if self.search.done else self.search.ask(1):
            self._counts["candidates"] += 1
            if self.own_parents:
                trial = replace(trial, parents=tuple(self._told[parent] for parent in trial.parents))
            if trial.number < self.whole:
                self._runners[trial.number] = _Runner(trial, -1, len(self._stops) - 1)
                self._queue.append(trial.number)
                return True
            self._runners[trial.number] = _Runner(trial, self._joined())
            self._queue.append(trial.number)
            return True
        if self._begun in self._groups:  # the search waits: nobody joins any more
            self._begun += 1
            self._arrived(self._begun - 1, told=0)
        return bool(self._queue)

    def _joined(self) -> int:
        """The group of one more candidate; 0 where there are no groups to be cut."""
        if not self.settings.fidelities:
            return 0
        index = self._begun
        group = self._groups.setdefault(index, _Group())
        group.size, group.waiting = group.size + 1, group.waiting + 1
        self._begun += group.size == self.settings.group
        return index

    def _proposed(self, number: int) -> Trial:
        """The trial that scores the candidate on its next sample."""
        runner = self._runners[number]
        self._numbers[self._next] = number
        self._next += 1
        wants = runner.trial.wants
        if runner.group >= 0:
            start = self._stops[runner.stop - 1] if runner.stop else 0.0
            wants = Scores(sample=Sample(self.order, start, self._stops[runner.stop], runner.seen))
        made = replace(runner.trial, number=self._next - 1, wants=wants)
        self._spent += made.cost
        return made

    def _go_on(self, number: int) -> None:
        self._runners[number].stop += 1
        self._queue.append(number)

    def _arrived(self, index: int, told: int = 1) -> None:
        """Count ``told`` candidates of a group as told or ended; cut the group when it waits for none."""
        group = self._groups[index]
        group.waiting -= told
        if index == self._begun or group.waiting:
            return
        count = math.ceil(group.size / self.settings.eta)
        ranking = self._ranking(group.ready)
        going, gone = sorted(ranking[:count]), ranking[count:]
        group.level, group.size, group.waiting, group.ready = group.level + 1, len(going), len(going), []
        if group.level == len(self.settings.fidelities) or not going:
            del self._groups[index]
        for number in sorted(gone):
            told_why = f"on {self._share(self._runners[number])} others of its group were better"
            self._leave(number, "halving", _ended(told_why), Outcome(False))
        for number in going:
            self._go_on(number)

    def _ranking(self, numbers: Sequence[int]) -> list[int]:
        """Candidates by the estimates of their scores, the best first, the older of equals first."""
        if not numbers:
            return []
        points = np.array([self._oriented(self._runners[number].estimates) for number in numbers])
        ranges = self._whole.scale.unit == "ranges"
        front, means = ranks(points), self._whole.with_also(points).means(points) if ranges else points.mean(axis=1)
        return [numbers[i] for i in sorted(range(len(numbers)), key=lambda i: (front[i], -means[i], numbers[i]))]

    def _oriented(self, estimates: Mapping[str, Estimate]) -> Floats:
        return oriented({name: one.value for name, one in estimates.items()}, self.goals)

    def _leave(self, number: int, why: str, evaluation: Evaluation, outcome: Outcome) -> None:
        """The candidate's race is over: tell the search."""
        runner = self._runners.pop(number)
        self._counts[why] += 1
        self.search.tell(runner.trial, evaluation, outcome)
        group = self._groups.get(runner.group)
        if group is not None and why in ("failed", "bound") and runner.stop == group.level:
            self._arrived(runner.group)

    # -- estimates -----------------------------------------------------------------------------------------

    def _estimates(self, trial: Trial, evaluation: Evaluation) -> dict[str, Estimate]:
        """Estimates of its scores on all examples, made sharper by its parents' scores."""
        parents = [self._known[parent] for parent in dict.fromkeys(trial.parents) if parent in self._known]
        return {
            goal.name: estimate(
                evaluation.scores[goal.name],
                evaluation.errors[goal.name],
                evaluation.per_example[goal.name],
                [scores[goal.name] for scores in parents],
                self.order,
            )
            for goal in self.goals
        }

    def _note(self, trial: Trial, evaluation: Evaluation, outcome: Outcome, runner: _Runner) -> None:
        """Learn of a candidate that was scored on all examples."""
        point = oriented(evaluation.scores, self.goals)
        self._front.add(trial.number, point)
        self._whole.take(point.tolist())
        if self.own_parents:
            self._told[runner.trial.number] = trial.number
        if outcome.accepted and all(goal.name in evaluation.per_example for goal in self.goals):
            self._known[trial.number] = evaluation.per_example
        for gone in outcome.evicted:
            self._known.pop(gone, None)
        for name, one in runner.estimates.items():
            if one.error > 0:
                self._misses.append((evaluation.scores[name] - one.value) / one.error)

    def _has_a_chance(self, runner: _Runner, trial: Trial) -> bool:
        """Whether it would enter population or front with the best possible scores on the remaining examples."""
        if not self._known:
            return True
        whole = next(iter(self._known.values()))
        scores, per_example = {}, {}
        for goal in self.goals:
            seen, count = runner.seen[goal.name], len(whole[goal.name])
            least, most = self._limits.get(goal.name, (-math.inf, math.inf))
            best = most if goal.direction == "maximize" else least
            if not math.isfinite(best):
                return True
            each = np.full(count, best, np.bool_ if seen.dtype == np.bool_ else np.float64)
            each[order(self.order, count)[: len(seen)]] = seen
            per_example[goal.name] = each
            scores[goal.name] = float(each.mean(dtype=np.float64))
        found = Evaluation(scores, per_example)
        return self.population.may_accept(found) or self._front.takes(trial.number, oriented(scores, self.goals))

    def _share(self, runner: _Runner) -> str:
        return f"{self._stops[runner.stop]:.1%} of the examples"


def _ended(text: str) -> Evaluation:
    """The evaluation that the search is told for a candidate that was not scored on all examples."""
    return Evaluation.failed("ended early", text)


def raced(
    pair: Pair, context: Context, race: RaceSettings | None, whole: int = 0, *, own_parents: bool = False
) -> Pair:
    """The search and its population, the candidates racing where there is a race.

    Args:
        pair: The search and its population.
        context: The context they were made for.
        race: The race's settings; None for no race.
        whole: As for ``Racing``.
        own_parents: As for ``Racing``.
    """
    if race is None:
        return pair
    search, population = pair
    racing = Racing(
        search, population, context.goals, context.seed, race, context.limits, whole, own_parents=own_parents
    )
    return racing, population
