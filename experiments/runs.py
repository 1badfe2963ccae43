"""A run as its journal tells it: status, front, references. Reads only; light enough to be asked while it runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from populations.errors import InputError
from populations.journal import Journal, Row
from populations.pareto import ParetoFront
from populations.population import mean_score
from populations.trial import Evaluation, Failure, Goal, Trial, oriented

JOURNAL = "journal.sqlite"


@dataclass(frozen=True)
class Scored:
    """A merge with what it scored.

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
        directory: The run directory.

    Raises:
        JournalError: There is no journal in it.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        with self.journal() as journal:
            self.name = journal.fact("name") or self.directory.name
            self.goals = goals(journal.fact("goals"))
            self.held_out_goals = goals(journal.fact("held_out_goals"))

    def journal(self) -> Journal:
        """The journal, for reading; close it after use."""
        return Journal.open(self.directory / JOURNAL)

    def status(self) -> dict[str, Any]:
        """Plain values: state, evaluations, failures, evaluations_per_second, best, digest and more."""
        with self.journal() as journal:
            rows = list(journal.rows())
            best = best_row(rows, self.goals)
            failed = [row for row in rows if row.failure is not None]
            elapsed = float(journal.fact("elapsed") or 0.0)
            state = journal.fact("state") or "starting"
            if state == "running" and not journal.in_use:
                state = "killed"
            return {
                "name": self.name,
                "directory": str(self.directory),
                "state": state,
                "algorithm": journal.fact("algorithm"),
                "signature": journal.fact("signature"),
                "seed": int(journal.fact("seed") or 0),
                "evaluations": len(rows),
                "budget": json.loads(journal.fact("budget") or "{}"),
                "failures": len(failed),
                "last_failure": _in_words(failed[-1].failure) if failed else None,
                "seconds": elapsed,
                "evaluations_per_second": len(rows) / elapsed if elapsed else 0.0,
                "best": None if best is None else {"id": best.number, "scores": best.scores},
                "front_size": len(front_rows(rows, self.goals)),
                "stop_reason": journal.fact("stop_reason"),
                "error": journal.fact("error"),
                "versions": json.loads(journal.fact("versions") or "{}"),
                "digest": journal.digest(),
            }

    def front(self) -> list[Scored]:
        """The Pareto front of everything scored, best mean first, with held-out scores where measured."""
        with self.journal() as journal:
            rows = front_rows(list(journal.rows()), self.goals)
            members = [_scored(journal, row) for row in rows]
        return sorted(members, key=lambda m: -_mean(m.scores, self.goals))

    def best(self) -> Scored | None:
        """The candidate of highest mean score on the search's objectives, or None."""
        with self.journal() as journal:
            row = best_row(list(journal.rows()), self.goals)
            return None if row is None else _scored(journal, row)

    def references(self) -> list[Scored]:
        """The seed models and their average, to compare with."""
        with self.journal() as journal:
            return [
                Scored(
                    name,
                    _scores(journal.measurement(genome.digest, "search")),
                    _scores(journal.measurement(genome.digest, "held_out")),
                )
                for name, genome in journal.references()
            ]

    def trial(self, member: int | str) -> Trial:
        """The trial of a member: its number, or ``best``.

        Raises:
            InputError: Nothing has been scored, or ``member`` is neither a number nor ``best``.
            JournalError: There is no such trial, or its dense weights were not kept.
        """
        if member == "best":
            best = self.best()
            if best is None:
                raise InputError(f"{self.directory}: nothing has been scored yet.", "See `ecotone status`.")
            member = best.id
        if not str(member).isdigit():
            raise InputError(
                f"member: expected a trial's number or 'best', found {member!r}.",
                f"`ecotone front {self.directory}` lists them.",
            )
        with self.journal() as journal:
            return journal.trial(int(member))

    def scored(self, number: int) -> Scored:
        """What a trial scored.

        Raises:
            InputError: It has no scores.
        """
        with self.journal() as journal:
            row = next((row for row in journal.rows(number - 1) if row.number == number), None)
            if row is None or row.scores is None or row.failure is not None:
                why = "has not been scored" if row is None else f"failed ({row.failure.message})" if row.failure else ""
                raise InputError(
                    f"member {number}: {why}.", f"`ecotone front {self.directory}` lists those that can be."
                )
            return _scored(journal, row)

    def export(self, member: int | str, to: str | Path) -> Path:
        """Write a member's weights: see ``experiments.exports.export``."""
        from experiments.exports import export

        return export(self, member, to)


def goals(text: str | None) -> tuple[Goal, ...]:
    """The goals that a journal's fact lists."""
    return tuple(Goal(name, direction) for name, direction in json.loads(text or "[]"))


def best_row(rows: Sequence[Row], wanted: Sequence[Goal]) -> Row | None:
    """The first row of highest mean oriented score, or None."""
    scored = [row for row in rows if row.scores and row.failure is None]
    return max(scored, key=lambda row: _mean(row.scores, wanted), default=None)


def front_rows(rows: Sequence[Row], wanted: Sequence[Goal]) -> list[Row]:
    """The rows that no other row dominates, in order of number."""
    front, by_number = ParetoFront(wanted), {}
    for row in rows:
        if row.scores and row.failure is None and front.add(row.number, oriented(row.scores, wanted)):
            by_number[row.number] = row
    return [by_number[number] for number in sorted(front.numbers)]


def _mean(scores: Mapping[str, float] | None, wanted: Sequence[Goal]) -> float:
    return -math.inf if not scores else mean_score(scores, wanted)


def _scored(journal: Journal, row: Row) -> Scored:
    return Scored(row.number, row.scores, _scores(journal.measurement(row.digest, "held_out")), row.parents)


def _in_words(failure: Failure | None) -> str | None:
    return None if failure is None else f"{failure.kind}: {failure.message}"


def _scores(evaluation: Evaluation | None) -> Mapping[str, float] | None:
    return None if evaluation is None or not evaluation.ok else evaluation.scores
