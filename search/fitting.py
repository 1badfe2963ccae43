"""Evaluations that fit their trials: what a pool or a plug-in returns is checked once, before it is recorded.

An evaluation that does not fit is a failure of its candidate. Recorded as it is, it would end the search, and every
attempt to resume it. An objective that gives another number of scores by example than before makes such an evaluation:
the first candidate that is recorded with all examples says how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ecotone.fitness.scores import no_number
from ecotone.populations.samples import reached
from ecotone.populations.trial import Evaluation, Gathered, Goal, Gradient, Scores, Statistics, Trial, Wish


class Fitting:
    """Checks evaluations, and knows how many scores by example each objective gives.

    Args:
        goals: The objectives whose scores trials have; None where they are not known.
    """

    def __init__(self, goals: Sequence[Goal] | None = None) -> None:
        self._goals = None if goals is None else tuple(goal.name for goal in goals)
        self._counts: dict[str, int] | None = None
        self._checks: Mapping[type[Wish], Callable[[Trial, Evaluation], str]] = {
            Scores: self._scores,
            Gradient: self._gradient,
            Statistics: self._statistics,
        }

    def fitted(self, trial: Trial, evaluation: Any) -> Evaluation:
        """The evaluation, or the failure that it does not fit.

        Args:
            trial: What was to be measured.
            evaluation: What a pool returned for it.
        """
        misfit = self._misfit(trial, evaluation)
        if misfit:
            return Evaluation.failed("exception", f"the evaluation does not fit its candidate: {misfit}.")
        assert isinstance(evaluation, Evaluation)
        self.learn(trial, evaluation)
        return evaluation

    def learn(self, trial: Trial, evaluation: Evaluation) -> None:
        """Take the number of scores by example from the first evaluation on all examples."""
        if self._counts is None and evaluation.ok and trial.scored and isinstance(trial.wants, Scores):
            self._counts = {name: len(each) for name, each in evaluation.per_example.items()}

    def _misfit(self, trial: Trial, evaluation: Any) -> str:
        """Why an evaluation does not fit; empty when it does."""
        if not isinstance(evaluation, Evaluation):
            return f"expected an Evaluation, found {type(evaluation).__name__}"
        if evaluation.failure is not None:
            return ""
        for name, value in evaluation.scores.items():
            if type(value) is not float and (kind := no_number(value)) is not None:
                return f"{name}: expected a number, found {kind}"
            if not math.isfinite(value):
                return f"{name}: expected a finite number, found {value}"
        details: Mapping[str, Any] = evaluation.details
        for name, fact in details.items():
            if not isinstance(fact, str | int | float):
                return f"details: {name}: expected a text or a number, found {type(fact).__name__}"
        check = self._checks.get(type(trial.wants))
        return "" if check is None else check(trial, evaluation)

    def _scores(self, trial: Trial, evaluation: Evaluation) -> str:
        if self._goals is not None and not evaluation.scores.keys() >= set(self._goals):
            return f"expected scores of {_listed(self._goals)}, found {_listed(evaluation.scores)}"
        for name, each in evaluation.per_example.items():
            if not isinstance(each, np.ndarray) or each.ndim != 1 or each.dtype.kind not in "biuf":
                return f"{name}: expected scores by example of shape (N,), found {type(each).__name__}"
        return "" if self._counts is None else self._other_counts(trial, evaluation)

    def _other_counts(self, trial: Trial, evaluation: Evaluation) -> str:
        counts = self._counts or {}
        if trial.sample is not None:
            counts = {name: reached(count, trial.sample.stop) for name, count in counts.items()}
        found = {name: len(each) for name, each in evaluation.per_example.items()}
        for name in {**counts, **found} if found != counts else ():
            if found.get(name, 0) != counts.get(name, 0):
                return (
                    f"{name}: expected {counts.get(name, 'no')} scores by example, as the candidates before had, found "
                    f"{found.get(name, 'none')}"
                )
        return ""

    @staticmethod
    def _gradient(trial: Trial, evaluation: Evaluation) -> str:
        wish = trial.gradient
        assert wish is not None
        if not evaluation.scores.keys() >= set(wish.tasks):
            return f"expected losses of {_listed(wish.tasks)}, found {_listed(evaluation.scores)}"
        gradient, shape = evaluation.gradient, trial.genome.coefficients.shape
        if gradient is None or np.shape(gradient) != shape:
            return f"expected a gradient of shape {shape}, found {None if gradient is None else np.shape(gradient)}"
        return "" if np.isfinite(gradient).all() else "expected a finite gradient, found NaN or infinity"

    @staticmethod
    def _statistics(_trial: Trial, evaluation: Evaluation) -> str:
        kind = type(evaluation.statistics).__name__
        return "" if isinstance(evaluation.statistics, Gathered) else f"expected statistics, found {kind}"


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"
