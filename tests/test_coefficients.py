"""Boxes of coefficients: points and genomes, and blocks put into groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ecotone.populations.errors import InputError
from ecotone.populations.gram import GramTable
from ecotone.populations.space import Space
from ecotone.search.coefficients import CoefficientBox, grouped

SIZE = 100
SPACE = Space(
    ("a", "b"),
    tuple("stuvwx"),
    np.array([0, 10, 20, 50, 60, 90, SIZE]),
    tuple("123456"),
    np.array([0, 10, 20, 50, 60, 90, SIZE]),
    GramTable.from_vectors(np.eye(2, SIZE, dtype=np.float32)),
    np.eye(2),
    ("a", "b"),
)


def test_a_point_and_its_genome_are_each_others_inverse() -> None:
    box = CoefficientBox.of(SPACE, "block", -1.0, 2.0)
    assert (box.segments, box.size) == (6, 12)
    point = box.draw(seed=0, number=4)
    genome = box.genome(point)
    assert genome.coefficients[1].tolist() == point[2:4].tolist()
    assert (box.point(genome) == point).all()
    assert (box.point(genome.simplified()) == point).all()


def test_points_are_even_in_the_box_and_their_own_for_each_trial() -> None:
    box = CoefficientBox.of(SPACE, "model", -1.0, 3.0)
    points = np.array([box.draw(0, number) for number in range(4000)])
    assert points.min() >= -1
    assert points.max() <= 3
    assert points.mean(axis=0) == pytest.approx([1, 1], abs=0.08)
    assert (box.draw(0, 7) == points[7]).all()
    assert (box.draw(1, 7) != points[7]).all()


@pytest.mark.parametrize(
    ("groups", "wanted"),
    [(1, [0, 100]), (2, [0, 50, 100]), (3, [0, 20, 60, 100]), (6, [0, 10, 20, 50, 60, 90, 100])],
)
def test_groups_are_runs_of_blocks_of_about_equal_size(groups: int, wanted: list[int]) -> None:
    assert grouped(SPACE, groups).tolist() == wanted
    assert CoefficientBox.of(SPACE, "groups", 0, 1, groups).size == 2 * groups


def test_every_group_gets_a_block_however_uneven_they_are() -> None:
    uneven = replace(SPACE, block_borders=np.array([0, 95, 96, 97, 98, 99, SIZE]))
    for groups in range(1, 7):
        borders = grouped(uneven, groups)
        assert len(borders) == groups + 1
        assert (np.diff(borders) > 0).all()


@pytest.mark.parametrize("groups", [0, 7])
def test_more_groups_than_blocks_are_refused(groups: int) -> None:
    with pytest.raises(InputError, match=rf"search.groups: expected between 1 and 6.* found {groups}"):
        CoefficientBox.of(SPACE, "groups", 0, 1, groups)
