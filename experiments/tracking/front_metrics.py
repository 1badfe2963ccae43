"""Fronts as metrics of which each step is one member, so that a line chart of one over another shows the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import TypeAlias

import numpy as np

from ecotone.experiments.tracking.names import FRONT, HELD_OUT_FRONT, member_axis, metric_names, pair_metrics, pairs_of
from ecotone.experiments.tracking.protocol import Line
from ecotone.experiments.tracking.summary import Summary
from ecotone.populations.fronts import non_dominated
from ecotone.populations.journal import Row
from ecotone.populations.trial import Goal, oriented

Scores: TypeAlias = Mapping[str, float]


def front_lines(summary: Summary, goals: Sequence[Goal], held_out: Sequence[Goal], now: int) -> list[Line]:
    """The front on search data, and its members' scores on held-out data; empty with one objective.

    - ``front/<objective>``: all members, by the first objective.
    - ``front_held_out/<objective>``: the same members, by the first held-out objective. They need not be a front
      there: that they are worse and out of order is what held-out data is for.
    - With more than two objectives ``front_pairs/...`` and ``front_held_out_pairs/...``, for each two objectives: the
      members that no other dominates in these two on search data, by the first of them.

    Args:
        summary: The end of a search.
        goals: Its objectives.
        held_out: Its held-out objectives.
        now: The time of all lines (unix milliseconds).
    """
    if len(goals) < 2:
        return []
    searched = [(row, row.scores or {}) for row in summary.front]
    measured = [(row, summary.held_out[row.number]) for row in summary.front if row.number in summary.held_out]
    lines = _whole(FRONT, goals, [scores for _, scores in searched], now)
    lines += _pairs(FRONT, goals, searched, goals, now)
    if len(held_out) > 1:
        lines += _whole(HELD_OUT_FRONT, held_out, [scores for _, scores in measured], now)
        lines += _pairs(HELD_OUT_FRONT, held_out, measured, goals, now)
    return lines


def _whole(group: str, goals: Sequence[Goal], members: Sequence[Scores], now: int) -> list[Line]:
    names = metric_names([goal.name for goal in goals])
    keys = {f"{group}/{names[goal.name]}": goal.name for goal in goals}
    return _steps(group, keys, sorted(members, key=itemgetter(goals[0].name)), now)


def _pairs(
    group: str, goals: Sequence[Goal], members: Sequence[tuple[Row, Scores]], searched: Sequence[Goal], now: int
) -> list[Line]:
    if len(goals) < 3:
        return []
    lines: list[Line] = []
    names = [goal.name for goal in goals]
    for x, y in pairs_of(names):
        chosen = _front_in([row for row, _ in members], [goal for goal in searched if goal.name in (x, y)])
        shown = [scores for row, scores in members if row.number in chosen]
        keys = dict(zip(pair_metrics(group, x, y, names), (x, y), strict=True))
        lines += _steps(f"{group}_pairs", keys, sorted(shown, key=itemgetter(x)), now)
    return lines


def _front_in(rows: Sequence[Row], goals: Sequence[Goal]) -> set[int]:
    """Numbers of the rows that no other dominates in two objectives; all when the search does not have both."""
    if len(goals) < 2 or not rows:
        return {row.number for row in rows}
    keep = non_dominated(np.array([oriented(row.scores or {}, goals) for row in rows]))
    return {row.number for row, kept in zip(rows, keep, strict=True) if kept}


def _steps(group: str, keys: Mapping[str, str], members: Sequence[Scores], now: int) -> list[Line]:
    """Member by member, so that a batch that is cut leaves no x without its y for long."""
    return [
        Line(step, now, {key: scores[name] for key, name in keys.items()}, axis=member_axis(group))
        for step, scores in enumerate(members)
    ]
