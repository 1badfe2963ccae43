"""A run as its journal shows it: status, front, references. Reading only, and cheap enough while the run goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ecotone.experiments import storage
from ecotone.experiments.accepted import accepted_texts
from ecotone.experiments.storage import JOURNAL as JOURNAL
from ecotone.populations import facts
from ecotone.populations.errors import InputError
from ecotone.populations.fronts import hypervolume
from ecotone.populations.genome import Floats, Genome
from ecotone.populations.journal import Journal, Row
from ecotone.populations.pareto import ParetoFront
from ecotone.populations.ranking import Scale
from ecotone.populations.trial import Evaluation, Failure, Goal, Scores, Trial, oriented


@dataclass(frozen=True)
class Scored:
    """A merge and its scores.

    Args:
        id: The trial's number, or the name of a reference merge (a seed model, the average).
        scores: On the search's objectives, as they report them.
        held_out: On the held-out objectives; None when not measured (yet).
        parents: Numbers of the trials it was bred from.
    """

    id: int | str
    scores: Mapping[str, float] | None
    held_out: Mapping[str, float] | None
    parents: tuple[int, ...] = ()

    def record(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


class Run:
    """A run directory, open for reading.

    Args:
        directory: The run directory. From a URL its newest copy is fetched.

    Attributes:
        directory: The folder of its files.
        where: The name that the user knows it by: a path, or a URL.

    Raises:
        JournalError: There is no journal in it.
        StorageError: The URL cannot be read.
    """

    def __init__(self, directory: str | Path) -> None:
        distant = storage.is_url(str(directory))
        self.directory: Path = storage.fetched(str(directory)) if distant else Path(directory)
        self._url = storage.named(str(directory)) if distant else storage.url_of(self.directory)
        self.where: str = self._url or str(self.directory)
        with self.journal() as journal:
            self.name: str = journal.fact(facts.NAME) or self.directory.name
            self.goals: tuple[Goal, ...] | tuple[()] = journal.fact(facts.GOALS) or ()
            self.held_out_goals: tuple[Goal, ...] | tuple[()] = journal.fact(facts.HELD_OUT_GOALS) or ()

    @property
    def label(self) -> str:
        """The last part of its name."""
        return (self._url or str(self.directory.resolve())).rsplit("/", 1)[-1]

    def check_search(self) -> None:
        """Refuse a directory that `ecotone statistics` made.

        Raises:
            InputError: It holds statistics, and no search.
        """
        with self.journal() as journal:
            check_search(journal, self.where)

    def journal(self) -> Journal:
        """The journal, for reading; close it after use."""
        return Journal.open(self.directory / JOURNAL)

    def status(self) -> dict[str, Any]:
        """Plain values: state, evaluations, failures, evaluations_per_second, best, digest and more.

        For a run at a URL, ``storage`` names its manager and the time of its newest copy.
        """
        standing = storage.not_asked(self.directory) if self._url is None else storage.standing(self._url)
        with self.journal() as journal:
            everything = list(journal.rows(unscored=True))
            rows = [row for row in everything if row.scored]
            front = front_rows(rows, self.goals)
            best = best_row(front, self._scale(journal, rows))
            failed = [row for row in everything if row.failure is not None]
            elapsed = journal.fact(facts.ELAPSED) or 0.0
            state = journal.fact(facts.STATE) or "starting"
            if state == "running" and not (journal.in_use or (standing and standing["managed"])):
                state = "killed"
            return {
                "name": self.name,
                "directory": self.where,
                "storage": standing,
                "state": state,
                "holds": "a search" if self.goals else "statistics, no search",
                "algorithm": journal.fact(facts.ALGORITHM),
                "signature": journal.fact(facts.SIGNATURE),
                "seed": journal.fact(facts.SEED) or 0,
                "evaluations": len(rows),
                "samples": sum(row.partial for row in everything),
                "gradients": sum(row.gradient is not None for row in everything),
                "statistics": sum(row.statistics is not None for row in everything) + len(journal.statistics()),
                "budget": journal.fact(facts.BUDGET) or {},
                "failures": len(failed),
                "last_failure": _in_words(failed[-1].failure) if failed else None,
                "seconds": elapsed,
                "evaluations_per_second": len(rows) / elapsed if elapsed else 0.0,
                "best": None if best is None else {"id": best.number, "scores": best.scores},
                "front_size": len(front),
                **self._hypervolume(rows, front, {}),
                "accepted_changes": accepted_texts(journal),
                "stop_reason": journal.fact(facts.STOP_REASON),
                "error": journal.fact(facts.ERROR),
                "versions": journal.fact(facts.VERSIONS) or {},
                "digest": journal.digest(),
            }

    def front(self) -> list[Scored]:
        """The Pareto front of everything scored, the best first, with held-out scores where measured.

        Raises:
            InputError: As for ``check_search``.
        """
        self.check_search()
        with self.journal() as journal:
            rows = list(journal.rows())
            scale, members = self._scale(journal, rows), [_scored(journal, row) for row in front_rows(rows, self.goals)]
        means = scale.means(points_of((member.scores for member in members), self.goals))
        return [members[i] for i in np.argsort(-means, kind="stable")]

    def hypervolume(self, given: Mapping[str, float] = MappingProxyType({})) -> dict[str, Any]:
        """``hypervolume`` of the front and the ``reference_point`` it is measured from, in score units.

        Empty with one objective, or without a front.

        Args:
            given: Numbers of the reference point by objective; the others are those of ``reference_point``.
        """
        with self.journal() as journal:
            rows = list(journal.rows())
        return self._hypervolume(rows, front_rows(rows, self.goals), given)

    def _hypervolume(self, rows: Sequence[Row], front: Sequence[Row], given: Mapping[str, float]) -> dict[str, Any]:
        if len(self.goals) < 2 or not front:
            return {}
        points = points_of((row.scores for row in rows if row.failure is None), self.goals)
        seeds = points_of((one.scores for one in self.references()), self.goals)
        corner = reference_point(points, seeds, self.goals, given)
        members = points_of((row.scores for row in front), self.goals)
        return {"hypervolume": hypervolume(members, corner), "reference_point": in_score_units(corner, self.goals)}

    def front_or_explain(self) -> list[Scored]:
        """The front, which has at least one member.

        Raises:
            InputError: Nothing has scores (yet).
        """
        members = self.front()
        if not members:
            raise InputError(f"{self.where}: there is no front, as {self._why_empty()}.", "See `ecotone status`.")
        return members

    def _why_empty(self) -> str:
        with self.journal() as journal:
            count = sum(1 for _ in journal.rows())
        return f"none of its {count} evaluations has scores" if count else "nothing has been scored yet"

    def report(self) -> Mapping[str, Any] | None:
        """The search's own report at its end: a predicted front, errors of surrogates, a tree; None without one."""
        with self.journal() as journal:
            return journal.fact(facts.REPORT)

    def best(self) -> Scored | None:
        """The best candidate on the search's objectives (``ecotone.populations.ranking``), or None.

        Raises:
            InputError: As for ``check_search``.
        """
        self.check_search()
        with self.journal() as journal:
            rows = list(journal.rows())
            row = best_row(front_rows(rows, self.goals), self._scale(journal, rows))
            return None if row is None else _scored(journal, row)

    def scales(self) -> tuple[Scale, Scale]:
        """The scales of the means of scores on search data, and of those on held-out data."""
        with self.journal() as journal:
            rows = list(journal.rows())
            searched = self._scale(journal, rows)
            measured = [_scored(journal, row).held_out for row in front_rows(rows, self.goals)]
        references = points_of((one.held_out for one in self.references()), self.held_out_goals)
        return searched, Scale.of(self.held_out_goals, points_of(measured, self.held_out_goals), references)

    def _scale(self, journal: Journal, rows: Sequence[Row]) -> Scale:
        """The scale of scores on search data."""
        references = (scores for _, _, scores in reference_scores(journal, rows))
        candidates = points_of((row.scores for row in rows if row.failure is None), self.goals)
        return Scale.of(self.goals, candidates, points_of(references, self.goals))

    def examples(self) -> dict[str, dict[str, int]]:
        """The number of examples behind each score: by ``search`` and ``held_out``, and by objective."""
        with self.journal() as journal:
            return {"search": journal.examples("search"), "held_out": journal.examples("held_out")}

    def references(self) -> list[Scored]:
        """The seed models and their average, to compare with."""
        with self.journal() as journal:
            return [
                Scored(
                    name,
                    _scores(journal.measurement(genome.digest, Scores())),
                    _scores(journal.measurement(genome.digest, Scores("held_out"))),
                )
                for name, genome in journal.references()
            ]

    def trial(self, member: int | str) -> Trial:
        """The trial of a member: its number, or ``best``.

        Raises:
            InputError: Nothing has been scored, or ``member`` is neither a number nor ``best``.
            JournalError: There is no such trial, or its dense weights were not kept.
        """
        self.check_search()
        if member == "best":
            best = self.best()
            if best is None:
                raise InputError(f"{self.where}: nothing has been scored yet.", "See `ecotone status`.")
            member = best.id
        if not str(member).isdecimal():
            raise InputError(
                f"member: expected a trial's number or 'best', found {member!r}.",
                f"`ecotone front {self.where}` lists the members.",
            )
        with self.journal() as journal:
            return journal.trial(int(member))

    def scored(self, number: int) -> Scored:
        """The scores of a trial.

        Raises:
            InputError: It has no scores.
        """
        with self.journal() as journal:
            row = next((row for row in journal.rows(number - 1) if row.number == number), None)
            if row is None or row.scores is None or row.failure is not None:
                why = "has not been scored" if row is None else f"failed ({row.failure.message})" if row.failure else ""
                raise InputError(f"member {number}: {why}.", f"`ecotone front {self.where}` lists members with scores.")
            return _scored(journal, row)

    def export(
        self,
        member: int | str,
        to: str | Path,
        *,
        accept_changes: bool = False,
        trust: bool = False,
        folders: tuple[str, ...] = (),
    ) -> Path:
        """Write a member's weights: see ``ecotone.experiments.exports.export``."""
        from ecotone.experiments.exports import export

        return export(self, member, to, accept_changes=accept_changes, trust=trust, folders=folders)


def check_search(journal: Journal, where: str) -> None:
    """Refuse the journal of `ecotone statistics`, which has no objectives.

    Args:
        journal: The journal of a run.
        where: How the user names its directory.

    Raises:
        InputError: It holds statistics, and no search.
    """
    if journal.fact(facts.GOALS) is None:
        raise InputError(
            f"{where}: expected a search, found statistics alone.",
            f"`ecotone status {where}` shows them; `ecotone statistics RECIPE --kind KIND --out {where}` gathers more.",
        )


def best_row(front: Sequence[Row], scale: Scale) -> Row | None:
    """The best row of a front, or None of an empty one."""
    points = points_of((row.scores for row in front), scale.goals)
    return front[scale.best([row.number for row in front], points)] if front else None


def reference_scores(
    journal: Journal, rows: Iterable[Row] | None = None
) -> list[tuple[str, Genome, Mapping[str, float]]]:
    """Names, genomes and search scores (empty where there are none) of the merges to compare with.

    A trial of the same genome counts, until they are measured themselves.

    Args:
        journal: The journal.
        rows: The rows of its scored trials, where they have been read; None reads them if they are needed.
    """
    references = journal.references()
    scores = {genome.digest: _scores(journal.measurement(genome.digest, Scores())) for _, genome in references}
    if any(found is None for found in scores.values()):
        for row in journal.rows() if rows is None else rows:
            if row.failure is None and row.digest in scores and not scores[row.digest]:
                scores[row.digest] = row.scores
    return [(name, genome, scores[genome.digest] or {}) for name, genome in references]


def front_rows(rows: Sequence[Row], wanted: Sequence[Goal]) -> list[Row]:
    """The rows that no other row dominates, in order of number."""
    front, by_number = ParetoFront(wanted), {}
    for row in rows:
        if wanted and row.scores and row.failure is None and front.add(row.number, oriented(row.scores, wanted)):
            by_number[row.number] = row
    return [by_number[number] for number in sorted(front.numbers)]


def points_of(scores: Iterable[Mapping[str, float] | None], wanted: Sequence[Goal]) -> Floats:
    """(N, M) oriented scores, larger is better. Entries without scores are left out."""
    rows = [oriented(one, wanted) for one in scores if one]
    return np.array(rows) if rows else np.zeros((0, len(wanted)))


def reference_point(
    points: ArrayLike, seeds: ArrayLike, wanted: Sequence[Goal], given: Mapping[str, float] = MappingProxyType({})
) -> Floats:
    """(M,) the oriented point from which hypervolumes are measured.

    The user may give a number for each objective. The default is 0 in an objective that is maximised and scored in
    [0, 1]. In others it is the worst score of the seed models and their average, or of all candidates while those are
    not measured.

    Args:
        points: (N, M) oriented scores of candidates.
        seeds: (J, M) oriented scores of the reference merges.
        wanted: The M objectives.
        given: The user's numbers by objective, in score units.
    """
    candidates, references = np.asarray(points), np.asarray(seeds)
    everything = np.concatenate([candidates, references])
    share = (everything >= 0).all(axis=0) & (everything <= 1).all(axis=0)
    worst = (references if len(references) else candidates).min(axis=0, initial=math.inf)
    plain = share & np.array([goal.direction == "maximize" for goal in wanted])
    default = np.where(plain | ~np.isfinite(worst), 0.0, worst)
    pairs = zip(wanted, default, strict=True)
    return np.array([goal.sign * given[goal.name] if goal.name in given else value for goal, value in pairs])


def in_score_units(point: Floats, wanted: Sequence[Goal]) -> dict[str, float]:
    """The oriented ``point`` (M,) as the objectives report it."""
    return {goal.name: float(goal.sign * value) + 0.0 for goal, value in zip(wanted, point, strict=True)}


def _scored(journal: Journal, row: Row) -> Scored:
    return Scored(row.number, row.scores, _scores(journal.measurement(row.digest, Scores("held_out"))), row.parents)


def _in_words(failure: Failure | None) -> str | None:
    return None if failure is None else f"{failure.kind}: {failure.message}"


def _scores(evaluation: Evaluation | None) -> Mapping[str, float] | None:
    return None if evaluation is None or not evaluation.ok else evaluation.scores
