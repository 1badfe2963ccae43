"""A chain of searches: each stage begins with merges that the one before it found.

    MAP finds a front of merges with one coefficient a model -> AdaMerging refines its members tensor by tensor

A stage is a search of its own with a population of its own, and counts its trials from 0. Outside, numbers run on
through all stages, so that the chain is one search with one journal, one budget and one front. The merges that a stage
begins with were scored in the stage before. The stage is told these scores, so no merge is paid for twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from ecotone.populations.errors import InputError, SearchError
from ecotone.populations.fronts import farthest_first
from ecotone.populations.genome import Floats, Genome
from ecotone.populations.pareto import ParetoFront
from ecotone.populations.population import Population
from ecotone.populations.ranking import Extremes, Scale
from ecotone.populations.trial import Evaluation, Goal, Member, Outcome, Scores, Trial, oriented
from ecotone.search.protocol import SLACK, Search

Start: TypeAlias = Literal["front", "best", "archive", "none"]
Pair: TypeAlias = tuple[Search, Population]

REMEMBERED = 1000  # trials that a stage may have answered from memory: one that only ever repeats itself must end
KEY = 3_266_489_917  # spawn key of the stages' seeds, with their positions


@dataclass(frozen=True)
class Stage:
    """One search of a chain.

    Args:
        name: The algorithm's name, for reports.
        make: Gives the search and its population; takes the genomes to begin with, none of them for the first stage.
        evaluations: The most trials that are scored for this stage; None means as many as the budget has.
        start: Merges of the stage before to begin with: its ``front``, its ``best`` merge (by the mean that
            ``ecotone.populations.ranking`` defines, with the ranges of everything that the chain was told), its
            ``archive`` (the members of its population), or ``none``.
        starts: The most genomes to begin with, the best and others spread over the scores; None means all.
    """

    name: str
    make: Callable[[Sequence[Genome]], Pair]
    evaluations: int | None = None
    start: Start = "none"
    starts: int | None = None


def stage_seed(seed: int, stage: int) -> int:
    """The seed of stage ``stage`` of a recipe seeded ``seed``: the recipe's own for the first."""
    if stage == 0:
        return seed
    return int(np.random.SeedSequence(seed, spawn_key=(stage, KEY)).generate_state(1, np.uint64)[0])


class StagedSearch:
    """A chain of stages, one after the other. To the manager it is one search.

    Its ``population`` is the running stage's. A stage ends when its search is done or its share of the evaluations is
    spent, and everything is told. Then the next begins; the last may go on until the budget is spent. When no trial of
    a stage could be scored, the next has nothing to begin with, and the chain ends.

    Args:
        stages: In order; the first begins with nothing.
        goals: The objectives.

    Raises:
        InputError: There are no stages, the first has something to begin with, or a search refuses its arguments.

    Example::

        from ecotone.populations.population import ElitistArchive
        from ecotone.search.cma_es import CmaEs, CmaEsSettings
        from ecotone.search.random_search import RandomSearch
        from ecotone.search.stages import Stage, StagedSearch, stage_seed

        def first(starts):
            return RandomSearch(box, seed=0), ElitistArchive(goals, capacity=20)

        def second(starts):  # from the best merge of the first
            search = CmaEs(box, goals, stage_seed(0, 1), CmaEsSettings(sigma=0.1), box.point(starts[0]))
            return search, ElitistArchive(goals, capacity=20)

        search = StagedSearch([Stage("random", first, 40), Stage("cma_es", second, start="best")], goals)
        for _ in range(40):
            for trial in search.ask(4):
                evaluation = score(trial.genome)
                search.tell(trial, evaluation, search.population.add(trial, evaluation))
    """

    stages: tuple[Stage, ...]
    goals: tuple[Goal, ...]
    running: _Running

    def __init__(self, stages: Sequence[Stage], goals: Sequence[Goal]) -> None:
        if not stages:
            raise InputError("search: expected one stage or more, found none.")
        if stages[0].start != "none":
            raise InputError(f"search[0].start: the first stage has none before it, found {stages[0].start!r}.")
        self.stages, self.goals = tuple(stages), tuple(goals)
        self.population: StagedPopulation = StagedPopulation(self)
        self._next = 0
        self._reports: list[dict[str, Any]] = []  # of the stages that have ended
        self._told = Extremes(goals)  # of all stages
        self.running = _Running(0, self.stages[0], self.goals, ())

    @property
    def done(self) -> bool:
        """True when the last stage that can begin has ended."""
        return self.running.over and self._following() is None

    def ask(self, n: int) -> list[Trial]:
        """Up to ``n`` trials of the running stage; the next stage begins here."""
        while True:
            if self.running.over and not self._begin():
                return []
            trials = self._proposed(n)
            if trials or not self.running.over:
                return trials

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        """Let the stage that asked for the trial learn."""
        if trial.scored and evaluation.ok:
            self._told.take(oriented(evaluation.scores, self.goals).tolist())
        self.running.tell(trial, evaluation, outcome)

    def state(self) -> dict[str, Any]:
        """The running stage, the merges it began with, the reports of the stages before, and the scores' extremes."""
        return {
            "next": self._next,
            "reports": list(self._reports),
            "told": self._told.state(),
            "running": self.running.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``; to be called before the population's ``restore``."""
        self._next, self._reports = state["next"], list(state["reports"])
        self._told.restore(state["told"])
        index, starts = state["running"]["index"], [_member(record) for record in state["running"]["starts"]]
        self.running = _Running(index, self.stages[index], self.goals, starts)
        self.running.restore(state["running"])

    def report(self) -> dict[str, Any]:
        """Every stage that has begun (``stages``), and the ``warnings`` of all; plain values.

        A stage has its ``algorithm``, its ``start``, the numbers of the trials it began with (``starts``), that of its
        first trial (``first``, None before there is one), the number of ``evaluations`` it was given, and its search's
        own ``report``, None where it has none. Numbers of trials are those of the chain.
        """
        stages = [*self._reports, self.running.report()]
        texts = [
            f"stage {i} ({report['algorithm']}): {text}"
            for i, report in enumerate(stages)
            for text in _warnings(report)
        ]
        if self.running.over and len(stages) < len(self.stages) and self._following() is None:
            texts.append(f"stage {len(stages)} could not begin: nothing of the stage before it could be scored.")
        return {"algorithm": "+".join(stage.name for stage in self.stages), "stages": stages, "warnings": texts}

    # -- going on ------------------------------------------------------------------------------------------

    def _following(self) -> tuple[int, list[Member]] | None:
        """The next stage and the merges it begins with; None when there is no stage, or no merge that it needs."""
        index = self.running.index + 1
        if index == len(self.stages):
            return None
        stage = self.stages[index]
        starts = [] if stage.start == "none" else self.running.found(stage.start, stage.starts, self._told.scale)
        return (index, starts) if starts or stage.start == "none" else None

    def _begin(self) -> bool:
        """Let the next stage begin; False when there is none."""
        following = self._following()
        if following is None:
            return False
        self._reports.append(self.running.report())
        index, starts = following
        self.running = _Running(index, self.stages[index], self.goals, starts)
        return True

    def _proposed(self, n: int) -> list[Trial]:
        """Up to ``n`` trials to be scored. Trials whose scores are known are told at once, and others asked for."""
        trials: list[Trial] = []
        while n:
            found, n = self.running.ask(n), 0
            for trial in found:
                known = self.running.remembered(trial)
                if known is None:
                    trials.append(self.running.numbered(trial, self._next))
                    self._next += 1
                else:
                    self.running.learn(trial, known)
                    n += 1
        return trials


class StagedPopulation:
    """The running stage's population, with the numbers of the chain's trials.

    Args:
        search: The chain.
    """

    def __init__(self, search: StagedSearch) -> None:
        self._search = search

    @property
    def capacity(self) -> int:
        """The most members that the running stage holds."""
        return self._search.running.population.capacity

    @property
    def members(self) -> Sequence[Member]:
        """The running stage's members, oldest first."""
        return tuple(self._search.running.members())

    def add(self, trial: Trial, evaluation: Evaluation) -> Outcome:
        """Offer it to the running stage's population."""
        return self._search.running.add(trial, evaluation)

    def may_accept(self, best: Evaluation) -> bool:
        """Ask the running stage's population."""
        return self._search.running.population.may_accept(best)

    def state(self) -> dict[str, Any]:
        """The running stage's population."""
        running = self._search.running
        return {"stage": running.index, "population": running.population.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, after the search has been restored.

        Raises:
            SearchError: The search stands at another stage.
        """
        running = self._search.running
        if state["stage"] != running.index:
            raise SearchError(
                f"population: expected the state of stage {running.index}, found that of stage {state['stage']}.",
                "Restore the search first.",
            )
        running.population.restore(state["population"])


class _Running:
    """A stage under way. Its trials have numbers of their own, from 0; ``numbers`` holds the chain's numbers.

    Several trials of a stage may stand for one of the chain, when a search proposes a merge it began with again.
    """

    index: int
    stage: Stage
    goals: tuple[Goal, ...]
    search: Search
    population: Population

    def __init__(self, index: int, stage: Stage, goals: Sequence[Goal], starts: Sequence[Member]) -> None:
        self.index, self.stage, self.goals = index, stage, tuple(goals)
        self.starts: dict[str, Member] = {member.trial.genome.digest: member for member in starts}
        self.search, self.population = stage.make([member.trial.genome for member in starts])
        self.numbers: list[int] = []  # of the chain, by the stage's own
        self._own: dict[int, list[int]] = {}  # the reverse
        self._first: int | None = None  # number of the first trial that is not a start
        self._scored: float = 0  # evaluations asked for; a sample counts for its share
        self._waiting = 0  # trials of either kind that are not told
        self._recalled = 0  # trials answered from memory
        self._front = ParetoFront(goals)
        self._on_front: dict[int, Member] = {}

    @property
    def over(self) -> bool:
        """True when nothing more is asked for, and everything is told."""
        return not self._waiting and (self._room() == 0 or self.search.done)

    def _room(self) -> int | None:
        """Evaluations left of the stage's share; None when it has no share."""
        return None if self.stage.evaluations is None else math.ceil(self.stage.evaluations - self._scored - SLACK)

    # -- trials --------------------------------------------------------------------------------------------

    def ask(self, n: int) -> list[Trial]:
        """Up to ``n`` trials, no more than the share allows, with the stage's own numbers."""
        room = self._room()
        count = n if room is None else min(n, room)
        return self.search.ask(count) if count and not self.search.done else []

    def remembered(self, trial: Trial) -> Member | None:
        """The merge that the stage began with, when the trial is the same."""
        if trial.wants != Scores() or self._recalled == REMEMBERED:
            return None
        return self.starts.get(trial.genome.digest)

    def numbered(self, trial: Trial, number: int) -> Trial:
        """The trial as number ``number`` of the chain."""
        parents = tuple(self.numbers[parent] for parent in trial.parents)
        self._note(number)
        self._first = number if self._first is None else self._first
        self._scored += trial.cost
        self._waiting += 1
        return replace(trial, number=number, parents=parents)

    def learn(self, trial: Trial, known: Member) -> None:
        """Tell the stage the scores that a trial had before it began."""
        self._note(known.trial.number)
        self._recalled += 1
        trial = replace(known.trial, number=trial.number)
        outcome = self.population.add(trial, known.evaluation)
        self._keep(trial, known.evaluation)
        self.search.tell(trial, known.evaluation, outcome)

    def add(self, trial: Trial, evaluation: Evaluation) -> Outcome:
        """Offer a trial of the chain to the stage's population."""
        outcome = self.population.add(self._mine(trial), evaluation)
        return Outcome(outcome.accepted, tuple(self.numbers[number] for number in outcome.evicted))

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        """Let the stage learn of a trial of the chain."""
        self._waiting -= 1
        mine = self._mine(trial)
        if trial.scored:
            self._keep(mine, evaluation)
        evicted = tuple(own for number in outcome.evicted for own in self._own[number])
        self.search.tell(mine, evaluation, Outcome(outcome.accepted, evicted))

    def _note(self, number: int) -> None:
        self._own.setdefault(number, []).append(len(self.numbers))
        self.numbers.append(number)

    def _mine(self, trial: Trial) -> Trial:
        return replace(trial, number=self._own[trial.number][0])

    # -- what was found ------------------------------------------------------------------------------------

    def members(self) -> Iterable[Member]:
        """The population, with the chain's numbers."""
        return map(self._outward, self.population.members)

    def found(self, start: Start, most: int | None, scale: Scale) -> list[Member]:
        """The merges for a stage that begins with ``start``, with the chain's numbers; ``scale`` says which is best."""
        if start == "archive":
            members = list(self.members())
        else:
            members = [self._outward(member) for member in self._on_front.values()]
        members = sorted({m.trial.number: m for m in members}.values(), key=lambda m: m.trial.number)
        if not members:
            return []
        most = 1 if start == "best" else most
        return members if most is None or len(members) <= most else _spread(members, most, scale)

    def _keep(self, trial: Trial, evaluation: Evaluation) -> None:
        """Keep the trial if it is on the stage's front."""
        if evaluation.ok and self._front.add(trial.number, oriented(evaluation.scores, self.goals)):
            self._on_front[trial.number] = Member(trial, evaluation)
            self._on_front = {number: self._on_front[number] for number in self._front.numbers}

    def _outward(self, member: Member) -> Member:
        return replace(member, trial=replace(member.trial, number=self.numbers[member.trial.number]))

    # -- state and report ----------------------------------------------------------------------------------

    _PLAIN = ("_first", "_scored", "_waiting", "_recalled")

    def state(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in self._PLAIN},
            "index": self.index,
            "starts": [_record(member) for member in self.starts.values()],
            "numbers": list(self.numbers),
            "front": [_record(member) for member in self._on_front.values()],
            "search": self.search.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in self._PLAIN:
            setattr(self, name, state[name])
        self.numbers, self._own = [], {}
        for number in state["numbers"]:
            self._note(number)
        self._front, self._on_front = ParetoFront(self.goals), {}
        for record in state["front"]:
            member = _member(record)
            self._keep(member.trial, member.evaluation)
        self.search.restore(state["search"])

    def report(self) -> dict[str, Any]:
        """As ``StagedSearch.report`` says."""
        own = getattr(self.search, "report", None)
        return {
            "algorithm": self.stage.name,
            "start": self.stage.start,
            "starts": [member.trial.number for member in self.starts.values()],
            "first": self._first,
            "evaluations": round(self._scored, 6),
            "report": None if own is None else _renumbered(own(), self.numbers),
        }


def _spread(members: Sequence[Member], most: int, scale: Scale) -> list[Member]:
    """``most`` of the members, in the same order: the best, then each time the one whose scores are farthest from
    those of the members taken so far. Distances are in ranges of the scores.
    """
    scores: Floats = np.array([oriented(member.evaluation.scores, scale.goals) for member in members])
    extent = np.ptp(scores, axis=0)
    best = scale.best([member.trial.number for member in members], scores)
    taken = farthest_first(scores / np.where(extent > 0, extent, 1.0), [best], most)
    return [members[i] for i in sorted(taken)]


def _renumbered(value: Any, numbers: Sequence[int], key: str = "") -> Any:
    """A report with the chain's numbers: of ``number``, ``design``, and of trials that ``warnings`` mention."""
    if isinstance(value, Mapping):
        return {name: _renumbered(one, numbers, name) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_renumbered(one, numbers, key) for one in value]
    if key in ("number", "design") and isinstance(value, int):
        return numbers[value] if value < len(numbers) else None  # None: not asked for yet
    if key == "warnings":
        # Only as a descent's warning has it: an error's own text may speak of trials, too.
        return re.sub(r"\btrial (\d+)(?= is its best\.$)", lambda found: f"trial {numbers[int(found[1])]}", value)
    return value


def _warnings(stage: Mapping[str, Any]) -> list[str]:
    return list((stage["report"] or {}).get("warnings", ()))


def _record(member: Member) -> dict[str, Any]:
    """A member as plain values and arrays."""
    trial, evaluation = member.trial, member.evaluation
    return {
        "number": trial.number,
        "genome": trial.genome.to_json(),
        "parents": list(trial.parents),
        "scores": dict(evaluation.scores),
        "per_example": {name: np.array(values) for name, values in evaluation.per_example.items()},
        "seconds": evaluation.seconds,
        "items": evaluation.items,
        "details": dict(evaluation.details),
    }


def _member(record: Mapping[str, Any]) -> Member:
    trial = Trial(record["number"], Genome.from_json(record["genome"]), tuple(record["parents"]))
    kept = {name: record[name] for name in ("scores", "per_example", "seconds", "items", "details")}
    return Member(trial, Evaluation(**kept))
