"""Directions spread evenly over the unit simplex: weightings of objectives or tasks."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np

from ecotone.populations.genome import Floats


def reference_directions(objectives: int, count: int) -> Floats:
    """(H, M) directions spread evenly over the unit simplex, as many as fit into ``count`` (but at least M).

    The lattice of Das and Dennis 1998; when it is too coarse to have a point inside, what is left of ``count``
    goes to a second lattice shrunk to half its size (Deb and Jain 2014, section IV-A).
    """
    outer = _divisions(objectives, count)
    directions = _lattice(objectives, outer)
    room = count - len(directions)
    if outer >= objectives or room < objectives:
        return directions
    inner = 0.5 * lattice(objectives, room) + 0.5 / objectives
    return np.unique(np.concatenate([directions, inner]), axis=0)


def lattice(objectives: int, count: int) -> Floats:
    """(H, M) the finest lattice of Das and Dennis 1998 on the unit simplex of at most ``count`` points (at least M)."""
    return _lattice(objectives, _divisions(objectives, count))


def _divisions(objectives: int, count: int) -> int:
    """The most divisions of an axis whose lattice has at most ``count`` points; at least 1."""
    divisions = 1
    while objectives > 1 and comb(divisions + objectives, objectives - 1) <= count:
        divisions += 1
    return divisions


def _lattice(objectives: int, divisions: int) -> Floats:
    """(H, M) all points of the unit simplex whose coordinates are multiples of 1 / divisions."""
    slots = divisions + objectives - 1
    bars = np.array(list(combinations(range(slots), objectives - 1)), np.int64)  # stars and bars
    edges = np.hstack([np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), slots)])
    return (np.diff(edges, axis=1) - 1) / divisions
