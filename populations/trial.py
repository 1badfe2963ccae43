"""A candidate, its wish, and its result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ecotone.populations.errors import LONGEST, InputError, shown
from ecotone.populations.genome import Floats, Genome
from ecotone.populations.samples import Sample

Direction: TypeAlias = Literal["maximize", "minimize"]
Subset: TypeAlias = Literal["search", "held_out"]
Tally: TypeAlias = Literal["evaluations", "samples", "gradients", "statistics"]


@dataclass(frozen=True)
class Goal:
    """The name of an objective and which way is better."""

    name: str
    direction: Direction = "maximize"

    @property
    def sign(self) -> float:
        """+1.0 when larger is better, -1.0 when smaller is."""
        return 1.0 if self.direction == "maximize" else -1.0


class Wish(ABC):
    """A trial's wish: the thing that is to be measured. The wishes are ``Scores``, ``Gradient`` and ``Statistics``."""

    sort: ClassVar[str]
    """Its name in the journal."""

    @property
    def scored(self) -> bool:
        """True when scores of all examples are wanted. Other trials enter no population and no front."""
        return False

    @property
    def cost(self) -> float:
        """The part of a budget of evaluations that it takes."""
        return 0.0

    @property
    @abstractmethod
    def tally(self) -> Tally:
        """The count in which its trials are counted."""

    @property
    def sample(self) -> Sample | None:
        """The examples that scores are wanted on, if not on all."""
        return None

    @property
    def gradient(self) -> Gradient | None:
        """The gradient that is wanted, if one is."""
        return None

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Plain values for the journal, without ``sort``."""


@dataclass(frozen=True)
class Scores(Wish):
    """Scores on objectives.

    Args:
        subset: The objectives that guide the search, or those held out from it.
        sample: The examples to be scored now. The scores cover these and the examples seen before. None takes all.
    """

    sort: ClassVar[str] = "scores"
    subset: Subset = "search"
    sample: Sample | None = None

    @property
    def scored(self) -> bool:
        """True when scores of all examples are wanted."""
        return self.sample is None or not self.sample.partial

    @property
    def cost(self) -> float:
        """1, or the share of the examples in a sample."""
        return 1.0 if self.sample is None else self.sample.cost

    @property
    def tally(self) -> Tally:
        """Samples count apart."""
        return "evaluations" if self.scored else "samples"

    def record(self) -> dict[str, Any]:
        """The subset, unless it is the search's, and the share of the examples that a sample reaches."""
        held_out = {} if self.subset == "search" else {"subset": self.subset}
        return held_out if self.sample is None or self.scored else {**held_out, "reaches": self.sample.stop}

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> Scores:
        """The wish that ``record`` tells of, without its sample."""
        return cls(record.get("subset", "search"))


@dataclass(frozen=True)
class Gradient(Wish):
    """The losses of calibration tasks, and the gradient of their weighted sum by the genome's coefficients.

    Args:
        tasks: Names of calibration tasks, each once.
        step: Number of the batch in each task's stream, from 0.
        weights: One a task: what its loss is multiplied by in the sum.
    """

    sort: ClassVar[str] = "gradient"
    tasks: tuple[str, ...]
    step: int
    weights: tuple[float, ...]

    @classmethod
    def of(cls, task: str, step: int, weight: float = 1.0) -> Gradient:
        """The gradient of one task's loss."""
        return cls((task,), step, (weight,))

    @property
    def task(self) -> str:
        """The name of the task, if it is one.

        Raises:
            ValueError: There are several.
        """
        (name,) = self.tasks
        return name

    @property
    def tally(self) -> Tally:
        """A gradient."""
        return "gradients"

    @property
    def gradient(self) -> Gradient:
        """Itself."""
        return self

    def record(self) -> dict[str, Any]:
        """All of it."""
        return {"tasks": list(self.tasks), "step": self.step, "weights": list(self.weights)}

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> Gradient:
        """The wish that ``record`` tells of."""
        return cls(tuple(record["tasks"]), record["step"], tuple(record["weights"]))


@dataclass(frozen=True)
class Statistics(Wish):
    """Statistics of the merge's layers on the data of calibration tasks, as tensors by the layers' names.

    Args:
        kind: The kind of statistics, by its registered name, such as ``magnitude``.
        tasks: Names of calibration tasks, each once.
        settings: Those of the kind, plain values; what is left out has its default.
    """

    sort: ClassVar[str] = "statistics"
    kind: str
    tasks: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tally(self) -> Tally:
        """Statistics."""
        return "statistics"

    def record(self) -> dict[str, Any]:
        """All of it."""
        return {"kind": self.kind, "tasks": list(self.tasks), "settings": dict(self.settings)}

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> Statistics:
        """The wish that ``record`` tells of."""
        return cls(record["kind"], tuple(record["tasks"]), record["settings"])


WISHES: Mapping[str, type[Scores | Gradient | Statistics]] = {
    wish.sort: wish for wish in (Scores, Gradient, Statistics)
}
"""The wishes, by their names in the journal."""


@dataclass(frozen=True)
class Trial:
    """A genome, and the wish that is to be measured of its merge.

    Args:
        number: Position in the search, from 0; its randomness comes from ``SeedSequence(seed, (number,))``.
        genome: The merge.
        parents: Numbers of the trials it was bred from.
        wants: Scores, a gradient or statistics.
    """

    number: int
    genome: Genome
    parents: tuple[int, ...] = ()
    wants: Wish = Scores()

    @property
    def scored(self) -> bool:
        """True when it is to have scores of all examples. Other trials enter no population and no front."""
        return self.wants.scored

    @property
    def cost(self) -> float:
        """The part of a budget of evaluations that it takes: 1, less for a sample, nothing without scores."""
        return self.wants.cost

    @property
    def sample(self) -> Sample | None:
        """The examples that it is to be scored on, if not on all."""
        return self.wants.sample

    @property
    def gradient(self) -> Gradient | None:
        """The gradient that it wants, if it wants one."""
        return self.wants.gradient


@dataclass(frozen=True)
class Failure:
    """The reason why a candidate has no scores.

    Args:
        kind: ``exception``, ``not finite``, ``out of memory``, ``worker died`` or ``timed out``.
        message: One line for the user. Of a long one the beginning and the end are kept.
        details: The traceback or log, possibly empty. Of a long one the beginning and the end are kept.
    """

    kind: str
    message: str
    details: str = ""

    def __post_init__(self) -> None:
        """Make what other packages said fit to be recorded, sent to trackers and printed: no secrets, no megabytes."""
        object.__setattr__(self, "message", shown(self.message, 4_000, lines=True))
        object.__setattr__(self, "details", shown(self.details, LONGEST, lines=True))

    @property
    def text(self) -> str:
        """The message, and below it the traceback, unless that is of an error which says all in words."""
        lines = self.details.strip().splitlines()
        ours = bool(lines) and lines[-1].startswith("ecotone.populations.errors.")
        return self.message if ours else f"{self.message}\n{self.details}".rstrip()


@dataclass(frozen=True)
class Gathered:
    """Statistics that were gathered. Their tensors lie in the cache of the machine that gathered them.

    Args:
        key: Their name in the cache: a hash of all that they depend on.
        digest: A hash of the tensors' names, types, shapes and numbers.
        layers: Number of tensors.
        nbytes: Their size in bytes.
    """

    key: str
    digest: str
    layers: int
    nbytes: int


@dataclass(frozen=True)
class Evaluation:
    """The result of a candidate. A bad candidate is a result too: ``failure`` gives the reason.

    Args:
        scores: By objective name, as the objective reports them (not sign-flipped); empty on failure. A gradient trial
            has losses by task name instead, without their weights.
        per_example: By objective name, (N,) one score for each example (bool for right or wrong), where given. A sample
            has (n,) in its order, unless it reaches all examples.
        failure: None when the whole wish was measured, and is finite.
        seconds: Worker time spent on this candidate.
        items: Examples scored for it.
        details: Small facts, never part of the result. A scored trial has ``merge_seconds``, the part of ``seconds``
            for forming its weights. A gradient trial has details of its tasks, under ``detail_of``.
        gradient: (S, K) derivatives of a gradient trial's weighted sum of losses by the genome's coefficients.
        errors: For a sample, by objective name: standard errors of the scores as estimates of those on all examples.
        statistics: For a trial that wants statistics: their place in the cache.
    """

    scores: Mapping[str, float]
    per_example: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    failure: Failure | None = None
    seconds: float = 0.0
    items: int = 0
    details: Mapping[str, str | int | float] = field(default_factory=dict)
    gradient: Floats | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    statistics: Gathered | None = None

    @property
    def ok(self) -> bool:
        """True when the wish was measured."""
        return self.failure is None

    @staticmethod
    def detail_of(task: str, name: str) -> str:
        """The key in ``details`` of a calibration task's detail ``name``."""
        return f"{name} of {task}"

    @classmethod
    def failed(cls, kind: str, message: str, details: str = "", seconds: float = 0.0) -> Evaluation:
        """An evaluation without scores, and the reason."""
        return cls({}, failure=Failure(kind, message, details), seconds=seconds)


@dataclass(frozen=True)
class Outcome:
    """The population's answer to an evaluation.

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
    """(M,) the scores in the order of ``goals``, with the sign of minimised ones flipped: larger is better.

    Raises:
        InputError: One is missing.
    """
    try:
        return np.array([goal.sign * scores[goal.name] for goal in goals])
    except KeyError as error:
        raise InputError(
            f"scores: expected one of the objective {error}, found those of {', '.join(scores)}."
        ) from error
