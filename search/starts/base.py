"""What a solver knows of the models, and what it must declare. Nothing here touches a weight, or a worker."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from ecotone.populations.errors import InputError, nearest
from ecotone.populations.genome import Floats
from ecotone.populations.space import Space
from ecotone.settings import ANYTHING, Answers, Kind, check_kind

Weighs: TypeAlias = Literal["models", "task_vectors", "prepared"]
"""What coefficients weigh: the experts themselves, their task vectors, or what an operator mixes in their place."""
By: TypeAlias = Literal["model", "block", "tensor"]
"""The parts of a model that a solver finds coefficients for."""

FIELD = "search.start.solve"
_NUMBERED = re.compile(r"(?:(.*)\.)?(\d+)")


@dataclass(frozen=True, eq=False)
class Geometry:
    """The E experts of a search by tensor: lengths and cosines of what coefficients weigh, and depths.

    Where the operator adds to a base, the vectors are the experts' task vectors; with ``linear`` they are the models.

    Args:
        space: The models. Its Gram table may lack geometry as long as only names and depths are asked for.
        weighs: What coefficients weigh.
        published: (K,) coefficients of the operator's published merge; None where it is at 1, or there is none.
    """

    space: Space
    weighs: Weighs
    published: Floats | None = None

    @property
    def experts(self) -> tuple[str, ...]:
        """E names."""
        return self.space.seed_names

    @property
    def tensors(self) -> int:
        """T."""
        return len(self.space.tensors)

    @cached_property
    def grams(self) -> Floats:
        """(T, E, E) inner products of the experts' vectors over each tensor.

        Raises:
            InputError: They are not finite.
        """
        sources, seeds = self.space.gram.between(self.space.tensor_borders), self.space.seeds
        if not np.isfinite(sources).all():
            raise InputError(
                f"{FIELD}: the models' inner products are not finite: weights hold infinity, or are too large.",
                "Leave search.start out, or say solve: average.",
            )
        return np.asarray(seeds @ sources @ seeds.T)

    @cached_property
    def lengths(self) -> Floats:
        """(T, E) lengths of the experts' vectors; 0 where rounding leaves nothing of them.

        The table holds prefix sums. Over m regions their difference is off by at most m epsilon / 2 times the sum up to
        there, so a smaller square is zero for all that is known. The bound is relative: tiny tensors keep their angles.
        """
        table, borders, seeds = self.space.gram, self.space.tensor_borders, self.space.seeds
        ends = np.searchsorted(table.borders, borders)
        before = np.einsum("ek,tkl,el->te", seeds, table.prefix[ends[1:]], seeds)
        noise = 4 * np.finfo(np.float64).eps * np.diff(ends)[:, None] * before
        squares = np.einsum("tee->te", self.grams)
        return np.sqrt(np.where(squares > noise, squares, 0.0))

    @cached_property
    def cosines(self) -> Floats:
        """(T, E, E) cosines of the angles between the experts' vectors; 0 where one of them has no length."""
        lengths = self.lengths
        products = lengths[:, :, None] * lengths[:, None, :]
        there = products > 0
        cosines = np.clip(np.where(there, self.grams, 0.0) / np.where(there, products, 1.0), -1.0, 1.0)
        diagonal = np.arange(len(self.experts))
        cosines[:, diagonal, diagonal] = lengths > 0
        return cosines

    @cached_property
    def depths(self) -> Floats:
        """(T,) how deep each tensor's block lies in its stack: 0 in the first, 1 in the last; NaN outside of blocks.

        A block is a numbered layer (``model.layers.3``); a stack is all blocks of one name. The one block of a stack
        lies at 0.
        """
        stacks: dict[str, list[int]] = {}
        places = [_NUMBERED.fullmatch(name) for name in self.space.blocks]
        for place in filter(None, places):
            stacks.setdefault(place[1] or "", []).append(int(place[2]))
        ranks = {stack: sorted(set(numbers)) for stack, numbers in stacks.items()}
        depths = [
            np.nan if place is None else (rank := ranks[place[1] or ""]).index(int(place[2])) / max(1, len(rank) - 1)
            for place in places
        ]
        block = np.searchsorted(self.space.block_borders, self.space.tensor_borders[:-1], side="right") - 1
        return np.array(depths)[block]

    def of_experts(self, rows: Floats) -> Floats:
        """(T, K) coefficients by tensor of the (T, E) or (E,) shares of the experts."""
        table = np.broadcast_to(rows, (self.tensors, len(self.experts)))
        return np.asarray(table @ self.space.seeds)


class Solver(Kind):
    """A solver: its part of a recipe, and its formula.

    A subclass has a field ``solve``, a ``Literal`` of its name, an entry for each field in the ``Attributes`` section
    of its docstring, and ``coefficients``. The registry refuses one that lacks any.

    Attributes:
        solve: The name of the solver.
    """

    solve: str

    by: ClassVar[By] = "tensor"
    """How fine its coefficients are."""
    of: ClassVar[tuple[Weighs, ...]] = ("models", "task_vectors", "prepared")
    """What coefficients may weigh so that the formula has its meaning."""

    _answers: ClassVar[Answers] = {
        "check": ANYTHING,
        "coefficients": (lambda answer: isinstance(answer, np.ndarray) and answer.ndim == 2, "an array (T, K)"),
    }

    @property
    def _subject(self) -> str:
        return f"{FIELD}: the solver {self.solve!r}"

    def check(self, models: Geometry) -> None:
        """Refuse models that the formula has no meaning for. It may ask for names and depths alone.

        Raises:
            InputError: It has none.
        """

    @abstractmethod
    def coefficients(self, models: Geometry) -> Floats:
        """(T, K) coefficients by tensor.

        Raises:
            InputError: Inner products are not finite.
        """

    def check_operator(self, weighs: Weighs) -> None:
        """Refuse an operator whose coefficients weigh something that the formula does not know.

        Raises:
            InputError: It does.
        """
        if weighs in self.of:
            return
        if weighs == "models":
            raise InputError(
                f"{FIELD}: {self.solve} weighs task vectors, found a merge.operator that mixes the models themselves.",
                "Use merge.operator task_arithmetic and give models.base.",
            )
        raise InputError(
            f"{FIELD}: {self.solve} is solved from the experts as they are, found a merge.operator that mixes others "
            "in their place.",
            "Use merge.operator task_arithmetic, or solve: one_shot, the operator's own merge.",
        )


class Weighted(Solver):
    """A solver with a weight for each expert.

    Attributes:
        weights: For each expert, by name, its weight, at least 0; 1 where not given. Weights are divided by their sum.
    """

    weights: dict[str, float] | None = None

    def check(self, models: Geometry) -> None:
        """Refuse weights of experts there are not, below 0, or all 0."""
        weights = self.weights or {}
        known(weights, models.experts, f"{FIELD}: {self.solve}: weights")
        if any(weight < 0 for weight in weights.values()) or not self.shares(models.experts).any():
            raise InputError(
                f"{FIELD}: {self.solve}: weights: expected numbers of at least 0, one of them above, found {weights}."
            )

    def shares(self, experts: Sequence[str]) -> Floats:
        """(E,) the weights, divided by their sum."""
        given = np.array([float((self.weights or {}).get(name, 1.0)) for name in experts])
        return given / (given.sum() or 1.0)


def known(named: Mapping[str, float], experts: Sequence[str], place: str) -> None:
    """Refuse numbers for experts there are not, unless the names of the experts are not all known yet.

    Raises:
        InputError: There is one.
    """
    if len(set(experts)) < len(experts):
        return
    for name in named:
        if name not in experts:
            raise InputError(f"{place}: there is no expert {name!r}.", nearest(name, list(experts)))


def check_declared(name: str, kind: Any) -> None:
    """Refuse a solver that lacks a declaration (``ecotone.settings.check_kind``).

    Raises:
        InputError: It is no subclass of ``Solver``, its ``solve`` is no ``Literal`` with this name, it lacks a method
            or the text of a field.
    """
    check_kind(name, kind, Solver, "solve")
