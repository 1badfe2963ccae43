"""The end of a search: the results of the whole run that are logged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ecotone.experiments.runs import reference_scores
from ecotone.experiments.tracking.names import acceptable, distinct, metric_names
from ecotone.experiments.tracking.scoreboard import Scoreboard
from ecotone.experiments.tracking.subject import Subject
from ecotone.populations.journal import Journal, Row
from ecotone.populations.trial import Evaluation, Goal, Scores


@dataclass(frozen=True)
class Summary:
    """The results that are logged at the end of a search.

    Args:
        metrics: Held-out scores of the best candidate, and scores of the merges to compare with.
        front: The rows of the front, sorted by the first objective.
        held_out: Scores on held-out data by trial number, for the members of the front that have such scores.
        references: Scores on search data of the merges to compare with.
        table: The front: ``columns``, and the rows as ``data``.
    """

    metrics: Mapping[str, float]
    front: Sequence[Row]
    held_out: Mapping[int, Mapping[str, float]]
    references: Sequence[Mapping[str, float]]
    table: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """A text that differs between the ends of a run."""
        text = json.dumps([self.metrics, self.table], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def front_mark(self) -> str:
        """A text that differs between the fronts of a run."""
        text = json.dumps([(row.number, row.number in self.held_out) for row in self.front])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def summary_of(journal: Journal, board: Scoreboard, subject: Subject) -> Summary:
    """The results at the end of the journal, held-out and reference scores included."""
    names = metric_names([goal.name for goal in (*subject.goals, *subject.held_out)])
    metrics: dict[str, float] = {}
    references = _references(journal)
    best = board.best([scores for _, _, scores in references if scores])
    if best is not None:
        held_out = _measured(journal.measurement(best.digest, Scores("held_out")))
        metrics |= {f"held_out/{names[goal.name]}": held_out[goal.name] for goal in _of(subject.held_out, held_out)}
    for reference, digest, searched in references:
        held_out = _measured(journal.measurement(digest, Scores("held_out")))
        for goal in _of(subject.goals, searched):
            metrics[f"references/{reference}/{names[goal.name]}"] = searched[goal.name]
        for goal in _of(subject.held_out, held_out):
            metrics[f"references/{reference}/held_out/{names[goal.name]}"] = held_out[goal.name]
    first = subject.goals[0].name if subject.goals else ""
    front = sorted(board.members.values(), key=lambda row: ((row.scores or {}).get(first, 0.0), row.number))
    held = {row.number: _measured(journal.measurement(row.digest, Scores("held_out"))) for row in front}
    return Summary(
        metrics,
        front,
        {number: scores for number, scores in held.items() if scores},
        [scores for _, _, scores in references if scores],
        _front_table(front, held, subject),
    )


def _of(goals: Iterable[Goal], scores: Mapping[str, float]) -> list[Goal]:
    return [goal for goal in goals if goal.name in scores]


def _measured(evaluation: Evaluation | None) -> Mapping[str, float]:
    return {} if evaluation is None or not evaluation.ok else evaluation.scores


def _references(journal: Journal) -> list[tuple[str, str, Mapping[str, float]]]:
    """Metric name, digest and search scores of each merge to compare with; a trial of the same genome counts."""
    references = reference_scores(journal)
    names = distinct({name: acceptable(name) for name, _, _ in references})
    return [(names[name], genome.digest, scores) for name, genome, scores in references]


def _front_table(front: Sequence[Row], measured: Mapping[int, Mapping[str, float]], subject: Subject) -> dict[str, Any]:
    goals = [goal.name for goal in subject.goals]
    held_out = [goal.name for goal in subject.held_out]
    data = []
    for row in front:
        scores = [(row.scores or {}).get(name) for name in goals]
        parents = " ".join(map(str, row.parents))
        data.append([row.number, row.digest, parents, *scores, *(measured[row.number].get(name) for name in held_out)])
    return {"columns": ["number", "digest", "parents", *goals, *(f"held_out/{n}" for n in held_out)], "data": data}
