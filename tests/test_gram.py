"""Inner products from Gram tables, and SLERP composed in coefficient space against SLERP of the vectors."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome, combine
from ecotone.populations.gram import GramTable
from ecotone.search.m2n2 import slerp_weights

Vector = NDArray[np.float64]


def dense(genome: Genome, vectors: Vector) -> Vector:
    """(n,) the merge that ``genome`` stands for."""
    return (np.repeat(genome.coefficients, np.diff(genome.boundaries), axis=0) * vectors.T).sum(axis=1)


def slerp(a: Vector, b: Vector, t: Vector | float) -> Vector:
    """SLERP with one angle between the two whole vectors and a weight a position, straight from the paper."""
    cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    if math.sin(angle) <= 1e-6:
        return (1 - t) * a + t * b
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / math.sin(angle)


def crossed(gram: GramTable, a: Genome, b: Genome, weight: float, split: int) -> Genome:
    """The same child in coefficient space."""
    norms = math.sqrt(gram.inner(a, a) * gram.inner(b, b))
    angle = math.acos(min(1.0, max(-1.0, gram.inner(a, b) / norms)))
    before, after = slerp_weights(weight, angle), slerp_weights(1 - weight, angle)
    if split == 0:
        return combine([a, b], after)
    return combine([a, b], [before, after], [0, split, a.size])


def coarse_borders(tensors: list[int], pieces: int) -> NDArray[np.int64]:
    """Region borders that cut each tensor evenly."""
    cuts = [np.linspace(a, b, pieces + 1).astype(int) for a, b in pairwise(tensors)]
    return np.unique(np.concatenate(cuts))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("borders", ["element", "coarse"])
def test_a_chain_of_300_crossovers_agrees_with_slerp_of_the_vectors(seed: int, borders: str) -> None:
    rng = np.random.default_rng(seed)
    tensors = [0, 7, 120, 131, 400]
    vectors = rng.standard_normal((4, 400)) + rng.standard_normal(400)
    edges = np.arange(401) if borders == "element" else coarse_borders(tensors, 5)
    gram = GramTable.from_vectors(vectors, edges)
    genomes = [Genome.uniform(400, row) for row in np.eye(4)]
    direct = [dense(genome, vectors) for genome in genomes]
    assert not set(edges) <= set(tensors)  # split points inside tensors, too
    for _ in range(300):
        a, b = rng.integers(0, len(genomes), 2)
        weight = rng.random()
        split = int(edges[rng.integers(0, len(edges) - 1)])
        child = crossed(gram, genomes[a], genomes[b], weight, split)
        t = np.where(np.arange(400) < split, weight, 1 - weight)
        wanted = slerp(direct[a], direct[b], t)
        assert np.linalg.norm(dense(child, vectors) - wanted) <= 1e-12 * np.linalg.norm(wanted)
        genomes.append(child)
        direct.append(wanted)
        if len(genomes) > 12:
            gone = int(rng.integers(0, 12))
            del genomes[gone], direct[gone]


def test_coarse_regions_give_the_inner_products_of_fine_ones() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((3, 60))
    coarse = np.array([0, 7, 20, 21, 60])
    fine, wide = GramTable.from_vectors(vectors), GramTable.from_vectors(vectors, coarse)
    assert np.allclose(fine.between(coarse), wide.between(coarse), rtol=1e-13, atol=1e-13)
    a = Genome(np.array([0, 7, 60]), rng.standard_normal((2, 3)))
    b = Genome(np.array([0, 20, 21, 60]), rng.standard_normal((3, 3)))
    wanted = float(dense(a, vectors) @ dense(b, vectors))
    assert fine.inner(a, b) == pytest.approx(wanted, rel=1e-12)
    assert wide.inner(a, b) == pytest.approx(wanted, rel=1e-12)
    assert wide.inner(a, b) == pytest.approx(wide.inner(b, a), rel=1e-14)


def test_the_table_is_prefix_sums_of_the_regions() -> None:
    blocks = np.array([[[1.0, 2.0], [2.0, 5.0]], [[3.0, 0.0], [0.0, 1.0]]])
    table = GramTable.from_regions([0, 4, 9], blocks)
    assert table.prefix[0].tolist() == [[0, 0], [0, 0]]
    assert table.between(np.array([0, 9]))[0].tolist() == [[4, 2], [2, 6]]
    assert table.between(np.array([0, 4, 9])).tolist() == blocks.tolist()


@pytest.mark.parametrize("wrong", [5, 10, 100])
def test_positions_off_the_region_borders_are_refused(wrong: int) -> None:
    table = GramTable.from_vectors(np.ones((2, 10)), [0, 4, 9])
    with pytest.raises(InputError, match=rf"positions: expected region borders of the Gram table, found \[{wrong}\]"):
        table.between(np.array([0, wrong]))


# -- slerp itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-7, 0.3, math.pi / 2, 3.0, math.pi])
def test_slerp_ends_at_its_parents(angle: float) -> None:
    assert slerp_weights(0.0, angle) == pytest.approx((1.0, 0.0), abs=1e-15)
    assert slerp_weights(1.0, angle) == pytest.approx((0.0, 1.0), abs=1e-15)


@pytest.mark.parametrize("angle", [0.0, 5e-7, math.pi])
def test_parallel_vectors_are_mixed_linearly(angle: float) -> None:
    assert slerp_weights(0.25, angle) == (0.75, 0.25)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.77])
def test_slerp_of_equal_norms_keeps_the_norm_and_mixes_the_angle(t: float) -> None:
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((2, 50))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    gram = GramTable.from_vectors(vectors)
    a, b = Genome.uniform(50, [1.0, 0.0]), Genome.uniform(50, [0.0, 1.0])
    angle = math.acos(gram.inner(a, b))
    child = combine([a, b], slerp_weights(t, angle))
    assert gram.inner(child, child) == pytest.approx(1.0, abs=1e-13)
    assert math.acos(gram.inner(a, child)) == pytest.approx(t * angle, abs=1e-12)
    linear = combine([a, b], [1 - t, t])
    assert gram.inner(linear, linear) < 0.99  # the chord runs inside the arc: this test can tell them apart
