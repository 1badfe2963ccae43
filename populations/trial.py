"""A candidate and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ecotone.populations.genome import Floats, Genome
from ecotone.populations.samples import Sample

Direction: TypeAlias = Literal["maximize", "minimize"]
Subset: TypeAlias = Literal["search", "held_out"]


@dataclass(frozen=True)
class Goal:
    """The name of an objective and which way is better."""

    name: str
    direction: Direction = "maximize"

    @property
    def sign(self) -> float:
        """+1.0 when larger is better, -1.0 when smaller is."""
        return 1.0 if self.direction == "maximize" else -1.0


@dataclass(frozen=True)
class CalibrationBatch:
    """What a gradient trial differentiates: the sum of the losses of some tasks, each times its weight.

    Args:
        tasks: Names of calibration tasks, each once.
        step: Number of the batch in each task's stream, from 0.
        weights: One a task.
    """

    tasks: tuple[str, ...]
    step: int
    weights: tuple[float, ...]

    @classmethod
    def of(cls, task: str, step: int, weight: float = 1.0) -> CalibrationBatch:
        """A batch of one task."""
        return cls((task,), step, (weight,))

    @property
    def task(self) -> str:
        """The name of the task, if it is one.

        Raises:
            ValueError: There are several.
        """
        (name,) = self.tasks
        return name


@dataclass(frozen=True)
class Trial:
    """A genome to be scored, or whose coefficients' gradient is wanted.

    Args:
        number: Position in the search, from 0; its randomness comes from ``SeedSequence(seed, (number,))``.
        genome: The merge.
        parents: Numbers of the trials it was bred from.
        subset: Which objectives score it: those that guide the search, or those held out from it.
        calibration: When given, no objective scores it: its losses on that batch are wanted, and their gradient.
        sample: When given, it is scored on these examples, and has scores of them and of those seen before.
    """

    number: int
    genome: Genome
    parents: tuple[int, ...] = ()
    subset: Subset = "search"
    calibration: CalibrationBatch | None = None
    sample: Sample | None = None

    @property
    def scored(self) -> bool:
        """Whether it is to have scores of all examples: others are in no population and on no front."""
        return self.calibration is None and (self.sample is None or not self.sample.partial)

    @property
    def cost(self) -> float:
        """What it takes of a budget of evaluations: 1, less for a sample, nothing for a gradient."""
        if self.calibration is not None:
            return 0
        return 1 if self.sample is None else self.sample.cost


@dataclass(frozen=True)
class Failure:
    """Why a candidate has no scores.

    Args:
        kind: ``exception``, ``not finite``, ``out of memory``, ``worker died`` or ``timed out``.
        message: One line for the user.
        details: The traceback or log, possibly empty.
    """

    kind: str
    message: str
    details: str = ""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a candidate. A bad candidate is a result: then ``failure`` says why.

    Args:
        scores: By objective name, as the objective reports them (not sign-flipped); empty on failure. Of a gradient
            trial: losses by the tasks' names, without their weights.
        per_example: By objective name, (N,) one score an example (bool for right or wrong), where given. Of a sample:
            (n,) in its order, unless it reaches all examples.
        failure: None when all objectives gave finite scores.
        seconds: Worker time spent on this candidate.
        items: Examples scored for it.
        details: Small facts worth keeping; never part of the result. Of a scored trial ``merge_seconds``: the part of
            ``seconds`` that forming its weights took. What a gradient trial's tasks tell is under ``detail_of``.
        gradient: (S, K) derivatives of a gradient trial's weighted sum of losses by the genome's coefficients.
        errors: Of a sample: by objective name, standard errors of the scores as estimates of those of all examples.
    """

    scores: Mapping[str, float]
    per_example: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    failure: Failure | None = None
    seconds: float = 0.0
    items: int = 0
    details: Mapping[str, str | int | float] = field(default_factory=dict)
    gradient: Floats | None = None
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True when the candidate has scores."""
        return self.failure is None

    @staticmethod
    def detail_of(task: str, name: str) -> str:
        """The key under which ``details`` have what is called ``name`` of a calibration task."""
        return f"{name} of {task}"

    @classmethod
    def failed(cls, kind: str, message: str, details: str = "", seconds: float = 0.0) -> Evaluation:
        """An evaluation that says why there are no scores."""
        return cls({}, failure=Failure(kind, message, details), seconds=seconds)


@dataclass(frozen=True)
class Outcome:
    """What became of an evaluation in the population.

    Args:
        accepted: The candidate is a member now.
        evicted: Numbers of the members that left for it.
    """

    accepted: bool
    evicted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Member:
    """A trial of the population with its evaluation."""

    trial: Trial
    evaluation: Evaluation


def oriented(scores: Mapping[str, float], goals: Sequence[Goal]) -> Floats:
    """(M,) the scores in the order of ``goals``, with the sign of minimised ones flipped: larger is better."""
    return np.array([goal.sign * scores[goal.name] for goal in goals])
