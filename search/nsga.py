"""NSGA-II and NSGA-III in steady state: multi-objective evolution that never waits for a generation.

NSGA-II: Deb, Pratap, Agarwal and Meyarivan 2002; NSGA-III: Deb and Jain 2014. In both a child is bred by simulated
binary crossover (Deb and Agrawal 1995) and polynomial mutation (Deb and Goyal 1996), bounded by the box. What
differs from the papers is the replacement: each child that comes back is put to the survivors and the least of
them leaves (mu + 1; Durillo et al. 2009 found that better than whole generations), and children are bred from the
survivors known when they are asked for. So workers never idle, and a result counts from the next proposal on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from ecotone.populations.errors import InputError
from ecotone.populations.fronts import ranks
from ecotone.populations.genome import Floats, Integers
from ecotone.populations.population import ElitistArchive
from ecotone.populations.trial import Evaluation, Goal, Outcome, Trial, oriented
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.kinds import Begins, Context, ModelsFirstBox, Needs, Pair
from ecotone.search.protocol import trial_rng
from ecotone.search.racing import RaceSettings, raced
from ecotone.search.simplex import reference_directions

Variant: TypeAlias = Literal["nsga2", "nsga3"]

_TRIES = 8  # children bred anew because they equal a survivor or a trial in flight
_HALF = 8e307  # of the largest number: the range of larger ones may be no number


class NsgaSettings(ModelsFirstBox):
    """NSGA-II or NSGA-III in steady state: each result counts from the next proposal on.

    Attributes:
        algorithm: ``nsga2``: genetic search by crowding distance; ``nsga3``: genetic search by reference directions,
            for two or more objectives.
        population: Survivors from which children are bred. None means 20, or twice the number of objectives if that is
            more.
        crossover: Probability that a child has coefficients of both parents.
        crossover_index: Distribution index of the crossover. With a larger index, children are nearer to a parent.
        mutation: Probability that a coefficient mutates. None means 1/D for D coefficients.
        mutation_index: Distribution index of the mutation. With a larger index, steps are smaller.
        race: Score every candidate on some of the examples first, and only the promising candidates on all
            (``ecotone.search.racing``). None scores every candidate on all examples.
    """

    algorithm: Variant = "nsga2"
    population: int | None = Field(default=None, ge=4)
    crossover: float = Field(default=0.9, ge=0, le=1)
    crossover_index: float = Field(default=20.0, ge=0)
    mutation: float | None = Field(default=None, ge=0, le=1)
    mutation_index: float = Field(default=20.0, ge=0)
    race: RaceSettings | None = None

    def needs(self) -> Needs:
        """Reference directions have a meaning for two objectives or more."""
        return Needs(objectives=2 if self.algorithm == "nsga3" else 1)

    def begins(self) -> Begins:
        """With merges that are scored in place of the models."""
        return Begins()

    def make(self, context: Context) -> Pair:
        """The search, and an archive of the best."""
        box = self.box(context)
        search = Nsga(box, context.goals, context.seed, self, self.first(box, context))
        archive = ElitistArchive(context.goals, self.archive)
        return raced((search, archive), context, self.race, own_parents=True)


@dataclass(frozen=True, eq=False)
class _Survivor:
    """A point of the box, its scores, and its trial."""

    number: int
    point: Floats
    scores: Floats


class Nsga:
    """NSGA-II or NSGA-III over merge coefficients, one survivor replaced at a time.

    The first trials are the ``seeds``, then points drawn evenly, ``population`` in all; later ones are children.
    NSGA-II draws parents by binary tournaments of rank and crowding distance, NSGA-III draws them evenly. Failed
    trials never join the population. A proposal takes well under a millisecond.

    Args:
        box: The bounds of the coefficients.
        goals: The M objectives.
        seed: The recipe's seed.
        settings: The variant, its population, and how children are bred; None means the defaults.
        seeds: (n, D) points to score first, such as the models themselves; moved into the box.

    Raises:
        InputError: NSGA-III with one objective, or seeds of another shape.

    Example::

        from ecotone.populations.population import ElitistArchive
        from ecotone.search.nsga import Nsga, NsgaSettings

        archive = ElitistArchive(goals, capacity=20)
        search = Nsga(box, goals, 0, NsgaSettings(algorithm="nsga3", population=12))
        for _ in range(25):
            for trial in search.ask(4):
                evaluation = score(trial.genome)
                search.tell(trial, evaluation, archive.add(trial, evaluation))
    """

    settings: NsgaSettings

    def __init__(
        self,
        box: CoefficientBox,
        goals: Sequence[Goal],
        seed: int,
        settings: NsgaSettings | None = None,
        seeds: ArrayLike | None = None,
    ) -> None:
        self.box = box
        self.goals: tuple[Goal, ...] = tuple(goals)
        self.seed = seed
        self.settings = settings = settings or NsgaSettings()
        self.population: int = settings.population or default_population(len(self.goals))
        self.mutation: float = 1.0 / box.size if settings.mutation is None else settings.mutation
        self.seeds: Floats = seed_points(box, seeds)
        if settings.algorithm == "nsga3" and len(self.goals) < 2:
            raise InputError(
                f"search.algorithm: nsga3 expects two objectives or more, found {len(self.goals)}.",
                "For one objective use cma_es.",
            )
        directed = settings.algorithm == "nsga3"
        self.directions: Floats | None = reference_directions(len(self.goals), self.population) if directed else None
        self._next = 0
        self._survivors: list[_Survivor] = []
        self._flying: dict[int, Floats] = {}
        self._known: Counter[bytes] = Counter()  # points of survivors and of trials in flight
        self._ideal = np.full(len(self.goals), -np.inf)  # best score seen of each objective
        self._rank: Integers | None = None  # of the survivors, where it is known
        self._spreads: dict[int, Floats] = {}  # their crowding distances by rank, where these are known

    @property
    def done(self) -> bool:
        """Never: evolution goes on until the budget is spent."""
        return False

    def ask(self, n: int) -> list[Trial]:
        """``n`` trials: seeds and even draws until there are ``population``, then children of the survivors."""
        return [self._proposed(number) for number in range(self._next, self._next + n)]

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        """Add the trial to the survivors; when there are too many, the least of them leaves."""
        point = self._flying.pop(trial.number)
        if not evaluation.ok:
            self._forget(point)
            return
        scores = oriented(evaluation.scores, self.goals)
        self._ideal = np.maximum(self._ideal, scores)
        self._survivors.append(_Survivor(trial.number, point, scores))
        if len(self._survivors) > self.population:
            least, rank = self._least()
            self._forget(self._survivors.pop(least).point)
            self._rank = np.delete(rank, least)  # it was on the last front, so it dominated nobody
        else:
            self._rank = None
        self._spreads = {}

    def state(self) -> dict[str, Any]:
        """The survivors and the points in flight."""
        return {
            "next": self._next,
            "ideal": self._ideal.copy(),
            "survivors": [s.number for s in self._survivors],
            "points": _table([s.point for s in self._survivors], self.box.size),
            "scores": _table([s.scores for s in self._survivors], len(self.goals)),
            "flying": list(self._flying),
            "flying_points": _table(list(self._flying.values()), self.box.size),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._next, self._ideal = state["next"], state["ideal"].copy()
        rows = zip(state["survivors"], state["points"].copy(), state["scores"].copy(), strict=True)
        self._survivors = [_Survivor(*row) for row in rows]
        self._flying = dict(zip(state["flying"], state["flying_points"].copy(), strict=True))
        points = (*self._flying.values(), *(s.point for s in self._survivors))
        self._known = Counter(point.tobytes() for point in points)
        self._rank, self._spreads = None, {}

    # -- proposing ---------------------------------------------------------------------------------------

    def _proposed(self, number: int) -> Trial:
        parents: tuple[int, ...] = ()
        if number < len(self.seeds):
            point = self.seeds[number]
        elif number < self.population or len(self._survivors) < 2:
            point = self.box.draw(self.seed, number)
        else:
            point, parents = self._child(trial_rng(self.seed, number))
        self._flying[number] = point
        self._known[point.tobytes()] += 1
        self._next = number + 1
        return Trial(number, self.box.genome(point), parents)

    def _child(self, rng: np.random.Generator) -> tuple[Floats, tuple[int, ...]]:
        """A child that equals no survivor and nothing in flight, if breeding some more gives one."""
        settings = self.settings
        for _ in range(_TRIES):
            a, b = self._parents(rng)
            child = self._survivors[a].point
            if rng.random() < settings.crossover:
                child = simulated_binary(rng, child, self._survivors[b].point, self.box, settings.crossover_index)
            child = polynomial(rng, child, self.box, self.mutation, settings.mutation_index)
            if child.tobytes() not in self._known:
                break
        return child, (self._survivors[a].number, self._survivors[b].number)

    def _forget(self, point: Floats) -> None:
        key = point.tobytes()
        self._known[key] -= 1
        if not self._known[key]:
            del self._known[key]

    def _parents(self, rng: np.random.Generator) -> tuple[int, int]:
        """Two different survivors."""
        count = len(self._survivors)
        if self.settings.algorithm == "nsga3":
            a, b = rng.choice(count, 2, replace=False)
            return int(a), int(b)
        a = self._tournament(rng)
        for _ in range(_TRIES):
            b = self._tournament(rng)
            if b != a:
                return a, b
        return a, (a + 1) % count

    def _tournament(self, rng: np.random.Generator) -> int:
        """The better of two survivors drawn evenly: of lower rank, or as good and less crowded."""
        rank = self._ranked()
        first, second = (int(i) for i in rng.choice(len(self._survivors), 2, replace=False))
        if rank[first] != rank[second]:
            return first if rank[first] < rank[second] else second
        spread = self._spread(int(rank[first]))
        return second if spread[second] > spread[first] else first

    def _ranked(self) -> Integers:
        if self._rank is None:
            self._rank = ranks(self._scores())
        return self._rank

    def _spread(self, level: int) -> Floats:
        """(P,) crowding distances of the survivors of rank ``level``, zero of the others."""
        if level not in self._spreads:
            own = self._ranked() == level
            self._spreads[level] = np.zeros(len(own))
            self._spreads[level][own] = crowding(self._scores()[own])
        return self._spreads[level]

    # -- survival ----------------------------------------------------------------------------------------

    def _least(self) -> tuple[int, Integers]:
        """Position of the survivor to leave, one of the last front, where it is most crowded; the ranks of all."""
        scores = self._scores()
        rank = ranks(scores)
        last = np.flatnonzero(rank == rank.max())
        if self.directions is None:
            spread = crowding(scores[last])
            return int(last[np.flatnonzero(spread == spread.min())[-1]]), rank  # the youngest of equals
        return most_redundant(self._ideal - scores, rank, self.directions), rank

    def _scores(self) -> Floats:
        return _table([s.scores for s in self._survivors], len(self.goals))


def default_population(objectives: int) -> int:
    """Survivors to keep for ``objectives`` M when nothing is said: 20, or 2 M if that is more.

    Small, because a merge's budget is tens to hundreds of evaluations, not the papers' tens of thousands: merging
    three digit specialists, three objectives, NSGA-II had larger fronts with 20 than with 10 and 40 after 60, 120
    and 240 evaluations.
    """
    return max(20, 2 * objectives)


def seed_points(box: CoefficientBox, seeds: ArrayLike | None) -> Floats:
    """(n, D) the points to score first, moved into the box; none without seeds.

    Raises:
        InputError: The seeds are not of shape (n, D).
    """
    if seeds is None:
        return np.zeros((0, box.size))
    points = np.array(seeds, np.float64)
    if points.ndim != 2 or points.shape[1] != box.size:
        raise InputError(f"seeds: expected shape (n, {box.size}), found {points.shape}.")
    return box.clip(points)


# -- variation -----------------------------------------------------------------------------------------------


def simulated_binary(rng: np.random.Generator, a: Floats, b: Floats, box: CoefficientBox, index: float) -> Floats:
    """One child of the parents ``a`` and ``b`` (D,): each gene crosses with probability 1/2, others are of ``a``.

    Simulated binary crossover (Deb and Agrawal 1995), its distribution truncated to the box. A crossed gene
    comes from either of the two children that the operator makes.
    """
    crosses, uppers, draw = rng.random((3, len(a)))
    crossed, upper = crosses < 0.5, uppers < 0.5
    least, most = np.minimum(a, b), np.maximum(a, b)
    apart = np.maximum(most - least, 1e-14)
    room = np.where(upper, box.high - most, least - box.low)
    alpha = 2.0 - (1.0 + 2.0 * room / apart) ** -(index + 1.0)
    inward = draw <= 1.0 / alpha
    ratio = np.where(inward, draw * alpha, 1.0 / (2.0 - draw * alpha)) ** (1.0 / (index + 1.0))
    genes = 0.5 * (least + most + np.where(upper, ratio, -ratio) * apart)
    return np.where(crossed & (most - least > 1e-14), box.clip(genes), a)


def polynomial(rng: np.random.Generator, point: Floats, box: CoefficientBox, rate: float, index: float) -> Floats:
    """``point`` (D,) with each gene mutated with probability ``rate``: bounded polynomial mutation (Deb and Goyal)."""
    chances, draws = rng.random((2, len(point)))
    mutated = np.flatnonzero(chances < rate)
    if not len(mutated):
        return point
    gene, draw = point[mutated], draws[mutated]
    width, power = box.high - box.low, index + 1.0
    below, above = (gene - box.low) / width, (box.high - gene) / width
    down = (2.0 * draw + (1.0 - 2.0 * draw) * (1.0 - below) ** power) ** (1.0 / power) - 1.0
    up = 1.0 - (2.0 * (1.0 - draw) + (2.0 * draw - 1.0) * (1.0 - above) ** power) ** (1.0 / power)
    child: Floats = point.copy()
    child[mutated] = box.clip(gene + np.where(draw < 0.5, down, up) * width)
    return child


# -- selection -----------------------------------------------------------------------------------------------


def crowding(points: Floats) -> Floats:
    """(N,) crowding distance (Deb et al. 2002) of each of the ``points`` (N, M) of one front; infinite at its ends."""
    if len(points) < 3:  # there are only ends
        return np.full(len(points), np.inf if (points[0] != points[-1]).any() else 0.0)
    distance = np.zeros(len(points))
    for column in points.T:
        order = np.argsort(column, kind="stable")
        if abs(column[order[-1]]) > _HALF or abs(column[order[0]]) > _HALF:  # their range may be no number
            column = 0.5 * column
        width = column[order[-1]] - column[order[0]]
        if width > 0:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / width  # (section III-B)
            distance[order[[0, -1]]] = np.inf
    return distance


def most_redundant(costs: Floats, rank: Integers, directions: Floats) -> int:
    """The point of the last front that NSGA-III's niching (Deb and Jain 2014) would not take.

    Points are normalised and joined to their nearest direction; of the direction that has most of them the
    farthest point of the last front goes. Where the paper draws lots, distance decides.

    Args:
        costs: (N, M) how far each score is below the best seen.
        rank: (N,) fronts, 0 the best.
        directions: (H, M) as from ``reference_directions``.
    """
    units = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    normal = costs / intercepts(costs, rank)  # (section IV-C)
    along = normal @ units.T
    distance = np.sqrt(np.maximum((normal**2).sum(axis=1, keepdims=True) - along**2, 0.0))
    niche = distance.argmin(axis=1)  # (section IV-D)
    crowd = np.bincount(niche, minlength=len(units))
    last = np.flatnonzero(rank == rank.max())
    keys = [(crowd[niche[i]], distance[i, niche[i]], i) for i in last]  # (section IV-E)
    return int(max(keys)[2])


def intercepts(costs: Floats, rank: Integers) -> Floats:
    """(M,) where the plane through the extreme points cuts the axes, or else the worst costs of the first front.

    Deb and Jain 2014, section IV-C: the extreme point of an axis has the least of its scalarised costs.
    """
    size = costs.shape[1]
    weights = np.where(np.eye(size) > 0, 1.0, 1e-6)
    extremes = costs[[int((costs / weight).max(axis=1).argmin()) for weight in weights]]
    worst, front = costs.max(axis=0), costs[rank == 0].max(axis=0)
    try:
        cuts = 1.0 / np.linalg.solve(extremes, np.ones(size))
    except np.linalg.LinAlgError:
        cuts = front
    cuts = np.where(np.isfinite(cuts), np.minimum(cuts, worst), worst) if (cuts > 1e-6).all() else front
    return np.where(cuts > 1e-6, cuts, np.where(worst > 1e-6, worst, 1.0))


def _table(rows: Sequence[Floats], columns: int) -> Floats:
    return np.array(rows, np.float64).reshape(len(rows), columns)
