"""AdaMerging: merge coefficients learned by gradient, from unlabelled examples.

Yang et al. 2024, "AdaMerging: Adaptive Model Merging for Multi-Task Learning" (arXiv:2310.02575). In

    theta = theta_0 + sum_k lambda_k tau_k

each task vector tau_k has one lambda (task-wise), or a lambda for each tensor (layer-wise). Adam (Kingma and Ba 2015)
minimises the entropy of the merged model's predictions, summed over the tasks. The recipe says which segments have
lambdas of their own (the model, blocks, tensors), and which loss a task has.

Entropy also falls when a merge predicts one class for everything. So the objectives score every line of descent now and
then, and the report warns when loss and score fell together. ``ecotone.search.descent`` has lines, steps and checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ecotone.populations.genome import Floats, Integers
from ecotone.populations.population import ElitistArchive
from ecotone.populations.trial import Goal
from ecotone.search.descent import Descent, GradientSettings, Line
from ecotone.search.kinds import Context, Pair

if TYPE_CHECKING:
    from ecotone.merging.operators.base import Operator


class AdaMergingSettings(GradientSettings):
    """AdaMerging: coefficients learned by gradient on the calibration tasks.

    Attributes:
        algorithm: ``adamerging``: coefficients learned by gradient on the calibration tasks.
        granularity: The parts of the model that have their own coefficients: each ``tensor`` (the paper's layer-wise
            form), the whole ``model`` (its task-wise form), ``groups`` of consecutive blocks, ``components`` (all
            attention tensors, all feed-forward tensors, and so on), or each ``block`` (the tensors of one layer).
        accumulate: Batches of each task in one step, which uses their mean gradient; the authors' code takes two.
        init: The first value of every coefficient, unless the search begins with given merges; the paper's is 0.3.
        rate: Adam's step size, in units of the coefficients; the paper's is 0.001.
        clamp: Mix with coefficients that are clamped to 0 and 1, as the paper does. Adam moves the coefficients before
            clamping, whose gradient is zero outside 0 to 1. With false, coefficients are free, and no gradient
            vanishes.
        spread: Standard deviation of the normal noise added to the coefficients of every restart but the first.
    """

    algorithm: Literal["adamerging"] = "adamerging"
    init: float = 0.3
    rate: float = Field(default=1e-3, gt=0)
    spread: float = Field(default=0.1, ge=0)
    clamp: bool = False

    @classmethod
    def suited(cls, operator: Operator) -> dict[str, float]:
        """The published merge, where all its coefficients are the same."""
        around = getattr(operator, "around", None)
        return {} if around is None else {"init": around}

    def make(self, context: Context) -> Pair:
        """The search, and an archive of the best merges of its checks."""
        space, parts = context.space, self.parts(context.space)
        starts = [parts.of(start) for start in context.starts] or None
        search = AdaMerging(
            parts.borders, space.dimension, context.tasks, context.goals, context.seed, self, starts, parts.owners
        )
        return search, ElitistArchive(context.goals, self.archive)


class AdaMerging(Descent[AdaMergingSettings]):
    """Adam on the coefficients themselves; ``Descent`` says how lines, steps and checks go.

    Args:
        borders: (S+1,) segment borders in the flat parameter vector.
        sources: K.
        tasks: Names of the T calibration tasks.
        goals: The objectives of the checks.
        seed: The recipe's seed, for restarts.
        settings: Step size, steps, weights and so on; None for the defaults.
        starts: (R, K) coefficients of each merge to start from; None for ``settings.init`` everywhere.
        owners: (S,) for each segment, which of R rows of coefficients it has; None where each has its own (R = S).

    Raises:
        InputError: As for ``Descent``.

    Example::

        from ecotone.populations.population import ElitistArchive
        from ecotone.populations.trial import Outcome
        from ecotone.search.adamerging import AdaMerging, AdaMergingSettings

        archive = ElitistArchive(goals, capacity=20)
        settings = AdaMergingSettings(steps=50, rate=0.01)
        search = AdaMerging(space.tensor_borders, space.dimension, ["left", "right"], goals, 0, settings)
        while not search.done:
            for trial in search.ask(4):
                if trial.gradient is None:  # a check
                    evaluation = score(trial.genome)
                    outcome = archive.add(trial, evaluation)
                else:  # a gradient by the coefficients
                    evaluation, outcome = gradient(trial), Outcome(accepted=False)
                search.tell(trial, evaluation, outcome)
        learned = search.report()["lines"][0]["coefficients"]  # (S, K)
    """

    def __init__(
        self,
        borders: Integers,
        sources: int,
        tasks: Sequence[str],
        goals: Sequence[Goal],
        seed: int,
        settings: AdaMergingSettings | None = None,
        starts: Sequence[Floats] | None = None,
        owners: Integers | None = None,
    ) -> None:
        super().__init__(borders, sources, tasks, goals, seed, settings or AdaMergingSettings(), starts, owners)

    def _used(self, point: Floats) -> Floats:
        return np.clip(point, 0.0, 1.0) if self.settings.clamp else point

    def _pulled(self, line: Line, gradient: Floats) -> Floats:
        return np.where(self._outside(line), 0.0, gradient)

    def _outside(self, line: Line) -> NDArray[np.bool_]:
        """(R, K) True where clamping changes the coefficient."""
        return np.asarray(line.adam.point != self._used(line.adam.point))

    def _warnings(self, line: Line) -> Iterator[str]:
        yield from super()._warnings(line)
        stuck = int(np.count_nonzero(self._outside(line)))
        if stuck:
            yield (
                f"line {line.index}: {stuck} of {line.adam.point.size} coefficients ended outside [0, 1], where "
                "clamping makes gradients vanish; without clamp they stay free."
            )
