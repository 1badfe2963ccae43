"""A user's preference in a few words, and the member of a front that fits it best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from ecotone.experiments.runs import Run, Scored, points_of
from ecotone.populations.errors import InputError, nearest
from ecotone.populations.genome import Floats
from ecotone.populations.trial import Goal

Form: TypeAlias = Literal["weights", "point"]

POINT = "at:"  # begins a reference point
AUGMENTATION = 1e-3  # of the sum in the achievement: small, so that it only settles ties of the minimum
_REMEDY = 'Write weights, as in "a=0.7,b=0.3", or a point to reach, as in "at:a=0.9,b=0.8".'


@dataclass(frozen=True)
class Preference:
    """Weights of the objectives, or a point to reach.

    Args:
        text: The text that the user wrote.
        form: ``weights`` or ``point``.
        values: By objective. Objectives that are not named have weight 0. A point is in the scores' own units and
            direction, and puts no demand on objectives that are not named.
    """

    text: str
    form: Form
    values: Mapping[str, float]


def parse(text: str, goals: Sequence[Goal]) -> Preference:
    """The preference that ``text`` states over ``goals``.

    Raises:
        InputError: It is empty or contradictory (an objective twice, weights and a point in one), names an
            unknown objective, or has weights that are negative or all zero.
    """
    form: Form = "point" if text.strip().startswith(POINT) else "weights"
    values = numbers(text.strip().removeprefix(POINT), goals, "--preference", _REMEDY)
    if form == "weights":
        _check_weights(values)
    return Preference(text, form, values)


def reference_numbers(text: str, goals: Sequence[Goal]) -> dict[str, float]:
    """The numbers of ``--reference`` by objective, in score units.

    Raises:
        InputError: As for ``numbers``.
    """
    return numbers(text, goals, "--reference", 'As in "a=0.2,b=0.1".')


def numbers(text: str, goals: Sequence[Goal], option: str, remedy: str) -> dict[str, float]:
    """The finite numbers by objective that ``text`` gives as ``a=0.7,b=0.3``; errors name ``option``.

    Raises:
        InputError: The text is empty or not of that form, or names an objective twice or an unknown one.
    """
    values: dict[str, float] = {}
    known = [goal.name for goal in goals]
    for part in text.split(","):
        name, equals, number = (word.strip() for word in part.rpartition("="))
        if not equals or not name:
            raise InputError(f"{option}: expected OBJECTIVE=NUMBER, found {part.strip()!r}.", remedy)
        if name.startswith(POINT):
            raise InputError(f"{option}: expected weights or a point to reach, found both in {text!r}.", remedy)
        if name not in known:
            raise InputError(f"{option}: there is no objective {name!r}.", nearest(name, known))
        if name in values:
            raise InputError(f"{option}: expected {name!r} once, found it twice.", remedy)
        values[name] = _number(number, name, option)
    return values


def choose(points: Floats, goals: Sequence[Goal], preference: Preference) -> int:
    """The index of the point that fits the preference best; of equals the first.

    With weights: ``argmax w . z``, where ``z`` are the scores as shares of the range of ``points``, 0 the worst
    and 1 the best in each objective (MAP's rule; scaling all weights changes nothing). Such sums can only pick
    members of the front's convex hull. With a point ``r``: the largest augmented Chebyshev achievement

        min_i (y_i - r_i) / range_i  +  1e-3 sum_i (y_i - r_i) / range_i        (Wierzbicki 1980)

    over the objectives that the point names (and all of them in the sum), which can pick any member.

    Args:
        points: (N, M) oriented scores, usually a front.
        goals: The M objectives.
        preference: The result of ``parse``.

    Raises:
        InputError: There are no points.
    """
    if not len(points):
        raise InputError(
            "--preference: there is nothing to choose from, as the front is empty.", "See `ecotone status`."
        )
    span = np.ptp(points, axis=0)
    span[span == 0] = 1.0
    if preference.form == "weights":
        weights = np.array([preference.values.get(goal.name, 0.0) for goal in goals])
        # Rounded, so that members that are equal in words are equal in numbers and the first is taken.
        return int(np.argmax(((points - points.min(axis=0)) / span @ weights).round(12)))
    named = np.array([goal.name in preference.values for goal in goals])
    wanted = np.array([goal.sign * preference.values.get(goal.name, 0.0) for goal in goals])
    gaps = (points - wanted) / span
    return int(np.argmax((gaps[:, named].min(axis=1) + AUGMENTATION * gaps.sum(axis=1)).round(12)))


def shortfalls(point: Floats, goals: Sequence[Goal], preference: Preference) -> dict[str, float]:
    """By objective, the gap between the oriented ``point`` (M,) and the point to reach; empty if it reaches it."""
    if preference.form == "weights":
        return {}
    by_name = {goal.name: (goal.sign, score) for goal, score in zip(goals, point, strict=True)}
    gaps = {name: by_name[name][0] * value - by_name[name][1] for name, value in preference.values.items()}
    return {name: float(gap) for name, gap in gaps.items() if gap > 1e-12}


@dataclass(frozen=True)
class Choice:
    """The member of a front that a preference picks.

    Args:
        member: The member.
        reason: Why, in a sentence.
        missing: The distance by which it misses the point to reach, by objective; empty if it reaches it.
    """

    member: Scored
    reason: str
    missing: Mapping[str, float]


def choose_member(run: Run, text: str) -> Choice:
    """The member of the front of ``run`` that fits the preference ``text``.

    Raises:
        InputError: The preference cannot be understood, or there is no front.
    """
    preference, members = parse(text, run.goals), run.front_or_explain()
    points = points_of((member.scores for member in members), run.goals)
    index = choose(points, run.goals, preference)
    missing = shortfalls(points[index], run.goals, preference)
    return Choice(members[index], in_words(preference, missing), missing)


def in_words(preference: Preference, missing: Mapping[str, float]) -> str:
    """The reason for the choice, in one sentence."""
    if preference.form == "weights":
        return f"best weighted sum of scores, as shares of the front's range, for {preference.text}"
    if not missing:
        return f"reaches {preference.text.strip()}, with the most to spare"
    parts = ", ".join(f"{name} by {gap:.4g}" for name, gap in missing.items())
    return f"no member reaches {preference.text.strip()}; this one comes nearest and misses {parts}"


def _check_weights(values: Mapping[str, float]) -> None:
    for name, weight in values.items():
        if weight < 0:
            raise InputError(
                f"--preference: expected weights of 0 or more, found {weight:g} for {name!r}.",
                "A larger weight means that the objective matters more, whatever its direction.",
            )
    if not any(values.values()):
        raise InputError("--preference: expected at least one weight above 0, found none.", _REMEDY)


def _number(text: str, name: str, option: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{option}: expected a number for {name!r}, found {text!r}.", f"As in {name}=0.7.")
    return value
