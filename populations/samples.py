"""Which examples a score stands on: a growing sample of each objective's, in an order that a seed decides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecotone.populations.genome import Floats, Integers


@dataclass(frozen=True)
class Sample:
    """Part of each objective's examples, those that a trial is to be scored on now.

    Examples are taken in an order drawn from ``seed``, the same for every trial, so that a larger sample holds a
    smaller one and trials are compared on the same examples.

    Args:
        seed: Of the order.
        start: The share of the examples that is scored already, from 0.
        stop: The share that is scored then, above ``start``; with 1 these are all.
        seen: By objective name, (n,) scores of the examples up to ``start``, in that order.
    """

    seed: int
    start: float
    stop: float
    seen: Mapping[str, NDArray[Any]] = field(default_factory=dict, compare=False)

    @property
    def partial(self) -> bool:
        """Whether examples are left out even then."""
        return self.stop < 1.0

    @property
    def cost(self) -> float:
        """The share of the examples that is scored."""
        return self.stop - self.start

    def now(self, count: int) -> Integers:
        """Which of an objective's ``count`` examples are to be scored."""
        return order(self.seed, count)[reached(count, self.start) : reached(count, self.stop)]

    def then(self, count: int) -> Integers:
        """Which of them have scores then, in the order of the sample."""
        return order(self.seed, count)[: reached(count, self.stop)]


def reached(count: int, share: float) -> int:
    """How many of ``count`` examples a share of them is: rounded up."""
    return min(count, math.ceil(count * share - 1e-9))


@lru_cache(maxsize=256)
def order(seed: int, count: int) -> Integers:
    """(count,) the examples in the order of a seed. Not to be written to."""
    found = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(count,)))).permutation(count)
    found.flags.writeable = False
    return found


def error_of_mean(values: NDArray[Any], count: int) -> float:
    """The standard error of the mean of ``values`` (n,) as an estimate of that of all ``count``: simple random
    sampling without replacement (Cochran 1977, equation 2.20). NaN for a single value of several.

    Args:
        values: Scores of the sample's examples.
        count: N, how many there are in all, n among them.
    """
    n = len(values)
    if n == count:
        return 0.0
    if n < 2:
        return math.nan
    return float(np.std(values.astype(np.float64), ddof=1)) * math.sqrt((1.0 - n / count) / n)


@dataclass(frozen=True)
class Estimate:
    """What a score on all examples is likely to be.

    Args:
        value: In the objective's own direction.
        error: Its standard error; NaN where the sample is too small to tell.
        items: Examples that it stands on.
    """

    value: float
    error: float
    items: int


def estimate(value: float, error: float, seen: NDArray[Any], known: Sequence[NDArray[Any]], seed: int) -> Estimate:
    """A sample's score made sharper by merges that are known on all examples: the regression estimator.

    Where the relatives of a merge (its parents) do well, the merge is likely to. So its scores in the sample are
    regressed on theirs, and its score is moved by what they have more, or less, on all examples than in the sample
    (Cochran 1977, chapter 7; the difference needs no model of items, as item response theory would)::

        value + sum_p b_p (mean of p on all - mean of p in the sample),   error * sqrt(1 - R^2)

    Where the sample has fewer than ten examples for each relative, or they tell nothing, it stays as it is. Relatives
    that are just like the merge in the sample need not be so elsewhere: 1 - R^2 is taken to be at least 1 / n, as if
    they differed on one example.

    Args:
        value: The score of the sample.
        error: Its standard error.
        seen: (n,) the sample's scores, in its order.
        known: (N,) of each relative, all scores in the objective's order.
        seed: Of the sample.
    """
    n = len(seen)
    plain = Estimate(value, error, n)
    if not known or n == len(known[0]) or n < 10 * (len(known) + 1):
        return plain
    whole = np.stack([one.astype(np.float64) for one in known], 1)
    part = whole[order(seed, len(whole))[:n]]
    centred, target = part - part.mean(0), seen.astype(np.float64) - seen.mean(dtype=np.float64)
    total = float(target @ target)
    if total == 0.0:
        return plain
    slopes: Floats = np.linalg.lstsq(centred, target, rcond=1e-9)[0]
    left = target - centred @ slopes
    unexplained = float(left @ left) / total * (n - 1) / (n - 1 - len(known))  # one minus the adjusted R squared
    unexplained = max(unexplained, 1.0 / n)
    if unexplained >= 1.0:
        return plain
    moved = float(slopes @ (whole.mean(0) - part.mean(0)))
    return Estimate(value + moved, error * math.sqrt(unexplained), n)
