"""Random search: coefficients drawn evenly from a box. The baseline every other search has to beat."""

from __future__ import annotations

from typing import Any, Literal

from ecotone.populations.population import ElitistArchive
from ecotone.populations.trial import Evaluation, Outcome, Trial
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.kinds import Begins, Box, Context, Needs, Pair
from ecotone.search.racing import RaceSettings, raced


class RandomSettings(Box):
    """Random search: coefficients drawn evenly. The baseline every other search has to beat.

    Attributes:
        algorithm: ``random``.
        race: Score candidates on some of the examples first (``ecotone.search.racing``); None for no race.
    """

    algorithm: Literal["random"] = "random"
    race: RaceSettings | None = None

    def needs(self) -> Needs:
        """One objective."""
        return Needs()

    def begins(self) -> Begins:
        """It cannot."""
        return Begins("random search has no use for merges to begin with")

    def make(self, context: Context) -> Pair:
        """The search, and an archive of the best."""
        search = RandomSearch(self.box(context), context.seed)
        return raced((search, ElitistArchive(context.goals, self.archive)), context, self.race)


class RandomSearch:
    """Each trial's coefficients are independent and uniform in the box.

    Args:
        box: Where coefficients lie.
        seed: The recipe's seed.
    """

    def __init__(self, box: CoefficientBox, seed: int) -> None:
        self.box = box
        self.seed = seed
        self._next = 0

    @property
    def done(self) -> bool:
        """Never."""
        return False

    def ask(self, n: int) -> list[Trial]:
        """``n`` new points."""
        numbers = range(self._next, self._next + n)
        trials = [Trial(number, self.box.genome(self.box.draw(self.seed, number))) for number in numbers]
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
