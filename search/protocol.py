"""The protocol of search algorithms: ask for trials, tell their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ecotone.populations.trial import Evaluation, Outcome, Trial

SLACK = 1e-6
"""Evaluations by which a sum of shares of them may be off."""


class Search(Protocol):
    """An algorithm that proposes merges.

    The manager calls ``ask(n)``, has the trials scored, gives each evaluation to the population and then to
    ``tell``, with what the population said. Results come in trial order under ``order: strict``. A search must
    depend on nothing but its arguments and these calls, so that replaying them rebuilds it exactly: the
    randomness of trial ``number`` comes from ``trial_rng(seed, number)``.
    """

    def ask(self, n: int) -> list[Trial]:
        """Up to ``n`` trials, numbered on from the last; none (and nothing changed) while it waits for results."""

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        """Learn the scores of a trial. A failed evaluation is a result, too."""

    @property
    def done(self) -> bool:
        """True when the algorithm has nothing more to propose."""

    def state(self) -> dict[str, Any]:
        """Everything later calls depend on, besides the arguments and the population: numbers, text, arrays."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state`` of a search built with the same arguments."""


def trial_rng(seed: int, number: int) -> np.random.Generator:
    """The generator of one trial: it depends on the recipe's seed and the trial's number, on nothing else."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=(number,))))


def numbered(start: int, trials: Sequence[Trial]) -> bool:
    """True when the trials' numbers run on from ``start``."""
    return [trial.number for trial in trials] == list(range(start, start + len(trials)))
