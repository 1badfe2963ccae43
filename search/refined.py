"""M2N2 with Lamarckian refinement: now and then a child learns before it is scored.

Every n-th child takes a few steps of Adam on the sum of the calibration tasks' losses. It moves coefficients of its
own, one for each of its segments and sources. The merge that has learned is the one that is scored, and that enters
population, journal and front. So children inherit what their parents acquired, as Lamarck thought: memetic algorithms
call it Lamarckian learning (Whitley, Gordon and Mathias 1994). Crossover finds where to cut, gradients find how much of
each source to take.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats, Genome
from ecotone.populations.trial import Evaluation, Gradient, Outcome, Scores, Trial, Wish
from ecotone.search.descent import Adam, problem
from ecotone.settings import Part

if TYPE_CHECKING:
    from ecotone.search.m2n2 import M2N2

_SCORE = -1  # stands where a gradient trial has its task's position


class RefineSettings(Part):
    """Refinement of M2N2's children by gradient on the calibration tasks, before they are scored.

    Attributes:
        every: Every how many children one is refined; 1 refines all children.
        steps: Steps of Adam for a child. Each step uses one batch of every calibration task.
        rate: Adam's step size, in units of the coefficients.
    """

    every: int = Field(default=4, ge=1)
    steps: int = Field(default=5, ge=1)
    rate: float = Field(default=0.01, gt=0)


@dataclass(eq=False)
class _Child:
    """A child that learns. ``losses`` has the sum over the tasks before each step, ``told`` the gradients by task."""

    trial: Trial
    number: int  # among the refined children, from 0
    adam: Adam
    waiting: int = 0
    told: dict[int, tuple[float, Floats]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    failure: str = ""

    _PLAIN = ("number", "waiting", "failure")

    @property
    def genome(self) -> Genome:
        """The child with the coefficients learned so far; as it was bred when a gradient failed."""
        bred = self.trial.genome
        return bred if self.failure or not self.adam.t else replace(bred, coefficients=self.adam.point)

    def state(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in self._PLAIN},
            "adam": self.adam.state(),
            "told": {task: list(told) for task, told in self.told.items()},
            "losses": list(self.losses),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in self._PLAIN:
            setattr(self, name, state[name])
        self.adam.restore(state["adam"])
        self.told = {task: (loss, gradient.copy()) for task, (loss, gradient) in state["told"].items()}
        self.losses = list(state["losses"])


class Refined:
    """M2N2 in which every n-th child is refined by gradient before it is scored.

    The others are scored meanwhile. Each step takes the next batch of every task, so that no two children learn from
    the same batches (until a task's examples come round again). When a gradient fails, the child is scored as it was
    bred. Gradients and scores share one numbering of trials; the archive has these numbers.

    Args:
        search: Breeds the children, which must not be dense.
        tasks: Names of the T calibration tasks.
        settings: Which children are refined, in how many steps; None for the defaults.

    Raises:
        InputError: There are no tasks, or the search breeds with noise.

    Example::

        from ecotone.populations.niches import NicheArchive
        from ecotone.populations.trial import Outcome
        from ecotone.search.m2n2 import M2N2, M2N2Settings
        from ecotone.search.refined import Refined, RefineSettings

        archive = NicheArchive(goals, capacity=20)
        breeding = M2N2(space, archive, M2N2Settings(), seed=0)
        search = Refined(breeding, ["left", "right"], RefineSettings(every=2, steps=3))
        for _ in range(100):
            for trial in search.ask(1):
                if trial.gradient is None:  # a child, which may have learned
                    evaluation = score(trial.genome)
                    outcome = archive.add(trial, evaluation)
                else:  # a gradient by a child's coefficients
                    evaluation, outcome = gradient(trial), Outcome(accepted=False)
                search.tell(trial, evaluation, outcome)
    """

    search: M2N2
    tasks: tuple[str, ...]
    settings: RefineSettings

    def __init__(self, search: M2N2, tasks: Sequence[str], settings: RefineSettings | None = None) -> None:
        if not tasks:
            raise InputError("calibration: refinement learns from calibration tasks, and there are none.", "Give one.")
        if search.settings.mutation > 0:
            raise InputError(
                "search.refine: with mutation children are whole vectors, which have no coefficients to refine.",
                "Set mutation: 0, or leave refine out.",
            )
        self.search, self.tasks, self.settings = search, tuple(tasks), settings or RefineSettings()
        self._next = 0
        self._begun = 0  # refinements
        self._trials: dict[int, Trial] = {}  # of the search and not told, by its own numbers
        self._learning: dict[int, _Child] = {}  # those of them that are refined
        self._queue: deque[tuple[int, int]] = deque()  # (the search's number, task or score) to ask for, in this order
        self._flying: dict[int, tuple[int, int]] = {}  # by trial number
        self._refined: list[dict[str, Any]] = []  # records of those that were told

    @property
    def done(self) -> bool:
        """Never: evolution goes on until the budget is spent."""
        return False

    def ask(self, n: int) -> list[Trial]:
        """Up to ``n`` trials: first the trials that learning children need, then new children."""
        trials: list[Trial] = []
        while len(trials) < n and (self._queue or self._breed()):
            trials.append(self._proposed(*self._queue.popleft()))
        return trials

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        """Move a child when its gradients are all told; pass scores on to the search."""
        number, task = self._flying.pop(trial.number)
        if task == _SCORE:
            self._trials.pop(number)
            self._record(number, trial.number)
            self.search.tell(replace(trial, number=number), evaluation, outcome)
            return
        child = self._learning[number]
        child.waiting -= 1
        wrong = problem(evaluation, [self.tasks[task]], child.adam.point.shape)
        if wrong:
            child.failure = child.failure or f"step {child.adam.t}, task {self.tasks[task]!r}: {wrong}"
            self._drop(number, child)
        else:
            child.told[task] = evaluation.scores[self.tasks[task]], np.array(evaluation.gradient, np.float64)
        if not child.waiting:
            self._step(number, child)

    def state(self) -> dict[str, Any]:
        """The search, the children that are not told, and the trials to ask for."""
        return {
            "next": self._next,
            "begun": self._begun,
            "search": self.search.state(),
            "trials": {n: [t.genome.to_json(), list(t.parents)] for n, t in self._trials.items()},
            "learning": {number: child.state() for number, child in self._learning.items()},
            "queue": [list(request) for request in self._queue],
            "flying": {number: list(request) for number, request in self._flying.items()},
            "refined": [dict(record) for record in self._refined],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._next, self._begun = state["next"], state["begun"]
        self.search.restore(state["search"])
        self._trials = {
            number: Trial(number, Genome.from_json(text), tuple(parents))
            for number, (text, parents) in state["trials"].items()
        }
        self._learning = {number: self._child(number) for number in state["learning"]}
        for number, found in state["learning"].items():
            self._learning[number].restore(found)
        self._queue = deque((number, task) for number, task in state["queue"])
        self._flying = {number: (own, task) for number, (own, task) in state["flying"].items()}
        self._refined = [dict(record) for record in state["refined"]]

    def report(self) -> dict[str, Any]:
        """The refined children (``refined``), and ``warnings`` when all of them failed; plain values.

        A child has the ``number`` of its scored trial, the sum of the tasks' losses before the first and before the
        last step (``first`` and ``last``, None where unknown), and the ``failure`` that ended it, empty when none did.
        """
        failed = [record for record in self._refined if record["failure"]]
        texts = []
        if failed and len(failed) == len(self._refined):
            texts.append(f"none of {len(failed)} children could be refined; the last: {failed[-1]['failure']}")
        refined = [dict(record) for record in self._refined]
        return {"algorithm": "m2n2", "tasks": list(self.tasks), "refined": refined, "warnings": texts}

    # -- children ------------------------------------------------------------------------------------------

    def _breed(self) -> bool:
        """Queue the gradients or the score that the search's next trial needs; False when it has none."""
        trials = self.search.ask(1)
        for trial in trials:
            self._trials[trial.number] = trial
            bred = trial.number - self.search.first_child
            if bred >= 0 and (bred + 1) % self.settings.every == 0:
                self._learning[trial.number] = self._child(trial.number)
                self._begun += 1
                self._differentiate(trial.number)
            else:
                self._queue.append((trial.number, _SCORE))
        return bool(trials)

    def _child(self, number: int) -> _Child:
        trial = self._trials[number]
        return _Child(trial, self._begun, Adam(trial.genome.coefficients, self.settings.rate))

    def _differentiate(self, number: int) -> None:
        """Queue a gradient of each task for the child's next step."""
        self._queue.extend((number, task) for task in range(len(self.tasks)))
        self._learning[number].waiting = len(self.tasks)

    def _drop(self, number: int, child: _Child) -> None:
        """Ask for no more of the child's gradients."""
        kept = deque(request for request in self._queue if request[0] != number)
        child.waiting -= len(self._queue) - len(kept)
        self._queue = kept

    def _step(self, number: int, child: _Child) -> None:
        """Move a child whose step is told as a whole; then queue the next step, or its score."""
        if not child.failure:
            told = [child.told[task] for task in range(len(self.tasks))]  # in this order, whenever they were told
            child.losses.append(sum(loss for loss, _ in told))
            child.adam.step(sum((gradient for _, gradient in told), np.zeros_like(child.adam.point)))
            child.told = {}
        if child.failure or child.adam.t == self.settings.steps:
            self._queue.append((number, _SCORE))
        else:
            self._differentiate(number)

    def _proposed(self, number: int, task: int) -> Trial:
        """The next trial: the child as it stands."""
        trial, child = self._trials[number], self._learning.get(number)
        wants: Wish = Scores()
        if child is not None and task != _SCORE:
            wants = Gradient.of(self.tasks[task], child.number * self.settings.steps + child.adam.t)
        genome = trial.genome if child is None else child.genome
        self._flying[self._next] = number, task
        self._next += 1
        return Trial(self._next - 1, genome, trial.parents, wants)

    def _record(self, number: int, told: int) -> None:
        """Record the refinement of a child, if it had one."""
        child = self._learning.pop(number, None)
        if child is not None:
            first, last = (child.losses[0], child.losses[-1]) if child.losses else (None, None)
            self._refined.append({"number": told, "first": first, "last": last, "failure": child.failure})
