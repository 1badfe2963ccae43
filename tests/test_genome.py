"""The genome algebra: exact text, digests of equal merges, and the identities of split, combine and simplified."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome, combine
from ecotone.populations.gram import GramTable
from ecotone.populations.space import Space

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

SIZE = 24
FINITE = st.floats(-1e6, 1e6, allow_nan=False)


def expanded(genome: Genome) -> NDArray[np.float64]:
    """(n, K) the coefficients at every position, and the residual as a last column: what the merge is."""
    table = np.repeat(genome.coefficients, np.diff(genome.boundaries), axis=0)
    residual = np.zeros(genome.size) if genome.residual is None else genome.residual.astype(np.float64)
    return np.column_stack([table, residual])


@st.composite
def genomes(draw: st.DrawFn, sources: int = 3, dense: bool | None = None, numbers: st.SearchStrategy[float] = FINITE):
    inner = sorted(draw(st.sets(st.integers(1, SIZE - 1), max_size=6)))
    rows = draw(
        st.lists(
            st.lists(numbers, min_size=sources, max_size=sources),
            min_size=len(inner) + 1,
            max_size=len(inner) + 1,
        )
    )
    residual = None
    if draw(st.booleans()) if dense is None else dense:
        floats = st.floats(-1e6, 1e6, width=32)
        residual = np.array(draw(st.lists(floats, min_size=SIZE, max_size=SIZE)), np.float32)
    return Genome(np.array([0, *inner, SIZE]), np.array(rows), {"density": 0.5}, residual)


def space_of(size: int, tensors: list[int], blocks: list[int], sources: int = 2) -> Space:
    vectors = np.random.default_rng(0).standard_normal((sources, size))
    return Space(
        tuple(f"model-{i}" for i in range(sources)),
        tuple(f"tensor-{i}" for i in range(len(tensors) - 1)),
        np.array(tensors),
        tuple(f"block-{i}" for i in range(len(blocks) - 1)),
        np.array(blocks),
        GramTable.from_vectors(vectors),
        np.eye(sources),
        tuple(f"model-{i}" for i in range(sources)),
    )


# -- text ----------------------------------------------------------------------------------------------------


@given(genomes())
def test_json_gives_back_every_bit(genome: Genome) -> None:
    back = Genome.from_json(genome.to_json())
    assert back.boundaries.tolist() == genome.boundaries.tolist()
    assert back.coefficients.tobytes() == genome.coefficients.tobytes()
    assert back.parameters == genome.parameters
    if genome.residual is None:
        assert back.residual is None
    else:
        assert back.residual is not None
        assert back.residual.tobytes() == genome.residual.tobytes()
    assert back.digest == genome.digest


@pytest.mark.parametrize("value", [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, np.nextafter(1.0, 2.0)])
def test_json_keeps_awkward_numbers(value: float) -> None:
    back = Genome.from_json(Genome.uniform(3, [value]).to_json())
    assert back.coefficients.tobytes() == np.array([[value]]).tobytes()


def test_json_can_leave_the_dense_part_out() -> None:
    genome = Genome.dense(np.arange(5), sources=2)
    assert Genome.from_json(genome.to_json(residual=False)).residual is None
    assert "residual" not in json.loads(genome.to_json(residual=False))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"boundaries": [0, 3]}',
        '{"boundaries": [0, 3], "coefficients": [["a"]], "parameters": {}}',
        '{"boundaries": [0, 3], "coefficients": [[1.0]], "parameters": {}, "residual": "not base64 of zlib"}',
        '{"boundaries": [0, 3], "coefficients": [[1.0], [1.0, 2.0]], "parameters": {}}',
    ],
)
def test_text_that_is_no_genome_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"genome: expected JSON written by Genome\.to_json"):
        Genome.from_json(text)


# -- digests -------------------------------------------------------------------------------------------------


@given(genomes(), st.lists(st.integers(1, SIZE - 1), max_size=5))
def test_extra_splits_change_neither_merge_nor_digest(genome: Genome, positions: list[int]) -> None:
    cut = genome
    for position in positions:
        cut = cut.split(position)
        assert position in cut.boundaries
    assert np.array_equal(expanded(cut), expanded(genome))
    assert cut.digest == genome.digest
    assert cut == genome
    assert hash(cut) == hash(genome)
    assert cut.simplified().segments <= genome.segments


@given(genomes(), genomes())
def test_digests_are_equal_exactly_when_the_merges_are(a: Genome, b: Genome) -> None:
    assert (a.digest == b.digest) == (np.array_equal(expanded(a), expanded(b)) and dense_alike(a, b))


def dense_alike(a: Genome, b: Genome) -> bool:
    """Residuals are the same bits: a weight of -0.0 is not one of 0.0."""
    if a.residual is None or b.residual is None:
        return a.residual is b.residual
    return a.residual.tobytes() == b.residual.tobytes()


def test_digest_tells_all_parts_apart() -> None:
    plain = Genome(np.array([0, 4, 9]), np.array([[1.0, 0.0], [0.0, 1.0]]), {"density": 0.5})
    others = [
        Genome(np.array([0, 5, 9]), plain.coefficients, plain.parameters),
        Genome(plain.boundaries, np.array([[1.0, 0.0], [np.nextafter(0.0, 1.0), 1.0]]), plain.parameters),
        Genome(plain.boundaries, plain.coefficients, {"density": 0.25}),
        Genome(plain.boundaries, plain.coefficients),
        Genome(plain.boundaries, plain.coefficients, plain.parameters, np.ones(9, np.float32)),
        Genome(np.array([0, 4, 10]), plain.coefficients, plain.parameters),
    ]
    assert len({plain.digest, *(other.digest for other in others)}) == len(others) + 1
    assert all(plain != other for other in others)
    assert plain != "a string"


def test_negative_zero_and_order_of_parameters_do_not_matter() -> None:
    a = Genome.uniform(4, [0.0, 1.0], density=0.5, seed=1)
    b = Genome.uniform(4, [-0.0, 1.0], seed=1, density=0.5)
    assert a.digest == b.digest


# -- algebra -------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.lists(genomes(numbers=st.floats(-8, 8)), min_size=1, max_size=3),
    st.sets(st.integers(1, SIZE - 1), max_size=4),
    st.data(),
)
def test_combine_is_the_linear_combination_position_by_position(
    parents: list[Genome], inner: set[int], data: st.DataObject
) -> None:
    edges = [0, *sorted(inner), SIZE]
    numbers = st.floats(-4, 4)
    rows = [[data.draw(numbers) for _ in parents] for _ in edges[1:]]
    child = combine(parents, rows, edges)
    weights = np.repeat(np.array(rows), np.diff(edges), axis=0)
    wanted = sum(weights[:, [i]] * expanded(parent) for i, parent in enumerate(parents))
    scale = sum(np.abs(weights[:, [i]] * expanded(parent)) for i, parent in enumerate(parents))
    coefficients, residual = expanded(child)[:, :-1], expanded(child)[:, -1]
    assert np.allclose(coefficients, wanted[:, :-1], rtol=0, atol=1e-13 * (1 + scale[:, :-1].max()))
    assert (np.abs(residual - wanted[:, -1]) <= 1e-6 * (1e-6 + scale[:, -1])).all()
    assert child.parameters == parents[0].parameters


@given(genomes(dense=False))
def test_combining_one_parent_with_weight_one_changes_nothing(genome: Genome) -> None:
    assert combine([genome], [1.0]) == genome
    assert combine([genome, genome], [1.0, 0.0]) == genome


def test_combine_takes_each_parent_on_its_side() -> None:
    a, b = Genome.uniform(10, [1.0, 0.0]), Genome.uniform(10, [0.0, 1.0])
    child = combine([a, b], [[1, 0], [0, 1]], [0, 3, 10])
    assert child.boundaries.tolist() == [0, 3, 10]
    assert child.coefficients.tolist() == [[1, 0], [0, 1]]


def test_combine_refuses_weights_that_do_not_fit() -> None:
    a, b = Genome.uniform(10, [1.0]), Genome.uniform(10, [2.0])
    with pytest.raises(InputError, match=r"weights: expected shape \(1, 2\), found \(1, 3\)"):
        combine([a, b], [1.0, 2.0, 3.0])
    with pytest.raises(InputError, match=r"weights: expected shape \(2, 2\)"):
        combine([a, b], [[1.0, 2.0]], [0, 4, 10])


@pytest.mark.parametrize("other", [Genome.uniform(11, [1.0]), Genome.uniform(9, [1.0]), Genome.uniform(10, [1.0, 2.0])])
def test_combine_refuses_merges_of_other_models(other: Genome) -> None:
    with pytest.raises(InputError, match="genomes: expected"):
        combine([Genome.uniform(10, [1.0]), other], [0.5, 0.5])


@given(genomes())
def test_simplified_is_the_same_merge_with_no_equal_neighbours(genome: Genome) -> None:
    plain = genome.simplified()
    assert np.array_equal(expanded(plain), expanded(genome))
    assert not (plain.coefficients[1:] == plain.coefficients[:-1]).all(axis=1).any()
    assert plain.simplified() is plain


@given(genomes(numbers=st.floats(-8, 8)), st.integers(1, 8))
def test_simplified_to_a_limit(genome: Genome, limit: int) -> None:
    short = genome.simplified(limit)
    assert short.segments <= limit
    assert set(short.boundaries) <= set(genome.boundaries)
    assert short.size == genome.size
    # Joining takes length-weighted means: nothing leaves the range and the total stays what it was.
    assert np.allclose(expanded(short).sum(axis=0), expanded(genome).sum(axis=0), atol=1e-9)
    assert (short.coefficients <= genome.coefficients.max(axis=0) + 1e-12).all()
    assert (short.coefficients >= genome.coefficients.min(axis=0) - 1e-12).all()
    if genome.simplified().segments <= limit:
        assert short == genome


def test_simplified_joins_the_nearest_neighbours_first() -> None:
    genome = Genome(np.array([0, 2, 4, 6, 8]), np.array([[0.0], [0.1], [5.0], [9.0]]))
    assert genome.simplified(3).boundaries.tolist() == [0, 4, 6, 8]
    assert genome.simplified(3).coefficients[:, 0].tolist() == pytest.approx([0.05, 5.0, 9.0])
    assert genome.simplified(3) != genome
    # A short segment gives way before two long ones that differ less.
    uneven = Genome(np.array([0, 100, 200, 201]), np.array([[0.0], [1.0], [3.0]]))
    assert uneven.simplified(2).boundaries.tolist() == [0, 100, 201]


def test_constructors() -> None:
    space = space_of(10, tensors=[0, 4, 6, 10], blocks=[0, 6, 10])
    per_tensor = Genome.per_tensor(space, np.arange(6).reshape(3, 2), density=0.2)
    assert per_tensor.boundaries.tolist() == [0, 4, 6, 10]
    assert per_tensor.parameters == {"density": 0.2}
    assert Genome.per_block(space, np.ones((2, 2))) == Genome.uniform(10, [1.0, 1.0])
    assert (per_tensor.size, per_tensor.segments, per_tensor.sources) == (10, 3, 2)
    dense = Genome.dense(np.arange(10), sources=2)
    assert dense.residual is not None
    assert dense.residual.tolist() == list(range(10))
    assert not dense.coefficients.any()


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boundaries", "coefficients", "field"),
    [
        ([1, 5], [[1.0]], "boundaries"),
        ([0], [[1.0]], "boundaries"),
        ([0, 5, 5], [[1.0], [2.0]], "boundaries"),
        ([0, 5, 3], [[1.0], [2.0]], "boundaries"),
        ([[0, 5]], [[1.0]], "boundaries"),
        ([0, 5], [[1.0], [2.0]], "coefficients"),
        ([0, 5], [1.0], "coefficients"),
        ([0, 5], [[]], "coefficients"),
        ([0, 5], [[float("nan")]], "coefficients"),
        ([0, 5], [[float("inf")]], "coefficients"),
    ],
)
def test_genomes_that_cannot_be_are_refused(boundaries: list[int], coefficients: list[object], field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: expected"):
        Genome(np.array(boundaries), np.array(coefficients))


def test_residual_of_another_length_is_refused() -> None:
    with pytest.raises(InputError, match=r"residual: expected shape \(5,\), found \(4,\)"):
        Genome(np.array([0, 5]), np.ones((1, 1)), {}, np.zeros(4, np.float32))


@pytest.mark.parametrize("position", [0, 10, -1, 11])
def test_splits_fall_inside(position: int) -> None:
    with pytest.raises(InputError, match="position: expected 0 < position < 10"):
        Genome.uniform(10, [1.0]).split(position)


def test_limit_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="limit: expected at least 1"):
        Genome(np.array([0, 1, 2]), np.array([[1.0], [2.0]])).simplified(0)


def test_genomes_do_not_change() -> None:
    coefficients, boundaries = np.ones((1, 2)), np.array([0, 4])
    genome = Genome(boundaries, coefficients)
    digest = genome.digest
    coefficients[0, 0] = 7.0
    boundaries[1] = 9
    assert genome.coefficients[0, 0] == 1.0
    assert genome.size == 4
    assert Genome(genome.boundaries, genome.coefficients).digest == digest
    with pytest.raises(ValueError, match="read-only"):
        genome.coefficients[0, 0] = 2.0
    with pytest.raises(FrozenInstanceError):
        genome.residual = None  # type: ignore[misc]
