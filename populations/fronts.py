"""Tools for Pareto fronts: sorting, choosing, hypervolume, distances between fronts, attainment; most by moocore.

Everything here is in *oriented* scores (``ecotone.populations.trial.oriented``): larger is better in every column,
and the number of columns M is any. A point dominates another when it is at least as good in every column and
better in one.

The cost of an exact hypervolume grows as ``n ** (M - 2)``: at eight objectives 120 points take seconds and 240 a
minute. So beyond ``EXACT`` objectives it is estimated, always with the same directions (moocore's Rphi-FWE+), to about
0.1% in 20 ms.
"""

from __future__ import annotations

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats, Integers

EXACT = 6  # objectives up to which hypervolumes are exact
FEW = 15  # points up to which they are exact whatever the number of objectives
DIRECTIONS = 2**16  # of the estimate
STEPS = 64  # of the running hypervolume beyond five objectives


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """(N,) True where no other of the ``points`` (N, M) dominates; of equal points only the first is True.

    Raises:
        InputError: A number is NaN or infinite, or the shape is not (N, M).
    """
    return np.asarray(moocore.is_nondominated(_table(points, "points"), maximise=True), np.bool_)


def ranks(points: ArrayLike) -> Integers:
    """(N,) rank of each of the ``points`` (N, M): 0 on their front, 1 on the front of the rest, and so on.

    Equal points have equal ranks (Deb et al. 2002, non-dominated sorting).

    Raises:
        InputError: As for ``non_dominated``.
    """
    table = _table(points, "points")
    if table.shape[1] == 1:  # there moocore numbers equal points apart
        return np.unique(-table[:, 0], return_inverse=True)[1].astype(np.int64)
    return np.asarray(moocore.pareto_rank(table, maximise=True), np.int64)


def farthest_first(points: Floats, first: Sequence[int], count: int, apart: float = -1.0) -> list[int]:
    """Positions of up to ``count`` of ``points`` (N, M): first the positions ``first``, then always the farthest point.

    A point no farther than ``apart`` from one already taken is left out. With ``apart`` below 0 equal points are all
    taken.
    """
    order: list[int] = []
    away = np.full(len(points), np.inf)
    while len(order) < min(count, len(points)):
        waiting = [row for row in first if away[row] > apart]
        new = waiting[0] if waiting else int(np.argmax(away))
        if away[new] <= apart:
            break
        order.append(new)
        away = np.minimum(away, np.linalg.norm(points - points[new], axis=1))
        away[new] = -np.inf
    return order


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """The volume that the ``points`` (N, M) dominate above ``reference`` (M,): larger is better.

    Points that are not better than the reference in every objective add nothing; no points give 0.

    Raises:
        InputError: As for ``non_dominated``, or the reference is not of length M.
    """
    table = _table(points, "points")
    return _volume(table, _point(reference, table.shape[1]))


def hypervolume_over(points: ArrayLike, reference: ArrayLike) -> Floats:
    """(N,) the hypervolume of the first 1, 2, ..., N of the ``points`` (N, M), as a search found them.

    Beyond five objectives it is computed for 64 values of N, evenly spaced, and holds in between.

    Raises:
        InputError: As for ``hypervolume``.
    """
    table = _table(points, "points")
    count, columns = table.shape
    corner = _point(reference, columns)
    due = set(range(count) if columns < EXACT else np.linspace(count - 1, 0, STEPS).round().astype(int).tolist())
    front, volumes, volume, grown = table[:0], np.zeros(count), 0.0, False
    for index, point in enumerate(table):
        if (point > corner).all() and not (front >= point).all(axis=1).any():
            front, grown = np.concatenate([front[~(point >= front).all(axis=1)], point[None]]), True
        if grown and index in due:
            volume, grown = max(volume, _volume(front, corner)), False
        volumes[index] = volume
    return volumes


def igd_plus(points: ArrayLike, reference_front: ArrayLike) -> float:
    """Mean distance from ``reference_front`` (R, M) to the region that the ``points`` (N, M) dominate: 0 is best.

    The modified inverted generational distance of Ishibuchi et al. 2015: distances count only where a
    point is worse than the reference, so a better front never scores worse. No points give infinity.

    Raises:
        InputError: As for ``non_dominated``, the fronts differ in M, or the reference front is empty.
    """
    found, wanted = _pair(points, reference_front)
    return float(moocore.igd_plus(found, ref=wanted, maximise=True)) if len(found) else float("inf")


def epsilon(points: ArrayLike, reference_front: ArrayLike) -> float:
    """The least amount that, added to every score of ``points``, makes them weakly dominate ``reference_front``.

    The additive epsilon indicator of Zitzler et al. 2003, in score units: 0 or less is best. No points
    give infinity.

    Raises:
        InputError: As for ``igd_plus``.
    """
    found, wanted = _pair(points, reference_front)
    return float(moocore.epsilon_additive(found, ref=wanted, maximise=True)) if len(found) else float("inf")


def attainment(fronts: Sequence[ArrayLike], level: float = 0.5) -> Floats:
    """(A, M) the surface that at least a share ``level`` of the ``fronts`` (each (Ni, M)) reaches or exceeds.

    The empirical attainment function of Grunert da Fonseca et al. 2001, cut at ``level``: 0.5 of several
    seeds is their median front, 1.0 the part that all reach. With one objective it is a quantile.

    Raises:
        InputError: As for ``non_dominated``, no fronts, a level outside (0, 1], or more than three objectives.
    """
    if not fronts:
        raise InputError("fronts: expected at least one front, found none.")
    if not 0 < level <= 1:
        raise InputError(f"level: expected a share in (0, 1], found {level}.", "0.5 is the median front.")
    tables = [_table(front, f"fronts[{index}]") for index, front in enumerate(fronts)]
    columns = _same_columns(tables)
    if columns > 3:
        raise InputError(
            f"attainment: expected at most three objectives, found {columns}.",
            "Compare hypervolume, IGD+ or epsilon instead.",
        )
    needed = int(np.ceil(level * len(tables) - 1e-9))
    if sum(len(table) > 0 for table in tables) < needed:
        return np.zeros((0, columns))
    if columns == 1:
        return np.sort([table.max() for table in tables if len(table)])[::-1][needed - 1 : needed, None]
    sets = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    # moocore counts only the sets that have points, as a percentage of their number.
    share = 100.0 * needed / len(np.unique(sets))
    surface = moocore.eaf(-np.concatenate(tables), sets, percentiles=[share])
    return np.asarray(-surface[:, :-1], np.float64)


def _volume(table: Floats, corner: Floats) -> float:
    inside = table[(table > corner).all(axis=1)]
    if not len(inside):
        return 0.0
    if len(corner) > EXACT and len(inside) > FEW:
        return float(moocore.hv_approx(inside, ref=corner, maximise=True, nsamples=DIRECTIONS, method="Rphi-FWE+"))
    return float(moocore.hypervolume(inside, ref=corner, maximise=True))


def _table(points: ArrayLike, name: str) -> Floats:
    """The points as (N, M); moocore itself accepts NaN silently and infinity not at all."""
    table = np.ascontiguousarray(points, np.float64)
    if table.ndim != 2 or table.shape[1] < 1:
        raise InputError(f"{name}: expected shape (N, M), found {table.shape}.")
    if not np.isfinite(table).all():
        row = int(np.flatnonzero(~np.isfinite(table).all(axis=1))[0])
        raise InputError(
            f"{name}: expected finite scores, found {table[row].tolist()} in row {row}.", "Leave failed trials out."
        )
    return table


def _point(reference: ArrayLike, columns: int) -> Floats:
    point = np.asarray(reference, np.float64)
    if point.shape != (columns,) or not np.isfinite(point).all():
        raise InputError(f"reference: expected {columns} finite numbers, one an objective, found {point.tolist()}.")
    return point


def _pair(points: ArrayLike, reference_front: ArrayLike) -> tuple[Floats, Floats]:
    found, wanted = _table(points, "points"), _table(reference_front, "reference_front")
    _same_columns([found, wanted])
    if not len(wanted):
        raise InputError("reference_front: expected at least one point, found none.")
    return found, wanted


def _same_columns(tables: Sequence[Floats]) -> int:
    widths: list[int] = sorted({table.shape[1] for table in tables})
    if len(widths) > 1:
        raise InputError(f"fronts: expected one number of objectives, found {widths}.")
    return widths[0]
