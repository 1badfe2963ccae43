"""Boxes of coefficients: points and genomes, and blocks put into groups."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.populations.gram import GramTable
from ecotone.populations.space import Space
from ecotone.search.coefficients import CoefficientBox, Granularity, Parts, grouped, parts_of

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


NAMES = ("e.embed", "h.0.attn.q", "h.0.mlp.up", "h.1.attn.q", "h.1.attn.o", "h.1.mlp.up")
WOVEN = replace(SPACE, tensors=NAMES, block_borders=np.array([0, 10, 50, SIZE]), blocks=("e", "0", "1"))


def test_tensors_of_a_component_share_their_coefficients() -> None:
    box = CoefficientBox.of(WOVEN, "components", -1.0, 2.0)
    assert box.names == ("attention", "mlp", "embeddings")
    assert (box.rows, box.segments, box.size) == (3, 5, 6)
    point = box.draw(seed=0, number=4)
    genome = box.genome(point)
    assert genome.boundaries.tolist() == [0, 10, 20, 50, 90, SIZE]  # the two of attention beside each other are one
    attention, mlp, embeddings = point.reshape(3, 2).tolist()
    assert genome.coefficients.tolist() == [embeddings, attention, mlp, attention, mlp]
    assert box.point(genome).tolist() == point.tolist()
    assert box.point(genome.simplified()).tolist() == point.tolist()
    assert box.parts.fits(genome.simplified())


def test_components_of_each_group_of_blocks() -> None:
    box = CoefficientBox.of(WOVEN, "components", 0.0, 1.0, groups=2)
    assert box.names == ("attention 1", "attention 2", "mlp 1", "mlp 2", "embeddings 1")
    rows = np.arange(10.0).reshape(5, 2)
    assert box.genome(rows.ravel()).coefficients.tolist() == rows[[4, 0, 2, 1, 3]].tolist()


def test_segments_that_differ_within_a_component_are_averaged_by_length() -> None:
    box = CoefficientBox.of(WOVEN, "components", 0.0, 1.0)
    genome = Genome([0, 20, 50, SIZE], [[0.1, 0.2], [0.3, 0.3], [0.5, 0.8]])
    assert not box.parts.fits(genome)
    attention, mlp, embeddings = box.point(genome).reshape(3, 2)
    assert attention == pytest.approx((10 * np.array([0.1, 0.2]) + 40 * np.array([0.5, 0.8])) / 50)
    assert mlp == pytest.approx((30 * np.array([0.3, 0.3]) + 10 * np.array([0.5, 0.8])) / 40)
    assert embeddings.tolist() == [0.1, 0.2]
    assert box.point(Genome.uniform(SIZE, [0.1, 0.7])).tolist() == [0.1, 0.7] * 3  # to the bit


def test_a_gradient_of_a_component_is_the_sum_over_its_segments() -> None:
    parts = parts_of(WOVEN, "components")
    slopes = np.random.default_rng(0).normal(size=(5, 2))
    point, step = np.random.default_rng(1).normal(size=(2, 3, 2))
    moved = (slopes * (parts.expanded(point + step) - parts.expanded(point))).sum()
    assert (parts.summed(slopes) * step).sum() == pytest.approx(moved)


KINDS: dict[str, tuple[Granularity, int]] = {
    "model": ("model", 1),
    "groups": ("groups", 2),
    "components": ("components", 1),
    "both": ("components", 2),
    "block": ("block", 1),
    "tensor": ("tensor", 1),
}
HOLD = {
    "model": {"model"},
    "groups": {"model", "groups"},
    "components": {"model", "components"},
    "both": {"model", "groups", "components", "both", "block"},  # no group has two blocks with the same component
    "block": {"model", "groups", "block"},
    "tensor": set(KINDS),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_which_parts_hold_the_merges_of_which(kind: str, other: str) -> None:
    """As drawing merges of the one, and writing them with the parts of the other, shows."""
    boxes = [CoefficientBox.of(WOVEN, KINDS[name][0], 0.0, 1.0, KINDS[name][1]) for name in (kind, other)]
    assert boxes[0].parts.holds(boxes[1].parts) == (other in HOLD[kind])
    merge = boxes[1].genome(boxes[1].draw(0, 1))
    assert boxes[0].parts.fits(merge) == (other in HOLD[kind])
    assert (boxes[0].genome(boxes[0].point(merge)) == merge) == (other in HOLD[kind])


def test_parts_survive_as_text() -> None:
    parts = parts_of(WOVEN, "components", 2)
    found = Parts.read(json.loads(json.dumps(parts.record())))
    assert found.record() == parts.record()
    assert str(parts_of(WOVEN, "components")) == "3 components (attention, mlp, embeddings)"
    assert str(parts_of(WOVEN, "block")) == "3 segments"


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
