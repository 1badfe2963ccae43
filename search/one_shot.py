"""One merge whose coefficients are given: nothing is searched.

Most methods of model merging are one merge: the average, task arithmetic with one factor, or the vectors of an operator
that prepares, each taken once. Others solve the coefficients from the models' inner products (``start``). As a search
of one trial such a merge is scored, recorded and exported like any other.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import model_validator

from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats, Genome, Integers
from ecotone.populations.population import ElitistArchive
from ecotone.populations.space import Space
from ecotone.populations.trial import Evaluation, Outcome, Trial
from ecotone.search.kinds import Begins, Context, Fineness, Needs, Pair, SearchSettings
from ecotone.search.protocol import Search


class OneShotSettings(SearchSettings):
    """One merge whose coefficients are given: nothing is searched.

    Attributes:
        algorithm: ``one_shot``: one merge with given coefficients.
        at: The coefficient of every source, or a list with one for each source. None means the operator's published
            merge where it has one (1, as for TIES and operators that prepare whole matrices), all methods of a stack
            in equal parts, and else the average of the models.
        start: A solver of the coefficients, tensor by tensor, from the models' inner products, in place of ``at``:
            ``{solve: model_stock}``.
    """

    algorithm: Literal["one_shot"] = "one_shot"
    at: float | tuple[float, ...] | None = None

    compares: ClassVar[bool] = False

    @model_validator(mode="after")
    def _given_once(self) -> OneShotSettings:
        if self.at is not None and self.solvers:
            raise ValueError("start: expected without at, found both; leave one out")
        return self

    def needs(self) -> Needs:
        """Nothing, not even an objective."""
        return Needs(objectives=0)

    def begins(self) -> Begins:
        """Only with the merge that it solves, which is its one."""
        if self.solvers:
            return Begins(most=1, fixed=True)
        return Begins("its one merge has the coefficients that are given")

    def fineness(self) -> Fineness:
        """One coefficient a source, where it is given; by tensor where it is solved."""
        return "tensor" if self.solvers else "model"

    def borders(self, space: Space) -> Integers:
        """(2,) those of the whole model, or of the tensors."""
        return space.tensor_borders if self.solvers else np.array([0, space.size])

    def make(self, context: Context) -> Pair:
        """The search, and an archive of the one merge.

        Raises:
            InputError: There is not one coefficient for each source.
        """
        given = Genome.uniform(context.space.size, self.coefficients(context))
        genome = context.starts[0] if self.solvers and context.starts else given
        return OneShot(genome), ElitistArchive(context.goals, self.archive)

    def coefficients(self, context: Context) -> Floats:
        """(K,) coefficients of the merge, unless they are solved.

        Raises:
            InputError: As for ``make``.
        """
        space = context.space
        if self.at is None and context.own:
            own: Floats = context.own[0].coefficients[0]
            return own
        given = context.published if self.at is None else self.at
        if given is None:
            average: Floats = space.seeds.mean(axis=0)
            return average
        if isinstance(given, tuple) and len(given) != space.dimension:
            raise InputError(
                f"search.at: expected a number, or {space.dimension}, one for each of {', '.join(space.sources)}, "
                f"found {len(given)}."
            )
        return np.array(np.broadcast_to(given, space.dimension), np.float64)

    def describe(self, search: Search | None, context: Context) -> str:
        """The coefficients, unless they are solved."""
        if self.solvers:
            return ""
        found = self.coefficients(context)
        return f", at {', '.join(f'{one:g}' for one in (found[:1] if len(set(found.tolist())) == 1 else found))}"


class OneShot:
    """The search: one trial.

    Args:
        genome: The merge.
    """

    def __init__(self, genome: Genome) -> None:
        self._genome = genome
        self._asked = False

    @property
    def done(self) -> bool:
        """Whether the merge has been asked for."""
        return self._asked

    def ask(self, n: int) -> list[Trial]:
        """The merge, once."""
        if self._asked or n < 1:
            return []
        self._asked = True
        return [Trial(0, self._genome)]

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        """Do nothing: it learns from no score."""

    def state(self) -> dict[str, Any]:
        """Whether the merge has been asked for."""
        return {"asked": self._asked}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._asked = bool(state["asked"])
