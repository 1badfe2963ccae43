"""Sampling designs: where in the box of coefficients to measure merges before anything is known about them."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import scipy  # its parts are imported when they are used

from ecotone.populations.errors import InputError, nearest
from ecotone.populations.genome import Floats
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.surrogates import features, minimum

DesignName: TypeAlias = Literal["mixed", "sobol", "grid", "random"]
DESIGNS: tuple[DesignName, ...] = ("mixed", "sobol", "grid", "random")
STREAM = (0, 3_735_928_559)  # spawn key of a design's generator; those of trials have one number
ISOTROPIC = ONE_HOT = 0.2  # shares of a mixed design, besides the models themselves
JITTER = 0.1  # standard deviation of jittered points, in widths of the box
TRIES = 8  # mixed designs drawn, of which the best-conditioned is taken


def design(
    kind: DesignName,
    count: int,
    box: CoefficientBox,
    seed: int,
    seeds: Floats | None = None,
) -> Floats:
    """Points to measure first.

    ``mixed`` is MAP's mixture: every model itself, points with all coefficients equal (half of them jittered, and
    all beyond three, which determine a quadratic on that line), jittered models, and the rest a scrambled Sobol
    sequence. ``sobol`` and ``random`` fill the box evenly; ``grid``
    is a random part of the smallest regular grid that has enough points, and three a side at least, because fewer
    show no curvature.

    Args:
        kind: The kind of design.
        count: N, how many points.
        box: The bounds of the coefficients.
        seed: The recipe's seed.
        seeds: (J, K) coefficients of the models themselves, or (J, D) where parts differ, only for ``mixed``;
            None means one-hot vectors.

    Returns:
        (N, D) points in the box.

    Raises:
        InputError: There is no such design, or ``seeds`` have another number of columns than there are sources.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=STREAM))
    if kind == "mixed":
        return _mixed(count, box, rng, _tiled(box, np.eye(box.sources) if seeds is None else seeds))
    if kind == "grid":
        return _grid(count, box, rng)
    if kind == "sobol":
        return box.low + (box.high - box.low) * sobol(count, box.size, rng)
    if kind == "random":
        return rng.uniform(box.low, box.high, (count, box.size))
    raise InputError(f"search.design: there is no design {kind!r}.", nearest(kind, DESIGNS))


def sobol(count: int, size: int, rng: np.random.Generator) -> Floats:
    """(count, size) first points in the unit cube of a scrambled Sobol sequence."""
    power = max(0, int(np.ceil(np.log2(max(count, 1)))))
    words = rng.integers(2**63)  # an integer seed means the same to every version of scipy
    return np.asarray(scipy.stats.qmc.Sobol(size, scramble=True, seed=int(words)).random_base2(power)[:count])


def _mixed(count: int, box: CoefficientBox, rng: np.random.Generator, models: Floats) -> Floats:
    """The mixture; of several draws the one whose quadratic features are conditioned best."""
    models = models[:count]
    drawn = [np.vstack([models, _spread(count - len(models), box, rng, models)]) for _ in range(TRIES)]
    return min(drawn, key=lambda points: _condition(points, box))


def _spread(count: int, box: CoefficientBox, rng: np.random.Generator, models: Floats) -> Floats:
    """(count, D) isotropic points, jittered models and Sobol points."""
    width = box.high - box.low
    equal, near = round(ISOTROPIC * count), round(ONE_HOT * count)
    levels = (np.arange(equal) + rng.random(equal)) / max(equal, 1)
    isotropic = box.low + width * np.repeat(levels[:, None], box.size, axis=1)
    moved = (np.arange(equal) % 2 == 1) | (np.arange(equal) > 4)
    isotropic[moved] += rng.normal(0.0, JITTER * width, isotropic[moved].shape)
    jittered = models[rng.permutation(np.arange(near) % max(len(models), 1))] if len(models) else models
    jittered = jittered + rng.normal(0.0, JITTER * width, jittered.shape)
    filling = box.low + width * sobol(count - len(isotropic) - len(jittered), box.size, rng)
    return box.clip(np.vstack([isotropic, jittered, filling]))


def _condition(points: Floats, box: CoefficientBox) -> float:
    """Condition number of the quadratic's features over the box; 0 where that is too large a table to matter."""
    if len(points) < minimum(box.size):
        return 0.0
    half = 0.5 * (box.high - box.low)
    return float(np.linalg.cond(features((points - box.low) / half - 1.0)))


def _tiled(box: CoefficientBox, seeds: Floats) -> Floats:
    """(J, D) the models themselves, in the box; (J, K) coefficients are the same in every part."""
    rows = np.atleast_2d(np.asarray(seeds, np.float64))
    if rows.shape[1] == box.size:
        return box.clip(rows)
    if rows.shape[1] != box.sources:
        raise InputError(f"seeds: expected {box.sources} coefficients a model, found {rows.shape[1]}.")
    return box.clip(box.filled(np.tile(rows, (1, box.rows))))


def _grid(count: int, box: CoefficientBox, rng: np.random.Generator) -> Floats:
    side = 3
    while side**box.size < count:
        side += 1
    cells = side**box.size
    if cells <= 2**20:
        chosen = rng.permutation(cells)[:count]
        levels = np.stack(np.unravel_index(chosen, (side,) * box.size), axis=1).astype(np.float64)
    else:
        levels = _distinct(count, side, box.size, rng)
    return np.asarray(box.low + (box.high - box.low) * levels / (side - 1))


def _distinct(count: int, side: int, size: int, rng: np.random.Generator) -> Floats:
    """(count, size) distinct cells of a grid too large to list."""
    cells = np.zeros((0, size), np.int64)
    while len(cells) < count:
        more = np.vstack([cells, rng.integers(side, size=(count - len(cells), size))])
        _, first = np.unique(more, axis=0, return_index=True)
        cells = more[np.sort(first)]
    return cells.astype(np.float64)
