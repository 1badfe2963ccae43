"""Samples of an objective's examples. They grow in an order that a seed decides."""

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
    """The part of each objective's examples that a trial is to be scored on now.

    Examples come in an order drawn from ``seed``, the same for every trial. So a larger sample holds a smaller one, and
    trials are compared on the same examples.

    Args:
        seed: The seed of the order.
        start: The share of the examples that is scored already, from 0.
        stop: The share that is scored afterwards, above ``start``; 1 means all examples.
        seen: By objective name, (n,) scores of the examples up to ``start``, in that order.
    """

    seed: int
    start: float
    stop: float
    seen: Mapping[str, NDArray[Any]] = field(default_factory=dict, compare=False)

    @property
    def partial(self) -> bool:
        """True when examples are left out even afterwards."""
        return self.stop < 1.0

    @property
    def cost(self) -> float:
        """The share of the examples that is scored."""
        return self.stop - self.start

    def now(self, count: int) -> Integers:
        """The numbers of the examples to score, among an objective's ``count`` examples."""
        return order(self.seed, count)[reached(count, self.start) : reached(count, self.stop)]

    def then(self, count: int) -> Integers:
        """The numbers of the examples that have scores afterwards, in the order of the sample."""
        return order(self.seed, count)[: reached(count, self.stop)]


def reached(count: int, share: float) -> int:
    """The number of examples in a share of ``count``, rounded up."""
    return min(count, math.ceil(count * share - 1e-9))


@lru_cache(maxsize=256)
def order(seed: int, count: int) -> Integers:
    """(count,) the examples in the order of a seed; read-only."""
    shuffled = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(count,)))).permutation(count)
    shuffled.flags.writeable = False
    return shuffled


def error_of_mean(values: NDArray[Any], count: int) -> float:
    """The standard error of the mean of ``values`` (n,) as an estimate of the mean of all ``count``.

    Simple random sampling without replacement (Cochran 1977, equation 2.20). NaN for a single value of several.

    Args:
        values: Scores of the sample's examples.
        count: N, the number of all examples, these n included.
    """
    n = len(values)
    if n == count:
        return 0.0
    if n < 2:
        return math.nan
    return float(np.std(values.astype(np.float64), ddof=1)) * math.sqrt((1.0 - n / count) / n)


@dataclass(frozen=True)
class Estimate:
    """An estimate of a score on all examples.

    Args:
        value: In the objective's own direction.
        error: Its standard error; NaN where the sample is too small to tell.
        items: Number of examples behind it.
    """

    value: float
    error: float
    items: int


def estimate(value: float, error: float, seen: NDArray[Any], known: Sequence[NDArray[Any]], seed: int) -> Estimate:
    """A sample's score, made sharper by merges that are known on all examples: the regression estimator.

    A merge is likely to do well where its relatives (its parents) do. So its scores in the sample are regressed on
    theirs. Its score then moves by the difference between their means on all examples and in the sample (Cochran 1977,
    chapter 7; unlike item response theory this needs no model of items)::

        value + sum_p b_p (mean of p on all - mean of p in the sample),   error * sqrt(1 - R^2)

    The score stays as it is if the sample has fewer than ten examples for each relative, or if the relatives explain
    nothing. Relatives that equal the merge in the sample may differ from it elsewhere. So 1 - R^2 is at least 1 / n, as
    if they differed on one example.

    Args:
        value: The score of the sample.
        error: Its standard error.
        seen: (n,) the sample's scores, in its order.
        known: (N,) of each relative, all scores in the objective's order.
        seed: The seed of the sample.
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
