"""Random search: coefficients drawn evenly from a box. Every other search has to beat this baseline."""

from __future__ import annotations

from typing import Any, Literal

from ecotone.populations.population import ElitistArchive
from ecotone.populations.trial import Evaluation, Outcome, Trial
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.kinds import Begins, Box, Context, Needs, Pair
from ecotone.search.racing import RaceSettings, raced


class RandomSettings(Box):
    """Random search: coefficients drawn evenly from a box. Every other search has to beat this baseline.

    Attributes:
        algorithm: ``random``: coefficients drawn evenly between ``low`` and ``high``.
        race: Score every candidate on some of the examples first, and only the promising candidates on all
            (``ecotone.search.racing``). None scores every candidate on all examples.
    """

    algorithm: Literal["random"] = "random"
    race: RaceSettings | None = None

    def needs(self) -> Needs:
        """It needs no more than one objective."""
        return Needs()

    def begins(self) -> Begins:
        """It cannot begin with merges."""
        return Begins("random search has no use for merges to begin with")

    def make(self, context: Context) -> Pair:
        """The search, and an archive of the best."""
        search = RandomSearch(self.box(context), context.seed)
        return raced((search, ElitistArchive(context.goals, self.archive)), context, self.race)


class RandomSearch:
    """Random search: each trial's coefficients are independent and uniform in the box.

    Args:
        box: The bounds of the coefficients.
        seed: The recipe's seed.

    Example::

        from ecotone.populations.population import ElitistArchive
        from ecotone.search.random_search import RandomSearch

        archive = ElitistArchive(goals, capacity=20)
        search = RandomSearch(box, seed=0)
        for trial in search.ask(100):
            evaluation = score(trial.genome)
            search.tell(trial, evaluation, archive.add(trial, evaluation))
    """

    def __init__(self, box: CoefficientBox, seed: int) -> None:
        self.box = box
        self.seed = seed
        self._next = 0

    @property
    def done(self) -> bool:
        """Never: it draws until the budget is spent."""
        return False

    def ask(self, n: int) -> list[Trial]:
        """``n`` new points."""
        numbers = range(self._next, self._next + n)
        trials = [Trial(number, self.box.genome(self.box.draw(self.seed, number))) for number in numbers]
        self._next += n
        return trials

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        """Do nothing: it learns from no score."""

    def state(self) -> dict[str, Any]:
        """The counter."""
        return {"next": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._next = state["next"]
