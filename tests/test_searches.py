"""A conformance suite over every search and population, and problems with known answers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from processes import same_arithmetic

from ecotone.populations.genome import Floats, Genome
from ecotone.populations.niches import NicheArchive
from ecotone.populations.population import ElitistArchive, Population
from ecotone.populations.trial import Evaluation, Goal, Trial
from ecotone.search.adamerging import AdaMerging, AdaMergingSettings
from ecotone.search.bayesian_map import BayesianMap, BayesianMapSettings
from ecotone.search.cma_es import CmaEs, CmaEsSettings
from ecotone.search.coefficients import CoefficientBox, Granularity, Setting
from ecotone.search.expert_merging import ExpertMerging, ExpertMergingSettings
from ecotone.search.kinds import SearchSettings
from ecotone.search.m2n2 import M2N2, M2N2Settings
from ecotone.search.map import MapSearch, MapSettings
from ecotone.search.nested_map import NestedMapSearch, NestedMapSettings
from ecotone.search.nsga import Nsga, NsgaSettings, Variant
from ecotone.search.optuna_search import OptunaSearch, OptunaSettings, Sampler
from ecotone.search.protocol import Search, numbered, trial_rng
from ecotone.search.racing import RaceSettings, Racing
from ecotone.search.random_search import RandomSearch, RandomSettings
from ecotone.search.refined import Refined, RefineSettings
from ecotone.search.stages import Stage, StagedSearch, stage_seed
from ecotone.testing.searches import (
    SIZE,
    SPACE,
    VECTORS,
    WOVEN,
    Driver,
    SearchConformance,
    digests_of,
    expanded,
    made,
    space_of,
)

GOALS = (Goal("solved"),)
TWO_GOALS = (Goal("solved"), Goal("length", "minimize"))
THREE_GOALS = (*TWO_GOALS, Goal("some"))
Pair = tuple[Search, Population]

BLOCKS = CoefficientBox.of(SPACE, "block", 0.0, 1.0)


def m2n2(settings: M2N2Settings) -> Callable[[int], Pair]:
    def make(seed: int) -> Pair:
        archive = NicheArchive(GOALS, 5)
        return M2N2(SPACE, archive, settings, seed), archive

    return make


def refined(tasks: tuple[str, ...], **settings: Any) -> Callable[[int], Pair]:
    def make(seed: int) -> Pair:
        archive, settled = NicheArchive(GOALS, 5), RefineSettings(rate=0.02, **settings)
        return Refined(M2N2(SPACE, archive, M2N2Settings(), seed), tasks, settled), archive

    return make


def boxed(kind: str, population: Callable[[], Population], granularity: Granularity = "block") -> Callable[[int], Pair]:
    def make(seed: int) -> Pair:
        box = CoefficientBox.of(SPACE, granularity, -1.0, 1.0, groups=2 if granularity == "groups" else 1)
        if kind == "random":
            return RandomSearch(box, seed), population()
        return CmaEs(box, GOALS, seed, CmaEsSettings(algorithm=kind)), population()  # type: ignore[arg-type]

    return make


def nsga(variant: Variant, goals: tuple[Goal, ...] = TWO_GOALS) -> Callable[[int], Pair]:
    return lambda seed: (
        Nsga(BLOCKS, goals, seed, NsgaSettings(algorithm=variant, population=8), np.eye(6)),
        ElitistArchive(goals, 5),
    )


def optuna(
    sampler: Sampler, goals: tuple[Goal, ...] = TWO_GOALS, seeds: Floats | None = None, **settings: Any
) -> Callable[[int], Pair]:
    chosen = OptunaSettings(sampler=sampler, **settings)
    return lambda seed: (OptunaSearch(BLOCKS, goals, seed, chosen, seeds), ElitistArchive(goals, 5))


def plain_map(seed: int) -> Pair:
    box = CoefficientBox.of(SPACE, "model", 0.0, 1.5)
    search = MapSearch(box, TWO_GOALS, seed, MapSettings(samples=14, front=120), generations=10, filling=0)
    return search, ElitistArchive(TWO_GOALS, 5)


def map_by_components(seed: int) -> Pair:
    box = CoefficientBox.of(WOVEN, "components", -0.5, 1.5)
    search = MapSearch(box, TWO_GOALS, seed, MapSettings(samples=30, front=120), generations=20, filling=2)
    return search, ElitistArchive(TWO_GOALS, 5)


def with_settings(make: Callable[[CoefficientBox, int], Search]) -> Callable[[int], Pair]:
    """A search over one coefficient a model and two settings of the operator."""
    settings = Setting("density", 0.05, 1.0, "log"), Setting("mask_seed", 0, 7, "integer")
    box = CoefficientBox.of(SPACE, "model", -0.5, 1.5, settings=settings)
    return lambda seed: (make(box, seed), ElitistArchive(TWO_GOALS, 5))


def map_with_settings(box: CoefficientBox, seed: int) -> Search:
    settings = MapSettings(samples=24, front=120)
    return MapSearch(box, TWO_GOALS, seed, settings, seeds=np.eye(3), generations=10, filling=1)


def bayesian_with_settings(box: CoefficientBox, seed: int) -> Search:
    return BayesianMap(box, TWO_GOALS, seed, BayesianMapSettings(patience=None, paths=4, candidates=32))


def bayesian(seeds: Floats | None = None, **settings: Any) -> Callable[[int], Pair]:
    chosen = BayesianMapSettings(patience=None, paths=4, candidates=32, **settings)
    return lambda seed: (BayesianMap(BLOCKS, TWO_GOALS, seed, chosen, seeds), ElitistArchive(TWO_GOALS, 5))


def nested_map(seed: int) -> Pair:
    box = CoefficientBox.of(SPACE, "model", -0.5, 1.5)
    search = NestedMapSearch(box, THREE_GOALS, seed, SPACE.sources, NestedMapSettings(samples=30, front=30))
    return search, ElitistArchive(THREE_GOALS, 5)


def adamerging(granularity: Granularity, tasks: tuple[str, ...], **settings: Any) -> Callable[[int], Pair]:
    return lambda seed: (
        AdaMerging(SPACE.borders(granularity), 3, tasks, TWO_GOALS, seed, AdaMergingSettings(rate=0.02, **settings)),
        ElitistArchive(TWO_GOALS, 5),
    )


def staged(goals: tuple[Goal, ...], *stages: Callable[[int], Stage]) -> Callable[[int], Pair]:
    def make(seed: int) -> Pair:
        search = StagedSearch([stage(stage_seed(seed, i)) for i, stage in enumerate(stages)], goals)
        return search, search.population

    return make


def first(kind: str, evaluations: int) -> Callable[[int], Stage]:
    return lambda seed: Stage(kind, lambda starts: MAKERS[kind](seed), evaluations)


def then_m2n2(seed: int) -> Stage:
    def make(starts: Sequence[Genome]) -> Pair:
        archive = NicheArchive(GOALS, 5)
        return M2N2(SPACE, archive, M2N2Settings(), seed, starts), archive

    return Stage("m2n2", make, 30, "archive")


def then_cma_es(seed: int) -> Stage:
    def make(starts: Sequence[Genome]) -> Pair:
        box = CoefficientBox(np.unique(starts[0].boundaries), 3, -1.0, 1.0)
        return CmaEs(box, GOALS, seed, start=box.point(starts[0])), elite()

    return Stage("cma_es", make, None, "best")


def then_adamerging(seed: int) -> Stage:
    def make(starts: Sequence[Genome]) -> Pair:
        coefficients = [start.refined(SPACE.tensor_borders) for start in starts]
        settings = AdaMergingSettings(rate=0.02, steps=6, check_every=3, restarts=2)
        search = AdaMerging(SPACE.tensor_borders, 3, ("odd",), TWO_GOALS, seed, settings, coefficients)
        return search, ElitistArchive(TWO_GOALS, 5)

    return Stage("adamerging", make, 14, "front", 3)


def then_nsga(seed: int) -> Stage:
    def make(starts: Sequence[Genome]) -> Pair:
        box = CoefficientBox.of(SPACE, "tensor", -1.0, 1.0)
        seeds = [box.point(start) for start in starts]
        return Nsga(box, TWO_GOALS, seed, NsgaSettings(population=8), seeds), ElitistArchive(TWO_GOALS, 5)

    return Stage("nsga2", make, None, "archive")


def expert_merging(tasks: tuple[str, ...], **settings: Any) -> Callable[[int], Pair]:
    return lambda seed: (
        ExpertMerging(SPACE, tasks, TWO_GOALS, seed, ExpertMergingSettings(exclude=("b",), **settings)),
        ElitistArchive(TWO_GOALS, 5),
    )


def niches() -> Population:
    return NicheArchive(GOALS, 5)


def elite() -> Population:
    return ElitistArchive(GOALS, 5)


def raced(
    make: Callable[[int], Pair], whole: int = 0, own_parents: bool = False, **settings: Any
) -> Callable[[int], Pair]:
    """Examples are between 0 and 1."""
    race = RaceSettings(**{"fidelities": (0.2, 0.5), "eta": 2.0, "group": 4, "slices": 2, **settings})

    def made(seed: int) -> Pair:
        search, population = make(seed)
        limits = {"solved": (0.0, 1.0)}
        return Racing(search, population, GOALS, seed, race, limits, whole, own_parents=own_parents), population

    return made


def components(settings: type[SearchSettings], groups: int = 1, **more: Any) -> Callable[[int], Pair]:
    """Coefficients of attention and of the rest."""
    return made(settings(granularity="components", groups=groups, **more), TWO_GOALS, space=WOVEN)


MAKERS: dict[str, Callable[[int], Pair]] = {
    "m2n2": m2n2(M2N2Settings()),
    "m2n2-blocks-linear": m2n2(M2N2Settings(granularity="block", interpolation="linear", attraction=False)),
    "m2n2-dense": m2n2(M2N2Settings(mutation=0.05)),
    "m2n2-mutation-alone": m2n2(M2N2Settings(mutation=0.05, crossover=False)),
    "m2n2-refined": refined(("odd",), every=3, steps=2),
    "m2n2-refined-all": refined(("odd", "even"), every=1, steps=1),
    "random-elite": boxed("random", elite),
    "random-niches": boxed("random", niches, "tensor"),
    "cma_es-elite": boxed("cma_es", elite),
    "cma_es-niches": boxed("cma_es", niches, "model"),
    "sep_cma_es-elite": boxed("sep_cma_es", elite, "tensor"),
    "sep_cma_es-niches": boxed("sep_cma_es", niches),
    "nsga2": nsga("nsga2"),
    "nsga3": nsga("nsga3"),
    "bayesian_map": bayesian(),
    "bayesian_map-bins": bayesian(acquisition="bins", seeds=np.eye(3)),
    "optuna-tpe": optuna("tpe", seeds=np.eye(6)),
    "optuna-nsga2": optuna("nsga2", population=8),
    "optuna-nsga3": optuna("nsga3", population=8, seeds=np.eye(6)),
    "optuna-cma_es": optuna("cma_es", seeds=np.eye(6)),
    "optuna-random": optuna("random"),
    "optuna-qmc": optuna("qmc"),
    "map": plain_map,
    "nested_map": nested_map,
    "adamerging": adamerging("block", ("odd",), restarts=2, patience=20),
    "adamerging-together": adamerging("block", ("odd", "even"), restarts=3, together=2, accumulate=2),
    "adamerging-sweep": adamerging("tensor", ("odd", "even"), sweep=3, restarts=2, clamp=True, check_every=2),
    "expert_merging": expert_merging(("odd",), restarts=2),
    "expert_merging-free": expert_merging(("odd",), coefficients="free", restarts=2),
    "expert_merging-chunks": expert_merging(("odd",), restarts=3, steps=8, check_every=3, chunks=2.0, accumulate=2),
    "random-settings": with_settings(RandomSearch),
    "cma_es-settings": with_settings(lambda box, seed: CmaEs(box, TWO_GOALS, seed)),
    "nsga2-settings": with_settings(lambda box, seed: Nsga(box, TWO_GOALS, seed, NsgaSettings(population=8))),
    "optuna-tpe-settings": with_settings(lambda box, seed: OptunaSearch(box, TWO_GOALS, seed)),
    "map-settings": with_settings(map_with_settings),
    "bayesian_map-settings": with_settings(bayesian_with_settings),
    "random-components": components(RandomSettings),
    "cma_es-components": components(CmaEsSettings),
    "sep_cma_es-components-groups": components(CmaEsSettings, 2, algorithm="sep_cma_es"),
    "nsga2-components": components(NsgaSettings, population=8),
    "optuna-components": components(OptunaSettings),
    "map-components": map_by_components,
    "bayesian_map-components": components(BayesianMapSettings, patience=None, paths=4, candidates=32),
    "adamerging-components": components(AdaMergingSettings, rate=0.02, restarts=3, accumulate=2),
    "adamerging-components-groups": components(AdaMergingSettings, 2, rate=0.02, restarts=2, together=2),
    "raced-m2n2": raced(m2n2(M2N2Settings()), whole=3),
    "raced-cma_es": raced(boxed("cma_es", elite), group=3),
    "random-raced": raced(boxed("random", elite), fidelities=(), slices=3),
    "nsga2-raced": raced(nsga("nsga2", GOALS), own_parents=True, bound=False),
    "stages": staged(GOALS, first("cma_es-elite", 14), then_m2n2, then_cma_es),
    "stages-gradients": staged(TWO_GOALS, first("nsga2", 12), then_adamerging, then_nsga),
}


class TestEverySearch(SearchConformance):
    searches = MAKERS
    never_wait = ("random", "nsga", "optuna")
    per_merge: ClassVar = {
        **{"adamerging-components": 4, "adamerging-components-groups": 2},
        **dict.fromkeys(("adamerging-sweep", "adamerging-together", "expert_merging-chunks", "m2n2-refined-all"), 2),
        **{kind: 3 for kind in MAKERS if "raced" in kind},
    }

    @pytest.mark.slow
    def test_odd_scores_end_no_search(self, kind: str, scores: str) -> None:
        """A minute for all of them."""
        super().test_odd_scores_end_no_search(kind, scores)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind.endswith("components")])
def test_tensors_of_one_component_have_the_same_coefficients(kind: str) -> None:
    driver = Driver(*MAKERS[kind](0)).to(40)
    rows = np.array([t.genome.refined(WOVEN.tensor_borders) for t in (e[1][0] for e in driver.log if e[0] == "tell")])
    assert (rows[:, 0] == rows[:, 2]).all()
    assert np.count_nonzero((rows[:, 0] != rows[:, 1]).any(axis=1)) > len(rows) / 2


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind.endswith("settings")])
def test_settings_of_the_operator_are_searched_within_their_bounds(kind: str) -> None:
    driver = Driver(*MAKERS[kind](0)).to(60)
    parameters = [entry[1][0].genome.parameters for entry in driver.log if entry[0] == "tell"]
    assert all(list(each) == ["density", "mask_seed"] for each in parameters)
    densities, seeds = {each["density"] for each in parameters}, {each["mask_seed"] for each in parameters}
    assert 0.05 <= min(densities) < 0.2 < 0.3 < max(densities) <= 1.0
    assert all(type(seed) is int for seed in seeds)
    assert len(seeds) > 2
    assert seeds <= set(range(8))


ELSEWHERE = """
import importlib.util, json, os, sys
sys.path.insert(0, os.path.dirname({file!r}))
spec = importlib.util.spec_from_file_location("test_searches", {file!r})
module = importlib.util.module_from_spec(spec)
sys.modules["test_searches"] = module
spec.loader.exec_module(module)
print(json.dumps(module.digests_of(module.MAKERS, 5, 50)))
"""


@pytest.mark.slow
def test_another_process_proposes_the_same_trials() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE.format(file=__file__)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={"PYTHONHASHSEED": "77", "PATH": "", **same_arithmetic()},
    )
    assert json.loads(done.stdout) == digests_of(MAKERS, 5, 50)


def test_each_trial_has_a_generator_of_its_own() -> None:
    first = trial_rng(3, 8).random(4)
    assert trial_rng(3, 8).random(4).tolist() == first.tolist()
    others = [trial_rng(3, 9), trial_rng(4, 8), trial_rng(8, 3)]
    assert all(other.random(4).tolist() != first.tolist() for other in others)


def test_numbers_must_run_on() -> None:
    trials = [Trial(i, Genome.uniform(3, [1.0])) for i in (4, 5, 7)]
    assert numbered(4, trials[:2])
    assert numbered(9, [])
    assert not numbered(3, trials[:2])
    assert not numbered(4, trials)


# -- known answers -------------------------------------------------------------------------------------------

TARGET = np.array([[0.9, 0.1, 0.4], [0.2, 0.7, 0.3]])


def nearness(goal: Goal, trial: Trial) -> Evaluation:
    distance = float(np.sum((trial.genome.refined(SPACE.block_borders) - TARGET) ** 2))
    return Evaluation({goal.name: -distance if goal.direction == "maximize" else distance})


def best_of(search: Search, goal: Goal, evaluations: int) -> float:
    """The smallest distance to the target that is found."""
    population, best = ElitistArchive([goal], 3), math.inf
    asked = 0
    while asked < evaluations:
        for trial in search.ask(5):
            evaluation = nearness(goal, trial)
            best = min(best, abs(evaluation.scores[goal.name]))
            search.tell(trial, evaluation, population.add(trial, evaluation))
            asked += 1
    return best


@pytest.mark.parametrize("algorithm", ["cma_es", "sep_cma_es"])
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cma_es_finds_the_optimum_of_a_quadratic(algorithm: Any, direction: str, seed: int) -> None:
    goal = Goal("near", direction)  # type: ignore[arg-type]
    found = best_of(CmaEs(BLOCKS, [goal], seed, CmaEsSettings(algorithm=algorithm)), goal, 700)
    assert found < 1e-6
    assert best_of(RandomSearch(BLOCKS, seed), goal, 700) > 1e-2


def test_cma_es_survives_failures_on_its_way() -> None:
    search, population = CmaEs(BLOCKS, [Goal("near")], 0), ElitistArchive([Goal("near")], 3)
    best = math.inf
    for _ in range(200):
        for trial in search.ask(4):
            lucky = trial.number % 3
            evaluation = nearness(Goal("near"), trial) if lucky else Evaluation.failed("exception", "no")
            best = min(best, abs(evaluation.scores.get("near", math.inf)))
            search.tell(trial, evaluation, population.add(trial, evaluation))
    assert best < 1e-4


@pytest.mark.parametrize("algorithm", ["cma_es", "sep_cma_es"])
def test_cma_es_is_the_librarys_given_the_same_points(algorithm: Any) -> None:
    """What we add is the stream a trial: the distribution is updated by the library alone."""
    from cmaes import CMA, SepCMA

    ours = CmaEs(BLOCKS, [Goal("near")], 0, CmaEsSettings(algorithm=algorithm, population_size=6))
    theirs: Any = (SepCMA if algorithm == "sep_cma_es" else CMA)(
        np.full(6, 1 / 3), 0.2, bounds=np.tile([0, 1], (6, 1)), population_size=6
    )
    archive = ElitistArchive([Goal("near")], 3)
    for _ in range(10):
        generation = []
        for trial in ours.ask(6):
            evaluation = nearness(Goal("near"), trial)
            generation.append((trial.genome.coefficients.reshape(-1).copy(), -evaluation.scores["near"]))
            ours.tell(trial, evaluation, archive.add(trial, evaluation))
        theirs.ask()
        theirs.tell(generation)
        assert ours._optimiser.mean.tolist() == theirs.mean.tolist()
        assert ours._optimiser._sigma == theirs._sigma


def test_cma_es_starts_at_the_average_and_stays_in_its_box() -> None:
    wide = CmaEsSettings(sigma=0.5, population_size=40)
    search = CmaEs(CoefficientBox.of(SPACE, "block", 0.1, 0.6), [Goal("near")], 0, wide)
    points = np.array([trial.genome.coefficients.reshape(-1) for trial in search.ask(40)])
    assert points.min() >= 0.1
    assert points.max() <= 0.6
    narrow = CmaEs(BLOCKS, [Goal("near")], 0, CmaEsSettings(sigma=1e-6, population_size=40))
    assert narrow.ask(1)[0].genome.refined(SPACE.block_borders) == pytest.approx(np.full((2, 3), 1 / 3), abs=1e-4)
    placed = CmaEs(BLOCKS, [Goal("near")], 0, CmaEsSettings(sigma=1e-6), 0.7)
    assert placed.ask(1)[0].genome.refined(SPACE.block_borders) == pytest.approx(np.full((2, 3), 0.7), abs=1e-4)


@pytest.mark.parametrize("algorithm", ["cma_es", "sep_cma_es"])
def test_cma_es_in_one_dimension_and_its_end(algorithm: Any) -> None:
    one = space_of(VECTORS[:1], blocks=(0, SIZE))
    box = CoefficientBox.of(one, "model", 0.0, 1.0)
    search = CmaEs(box, [Goal("near")], 0, CmaEsSettings(algorithm=algorithm), 0.5)
    archive, best, asked = ElitistArchive([Goal("near")], 3), math.inf, 0
    while not search.done and asked < 5000:
        for trial in search.ask(3):
            asked += 1
            assert trial.genome.coefficients.shape == (1, 1)
            distance = (trial.genome.coefficients.item() - 0.3) ** 2
            best = min(best, distance)
            evaluation = Evaluation({"near": -distance})
            search.tell(trial, evaluation, archive.add(trial, evaluation))
    assert best < 1e-8
    assert search.done  # converged: it says so by itself


def test_random_search_is_even_in_its_box() -> None:
    search = RandomSearch(CoefficientBox.of(SPACE, "block", -0.5, 1.5), 0)
    points = np.array([trial.genome.coefficients for trial in search.ask(2000)])
    assert points.shape == (2000, 2, 3)
    assert points.min() >= -0.5
    assert points.max() <= 1.5
    assert points.mean(axis=0) == pytest.approx(np.full((2, 3), 0.5), abs=0.06)
    assert points.std(axis=0) == pytest.approx(np.full((2, 3), 2 / math.sqrt(12)), abs=0.03)


def test_m2n2_merges_two_specialists_and_needs_the_split_for_it() -> None:
    """One knows the first half of the parameters, the other the second; an example needs 90 % of its own."""
    truth = np.random.default_rng(9).choice([-1.0, 1.0], SIZE)
    halves = np.zeros((2, SIZE), np.float32)
    halves[0, : SIZE // 2], halves[1, SIZE // 2 :] = truth[: SIZE // 2], truth[SIZE // 2 :]
    space = space_of(halves)

    def best(settings: M2N2Settings) -> float:
        archive = NicheArchive(GOALS, 10)
        search, found = M2N2(space, archive, settings, 0), 0.0
        for _ in range(400):
            for trial in search.ask(1):
                right = expanded(trial.genome, halves) * truth >= 0.9
                found = max(found, float(right.mean()))
                evaluation = Evaluation({"solved": float(right.mean())}, {"solved": right})
                search.tell(trial, evaluation, archive.add(trial, evaluation))
        return found

    assert best(M2N2Settings()) > 0.9
    # On the arc between equal norms no single weight gives both halves 90 %: the seeds' half is all there is.
    assert best(M2N2Settings(split=False)) == 0.5
