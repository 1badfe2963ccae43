"""Races: samples of examples, estimates and their errors, cuts, the bound that loses nothing, real runs."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from managing import of_sample
from numpy.typing import NDArray
from pydantic import ValidationError
from test_adamerging_recipes import toy_recipe
from test_manager import SPACE
from torch import nn

from ecotone.experiments import compose
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.report import search_report_text
from ecotone.experiments.running import launch, resume
from ecotone.fitness.objectives import Accuracy, Entropy
from ecotone.fitness.protocol import Divisible, pooled_mean
from ecotone.fitness.worker import Worker
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.populations.niches import NicheArchive
from ecotone.populations.population import ElitistArchive, Population
from ecotone.populations.samples import Sample, error_of_mean, estimate, order, reached
from ecotone.populations.trial import Evaluation, Goal, Outcome, Scores, Trial
from ecotone.search.cma_es import CmaEs, CmaEsSettings
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.m2n2 import M2N2, M2N2Settings
from ecotone.search.nsga import Nsga, NsgaSettings
from ecotone.search.protocol import Search
from ecotone.search.racing import RaceSettings, Racing
from ecotone.search.random_search import RandomSearch

GOAL = (Goal("right"),)
PAIR = (Goal("right"), Goal("left"))
PROBES = np.random.default_rng(5).standard_normal((80, 20))
VECTORS = np.random.default_rng(1).standard_normal((2, 20))
LIMITS = {"right": (0.0, 1.0), "left": (0.0, 1.0)}
BOX = CoefficientBox.of(SPACE, "model", -1.0, 1.0)


def whole(trial: Trial) -> Evaluation:
    """Right or wrong on 60 examples of one task and 20 of another."""
    weights = (np.repeat(trial.genome.coefficients, np.diff(trial.genome.boundaries), axis=0) * VECTORS.T).sum(axis=1)
    right = PROBES @ weights > 0.8
    parts = {"right": right[:60], "left": right[60:]}
    return Evaluation({name: float(part.mean()) for name, part in parts.items()}, parts)


def run(
    search: Search, population: Population, trials: int, measure: Callable[[Trial], Evaluation] = whole
) -> list[Trial]:
    """Ask for one, tell it, and so on."""
    told: list[Trial] = []
    while len(told) < trials:
        asked = search.ask(1)
        assert asked
        for trial in asked:
            evaluation = of_sample(trial, measure(trial))
            outcome = population.add(trial, evaluation) if trial.scored else Outcome(False)
            search.tell(trial, evaluation, outcome)
        told += asked
    return told


# -- samples and estimates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 100])
def test_samples_grow_in_one_order_to_all_examples(count: int) -> None:
    stops = (0.0, 0.1, 0.3, 0.65, 1.0)
    parts = [Sample(4, a, b).now(count) for a, b in pairwise(stops)]
    assert np.array_equal(np.concatenate(parts), order(4, count))
    assert sorted(order(4, count)) == list(range(count))
    for index, part in enumerate(parts):
        assert np.array_equal(Sample(4, stops[index], stops[index + 1]).then(count), np.concatenate(parts[: index + 1]))
        assert len(part) == reached(count, stops[index + 1]) - reached(count, stops[index])


def test_another_seed_is_another_order_and_a_share_is_rounded_up() -> None:
    assert not np.array_equal(order(1, 50), order(2, 50))
    assert [reached(10, share) for share in (0.0, 0.01, 0.1, 0.3, 0.31, 1.0)] == [0, 1, 1, 3, 4, 10]


def test_the_error_of_a_sample_s_mean_is_that_of_many_samples() -> None:
    """Known answers: 0 for all of them, and the spread over all samples otherwise."""
    rng = np.random.default_rng(0)
    values = rng.random(60) < 0.4
    means, errors = [], []
    for _ in range(4000):
        part = rng.permutation(values)[:20]
        means.append(part.mean())
        errors.append(error_of_mean(part, 60) ** 2)
    assert np.std(means) ** 2 == pytest.approx(np.mean(errors), rel=0.06)
    assert error_of_mean(values, 60) == 0.0
    assert math.isnan(error_of_mean(values[:1], 60))


def relatives(share: float, n: int = 400) -> tuple[NDArray[np.bool_], list[NDArray[np.bool_]]]:
    """A merge's scores, and those of two parents with which it agrees on a share of the examples."""
    rng = np.random.default_rng(7)
    mother, father = rng.random(n) < 0.7, rng.random(n) < 0.5
    child = np.where(rng.random(n) < share, mother, rng.random(n) < 0.6)
    return child, [mother, father]


def test_parents_make_estimates_sharper_as_much_as_they_say() -> None:
    child, parents = relatives(0.9)
    misses, plain, errors, naive = [], [], [], []
    for seed in range(600):
        seen = child[order(seed, len(child))[:60]]
        value, error = pooled_mean(seen, len(child))
        found = estimate(value, error, seen, parents, seed)
        assert found.items == 60
        misses.append(found.value - child.mean())
        plain.append(value - child.mean())
        errors.append(found.error)
        naive.append(error)
    assert np.std(misses) < 0.6 * np.std(plain)
    assert abs(np.mean(misses)) < 0.005
    assert np.mean(errors) == pytest.approx(np.std(misses), rel=0.1)
    assert np.mean(naive) == pytest.approx(np.std(plain), rel=0.1)


def test_parents_that_tell_nothing_or_a_small_sample_change_nothing() -> None:
    child, parents = relatives(0.9)
    small = child[order(3, 400)[:20]]
    assert estimate(0.5, 0.1, small, parents, 3).value == 0.5
    same = np.ones(60, bool)
    assert estimate(1.0, 0.0, same, parents, 3) == estimate(1.0, 0.0, same, [], 3)


# -- objectives ----------------------------------------------------------------------------------------------


@pytest.fixture
def objectives() -> tuple[nn.Module, list[Divisible]]:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(37, 5, generator=generator), torch.randint(0, 4, (37,), generator=generator)
    torch.manual_seed(0)
    module = nn.Linear(5, 4).eval()
    return module, [Accuracy(Goal("right"), inputs, labels), Entropy(Goal("unsure", "minimize"), inputs)]


def test_parts_of_an_objective_make_up_the_whole(objectives: tuple[nn.Module, list[Divisible]]) -> None:
    module, measures = objectives
    for objective in measures:
        assert isinstance(objective, Divisible)
        score = objective.score(module)
        assert score.per_example is not None
        numbers = order(9, objective.count)
        pieces = [objective.subset(part).score(module).per_example for part in np.array_split(numbers, 4)]
        each = np.concatenate([piece for piece in pieces if piece is not None])
        assert np.allclose(each, score.per_example[numbers], rtol=1e-6)
        assert objective.pooled(score.per_example, np.arange(objective.count)) == (score.value, 0.0)
        value, error = objective.pooled(each[:9], numbers[:9])
        assert value == pytest.approx(score.per_example[numbers[:9]].mean(), rel=1e-6)
        assert 0 < error < 0.5


# -- the bound -----------------------------------------------------------------------------------------------


def example_scores(rng: np.random.Generator, binary: bool) -> NDArray[Any]:
    skill = rng.random()
    return rng.random(12) < skill if binary else rng.random(12) * skill


def offer(values: NDArray[Any], number: int) -> tuple[Trial, Evaluation]:
    return Trial(number, Genome.uniform(4, [1.0])), Evaluation({"right": float(values.mean())}, {"right": values})


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "real"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: ElitistArchive(GOAL, 5),
        lambda: NicheArchive(GOAL, 5),
        lambda: NicheArchive(GOAL, 5, alpha=0.5),
        lambda: NicheArchive(GOAL, 5, alpha=2.0),
        lambda: NicheArchive(GOAL, 5, resource="one"),
    ],
    ids=["elitist", "niches", "weak", "strong", "one"],
)
def test_whoever_is_ruled_out_would_not_have_been_accepted(make: Callable[[], Population], binary: bool) -> None:
    rng = np.random.default_rng(3)
    ruled_out = accepted = 0
    for _ in range(300):
        population = make()
        for number in range(8):
            population.add(*offer(example_scores(rng, binary), number))
        values = example_scores(rng, binary)
        seen = int(rng.integers(3, 12))
        best = values.copy()
        best[seen:] = True if binary else 1.0
        if population.may_accept(offer(best, 99)[1]):
            continue
        ruled_out += 1
        for _ in range(20):
            ends = values.copy()
            ends[seen:] = rng.random(12 - seen) < 0.9 if binary else rng.random(12 - seen)
            state = population.state()
            accepted += population.add(*offer(ends, 99)).accepted
            population.restore(state)
    assert accepted == 0
    assert ruled_out > 3 or (isinstance(population, NicheArchive) and population.alpha == 2.0 and not binary)


def m2n2(goals: Sequence[Goal], seed: int) -> tuple[M2N2, NicheArchive]:
    archive = NicheArchive(goals, 6)
    return M2N2(SPACE, archive, M2N2Settings(), seed), archive


BOUNDED: dict[str, Callable[[Sequence[Goal], int], tuple[Search, Population]]] = {
    "m2n2": m2n2,
    "random": lambda goals, seed: (RandomSearch(BOX, seed), ElitistArchive(goals, 4)),
}


@pytest.mark.parametrize("goals", [GOAL, PAIR], ids=["one goal", "two goals"])
@pytest.mark.parametrize("kind", BOUNDED)
@pytest.mark.parametrize("seed", range(3))
def test_with_the_bound_alone_a_search_finds_the_same_for_less(kind: str, goals: tuple[Goal, ...], seed: int) -> None:
    """Its population, and so all that is bred from it, is what it would be without a race."""
    plain, population = BOUNDED[kind](goals, seed)
    before = [trial.genome.digest for trial in run(plain, population, 150)]
    search, racers = BOUNDED[kind](goals, seed)
    settings = RaceSettings(fidelities=(), slices=6)
    racing = Racing(search, racers, goals, seed, settings, LIMITS, whole=2 if kind == "m2n2" else 0)
    trials: list[Trial] = []
    while racing.report()["candidates"] < 150:
        trials += run(racing, racers, 1)
    first = [trial.genome.digest for trial in trials if trial.sample is None or not trial.sample.start]
    assert first == before[: len(first)]
    assert [m.trial.genome.digest for m in racers.members] == [m.trial.genome.digest for m in population.members]
    report = racing.report()
    if kind == "random":  # in a niche there is hope for long
        assert report["bound"] > 20
        assert report["spent"] < 145
    assert sum(report[why] for why in ("whole", "bound", "failed", "halving")) in (149, 150)


def test_without_limits_nothing_is_ruled_out() -> None:
    search, archive = m2n2(GOAL, 0)
    racing = Racing(search, archive, GOAL, 0, RaceSettings(fidelities=(), slices=4), {}, whole=2)
    run(racing, archive, 100)
    assert racing.report()["bound"] == 0


# -- cuts ----------------------------------------------------------------------------------------------------


def test_one_in_eta_goes_on_after_each_level() -> None:
    search, archive = m2n2(GOAL, 1)
    settings = RaceSettings(fidelities=(0.1, 0.4), eta=4.0, group=16, slices=2, bound=False)
    racing = Racing(search, archive, GOAL, 1, settings, whole=2)
    trials = run(racing, archive, 2 + 3 * (16 + 4 + 1 + 1))
    shares = Counter((trial.sample.start, trial.sample.stop) for trial in trials if trial.sample)
    assert shares == {(0.0, 0.1): 48, (0.1, 0.4): 12, (0.4, 0.7): 3, (0.7, 1.0): 3}
    report = racing.report()
    assert (report["candidates"], report["whole"], report["halving"], report["bound"]) == (50, 5, 45, 0)
    assert report["spent"] == pytest.approx(sum(trial.cost for trial in trials))
    assert report["spent"] == pytest.approx(2 + 3 * (1.6 + 1.2 + 0.6))


def test_those_go_on_that_are_best_on_the_sample_and_their_genomes_are_the_same_ones() -> None:
    search, archive = RandomSearch(BOX, 5), ElitistArchive(GOAL, 4)
    settings = RaceSettings(fidelities=(0.5,), eta=3.0, group=6, slices=1, bound=False)
    racing = Racing(search, archive, GOAL, 5, settings)
    trials = run(racing, archive, 8)
    first, last = trials[:6], trials[6:]
    half = order(racing.order, 60)[:30]
    scores = {trial.genome.digest: whole(trial).per_example["right"][half].mean() for trial in first}
    best = sorted(scores.values())[-2:]
    assert sorted(scores[trial.genome.digest] for trial in last) == best
    for member in archive.members:
        assert member.evaluation.scores["right"] == whole(member.trial).scores["right"]
        assert np.array_equal(member.evaluation.per_example["right"], whole(member.trial).per_example["right"])


def test_the_front_of_a_group_goes_before_its_means() -> None:
    """Of two objectives: a specialist is not beaten by those between."""
    scores = {0: (0.9, 0.0), 1: (0.5, 0.5), 2: (0.5, 0.45), 3: (0.45, 0.5)}

    def measure(trial: Trial) -> Evaluation:
        right, left = scores[order_of.setdefault(trial.genome.digest, len(order_of))]
        parts = {"right": np.full(20, right), "left": np.full(20, left)}
        return Evaluation({"right": right, "left": left}, parts)

    order_of: dict[str, int] = {}
    archive = ElitistArchive(PAIR, 9)
    settings = RaceSettings(fidelities=(0.5,), eta=2.0, group=4, slices=1, bound=False)
    racing = Racing(RandomSearch(BOX, 0), archive, PAIR, 0, settings)
    run(racing, archive, 6, measure)
    assert sorted(order_of[member.trial.genome.digest] for member in archive.members) == [0, 1]


def test_a_generation_of_cma_es_is_a_group_and_the_cut_ones_are_its_worst() -> None:
    optimiser = CmaEs(BOX, GOAL, 2, CmaEsSettings(population_size=6))
    archive = ElitistArchive(GOAL, 4)
    settings = RaceSettings(fidelities=(0.5,), eta=3.0, group=100, slices=1, bound=False)
    racing = Racing(optimiser, archive, GOAL, 2, settings)
    trials = run(racing, archive, 5 * 8)
    assert racing.report()["whole"] == 10
    assert len({trial.genome.digest for trial in trials}) == 30


def test_parents_have_the_numbers_of_whole_trials() -> None:
    archive = ElitistArchive(GOAL, 4)
    search = Nsga(BOX, GOAL, 1, NsgaSettings(population=4), np.eye(2))
    racing = Racing(
        search, archive, GOAL, 1, RaceSettings(fidelities=(0.3,), eta=2.0, group=4), LIMITS, own_parents=True
    )
    trials = run(racing, archive, 120)
    scored = {trial.number for trial in trials if trial.scored}
    bred = [trial for trial in trials if trial.parents]
    assert len(bred) > 30
    assert all(parent in scored and parent < trial.number for trial in bred for parent in trial.parents)


def test_a_candidate_that_fails_ends_and_its_group_goes_on() -> None:
    def measure(trial: Trial) -> Evaluation:
        return Evaluation.failed("exception", "no") if trial.number % 7 == 2 else whole(trial)

    search, archive = m2n2(GOAL, 1)
    racing = Racing(search, archive, GOAL, 1, RaceSettings(fidelities=(0.2, 0.5), group=5), LIMITS, whole=2)
    run(racing, archive, 200, measure)
    report = racing.report()
    assert report["failed"] > 20
    assert report["whole"] > 5
    assert report["search"] is None


def test_estimates_are_as_far_off_as_they_say() -> None:
    rng = np.random.default_rng(2)

    def measure(trial: Trial) -> Evaluation:
        values = rng.random(400) < 0.6
        return Evaluation({"right": float(values.mean())}, {"right": values})

    known: dict[str, Evaluation] = {}
    archive = ElitistArchive(GOAL, 4)
    settings = RaceSettings(fidelities=(0.25,), eta=1.0, group=2, slices=1, bound=False)
    racing = Racing(RandomSearch(BOX, 5), archive, GOAL, 5, settings)
    run(racing, archive, 400, lambda trial: known.setdefault(trial.genome.digest, measure(trial)))
    report = racing.report()
    assert report["estimates"] >= 190
    assert 0.85 < report["miss"] < 1.15
    assert report["warnings"] == []


# -- workers and runs ----------------------------------------------------------------------------------------


def toys(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Recipe:
    """Three encoders of two tasks with 40 examples each, by M2N2 in races."""
    path = toy_recipe(folder, calibration=[], search={"algorithm": "m2n2", "race": {"slices": 2}}, **settings)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "ada_toys", raising=False)
    return Recipe.from_yaml(path)


def test_a_worker_scores_samples_and_joins_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = toys(tmp_path, monkeypatch)
    worker = Worker(compose.worker_spec(recipe, None))
    genome = Genome.uniform(worker.space().size, [0.5, 0.4, 0.1])
    [plain] = worker.measure([Trial(0, genome)])
    seen: dict[str, NDArray[Any]] = {}
    for start, stop in pairwise((0.0, 0.1, 0.55, 1.0)):
        [found] = worker.measure([Trial(1, genome, wants=Scores(sample=Sample(3, start, stop, seen)))])
        assert found.ok
        assert found.items == sum(reached(40, stop) - reached(40, start) for _ in plain.scores)
        seen = dict(found.per_example)
        if stop < 1:
            for name, values in plain.per_example.items():
                part = values[order(3, 40)[: reached(40, stop)]]
                assert np.array_equal(seen[name], part)
                assert found.scores[name] == part.mean()
                assert found.errors[name] == error_of_mean(part, 40)
    assert found.scores == plain.scores
    assert found.errors == {}
    assert all(np.array_equal(found.per_example[name], values) for name, values in plain.per_example.items())


def test_a_run_races_is_told_of_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = toys(tmp_path, monkeypatch, budget={"evaluations": 12})
    run = launch(recipe, tmp_path / "run")
    status, report = run.status(), run.report() or {}
    assert 12 <= report["spent"] < 14
    assert status["evaluations"] == report["whole"] < report["candidates"]
    assert status["samples"] > 9
    assert run.examples() == {"search": {"task 0": 40, "task 1": 40}, "held_out": {"task 0": 40}}
    with run.journal() as journal:
        partial = {row.number for row in journal.rows(unscored=True) if row.partial}
        stands = {n: {len(v) for v in one.per_example.values()} for n, one in journal.evaluations()}
        assert partial.isdisjoint(row.number for row in journal.rows())
    assert all(max(sizes) < 40 for number, sizes in stands.items() if number in partial)
    assert all(sizes == {40} for number, sizes in stands.items() if number not in partial)
    assert not any(member.id in partial for member in run.front())
    text = search_report_text(report, run.goals)
    assert f"Race: of {report['candidates']} candidates {report['whole']} were scored on all examples" in text
    launch(toys(tmp_path, monkeypatch, budget={"evaluations": 7}), tmp_path / "parts")
    further = resume(tmp_path / "parts", {"budget.evaluations": 12}).report() or {}
    assert 12 <= further["spent"] < 14


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"search.race": {"fidelity": [0.1]}}, "search.race.fidelity: unknown key.*Did you mean 'fidelities'"),
        ({"search.race": {"fidelities": [0.5, 0.1]}}, "fidelities: expected ascending shares between 0 and 1"),
        ({"search.race": {}, "search.refine": {}}, "race: children that are refined cannot race"),
        ({"search": {"algorithm": "map", "race": {}}}, "search.race: unknown key"),
    ],
)
def test_a_recipe_whose_race_cannot_be(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = toy_recipe(tmp_path, search={"algorithm": "m2n2"})
    with pytest.raises(InputError, match=words):
        Recipe.from_yaml(path, settings)


def test_an_objective_without_examples_cannot_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = {"name": "size", "type": "call", "call": "ada_toys:encoder"}
    recipe = toys(tmp_path, monkeypatch, objectives={"search": [objective], "held_out": []})
    with pytest.raises(InputError, match=r"search.race: objective 'size' cannot be asked of some of its examples"):
        Worker(compose.worker_spec(recipe, None))


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fidelities": (0.5, 0.2)}, r"fidelities: expected ascending shares between 0 and 1, found \[0.5"),
        ({"fidelities": (0.0,)}, "fidelities: expected"),
        ({"fidelities": (0.5, 1.0)}, "fidelities: expected"),
        ({"eta": 0.5}, r"eta\s+Input should be greater than or equal to 1"),
        ({"eta": math.nan}, r"eta\s+Input should be"),
        ({"group": 0}, r"group\s+Input should be greater than or equal to 1"),
        ({"slices": 0}, r"slices\s+Input should be"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RaceSettings(**settings)
