"""Comparing searches by their fronts: hypervolume, distance to the best known front, and cost.

Hypervolumes of all runs are measured from one reference point. IGD+ and the additive epsilon indicator compare each
front with the union of all of them, in shares of the union front's range, so that no objective's unit decides.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from statistics import median
from typing import Any

import numpy as np

from ecotone.experiments.preferences import reference_numbers
from ecotone.experiments.runs import Run, Scored, in_score_units, points_of, reference_point
from ecotone.experiments.tracking.names import algorithm_name
from ecotone.populations import facts
from ecotone.populations.errors import EcotoneError, InputError
from ecotone.populations.fronts import attainment, epsilon, hypervolume, hypervolume_over, igd_plus, non_dominated
from ecotone.populations.genome import Floats, Genome, Integers
from ecotone.populations.journal import Row
from ecotone.populations.trial import Goal
from ecotone.search.coefficients import Parts

REACH = "90%"
REPLACEABLE = ("seed", "runtime", "tracking")  # what may differ between seeds of one search


class Searched:
    """One run with its scored trials in the order they were asked for.

    Args:
        run: The run.
        goals: The objectives, in the order that all compared runs are read in.

    Raises:
        InputError: It has no front.
    """

    def __init__(self, run: Run, goals: Sequence[Goal]) -> None:
        self.run = run
        self.goals: tuple[Goal, ...] = tuple(goals)
        self.label: str = run.label
        self.front: list[Scored] = run.front_or_explain()
        self.references: list[Scored] = run.references()
        self.examples: dict[str, dict[str, int]] = run.examples()
        self.report: Mapping[str, Any] | dict[str, Any] = run.report() or {}
        with run.journal() as journal:
            self.recipe: Mapping[str, Any] = journal.fact(facts.RECIPE) or {}
            self.algorithm: str = algorithm_name(journal)
            self.seed: int = journal.fact(facts.SEED) or 0
            self.models: tuple[str, ...] | tuple[()] = journal.fact(facts.MODELS) or ()
            found = journal.fact(facts.COMPONENTS)
            self.components: Parts | None = None if found is None else Parts.read(found)
            self.seconds: float = journal.fact(facts.ELAPSED) or 0.0
            objectives = self.recipe.get("objectives", {}).get("search")
            self.measured_on: dict[str, Any] = {"objectives": objectives, "weights": journal.fact(facts.GEOMETRY)}
            self.state: str = journal.fact(facts.STATE) or "starting"
            self._created = journal.fact(facts.CREATED) or 0.0
            self._rows = list(journal.rows())
        self._ok = np.array([row.failure is None and bool(row.scores) for row in self._rows])
        self.points: Floats = points_of((row.scores for row in self._rows if row.failure is None), goals)

    @property
    def evaluations(self) -> int:
        """Number of evaluated trials, failed ones included."""
        return len(self._rows)

    @property
    def counts(self) -> Integers:
        """(N,) evaluations spent up to and with each scored trial."""
        return np.flatnonzero(self._ok) + 1

    @cached_property
    def times(self) -> Floats:
        """(N,) seconds of searching up to each scored trial; see ``search_seconds``."""
        seconds: Floats = search_seconds(self._rows, self._created, self.seconds)[self._ok]
        return seconds

    @cached_property
    def front_points(self) -> Floats:
        """(F, M) oriented scores of the front."""
        return points_of((member.scores for member in self.front), self.goals)

    @property
    def key(self) -> str:
        """A text that is equal for runs of one search that differ in their seed alone."""
        settings = {key: value for key, value in self.recipe.items() if key not in REPLACEABLE}
        return json.dumps([self.run.name, self.algorithm, settings], sort_keys=True, default=str)

    def genomes(self) -> dict[int, Genome | None]:
        """The front's genomes by trial number; None where dense weights were not kept."""
        found: dict[int, Genome | None] = {}
        with self.run.journal() as journal:
            for member in self.front:
                found[int(member.id)] = None
                with contextlib.suppress(EcotoneError):
                    found[int(member.id)] = journal.trial(int(member.id)).genome
        return found


@dataclass(frozen=True, eq=False)
class Line:
    """The result of one run.

    Args:
        searched: The run.
        volumes: (N,) hypervolume after each scored trial.
        hypervolume: That of its front on search data.
        share: Its share of the best run's hypervolume.
        igd_plus: Distance of the union front to it, in shares of the union front's range; 0 is best.
        epsilon: The least shift of its front that covers the union front, in the same unit; 0 is best.
        evaluations_to_reach: Evaluations until the wanted hypervolume; None when it was not reached.
        seconds_to_reach: Seconds of searching until then.
        held_out_hypervolume: The hypervolume of the front's scores on held-out data; None where not measured.
    """

    searched: Searched
    volumes: Floats
    hypervolume: float
    share: float
    igd_plus: float
    epsilon: float
    evaluations_to_reach: int | None
    seconds_to_reach: float | None
    held_out_hypervolume: float | None

    def record(self) -> dict[str, Any]:
        """As plain values for JSON."""
        one = self.searched
        return {
            "run": one.run.where,
            "name": one.run.name,
            "label": one.label,
            "algorithm": one.algorithm,
            "seed": one.seed,
            "evaluations": one.evaluations,
            "seconds": one.seconds,
            "front_size": len(one.front),
            "hypervolume": self.hypervolume,
            "share_of_best": self.share,
            "igd_plus": self.igd_plus,
            "epsilon": self.epsilon,
            "evaluations_to_reach": self.evaluations_to_reach,
            "seconds_to_reach": self.seconds_to_reach,
            "held_out_hypervolume": self.held_out_hypervolume,
        }


@dataclass(frozen=True, eq=False)
class Group:
    """Several seeds of one search.

    Args:
        label: Unique among the groups.
        lines: One a seed.
        surface: (A, M) oriented points of the median attainment surface, which most seeds reach or exceed.
            Empty with more than three objectives.
        surface_hypervolume: Its hypervolume; None with more than three objectives.
    """

    label: str
    lines: tuple[Line, ...]
    surface: Floats
    surface_hypervolume: float | None

    def record(self) -> dict[str, Any]:
        """Plain values for JSON: medians over seeds. A seed that did not reach the hypervolume counts as infinite."""
        volumes = [line.hypervolume for line in self.lines]
        held_out = [line.held_out_hypervolume for line in self.lines if line.held_out_hypervolume is not None]
        return {
            "label": self.label,
            "runs": [line.searched.label for line in self.lines],
            "seeds": [line.searched.seed for line in self.lines],
            "hypervolume": {"median": median(volumes), "low": min(volumes), "high": max(volumes)},
            "held_out_hypervolume": median(held_out) if len(held_out) == len(volumes) else None,
            "reached": sum(line.evaluations_to_reach is not None for line in self.lines),
            "evaluations_to_reach": _median([line.evaluations_to_reach for line in self.lines]),
            "seconds_to_reach": _median([line.seconds_to_reach for line in self.lines]),
            "median_front_hypervolume": self.surface_hypervolume,
        }


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs of the same objectives, side by side.

    Args:
        goals: The objectives.
        reference: (M,) oriented point from which hypervolumes are measured.
        held_out_reference: The same for held-out data, in score units; empty when nothing was measured there.
        target: The hypervolume to reach.
        reach: As the user gave it: a share of the best run's, or a number.
        lines: One a run, largest hypervolume first.
        groups: Those with several seeds, largest median hypervolume first.
        union: The members of the best known front: (label of the run, member).
        notes: Sentences that the reader of the table should know.
    """

    goals: tuple[Goal, ...]
    reference: Floats
    held_out_reference: Mapping[str, float]
    target: float
    reach: str
    lines: tuple[Line, ...]
    groups: tuple[Group, ...]
    union: tuple[tuple[str, Scored], ...]
    notes: tuple[str, ...]

    @property
    def reference_point(self) -> dict[str, float]:
        """The reference point in score units."""
        return in_score_units(self.reference, self.goals)

    def record(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "objectives": [vars(goal) for goal in self.goals],
            "reference_point": self.reference_point,
            "held_out_reference_point": dict(self.held_out_reference),
            "hypervolume_to_reach": self.target,
            "runs": [line.record() for line in self.lines],
            "groups": [group.record() for group in self.groups],
            "union_front": [{"run": label, "id": member.id, "scores": member.scores} for label, member in self.union],
            "notes": list(self.notes),
        }


def compare(runs: Sequence[Run], reference: str | None = None, reach: str = REACH) -> Comparison:
    """Compare the fronts of ``runs``.

    Args:
        runs: One or more; one given twice counts once.
        reference: The reference point as ``a=0.2,b=0.1`` in score units; objectives that it leaves out, or all with
            None, follow ``runs.reference_point`` over all runs together.
        reach: The hypervolume whose cost is reported: a share of the best run's (``90%``) or a number.

    Raises:
        InputError: The runs' objectives differ, a run has no front, or ``reference`` or ``reach`` cannot be read.
    """
    distinct = list({run.directory.resolve(): run for run in runs}.values())
    goals = _common_goals(distinct)
    given = {} if reference is None else reference_numbers(reference, goals)
    wanted = _Reach.parse(reach)
    searched = _labelled([Searched(run, goals) for run in distinct])
    points = np.concatenate([one.points for one in searched])
    seeds = points_of((merge.scores for one in searched for merge in one.references), goals)
    corner = reference_point(points, seeds, goals, given)
    union = _union(searched)
    held_out = _HeldOut(searched, given)
    volumes = [hypervolume_over(one.points, corner) for one in searched]
    best = max(float(over[-1]) for over in volumes)
    target = wanted.of(best)
    lines = [
        _line(one, over, best, target, union.points, held_out.hypervolume(one))
        for one, over in zip(searched, volumes, strict=True)
    ]
    lines.sort(key=lambda line: -line.hypervolume)
    return Comparison(
        goals,
        corner,
        held_out.reference,
        target,
        reach.strip(),
        tuple(lines),
        _groups(lines, corner),
        union.members,
        (*_notes(searched), *held_out.notes),
    )


def search_seconds(rows: Sequence[Row], created: float, elapsed: float) -> Floats:
    """(N,) seconds of searching until each of the ``rows`` and all before it were there.

    The journal has the wall clock of each result and the seconds searched in all. The clock's excess over those seconds
    is time in which the run was stopped. It is taken from the longest gaps between results.
    """
    if not rows:
        return np.zeros(0)
    clock = np.array([row.time for row in rows])
    order = np.argsort(clock, kind="stable")
    gaps = np.maximum(np.diff(clock[order], prepend=created), 0.0)
    excess = gaps.sum() - elapsed
    for index in np.argsort(-gaps, kind="stable"):
        if excess <= 0:
            break
        cut = min(excess, gaps[index])
        gaps[index] -= cut
        excess -= cut
    seconds = np.empty(len(rows))
    seconds[order] = np.cumsum(gaps)
    return np.asarray(np.maximum.accumulate(seconds))


@dataclass(frozen=True)
class _Reach:
    """A hypervolume to reach: a share of the best run's, or a number."""

    value: float
    is_share: bool

    @classmethod
    def parse(cls, text: str) -> _Reach:
        share = text.strip().endswith("%")
        try:
            value = float(text.strip().removesuffix("%")) / (100 if share else 1)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf or (share and value > 1):
            raise InputError(
                f"--reach: expected a share of the best run's hypervolume above 0%, or a number, found {text!r}.",
                "As in --reach 90% or --reach 0.81.",
            )
        return cls(value, share)

    def of(self, best: float) -> float:
        return self.value * best if self.is_share else self.value


@dataclass(frozen=True, eq=False)
class _Union:
    """The front of all runs together."""

    points: Floats
    members: tuple[tuple[str, Scored], ...]


def _union(searched: Sequence[Searched]) -> _Union:
    points = np.concatenate([one.front_points for one in searched])
    members = [(one.label, member) for one in searched for member in one.front]
    keep = non_dominated(points)
    return _Union(points[keep], tuple(member for member, kept in zip(members, keep, strict=True) if kept))


def _line(one: Searched, over: Floats, best: float, target: float, union: Floats, held_out: float | None) -> Line:
    low, span = union.min(axis=0), np.ptp(union, axis=0)
    span[span == 0] = 1.0
    mine, wanted = (one.front_points - low) / span, (union - low) / span
    there = np.flatnonzero(over >= target * (1 - 1e-12))
    first = int(there[0]) if target > 0 and len(there) else None
    volume = float(over[-1])
    return Line(
        searched=one,
        volumes=over,
        hypervolume=volume,
        share=volume / best if best else 1.0,
        igd_plus=igd_plus(mine, wanted),
        epsilon=epsilon(mine, wanted),
        evaluations_to_reach=None if first is None else int(one.counts[first]),
        seconds_to_reach=None if first is None else float(one.times[first]),
        held_out_hypervolume=held_out,
    )


class _HeldOut:
    """Hypervolumes of the fronts' scores on held-out data, from one reference point."""

    def __init__(self, searched: Sequence[Searched], given: Mapping[str, float]) -> None:
        self.reference: dict[str, float] = {}
        self.notes: tuple[str, ...] = ()
        self._measured = {one.label: one for one in searched if self._is_measured(one)}
        goals = {frozenset(one.run.held_out_goals) for one in self._measured.values()}
        self._goals: tuple[Goal, ...] = ()
        if len(goals) > 1:
            self.notes = ("The runs' held-out objectives differ: their fronts on held-out data do not compare.",)
            self._measured = {}
        elif goals:
            self._goals = next(iter(self._measured.values())).run.held_out_goals
            measured = self._measured.values()
            points = np.concatenate([self._points(one) for one in measured])
            seeds = points_of((merge.held_out for one in measured for merge in one.references), self._goals)
            self._corner = reference_point(points, seeds, self._goals, given)
            self.reference = in_score_units(self._corner, self._goals)

    def hypervolume(self, one: Searched) -> float | None:
        """That of one run's front; None where it was not measured whole."""
        return hypervolume(self._points(one), self._corner) if one.label in self._measured else None

    def _points(self, one: Searched) -> Floats:
        return points_of((member.held_out for member in one.front), self._goals)

    @staticmethod
    def _is_measured(one: Searched) -> bool:
        return bool(one.run.held_out_goals) and all(member.held_out is not None for member in one.front)


def _groups(lines: Sequence[Line], corner: Floats) -> tuple[Group, ...]:
    by_key = groupby(sorted(lines, key=lambda line: line.searched.key), key=lambda line: line.searched.key)
    several = [sorted(found, key=lambda line: line.searched.seed) for _, found in by_key]
    several = [found for found in several if len({line.searched.seed for line in found}) > 1]
    several.sort(key=lambda found: -median(line.hypervolume for line in found))
    names = _distinct([found[0].searched for found in several])
    return tuple(_group(name, found, corner) for name, found in zip(names, several, strict=True))


def _group(label: str, lines: Sequence[Line], corner: Floats) -> Group:
    if len(corner) > 3:
        return Group(label, tuple(lines), np.zeros((0, len(corner))), None)
    most = (len(lines) // 2 + 1) / len(lines)
    surface = attainment([line.searched.front_points for line in lines], most)
    return Group(label, tuple(lines), surface, hypervolume(surface, corner))


def _distinct(searched: Sequence[Searched]) -> list[str]:
    """A name for each: the algorithm, with the run's name or a number if several have the same."""
    for names in ([one.algorithm for one in searched], [f"{one.run.name}: {one.algorithm}" for one in searched]):
        if len(set(names)) == len(names):
            return names
    return [f"{one.run.name}: {one.algorithm} ({index})" for index, one in enumerate(searched, 1)]


def _labelled(searched: list[Searched]) -> list[Searched]:
    """Give runs different labels: their directories' names, or whole paths if names are equal."""
    names = [one.label for one in searched]
    for one in searched:
        if names.count(one.label) > 1:
            one.label = one.run.where
    return searched


def _common_goals(runs: Sequence[Run]) -> tuple[Goal, ...]:
    if not runs:
        raise InputError("compare: expected at least one run, found none.", "See `ecotone compare --help`.")
    first = runs[0]
    for run in runs[1:]:
        if set(run.goals) != set(first.goals):
            raise InputError(
                f"{run.where}: its objectives are {_listed(run.goals)}, those of {first.where} are "
                f"{_listed(first.goals)}.",
                "Only runs of the same objectives can be compared.",
            )
    return first.goals


def _notes(searched: Sequence[Searched]) -> list[str]:
    """Differences between the runs that the table does not show."""
    first, notes = searched[0], []
    for what in ("objectives", "weights"):
        differing = [one.label for one in searched[1:] if one.measured_on[what] != first.measured_on[what]]
        if differing:
            notes.append(f"{', '.join(differing)}: other {what} than {first.label}; the numbers may not be comparable.")
    unfinished = [f"{one.label} ({one.state})" for one in searched if one.state != "finished"]
    return [*notes, f"Not finished: {', '.join(unfinished)}."] if unfinished else notes


def _listed(goals: Sequence[Goal]) -> str:
    return ", ".join(f"{goal.name} ({goal.direction})" for goal in goals)


def _median(values: Sequence[float | None]) -> float | None:
    middle = median(math.inf if value is None else float(value) for value in values)
    return None if math.isinf(middle) else middle
