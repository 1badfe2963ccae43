"""M2N2 against a plain implementation on dense vectors, step by step, with every switch on and off."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.populations.gram import GramTable
from ecotone.populations.niches import NicheArchive
from ecotone.populations.space import Space
from ecotone.populations.trial import Evaluation, Goal, Trial
from ecotone.search.m2n2 import M2N2, M2N2Settings, normal_quantiles
from ecotone.search.protocol import trial_rng

SIZE, EXAMPLES, CAPACITY = 60, 40, 6
TENSORS = [0, 10, 25, 26, 60]
BLOCKS = [0, 25, 60]
Vector = NDArray[np.float64]


def space_of(vectors: Vector, dense: bool = False) -> Space:
    names = tuple(f"model-{i}" for i in range(len(vectors)))
    return Space(
        names,
        tuple(f"tensor-{i}" for i in range(len(TENSORS) - 1)),
        np.array(TENSORS),
        ("first", "second"),
        np.array(BLOCKS),
        GramTable.from_vectors(vectors),
        np.eye(len(vectors)),
        names,
        vectors.astype(np.float32) if dense else None,
    )


VECTORS = np.random.default_rng(7).standard_normal((3, SIZE)).astype(np.float32).astype(np.float64)
PROBES = np.random.default_rng(8).standard_normal((EXAMPLES, SIZE))


def solved(vector: Vector) -> NDArray[np.bool_]:
    """(N,) which examples a model gets right: half spaces, some of them hard."""
    return PROBES @ vector > np.linspace(-4, 8, EXAMPLES)


def expanded(genome: Genome, vectors: Vector = VECTORS) -> Vector:
    if genome.residual is not None:
        return genome.residual.astype(np.float64)
    return (np.repeat(genome.coefficients, np.diff(genome.boundaries), axis=0) * vectors.T).sum(axis=1)


# -- the plain implementation: whole vectors, the formulas as published, loops -------------------------------


@dataclass
class Plain:
    """One child a step over P dense vectors. It draws what the search draws, in the same order."""

    settings: M2N2Settings
    alpha: float
    seed: int
    numbers: list[int] = field(default_factory=list)
    vectors: list[Vector] = field(default_factory=list)
    scores: list[NDArray[np.bool_]] = field(default_factory=list)

    def worth(self) -> Vector:
        demand = np.sum(self.scores, axis=0).astype(float)
        return np.array([0.0 if z == 0 else z**-self.alpha for z in demand])

    def fitness(self) -> Vector:
        return np.array(self.scores, float) @ self.worth()

    def attraction(self, a: int) -> Vector:
        return np.maximum(np.array(self.scores, float) - self.scores[a], 0) @ self.worth()

    def child(self, number: int) -> tuple[Vector, tuple[int, ...]]:
        rng, on = trial_rng(self.seed, number), self.settings
        a = roulette(rng, self.fitness())
        parents: tuple[int, ...] = (a,)
        vector = self.vectors[a]
        if on.crossover:
            weights = self.attraction(a) if on.attraction else self.fitness()
            b = roulette(rng, weights if weights.sum() > 0 else self.fitness())
            parents = (a, b)
            w, s = rng.random(), rng.integers(0, SIZE)
            borders = {"element": range(SIZE + 1), "tensor": TENSORS, "block": BLOCKS}[on.granularity]
            s = max(border for border in borders if border <= s)
            t = np.where(np.arange(SIZE) < s, w, 1 - w) if on.split else np.full(SIZE, w)
            vector = (
                slerp(self.vectors[a], self.vectors[b], t)
                if on.interpolation == "slerp"
                else linear(self.vectors[a], self.vectors[b], t)
            )
        if on.mutation:
            vector = vector + on.mutation * normal_quantiles()[rng.integers(0, 2**16, SIZE, np.uint16)]
        return vector, tuple(self.numbers[i] for i in parents)

    def add(self, number: int, vector: Vector, scores: NDArray[np.bool_], survivors: list[int]) -> None:
        """The least fit must be gone from ``survivors``; which of several equals is gone is up to rounding."""
        self.numbers.append(number)
        self.vectors.append(vector)
        self.scores.append(scores)
        if len(self.numbers) > CAPACITY:
            (gone,) = set(self.numbers) - set(survivors)
            worst, fitness = self.numbers.index(gone), self.fitness()
            assert fitness[worst] <= fitness.min() + 1e-9
            for column in (self.numbers, self.vectors, self.scores):
                del column[worst]  # type: ignore[attr-defined]
        assert self.numbers == survivors


def roulette(rng: np.random.Generator, weights: Vector) -> int:
    shares = np.cumsum(weights) / weights.sum()
    return int(np.argmax(shares > rng.random()))


def linear(a: Vector, b: Vector, t: Vector) -> Vector:
    return (1 - t) * a + t * b


def slerp(a: Vector, b: Vector, t: Vector) -> Vector:
    cosine = np.clip(a @ b / math.sqrt((a @ a) * (b @ b)), -1, 1)
    angle = math.acos(cosine)
    if math.sin(angle) <= 1e-6:
        return linear(a, b, t)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / math.sin(angle)


PAPER = M2N2Settings()
ABLATIONS: dict[str, tuple[M2N2Settings, float]] = {
    "paper": (PAPER, 1.0),
    "no attraction": (M2N2Settings(attraction=False), 1.0),
    "no split": (M2N2Settings(split=False), 1.0),
    "linear": (M2N2Settings(interpolation="linear"), 1.0),
    "no competition": (PAPER, 0.0),
    "strong competition": (PAPER, 2.0),
    "tensors": (M2N2Settings(granularity="tensor"), 1.0),
    "blocks": (M2N2Settings(granularity="block"), 1.0),
    "mutation": (M2N2Settings(mutation=0.05), 1.0),
    "mutation alone": (M2N2Settings(mutation=0.05, crossover=False), 1.0),
    "all off": (M2N2Settings(attraction=False, split=False, interpolation="linear"), 0.0),
}


def searched(name: str, seed: int = 0) -> tuple[M2N2, NicheArchive]:
    settings, alpha = ABLATIONS[name]
    archive = NicheArchive([Goal("solved")], CAPACITY, alpha)
    return M2N2(space_of(VECTORS, dense=settings.mutation > 0), archive, settings, seed), archive


def step(search: M2N2, archive: NicheArchive, trial: Trial) -> Vector:
    vector = expanded(trial.genome)
    right = solved(vector)
    evaluation = Evaluation({"solved": float(right.mean())}, {"solved": right})
    search.tell(trial, evaluation, archive.add(trial, evaluation))
    return vector


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_step_is_the_papers(name: str, seed: int) -> None:
    search, archive = searched(name, seed)
    settings, alpha = ABLATIONS[name]
    plain = Plain(settings, alpha, seed)
    tolerance = 1e-5 if settings.mutation else 1e-11
    for number in range(200):
        (trial,) = search.ask(1)
        vector = expanded(trial.genome)
        if number < 3:
            wanted, parents = VECTORS[number], ()
        else:
            wanted, parents = plain.child(number)
        assert trial.parents == parents
        assert np.linalg.norm(vector - wanted) <= tolerance * np.linalg.norm(wanted)
        step(search, archive, trial)
        survivors = [member.trial.number for member in archive.members]
        plain.add(number, vector if settings.mutation else wanted, solved(vector), survivors)
    assert search.done is False


@pytest.mark.parametrize("name", [name for name in ABLATIONS if name != "paper"])
def test_every_switch_changes_the_search(name: str) -> None:
    def lived(which: str) -> list[str]:
        search, archive = searched(which)
        digests = []
        for _ in range(60):
            (trial,) = search.ask(1)
            step(search, archive, trial)
            digests.append(trial.genome.digest)
        return digests

    assert lived("paper") == lived("paper")
    assert lived(name) != lived("paper")


# -- one child at a time -------------------------------------------------------------------------------------


def two_parents(settings: M2N2Settings, scores: tuple[list[bool], list[bool]], vectors: Vector, seed: int = 0) -> M2N2:
    archive = NicheArchive([Goal("solved")], 4)
    search = M2N2(space_of(vectors, dense=settings.mutation > 0), archive, settings, seed)
    for trial, row in zip(search.ask(2), scores, strict=True):
        evaluation = Evaluation({"solved": float(np.mean(row))}, {"solved": np.array(row)})
        search.tell(trial, evaluation, archive.add(trial, evaluation))
    return search


PAIR = VECTORS[:2]
COMPLEMENTARY = ([True, False], [False, True])


def draws(number: int, seed: int = 0) -> tuple[float, int]:
    """The mixing weight and split position that trial ``number`` draws after its two parents."""
    rng = trial_rng(seed, number)
    rng.random(2)
    return float(rng.random()), int(rng.integers(0, SIZE))


def test_weight_and_complement_on_the_two_sides_of_the_split() -> None:
    search = two_parents(M2N2Settings(interpolation="linear"), COMPLEMENTARY, PAIR)
    for trial in search.ask(40):
        weight, split = draws(trial.number)
        assert sorted(trial.parents) == [0, 1]  # attraction: only the other one adds anything
        # Parent A gets 1-w before the split and w after it.
        share_of_a = [1 - weight, weight]
        a = trial.parents[0]
        rows = [[s if k == a else 1 - s for k in (0, 1)] for s in share_of_a]
        if split == 0:
            assert trial.genome.coefficients == pytest.approx(np.array([rows[1]]))
        else:
            assert trial.genome.boundaries.tolist() == [0, split, SIZE]
            assert trial.genome.coefficients == pytest.approx(np.array(rows))


class Fixed:
    """A generator that gives chosen weight and position."""

    def __init__(self, weight: float, position: int) -> None:
        self.weight, self.position = weight, position
        self.bit_generator = np.random.SFC64(0)  # of the noise

    def random(self) -> float:
        return self.weight

    def integers(self, low: int, high: int) -> int:
        return self.position


@pytest.mark.parametrize("interpolation", ["slerp", "linear"])
@pytest.mark.parametrize("mutated", [False, True])
def test_weight_zero_cuts_and_joins(interpolation: str, mutated: bool) -> None:
    settings = M2N2Settings(interpolation=interpolation, mutation=1e-12 if mutated else 0.0)  # type: ignore[arg-type]
    search = two_parents(settings, COMPLEMENTARY, PAIR)
    for position in (1, 17, SIZE - 1):
        child = born(search, 0.0, position)
        wanted = np.concatenate([PAIR[0][:position], PAIR[1][position:]])
        assert child == pytest.approx(wanted, abs=1e-6 if mutated else 1e-12)


@pytest.mark.parametrize("interpolation", ["slerp", "linear"])
def test_split_at_zero_is_no_split_with_the_complement(interpolation: str) -> None:
    settings = M2N2Settings(interpolation=interpolation)  # type: ignore[arg-type]
    split = two_parents(settings, COMPLEMENTARY, PAIR)
    unsplit = two_parents(settings.model_copy(update={"split": False}), COMPLEMENTARY, PAIR)
    for weight in (0.0, 0.2, 0.5, 0.9):
        assert born(split, weight, 0) == pytest.approx(born(unsplit, 1 - weight, 31), abs=1e-12)
        assert born(unsplit, weight, 0).tolist() == born(unsplit, weight, 31).tolist()


def born(search: M2N2, weight: float, position: int) -> Vector:
    """The child of members 0 and 1 for a weight and a split position, without noise."""
    if search._noise is not None:
        search._noise = np.zeros_like(search._noise)
    child = search._child(Fixed(weight, position), 0, 1)  # type: ignore[arg-type]
    return expanded(child, PAIR)


def test_slerp_keeps_the_norm_of_equal_parents() -> None:
    pair = PAIR / np.linalg.norm(PAIR, axis=1, keepdims=True)
    search = two_parents(M2N2Settings(split=False), COMPLEMENTARY, pair)
    for trial in search.ask(20):
        vector = expanded(trial.genome, pair)
        assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-12)
    chord = two_parents(M2N2Settings(split=False, interpolation="linear"), COMPLEMENTARY, pair)
    assert min(np.linalg.norm(expanded(trial.genome, pair)) for trial in chord.ask(20)) < 0.95


@pytest.mark.parametrize("second", [0.0, 1.0, -2.0])
def test_parallel_and_zero_parents_are_mixed_linearly(second: float) -> None:
    pair = np.stack([PAIR[0], second * PAIR[0]])
    search = two_parents(M2N2Settings(split=False), COMPLEMENTARY, pair)
    for trial in search.ask(10):
        weight, _ = draws(trial.number)
        a, b = trial.parents
        assert expanded(trial.genome, pair) == pytest.approx((1 - weight) * pair[a] + weight * pair[b], abs=1e-9)


def test_without_attraction_for_anyone_the_mate_is_drawn_by_fitness() -> None:
    """Nobody beats anybody: the published code divides by zero here."""
    search = two_parents(PAPER, ([True, True], [True, True]), PAIR)
    mates = [trial.parents for trial in search.ask(300)]
    share = {pair: mates.count(pair) / 300 for pair in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert all(0.15 < value < 0.35 for value in share.values())


def test_the_better_one_mates_by_fitness_when_it_is_beaten_nowhere() -> None:
    search = two_parents(PAPER, ([True, True, True], [True, False, False]), PAIR)  # fitness 2.5 and 0.5
    trials = search.ask(600)
    of_first = [trial.parents[1] for trial in trials if trial.parents[0] == 0]
    of_second = [trial.parents[1] for trial in trials if trial.parents[0] == 1]
    assert len(of_first) / 600 == pytest.approx(5 / 6, abs=0.05)
    assert of_first.count(0) / len(of_first) == pytest.approx(5 / 6, abs=0.06)
    assert set(of_second) == {0}


def test_an_archive_that_scores_nothing_still_breeds() -> None:
    search = two_parents(PAPER, ([False, False], [False, False]), PAIR)
    trials = search.ask(50)
    assert {trial.parents[0] for trial in trials} == {0, 1}
    assert all(np.isfinite(trial.genome.coefficients).all() for trial in trials)


def test_mutation_is_gaussian_of_the_given_width() -> None:
    settings = M2N2Settings(crossover=False, mutation=0.25)
    search = two_parents(settings, COMPLEMENTARY, PAIR)
    noise = np.concatenate(
        [expanded(trial.genome) - PAIR[trial.parents[0]].astype(np.float32) for trial in search.ask(200)]
    )
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert noise.std() == pytest.approx(0.25, rel=0.02)
    assert np.mean(np.abs(noise) < 0.25) == pytest.approx(0.6827, abs=0.02)


def test_genomes_stop_growing_at_the_limit() -> None:
    settings = M2N2Settings(max_segments=5)
    archive = NicheArchive([Goal("solved")], CAPACITY)
    search = M2N2(space_of(VECTORS), archive, settings, 0)
    most = 0
    for _ in range(150):
        (trial,) = search.ask(1)
        step(search, archive, trial)
        most = max(most, trial.genome.segments)
    assert most == 5


# -- batches, seeds, refusals --------------------------------------------------------------------------------


def test_breeding_waits_until_the_seeds_are_told() -> None:
    search, archive = searched("paper")
    seeds = search.ask(2) + search.ask(5)
    assert [trial.number for trial in seeds] == [0, 1, 2]
    assert [trial.genome for trial in seeds] == [Genome.uniform(SIZE, row) for row in np.eye(3)]
    assert search.ask(4) == []
    for trial in seeds[:2]:
        step(search, archive, trial)
        assert search.ask(4) == []
    failed = Evaluation.failed("exception", "no")
    search.tell(seeds[2], failed, archive.add(seeds[2], failed))
    assert [trial.number for trial in search.ask(4)] == [3, 4, 5, 6]


def test_it_proposes_nothing_when_every_seed_failed() -> None:
    search, archive = searched("paper")
    failed = Evaluation.failed("exception", "no")
    for trial in search.ask(3):
        search.tell(trial, failed, archive.add(trial, failed))
    assert search.ask(4) == []


def test_a_batch_is_what_single_asks_would_give() -> None:
    together, apart = two_parents(PAPER, COMPLEMENTARY, PAIR), two_parents(PAPER, COMPLEMENTARY, PAIR)
    assert together.ask(6) == [trial for _ in range(6) for trial in apart.ask(1)]


def test_settings_that_change_nothing_are_refused() -> None:
    archive = NicheArchive([Goal("solved")], 4)
    with pytest.raises(ValidationError, match="every child is a copy"):
        M2N2Settings(crossover=False)
    with pytest.raises(InputError, match="needs the dense vectors"):
        M2N2(space_of(VECTORS), archive, M2N2Settings(mutation=0.1), 0)


def test_noise_is_the_normal_distributions() -> None:
    table = normal_quantiles().astype(np.float64)
    assert len(table) == 2**16
    assert (np.diff(table) > 0).all()
    assert (table == -table[::-1]).all()
    assert table.var() == pytest.approx(1, abs=2e-4)
    assert (table**4).mean() == pytest.approx(3, abs=0.01)
    inside = [np.mean(np.abs(table) < sigmas) for sigmas in (1, 2, 3)]
    assert inside == pytest.approx([0.682689, 0.954500, 0.997300], abs=2e-5)
