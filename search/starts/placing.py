"""From solvers to the merges that a search begins with: their coefficients in the search's own segments and bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats, Genome, united
from ecotone.populations.space import Space
from ecotone.search.coefficients import Parts
from ecotone.search.kinds import Box, Context, SearchSettings
from ecotone.search.starts.base import FIELD, Geometry, Solver

STEP = 2.0**-40
"""What solved coefficients are multiples of: another processor's last bits of inner products change nothing."""


@dataclass(frozen=True)
class Solved:
    """A merge to begin with.

    Args:
        solver: The solver that gave it.
        genome: The merge, in the search's own segments.
        text: How fine it was solved, and what became of it in the search's segments and bounds; a clause.
        means: (K,) the mean of each source's coefficients, weighted by length.
        sources: K names of the sources.
    """

    solver: Solver
    genome: Genome
    text: str
    means: tuple[float, ...]
    sources: tuple[str, ...]

    def record(self, stage: int) -> dict[str, Any]:
        """Plain values, for the journal; ``stage`` is the number of the search in its chain."""
        plain = self.solver.model_dump(mode="json")
        means = list(self.means)
        return {"stage": stage, "solver": plain, "text": self.text, "means": means, "sources": list(self.sources)}


def begun(settings: SearchSettings, context: Context, known: bool = True) -> Context:
    """The context with the merges that the search's ``start`` solves, unless it has merges to begin with.

    Args:
        settings: The search.
        context: Its context.
        known: Whether the models' inner products are known. Without them the averages stand in for what is solved, so
            that the search can be made and described.

    Raises:
        InputError: A solver does not fit the operator or the models.
    """
    if context.starts or not settings.solvers:
        return context
    genomes = dict.fromkeys(one.genome for one in solved(settings, context)) if known else stand_ins(settings, context)
    return replace(context, starts=tuple(genomes), joined=True)


def stand_ins(settings: SearchSettings, context: Context) -> list[Genome]:
    """As many averages as there are solvers, each of which is checked.

    Raises:
        InputError: As for ``begun``.
    """
    models = _checked(settings, context)
    average = Genome.uniform(context.space.size, context.space.seeds.mean(axis=0))
    parts = settings.parts(models.space)
    return [_bounded(settings, placed(average, parts))[0] for _ in settings.solvers]


def solved(settings: SearchSettings, context: Context) -> list[Solved]:
    """The merges that the search's ``start`` solves, in the order of the solvers. Some may be the same.

    Raises:
        InputError: As for ``begun``; or inner products are not finite.
    """
    if not settings.solvers:
        return []
    models = _checked(settings, context)
    space, parts, found = context.space, settings.parts(context.space), []
    weights = np.diff(space.tensor_borders) / space.size
    for solver in settings.solvers:
        table = solver.coefficients(models)
        table = np.round(table / STEP) * STEP if solver.by == "tensor" else table
        genome, moved = _bounded(settings, placed(Genome.per_tensor(space, table).simplified(), parts))
        text = "; ".join(filter(None, [described(solver, space.borders(solver.by), parts), moved]))
        found.append(Solved(solver, genome, text, tuple((weights @ table).tolist()), tuple(space.sources)))
    return found


def texts(settings: SearchSettings, space: Space | None) -> list[str]:
    """What the search begins with, in words; by the solvers' names alone while the models' headers are not read."""
    if space is None:
        return [one.solve for one in settings.solvers]
    parts = settings.parts(space)
    return [f"{one.solve} ({described(one, space.borders(one.by), parts)})" for one in settings.solvers]


def described(solver: Solver, borders: np.ndarray[Any, np.dtype[np.int64]], parts: Parts) -> str:
    """How fine a solver's coefficients are, and whether the search's segments are coarser; a clause."""
    if solver.by == "model":
        return "the same coefficients everywhere"
    text = f"coefficients by {solver.by}"
    if parts.holds(Parts(np.asarray(borders))):
        return text
    whose = "the model" if len(parts) == 1 else f"each of the search's {parts.count}"
    return f"{text}, of which {whose} has the mean, weighted by length"


def placed(genome: Genome, parts: Parts) -> Genome:
    """A merge with the coefficients of ``parts``. Where a part has several, it gets their mean, weighted by length."""
    union = united(np.asarray(parts.borders), genome.boundaries)
    segments = np.searchsorted(parts.borders, union[:-1], side="right") - 1
    owners = segments if parts.owners is None else parts.owners[segments]
    rows = Parts(union, owners).of(genome)
    return Genome(parts.borders, parts.expanded(rows), genome.parameters).simplified()


def _bounded(settings: SearchSettings, genome: Genome) -> tuple[Genome, str]:
    """A merge moved into the search's bounds, and a clause that says so if it lay outside."""
    if not isinstance(settings, Box):
        return genome, ""
    rows: Floats = np.clip(genome.coefficients, settings.low, settings.high)
    if np.array_equal(rows, genome.coefficients):
        return genome, ""
    bounds = f"moved into the bounds of the search, {settings.low:g} to {settings.high:g}"
    return Genome(genome.boundaries, rows, genome.parameters).simplified(), bounds


def _checked(settings: SearchSettings, context: Context) -> Geometry:
    """The models as solvers know them, when all solvers fit them.

    Raises:
        InputError: As for ``begun``.
    """
    if not context.affine:
        raise InputError(
            f"{FIELD}: expected merges that are linear in their coefficients, found a merge.operator that has others.",
            "Use merge.operator linear or task_arithmetic; solve: nuslerp is SLERP by tensor.",
        )
    own = context.own[0].coefficients[0] if context.own else None
    models = Geometry(context.space, context.weighs, own)
    for solver in settings.solvers:
        solver.check_operator(context.weighs)
        solver.check(models)
    return models
