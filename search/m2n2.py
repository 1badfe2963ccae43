"""M2N2: evolution of merges with natural niches, attraction and a moving split point.

"Competition and Attraction Improve Model Fusion" (Abrantes, Lange, Tang; 2025). One child a step:

1. Parent A is drawn in proportion to shared fitness (``ecotone.populations.niches``).
2. Parent B is drawn in proportion to its attraction for A: its scores on the examples where A is weak.
3. A split point and one mixing weight join them: the weight holds before the split, its complement after.
   The join is spherical (SLERP) with the one angle between the two whole parents, or linear.
4. When models evolve from scratch, every parameter then gets Gaussian noise.
5. The archive takes the child, and its least fit member leaves.

The parents' angle comes from the Gram table of the sources, so composing a child touches no weight. Only children with
noise are dense vectors.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats, Genome, Integers, combine
from ecotone.populations.niches import NicheArchive
from ecotone.populations.space import Space
from ecotone.populations.trial import Evaluation, Outcome, Trial
from ecotone.search.kinds import Begins, Context, Fineness, Needs, Pair, SearchSettings
from ecotone.search.protocol import Search, trial_rng
from ecotone.search.racing import RaceSettings, raced
from ecotone.search.refined import Refined, RefineSettings

Odds: TypeAlias = list[float]


class M2N2Settings(SearchSettings):
    """M2N2: evolution with niches, attraction and split points. Turning a switch off gives the paper's ablations.

    Attributes:
        algorithm: ``m2n2``: evolution with niches, attraction and split points.
        archive: The most merges that the population keeps.
        alpha: How strongly members that solve the same examples share the fitness for them: 1 shares evenly, 0 is a
            plain genetic algorithm.
        resource: The fitness that each example has to share: the ``max`` of its scores in the population, or ``one``.
        attraction: Choose the second parent by attraction: its scores on the examples where the first parent is weak.
            Otherwise choose it by fitness, like the first.
        split: Draw a split point: one weight mixes the parents before it, the complement after it. Otherwise one weight
            mixes the whole vector.
        crossover: Join two parents. Otherwise the child is a copy of the first parent (then ``mutation`` must be above
            0).
        interpolation: How two parents are joined: ``slerp`` on the arc between them, or ``linear`` on the straight
            line.
        granularity: Where split points may fall: between any two weights (``element``), or at the borders of a
            ``tensor`` or of a ``block`` (the tensors of one layer).
        mutation: Standard deviation of the noise added to every weight of a child. Keep 0 for trained models; raise it
            to evolve models from random weights.
        max_segments: The most segments of a merge. A merge with more is simplified to this many
            (``Genome.simplified``).
        refine: Refine children by gradient on the calibration tasks before they are scored. None refines no children.
        race: Score every candidate on some of the examples first, and only the promising candidates on all
            (``ecotone.search.racing``). None scores every candidate on all examples.
    """

    algorithm: Literal["m2n2"] = "m2n2"
    archive: int = Field(default=20, ge=2)
    alpha: float = Field(default=1.0, ge=0)
    resource: Literal["max", "one"] = "max"
    attraction: bool = True
    split: bool = True
    crossover: bool = True
    interpolation: Literal["slerp", "linear"] = "slerp"
    granularity: Literal["element", "tensor", "block"] = "element"
    mutation: float = Field(default=0.0, ge=0)
    max_segments: int = Field(default=1024, ge=2)
    refine: RefineSettings | None = None
    race: RaceSettings | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> M2N2Settings:
        if self.refine is not None and self.race is not None:
            raise ValueError("race: children that are refined cannot race; leave refine or race out")
        if self.refine is not None and self.mutation > 0:
            raise ValueError("refine: with mutation children are whole vectors, without coefficients; leave one out")
        if not self.crossover and self.mutation == 0:
            raise ValueError("crossover: without it and with mutation 0 every child is a copy; set mutation above 0")
        return self

    def needs(self) -> Needs:
        """It needs scores to maximise, none below 0, merges linear in their coefficients, and the inner products."""
        return Needs(
            maximised=True,
            nonnegative=True,
            gradients=self.refine is not None,
            affine=True,
            per_example="useful",
            vectors=self.mutation > 0,
            geometry=True,
        )

    def begins(self) -> Begins:
        """It can begin with merges of any segments, in place of the models; not with mutation."""
        why = "with mutation m2n2 breeds whole vectors of weights, beginning with the models" if self.mutation else ""
        return Begins(why, any_segments=True)

    def fineness(self) -> Fineness:
        """The granularity of split points."""
        return self.granularity

    def borders(self, space: Space) -> Integers:
        """(S+1,) positions where split points may fall."""
        return space.borders(self.granularity)

    def segments(self, space: Space) -> int | None:
        """Not fixed: children have the split points of both parents."""
        return None

    def make(self, context: Context) -> Pair:
        """The search, and its archive of niches."""
        archive = NicheArchive(context.goals, self.archive, self.alpha, self.resource)
        space, starts = context.space, context.starts
        own = not starts and self.mutation == 0
        starts = context.own if own else starts
        if starts and (context.joined or own):  # these alone lack what sets the models apart
            starts = tuple(dict.fromkeys([*starts, *(Genome.uniform(space.size, row) for row in space.seeds)]))
        search = M2N2(space, archive, self, context.seed, starts)
        if self.refine is not None:
            return Refined(search, context.tasks, self.refine), archive
        return raced((search, archive), context, self.race, whole=search.first_child)

    def describe(self, search: Search | None, context: Context) -> str:
        """How many children learn, in how many steps, before they are scored."""
        if self.refine is None:
            return ""
        each = "every child" if self.refine.every == 1 else f"one child in {self.refine.every}"
        return f": {each} takes {self.refine.steps} steps on {len(context.tasks)} tasks before it is scored"


class M2N2:
    """M2N2 over the merges that ``space`` spans, with its members in ``archive``.

    The first trials are the original models themselves, or ``starts``. Breeding begins when they have all been told.

    Args:
        space: Layout, Gram table and seeds; its ``vectors`` are needed when ``settings.mutation`` is above 0.
        archive: The population to breed from; the manager adds to it before ``tell``.
        settings: The switches.
        seed: The recipe's seed.
        starts: Merges to begin with instead of the models; a single one is joined by the models.

    Raises:
        InputError: The settings leave nothing that could change, mutation lacks the dense vectors, or there are starts
            with it, which breeds whole vectors.

    Example::

        from ecotone.populations.niches import NicheArchive
        from ecotone.populations.ranking import Scale
        from ecotone.populations.trial import oriented
        from ecotone.search.m2n2 import M2N2, M2N2Settings

        archive = NicheArchive(goals, capacity=20)
        search = M2N2(space, archive, M2N2Settings(), seed=0)
        for _ in range(200):
            for trial in search.ask(1):
                evaluation = score(trial.genome)
                search.tell(trial, evaluation, archive.add(trial, evaluation))
        points = np.array([oriented(member.evaluation.scores, goals) for member in archive.members])
        best = archive.members[np.argmax(Scale.of(goals, points).means(points))]
    """

    def __init__(
        self,
        space: Space,
        archive: NicheArchive,
        settings: M2N2Settings,
        seed: int,
        starts: Sequence[Genome] = (),
    ) -> None:
        if settings.mutation > 0 and space.vectors is None:
            raise InputError("search.mutation: breeding with noise needs the dense vectors of the sources.")
        if settings.mutation > 0 and starts:
            raise InputError("search.mutation: breeding with noise begins with the models, found merges to start from.")
        self.space = space
        self.archive = archive
        self.settings = settings
        self.seed = seed
        self._borders = space.borders(settings.granularity)
        self._starts = tuple(starts)
        self._seeds = len(self._starts) + (len(space.seeds) if len(self._starts) < 2 else 0)
        self._next = 0
        self._told = 0
        self._norms: dict[int, float] = {}
        self._noise = np.float32(settings.mutation) * normal_quantiles() if settings.mutation > 0 else None

    @property
    def done(self) -> bool:
        """Never: evolution goes on until the budget is spent."""
        return False

    @property
    def first_child(self) -> int:
        """Number of the first trial that is bred."""
        return self._seeds

    def ask(self, n: int) -> list[Trial]:
        """First the models or ``starts``; once they are all told, children of the archive."""
        if self._next < self._seeds:
            numbers = range(self._next, min(self._next + n, self._seeds))
            trials = [Trial(number, self._seed_genome(number)) for number in numbers]
        elif self._told < self._seeds or not self.archive.members:
            return []
        else:
            trials = self._breed(range(self._next, self._next + n))
        self._next += len(trials)
        return trials

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        """Count the trial, and forget the norms of members that left. The archive has learned already."""
        self._told += 1
        for number in outcome.evicted:
            self._norms.pop(number, None)

    def state(self) -> dict[str, Any]:
        """The two counters."""
        return {"next": self._next, "told": self._told}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._next, self._told = state["next"], state["told"]
        self._norms.clear()

    # -- one child ---------------------------------------------------------------------------------------

    def _seed_genome(self, number: int) -> Genome:
        if number < len(self._starts):
            return self._starts[number]
        row = self.space.seeds[number - len(self._starts)]
        if self.settings.mutation > 0:
            assert self.space.vectors is not None
            return Genome.dense(row.astype(np.float32) @ self.space.vectors, self.space.dimension)
        return Genome.uniform(self.space.size, row)

    def _breed(self, numbers: range) -> list[Trial]:
        members, fitness = self.archive.members, _odds(self.archive.fitness())
        attraction: dict[int, Odds] = {}
        trials = []
        for number in numbers:
            rng = trial_rng(self.seed, number)
            parents = [a := _draw(rng, fitness)]  # step 1
            if self.settings.crossover:
                parents.append(b := self._mate(rng, a, fitness, attraction))  # step 2
                child = self._child(rng, a, b)  # step 3, and 4 with mutation
            else:
                child = self._mutated(rng, _residual(self._genome(a)))  # step 4
            trials.append(Trial(number, child, tuple(members[i].trial.number for i in parents)))
        return trials

    def _mate(self, rng: np.random.Generator, a: int, fitness: Odds, attraction: dict[int, Odds]) -> int:
        if not self.settings.attraction:
            return _draw(rng, fitness)
        if a not in attraction:
            attraction[a] = _odds(self.archive.attraction(a))
        # Nobody beats A anywhere: the published code samples from NaN there; fitness is what is left to go by.
        return _draw(rng, attraction[a] if attraction[a][-1] > 0 else fitness)

    def _child(self, rng: np.random.Generator, a: int, b: int) -> Genome:
        weight = float(rng.random())
        split = self._split(rng)
        angle = self._angle(a, b) if self.settings.interpolation == "slerp" else 0.0
        before, after = slerp_weights(weight, angle), slerp_weights(1.0 - weight, angle)
        genomes = [self._genome(a), self._genome(b)]
        if self.settings.mutation > 0:
            return self._mutated(rng, _joined(_residual(genomes[0]), _residual(genomes[1]), before, after, split))
        rows, borders = _intervals(before, after, split, self.space.size)
        return combine(genomes, rows, borders, self.settings.max_segments)

    def _split(self, rng: np.random.Generator) -> int:
        """A position drawn evenly from the flat vector, moved down to the nearest border; n without splits."""
        position = int(rng.integers(0, self.space.size))
        if not self.settings.split:
            return self.space.size
        if len(self._borders) == self.space.size + 1:
            return position
        return int(self._borders[np.searchsorted(self._borders, position, side="right") - 1])

    def _mutated(self, rng: np.random.Generator, vector: NDArray[np.float32]) -> Genome:
        assert self._noise is not None
        steps = _sixteen_bits(rng, self.space.size)
        noise = np.empty(self.space.size, np.float32)
        np.take(self._noise, steps, out=noise, mode="clip")  # clip never happens; it spares a copy
        noise += vector
        noise.flags.writeable = False  # the genome takes it as it is instead of a copy
        return Genome.dense(noise, self.space.dimension)

    def _genome(self, index: int) -> Genome:
        return self.archive.members[index].trial.genome

    def _angle(self, a: int, b: int) -> float:
        """The angle between the two whole parents; 0 when one of them is zero."""
        norms = self._norm(a) * self._norm(b)
        if a == b or norms == 0:
            return 0.0
        return math.acos(min(1.0, max(-1.0, self._inner(self._genome(a), self._genome(b)) / norms)))

    def _norm(self, index: int) -> float:
        trial = self.archive.members[index].trial
        if trial.number not in self._norms:
            self._norms[trial.number] = math.sqrt(max(0.0, self._inner(trial.genome, trial.genome)))
        return self._norms[trial.number]

    def _inner(self, a: Genome, b: Genome) -> float:
        if a.residual is not None and b.residual is not None:
            return float(np.einsum("i,i->", a.residual, b.residual, dtype=np.float64))
        return self.space.gram.inner(a, b)


@lru_cache(maxsize=1)
def normal_quantiles() -> NDArray[np.float32]:
    """(65536,) equally likely values of N(0, 1): the quantiles at the middles of 65,536 equal parts.

    Drawing noise by index costs a third of drawing normal floats, and gives the same bits on every processor.
    """
    normal, count = NormalDist(), 2**16
    upper = [normal.inv_cdf((index + 0.5) / count) for index in range(count // 2, count)]
    return np.array([-value for value in reversed(upper)] + upper, np.float32)


def _sixteen_bits(rng: np.random.Generator, size: int) -> NDArray[np.uint16]:
    """(size,) the numbers that ``rng.integers(0, 65536, size, np.uint16)`` draws, in a third of the time.

    A generator hands out its 64-bit numbers in parts, low bits first; half a number may be left over from earlier
    draws. This must be the last draw of ``rng``, which does not notice that the half was taken.
    """
    left = rng.bit_generator.state
    over = np.array([left["uinteger"]] if left["has_uint32"] else [], "<u4").view("<u2")
    whole = rng.bit_generator.random_raw(-(-size // 4)).astype("<u8", copy=False).view("<u2")
    drawn: NDArray[np.uint16] = np.concatenate([over, whole])[:size]
    return drawn


def slerp_weights(t: float, angle: float) -> tuple[float, float]:
    """Weights of A and B at ``t`` (0 gives A) on the arc between two vectors at ``angle``; linear when parallel."""
    sine = math.sin(angle)
    if sine <= 1e-6:
        return 1.0 - t, t
    return math.sin((1.0 - t) * angle) / sine, math.sin(t * angle) / sine


def _intervals(
    before: tuple[float, float], after: tuple[float, float], split: int, size: int
) -> tuple[list[tuple[float, float]], list[int]]:
    """Weights and borders of the non-empty intervals on both sides of the split."""
    if split <= 0:
        return [after], [0, size]
    if split >= size:
        return [before], [0, size]
    return [before, after], [0, split, size]


def _residual(genome: Genome) -> NDArray[np.float32]:
    assert genome.residual is not None
    return genome.residual


def _joined(
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    before: tuple[float, float],
    after: tuple[float, float],
    split: int,
) -> NDArray[np.float32]:
    """The dense child of two dense parents."""
    child = np.empty_like(a)
    for part, (left, right) in ((slice(0, split), before), (slice(split, None), after)):
        np.multiply(a[part], np.float32(left), out=child[part])
        child[part] += np.float32(right) * b[part]
    return child


def _odds(weights: Floats) -> Odds:
    """Running sums of the weights that ``_draw`` draws by."""
    sums: Odds = np.cumsum(weights).tolist()
    return sums


def _draw(rng: np.random.Generator, odds: Odds) -> int:
    """An index drawn in proportion to the weights of ``odds``, or evenly when all are 0."""
    if odds[-1] <= 0:
        return int(rng.integers(len(odds)))
    return min(bisect_right(odds, rng.random() * odds[-1]), len(odds) - 1)
