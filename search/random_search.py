"""Random search: coefficients drawn evenly from a box. The baseline every other search has to beat."""

from __future__ import annotations

from typing import Any

import numpy as np

from populations.genome import Genome, Integers
from populations.space import Space
from populations.trial import Evaluation, Outcome, Trial
from search.protocol import trial_rng


class RandomSearch:
    """Each trial's (S, K) coefficients are independent and uniform in ``[low, high]``.

    Args:
        space: The models' layout.
        borders: (S+1,) segment borders, as ``space.borders(granularity)`` gives them.
        low: Smallest coefficient.
        high: Largest coefficient.
        seed: The recipe's seed.
    """

    def __init__(self, space: Space, borders: Integers, low: float, high: float, seed: int) -> None:
        self.space = space
        self.borders = borders
        self.low, self.high = low, high
        self.seed = seed
        self._next = 0

    @property
    def done(self) -> bool:
        """Never."""
        return False

    def ask(self, n: int) -> list[Trial]:
        """``n`` new points."""
        trials = [Trial(number, self._genome(number)) for number in range(self._next, self._next + n)]
        self._next += n
        return trials

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        """Nothing to learn."""

    def state(self) -> dict[str, Any]:
        """The counter."""
        return {"next": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._next = state["next"]

    def _genome(self, number: int) -> Genome:
        shape = (len(self.borders) - 1, self.space.dimension)
        return Genome(np.asarray(self.borders), trial_rng(self.seed, number).uniform(self.low, self.high, shape))
