"""The settings of search algorithms. They are a part of the recipe, and declare all that the rest of Ecotone must know.

An algorithm is one file: the frozen settings (a subclass of ``SearchSettings``) and the class that searches. The
registry (``ecotone.search.registry``) knows the settings by the algorithm's name, and so do recipes, checks, stages,
races and reports. None of them names an algorithm. To add an algorithm, write its file and one line of the registry,
or an entry point of the group ``ecotone.searches`` in a package of your own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ecotone.fitness.kinds import CalibrationSettings
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome, Integers
from ecotone.populations.population import Population
from ecotone.populations.space import Space
from ecotone.populations.trial import Goal
from ecotone.search.coefficients import CoefficientBox, Granularity, Parts, Setting, parts_of
from ecotone.search.protocol import Search
from ecotone.search.starts.base import Solver, Weighs
from ecotone.search.starts.registry import Beginning, Solvers, listed
from ecotone.settings import ANYTHING, TEXT, TRUTH, Answers, Kind, check_kind, leaves

if TYPE_CHECKING:
    from ecotone.merging.operators.base import Operator

Pair: TypeAlias = tuple[Search, Population]
Fineness: TypeAlias = Literal["model", "groups", "components", "block", "tensor", "element"]
FINENESS: tuple[Fineness, ...] = get_args(Fineness)
"""How fine the segments of merges are, from one in all to any."""
APART: tuple[tuple[Fineness, Fineness], ...] = (("block", "components"),)
"""Pairs of which neither can hold the merges of the other, in the order of ``FINENESS``."""

OF_STAGES = ("search", "evaluations", "start", "starts")
"""The keys that a stage has beside the fields of its search."""


@dataclass(frozen=True)
class Context:
    """The models, the objectives and the limits that a search is made for.

    Args:
        space: The models.
        goals: The objectives that guide the search.
        seed: The seed of the search.
        evaluations: The most evaluations that the algorithm may spend; None for no limit.
        tasks: Names of the calibration tasks.
        starts: Merges to begin with, best first; empty for none.
        searched: Settings of the merge operator that are searched beside the coefficients.
        affine: Whether merges are linear in their coefficients under the operator.
        own: The operator's own merges that searches begin with, the first one first; empty for none.
        published: The coefficient of every source in the operator's published merge; None where there is no such merge.
        weighs: What coefficients weigh under the operator.
        joined: Whether ``starts`` come before what the search begins with anyway, such as the models. Otherwise they
            take its place: they were scored before.
        limits: For objectives whose score is the mean over examples: the lowest and the highest score of an example.
    """

    space: Space
    goals: tuple[Goal, ...]
    seed: int
    evaluations: int | None = None
    tasks: tuple[str, ...] = ()
    starts: tuple[Genome, ...] = ()
    searched: tuple[Setting, ...] = ()
    affine: bool = True
    own: tuple[Genome, ...] = ()
    published: float | None = None
    weighs: Weighs = "models"
    joined: bool = False
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """The conditions under which an algorithm can run a recipe.

    Args:
        objectives: The fewest objectives that the algorithm can search by.
        maximised: Whether every objective must have the direction ``maximize``.
        nonnegative: Whether no score, of an example or of all, may be below 0.
        varied: Whether it cannot search by an objective that gives all merges the same score.
        gradients: Whether it learns on calibration tasks, through a torch module.
        affine: Whether merges must be linear in their coefficients.
        per_example: Whether the algorithm uses scores by example: ``no``; ``useful`` when it searches better with them;
            ``needed`` when it cannot search without them.
        vectors: Whether it breeds whole vectors of weights, which have no coefficients.
        geometry: Whether it reads the models' inner products: made from headers alone it can be checked, not run.
    """

    objectives: int = 1
    maximised: bool = False
    nonnegative: bool = False
    varied: bool = False
    gradients: bool = False
    affine: bool = False
    per_example: Literal["no", "useful", "needed"] = "no"
    vectors: bool = False
    geometry: bool = False


@dataclass(frozen=True)
class Begins:
    """Whether an algorithm can begin with merges that were found before, as a later stage does.

    Args:
        refusal: Why it cannot, as a clause; empty when it can.
        most: The most of them that it takes unless the recipe says otherwise; None for all.
        fixed: Whether ``most`` holds whatever the recipe says.
        placed: Whether its own settings already say where it begins.
        any_segments: Whether it takes merges of any segments, and keeps their borders in its own merges.
    """

    refusal: str = ""
    most: int | None = None
    fixed: bool = False
    placed: bool = False
    any_segments: bool = False


def _is_pair(answer: Any) -> bool:
    return isinstance(answer, tuple) and len(answer) == 2 and hasattr(answer[0], "ask") and hasattr(answer[1], "add")


class SearchSettings(Kind):
    """The settings of a search algorithm: its part of a recipe, and its declarations.

    A subclass has a field ``algorithm``, a ``Literal`` of the names that recipes give it, an entry for each field in
    the ``Attributes`` section of its docstring, and all abstract methods. The registry refuses one that lacks any.

    Attributes:
        algorithm: The name of the search algorithm.
        archive: The most merges that the population keeps.
        start: Merges to begin with, solved from the models' inner products: a solver with its settings, such as
            ``{solve: model_stock}``, or several, ``{solve: [model_stock, average]}``. They come first among the
            candidates, before those that the search begins with anyway. None begins without.
    """

    algorithm: str
    archive: int = Field(default=20, ge=1)
    start: Beginning | None = None

    searches_settings: ClassVar[bool] = False
    """Whether settings of the merge operator can be searched beside the coefficients."""

    compares: ClassVar[bool] = True
    """Whether the models themselves and their average are scored beside its merges, to compare with."""

    _answers: ClassVar[Answers] = {
        "needs": (lambda answer: isinstance(answer, Needs), "Needs"),
        "begins": (lambda answer: isinstance(answer, Begins), "Begins"),
        "fineness": (lambda answer: isinstance(answer, str) and answer in FINENESS, f"one of {', '.join(FINENESS)}"),
        "borders": ANYTHING,
        "parts": (lambda answer: isinstance(answer, Parts), "Parts"),
        "segments": ANYTHING,
        "make": (_is_pair, "a pair of a search and a population"),
        "describe": TEXT,
        "reads_only_names": TRUTH,
        "check": ANYTHING,
    }
    _passes: ClassVar[Mapping[str, type[Exception]]] = {"check": ValueError}

    @property
    def _subject(self) -> str:
        return f"search.algorithm: the search {self.algorithm!r}"

    @property
    def solvers(self) -> tuple[Solver, ...]:
        """The solvers of the merges that it begins with; empty for none."""
        return listed(self.start)

    @model_validator(mode="after")
    def _can_begin_so(self) -> SearchSettings:
        count = len(self.solvers)
        begins = self.begins() if count else Begins()
        if begins.refusal:
            raise ValueError(f"start: {begins.refusal}; leave start out")
        if begins.fixed and begins.most == 1 and count > 1:
            raise ValueError(f"start: {self.algorithm} begins with one merge, found {count} to solve; name one")
        return self

    @model_serializer(mode="wrap")
    def _without_no_start(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a ``start`` that is None: records and signatures are those of recipes without the field."""
        fields: dict[str, Any] = handler(self)
        if fields.get("start", 0) is None and not takes_number(type(self)):
            del fields["start"]
        return fields

    @classmethod
    def suited(cls, operator: Operator) -> dict[str, float]:  # noqa: ARG003 - for those that have such fields
        """Fields that suit an operator, where the recipe gives none of them.

        Args:
            operator: The operator.
        """
        return {}

    @abstractmethod
    def needs(self) -> Needs:
        """The conditions under which it can run a recipe."""

    def imports(self) -> Mapping[str, tuple[str, ...]]:
        """The packages that it imports which come with an extra of Ecotone, by the extra; by default none."""
        return {}

    @abstractmethod
    def begins(self) -> Begins:
        """Whether it can begin with merges that were found before."""

    @abstractmethod
    def fineness(self) -> Fineness:
        """How fine the segments of its merges may be."""

    @abstractmethod
    def borders(self, space: Space) -> Integers:
        """(S+1,) borders that the segments of its merges may have, when it begins with nothing else.

        Raises:
            InputError: The models have fewer blocks than there are to be groups.
        """

    def parts(self, space: Space) -> Parts:
        """The parts that have coefficients of their own, when it begins with nothing else; by default the segments."""
        return Parts(self.borders(space))

    def segments(self, space: Space) -> int | None:
        """How many sets of coefficients there are to begin with; None where their number is not fixed."""
        return len(self.parts(space))

    @abstractmethod
    def make(self, context: Context) -> Pair:
        """The search and the population that it breeds from.

        Raises:
            InputError: The settings do not fit the models, objectives or budget, or a package is not installed.
        """

    @abstractmethod
    def describe(self, search: Search | None, context: Context) -> str:
        """A clause about the search for the report of ``validate``; empty when there is nothing to report.

        Args:
            search: The search that ``make`` returned; None where it cannot be made before the models are read.
            context: The context of the search. Its space may hold only the models' headers, or only their names.
        """

    def check(self, operator: str, needs_base: bool, tasks: Sequence[CalibrationSettings]) -> None:
        """Refuse an operator or calibration tasks that do not fit it; by default none.

        Args:
            operator: The merge operator's name.
            needs_base: Whether the operator adds to a base model.
            tasks: The calibration tasks.

        Raises:
            ValueError: One does not fit; the message names the recipe's field.
        """

    def reads_only_names(self) -> bool:
        """Whether the recipe alone, without the models' headers, is enough to make it."""
        return self.fineness() in ("model", "groups")


class Segmented(SearchSettings):
    """Coefficients of segments.

    Attributes:
        granularity: The parts of the model that have their own coefficients: the whole ``model``, ``groups`` of
            consecutive blocks, ``components`` (all attention tensors, all feed-forward tensors, and so on), each
            ``block`` (the tensors of one layer), or each ``tensor``.
        groups: The number of groups of consecutive blocks, with about as many parameters in each. Only for
            ``granularity: groups``, and for ``components``, which then have their own coefficients in each group.
    """

    granularity: Granularity = "block"
    groups: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _groups_are_asked_for(self) -> Segmented:
        if self.groups > 1 and self.granularity not in ("groups", "components"):
            raise ValueError(
                f"groups: expected granularity: groups with it, found granularity: {self.granularity}; components have "
                "groups, too"
            )
        return self

    def fineness(self) -> Fineness:
        """The granularity."""
        return self.granularity

    def borders(self, space: Space) -> Integers:
        """(S+1,) borders of one segment a model, group, block or tensor, or of the runs of a component's tensors."""
        return self.parts(space).borders

    def parts(self, space: Space) -> Parts:
        """The model, groups, components, blocks or tensors."""
        return parts_of(space, self.granularity, self.groups)


class Box(Segmented):
    """Coefficients of segments, each between two bounds.

    Attributes:
        low: The smallest value that a coefficient may take. Where neither bound is given, an operator whose published
            merge lies at 1 has its own: 0 to 2. A ``stack`` shares them out among its methods.
        high: The largest value that a coefficient may take.
    """

    low: float = 0.0
    high: float = 1.0

    searches_settings: ClassVar[bool] = True

    @model_validator(mode="after")
    def _box_is_open(self) -> Box:
        if not self.low < self.high:
            raise ValueError(f"low: expected less than high ({self.high}), found {self.low}")
        if not math.isfinite(self.high - self.low):
            raise ValueError(f"low: expected a finite distance to high ({self.high}), found {self.low}")
        return self

    def box(self, context: Context) -> CoefficientBox:
        """The box of the coefficients and of the operator's settings that are searched."""
        return CoefficientBox.of(context.space, self.granularity, self.low, self.high, self.groups, context.searched)

    @classmethod
    def suited(cls, operator: Operator) -> dict[str, float]:
        """The operator's bounds, if it has any."""
        bounds = getattr(operator, "bounds", None)
        return {} if bounds is None else {"low": bounds[0], "high": bounds[1]}

    def describe(self, search: Search | None, context: Context) -> str:
        """The bounds."""
        return f", each from {self.low:g} to {self.high:g}"


class FrontBox(Box):
    """Coefficients of segments, by default one a model, as a search for a front begins best with.

    Attributes:
        granularity: The parts of the model that have their own coefficients: the whole ``model`` (one coefficient for
            each model), ``groups`` of consecutive blocks, ``components`` (all attention tensors, all feed-forward
            tensors, and so on), each ``block`` (the tensors of one layer), or each ``tensor``.
    """

    granularity: Granularity = "model"


class ModelsFirstBox(FrontBox):
    """A search that may begin with given points.

    Attributes:
        models_first: Score the models themselves and their average before any other merge.
    """

    models_first: bool = True

    def first(self, box: CoefficientBox, context: Context) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """(n, D) points to score first: the starts, moved into the box, or else the models and their average.

        Starts that were not scored before come before the models, and do not take their place.
        """
        space, starts = context.space, context.starts
        alone = self.models_first and (context.joined or not starts)
        rows = [*space.seeds, space.seeds.mean(axis=0)] if alone else []
        models = [Genome.uniform(space.size, row) for row in rows]
        if alone and context.own:  # of what was prepared, a part alone is no model
            models = [*context.own]
        begun = [box.point(start) for start in (*starts, *models)]
        if not begun:
            return None
        if not starts:
            return np.array(begun)
        points = box.clip(np.array(begun))
        return points[np.sort(np.unique(points, axis=0, return_index=True)[1])]


def beyond(reached: Collection[Fineness], own: Fineness) -> Fineness | None:
    """The finest of the finenesses ``reached`` whose merges cannot be written with segments of ``own``; None if none.

    Merges of ``groups`` and ``components`` can where their borders and components are the same, which takes the models
    to tell.
    """
    place = FINENESS.index(own)
    lacking = [one for one in reached if FINENESS.index(one) > place or (own, one) in APART]
    return max(lacking, key=FINENESS.index, default=None)


def check_declared(name: str, kind: Any) -> None:
    """Refuse a search algorithm that lacks a declaration (``ecotone.settings.check_kind``).

    Raises:
        InputError: It is no subclass of ``SearchSettings``, its ``algorithm`` is no ``Literal`` with this name, it
            lacks a method or the text of a field, or a field has the name of a key of stages.
    """
    check_kind(name, kind, SearchSettings, "algorithm")
    taken = [field for field in kind.model_fields if field in OF_STAGES and not _is_own_start(kind, field)]
    if taken:
        keys = ", ".join(OF_STAGES)
        raise InputError(
            f"{kind.__name__}: expected fields with other names than the keys of a stage ({keys}), found "
            f"{', '.join(taken)}.",
            "Rename the field. Only a field `start` that may hold a number may stay.",
        )


def _is_own_start(kind: type[SearchSettings], field: str) -> bool:
    """Whether a field is a ``start`` of solvers, or a number: a stage tells both from its own, which is text."""
    return field == "start" and _held(kind) <= {int, float, type(None), Solver, Solvers}


def takes_number(kind: type[SearchSettings]) -> bool:
    """Whether the ``start`` of a search may be a number."""
    return bool(_held(kind) & {int, float})


def _held(kind: type[SearchSettings]) -> set[Any]:
    """The types that a search's ``start`` may hold."""
    return set(leaves(kind.model_fields["start"].annotation))
