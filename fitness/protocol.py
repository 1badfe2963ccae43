"""The protocols of what measures a model: objectives, and the tasks that merge coefficients are tuned on.

An objective takes a model that already carries a candidate's weights and returns a score. It may also give one score
an example, which M2N2's competition and Pareto fronts by example need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ecotone.populations.genome import Integers
from ecotone.populations.samples import error_of_mean
from ecotone.populations.trial import Goal

if TYPE_CHECKING:
    from torch import Tensor

    from ecotone.fitness.data import Examples
    from ecotone.fitness.heads import Head


@dataclass(frozen=True)
class Score:
    """The score that an objective gives one model.

    Args:
        value: The score, in the objective's own direction; NaN or infinity makes the candidate fail.
        per_example: (N,) one score an example (bool for right or wrong); None where the objective has no such scores.
        items: Examples scored.
    """

    value: float
    per_example: NDArray[Any] | None = None
    items: int = 0


@runtime_checkable
class Objective(Protocol):
    """Measures a model. ``goal`` says the score's name and which way is better."""

    @property
    def goal(self) -> Goal:
        """Name and direction."""
        ...

    def score(self, model: Any) -> Score:
        """The score of ``model``: an ``nn.Module`` in evaluation mode, or a dict of tensors by name."""
        ...


@runtime_checkable
class Divisible(Objective, Protocol):
    """An objective that can be asked of some of its examples: one that races (``ecotone.search.racing``) can use."""

    @property
    def count(self) -> int:
        """N, how many examples there are."""
        ...

    def subset(self, numbers: Integers) -> Objective:
        """The same of the examples ``numbers`` (n,) alone, which it gives scores of in this order."""
        ...

    def pooled(self, each: NDArray[Any], numbers: Integers) -> tuple[float, float]:
        """The score of a model that has ``each`` (n,) on the examples ``numbers``, and its standard error as an
        estimate of the score on all: 0 where these are all.
        """
        ...


def pooled_mean(each: NDArray[Any], count: int) -> tuple[float, float]:
    """``Divisible.pooled`` of an objective whose score is the mean of its examples', ``count`` of them in all."""
    mean = np.count_nonzero(each) / each.size if each.dtype == np.bool_ else float(each.mean(dtype=np.float64))
    return mean, error_of_mean(each, count)


class CalibrationTask(Protocol):
    """A stream of batches of one task's examples, and the loss of a model on each. Batch ``step`` depends on nothing
    else: not on the batches asked for before, nor on the process.
    """

    @property
    def name(self) -> str:
        """The task's name."""

    @property
    def examples(self) -> Examples:
        """All examples, on the model's device."""

    @property
    def head(self) -> Head | None:
        """Makes the logits of the model's outputs; None where the outputs are the logits."""

    def fits(self, model: Any, experts: Sequence[str]) -> None:
        """Raise ``InputError`` where it is plain before the first batch that the loss cannot be computed.

        Args:
            model: The module that merges are shown in.
            experts: Names of the experts.
        """

    def prepare(self, step: int, expert: Callable[[str], Any]) -> None:
        """Make ready for ``loss`` on batch ``step``.

        Args:
            step: Number of the batch.
            expert: Returns the model with the weights of the expert of that name. Whatever weights it had are gone.
        """

    def loss(self, model: Any, step: int) -> tuple[Tensor, dict[str, float], int]:
        """The mean loss of ``model`` on batch ``step``, with its graph; details; and the number of examples.

        Raises:
            InputError: The model, its outputs or its gradients are not what the loss needs.
        """
