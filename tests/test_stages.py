"""Chains of searches: what a stage begins with, who pays for it, numbers, shares, crashes, recipes and real runs."""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from managing import begun, ended
from processes import Ecotone, killed
from test_adamerging_recipes import toy_recipe
from test_manager import Crash, Simulated
from test_searches import GOALS, MAKERS, TWO_GOALS, Pair

from ecotone.experiments.checks import validate
from ecotone.experiments.compose import make_search
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch, resume
from ecotone.experiments.runs import Run
from ecotone.populations import facts
from ecotone.populations.errors import InputError, JournalError, SearchError
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal
from ecotone.populations.niches import NicheArchive
from ecotone.populations.pareto import ParetoFront
from ecotone.populations.population import ElitistArchive
from ecotone.populations.trial import Evaluation, Goal, Outcome, Trial, oriented
from ecotone.search.adamerging import AdaMerging, AdaMergingSettings
from ecotone.search.bayesian_map import BayesianMap, BayesianMapSettings
from ecotone.search.chain import StageSettings
from ecotone.search.cma_es import CmaEs, CmaEsSettings
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.m2n2 import M2N2, M2N2Settings
from ecotone.search.manager import Manager, Schedule
from ecotone.search.map import MapSearch, MapSettings
from ecotone.search.nsga import Nsga, NsgaSettings
from ecotone.search.random_search import RandomSettings
from ecotone.search.registry import SEARCHES
from ecotone.search.stages import REMEMBERED, Stage, StagedSearch, _renumbered, stage_seed
from ecotone.testing.searches import SPACE, WOVEN, Driver, expanded, scored

BOX = CoefficientBox.of(SPACE, "block", 0.0, 1.0)
FINE = SPACE.tensor_borders
PLAIN = [kind for kind in MAKERS if not kind.startswith("stages")]


def nsga(evaluations: int | None = 12) -> Stage:
    def make(starts: Sequence[Genome]) -> Pair:
        return Nsga(BOX, TWO_GOALS, 1, NsgaSettings(population=6), np.eye(6)), ElitistArchive(TWO_GOALS, 5)

    return Stage("nsga2", make, evaluations)


def adamerging(evaluations: int | None = None, start: Any = "front", most: int | None = None, **settings: Any) -> Stage:
    def make(starts: Sequence[Genome]) -> Pair:
        given: dict[str, Any] = {"rate": 0.02, "steps": 4, "check_every": 2} | settings
        coefficients = [one.refined(FINE) for one in starts] or None
        search = AdaMerging(FINE, 3, ("odd", "even"), TWO_GOALS, 2, AdaMergingSettings(**given), coefficients)
        return search, ElitistArchive(TWO_GOALS, 5)

    return Stage("adamerging", make, evaluations, start, most)


def m2n2(evaluations: int | None = None, start: Any = "archive") -> Stage:
    def make(starts: Sequence[Genome]) -> Pair:
        archive = NicheArchive(GOALS, 8)
        return M2N2(SPACE, archive, M2N2Settings(), 3, starts), archive

    return Stage("m2n2", make, evaluations, start)


def driven(*stages: Stage, goals: Sequence[Goal] = TWO_GOALS) -> Driver:
    search = StagedSearch(stages, goals)
    return Driver(search, search.population)


def finished(driver: Driver, most: int = 400) -> Driver:
    """Drive it until it is done."""
    while not driver.search.done and driver.asked < most:
        driver.ask(3)
        if driver.flying:
            driver.tell()
    return driver


def told(driver: Driver) -> list[tuple[Trial, Evaluation]]:
    return [entry[1][:2] for entry in driver.log if entry[0] == "tell"]


def front(results: Sequence[tuple[Trial, Evaluation]]) -> dict[int, Trial]:
    found = ParetoFront(TWO_GOALS)
    for trial, evaluation in results:
        if evaluation.ok and trial.gradient is None:
            found.add(trial.number, oriented(evaluation.scores, TWO_GOALS))
    return {trial.number: trial for trial, _ in results if trial.number in found.numbers}


# -- what a stage is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN)
def test_a_chain_of_one_is_the_search_itself(kind: str) -> None:
    plain = Driver(*MAKERS[kind](0)).to(40)
    search = StagedSearch([Stage(kind, lambda starts: MAKERS[kind](0))], plain.population.goals)  # type: ignore[attr-defined]
    chain = Driver(search, search.population).to(40)
    assert chain.digests == plain.digests
    mine, theirs = ([(trial.number, trial.parents) for trial, _ in told(one)] for one in (chain, plain))
    assert mine == theirs
    members = [[m.trial.number for m in one.population.members] for one in (chain, plain)]
    assert members[0] == members[1]


def test_the_seed_of_a_stage() -> None:
    assert stage_seed(7, 0) == 7
    assert len({stage_seed(seed, stage) for seed in range(5) for stage in range(5)}) == 25
    assert stage_seed(7, 2) == stage_seed(7, 2)


def test_a_stage_begins_with_the_front_before_it_exactly_and_pays_nothing_for_it() -> None:
    driver = finished(driven(nsga(), adamerging()))
    first = [one for one in told(driver) if one[0].number < 12]
    expected = front(first)
    assert len(expected) > 2
    report = driver.search.report()  # type: ignore[attr-defined]
    assert report["stages"][1]["starts"] == sorted(expected)
    lines = report["stages"][1]["report"]["lines"]
    for line, (number, trial) in zip(lines, sorted(expected.items()), strict=True):
        assert np.array_equal(line["start"], trial.genome.refined(FINE))
        assert line["checks"][0]["number"] == number  # what was scored in the stage before
    digests = {trial.genome.digest for trial, _ in first}
    later = [trial for trial, _ in told(driver) if trial.number >= 12 and trial.gradient is None]
    assert later
    assert not digests & {trial.genome.digest for trial in later}


@pytest.mark.parametrize(
    ("start", "most"), [("best", None), ("front", 1), ("front", 2), ("archive", None), ("archive", 4)]
)
def test_other_starts(start: str, most: int | None) -> None:
    driver = finished(driven(nsga(), adamerging(start=start, most=most)))
    results = told(driver)[:12]
    starts = driver.search.report()["stages"][1]["starts"]  # type: ignore[attr-defined]
    scored = {trial.number: oriented(one.scores, TWO_GOALS) for trial, one in results if one.ok}
    points, elite = np.array(list(scored.values())), ElitistArchive(TWO_GOALS, 5)
    for trial, evaluation in results:
        elite.add(trial, evaluation)
    archive = [member.trial.number for member in elite.members]
    extent = np.ptp(points, axis=0)
    best = list(scored)[int(np.argmax(((points - points.min(axis=0)) / extent).sum(axis=1)))]
    assert best in starts
    assert len(starts) == {("front", 2): 2, ("archive", None): 5, ("archive", 4): 4}.get((start, most), 1)
    assert set(starts) <= set(archive if start == "archive" else front(results))
    if most == 2:  # the other end of the front
        scores = {n: oriented(results[n][1].scores, TWO_GOALS) for n in front(results)}
        extent = np.ptp(list(scores.values()), axis=0)
        far = max(scores, key=lambda n: float(np.linalg.norm((scores[n] - scores[best]) / extent)))
        assert starts == sorted([best, far])


def test_without_a_start_a_stage_is_as_if_alone() -> None:
    driver = driven(nsga(), adamerging(start="none"))
    alone = driven(adamerging(start="none"))
    driver.to(12 + 10)
    alone.to(10)
    assert driver.digests[12:] == alone.digests


def test_parents_and_members_have_the_chains_numbers() -> None:
    driver = driven(Stage("cma_es", lambda starts: MAKERS["cma_es-elite"](0), 14), m2n2(), goals=GOALS).to(80)
    trials = {trial.number: trial for trial, _ in told(driver)}
    starts = driver.search.report()["stages"][1]["starts"]  # type: ignore[attr-defined]
    assert max(starts) < 14
    bred = [trial for trial in trials.values() if trial.parents]
    assert {parent for trial in bred for parent in trial.parents} >= set(starts[:1])
    for child in bred:
        a, b = (expanded(trials[parent].genome) for parent in (child.parents * 2)[:2])
        position = np.linalg.lstsq(np.stack([a, b], axis=1)[:4], expanded(child.genome)[:4], rcond=None)
        assert np.abs(np.stack([a, b], axis=1)[:4] @ position[0] - expanded(child.genome)[:4]).max() < 0.5
    for member in driver.population.members:
        assert trials[member.trial.number].genome == member.trial.genome


def test_a_stage_that_began_with_one_merge_breeds_it_with_the_models() -> None:
    driver = driven(Stage("cma_es", lambda starts: MAKERS["cma_es-elite"](0), 14), m2n2(start="best"), goals=GOALS)
    driver.to(17)
    later = [trial for trial, _ in told(driver) if trial.number >= 14] + list(driver.flying)
    assert [trial.genome.coefficients.tolist() for trial in later] == [[row] for row in np.eye(3).tolist()]
    (start,) = driver.search.report()["stages"][1]["starts"]  # type: ignore[attr-defined]
    assert start in [member.trial.number for member in driver.population.members]


# -- shares --------------------------------------------------------------------------------------------------


def test_stages_are_given_their_shares_exactly() -> None:
    driver = finished(driven(nsga(13), adamerging(5), nsga(20)))
    report = driver.search.report()  # type: ignore[attr-defined]
    assert [stage["evaluations"] for stage in report["stages"]] == [13, 5, 20]
    second, third = (stage["first"] for stage in report["stages"][1:])
    scored_in = Counter(
        (n >= second) + (n >= third) for n in range(driver.asked) if told(driver)[n][0].gradient is None
    )
    assert scored_in == {0: 13, 1: 5, 2: 20}
    assert driver.search.done
    assert driver.search.ask(3) == []


def test_a_stage_that_ends_by_itself_makes_room_for_the_next() -> None:
    driver = driven(nsga(), adamerging(100), nsga(None)).to(150)
    stages = driver.search.report()["stages"]  # type: ignore[attr-defined]
    lines = stages[1]["report"]["lines"]
    assert stages[1]["evaluations"] == sum(len(line["checks"]) - 1 for line in lines) < 100
    assert all(line["steps"] == 4 for line in lines if not line["ended"].startswith("failed"))
    assert stages[2]["evaluations"] > 10


def test_nothing_is_asked_while_the_last_results_of_a_stage_are_out() -> None:
    driver = driven(nsga(), adamerging())
    for _ in range(4):
        driver.ask(3)
    assert driver.search.ask(3) == []
    for _ in range(11):
        driver.tell()
        assert driver.search.ask(3) == []
    driver.tell()
    driver.ask(3)
    assert driver.asked == 15


def test_a_chain_ends_where_there_is_nothing_to_begin_with() -> None:
    search = StagedSearch([nsga(6), adamerging()], TWO_GOALS)
    for trial in search.ask(6):
        search.tell(trial, Evaluation.failed("exception", "no"), Outcome(False))
    assert search.ask(1) == []
    assert search.done
    assert search.report()["warnings"] == ["stage 1 could not begin: nothing of the stage before it could be scored."]


def test_a_search_that_only_repeats_itself_pays_in_the_end() -> None:
    """Otherwise asking would never return."""

    class Repeating:
        done, asked = False, 0

        def __init__(self, genome: Genome) -> None:
            self.genome = genome

        def ask(self, n: int) -> list[Trial]:
            self.asked += n
            return [Trial(self.asked - n + i, self.genome) for i in range(n)]

        def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
            pass

    def make(starts: Sequence[Genome]) -> Any:
        return Repeating(starts[0]), ElitistArchive(TWO_GOALS, 2)

    driver = driven(nsga(), Stage("again", make, None, "best")).to(20)
    assert driver.search.running.search.asked == REMEMBERED + 8  # type: ignore[attr-defined]


# -- starts of each algorithm --------------------------------------------------------------------------------


def test_surrogates_begin_with_points_in_their_box_beside_their_own() -> None:
    starts = np.array([[0.2, 0.4, 0.6], [1.2, 0.0, 0.0], [0.0, 1.0, 0.5]])
    box = CoefficientBox.of(SPACE, "model", 0.0, 1.0)
    plain = MapSearch(box, TWO_GOALS, 0, MapSettings(samples=12), evaluations=30)
    given = MapSearch(box, TWO_GOALS, 0, MapSettings(samples=12), evaluations=30, starts=starts)
    points = lambda search, n: np.array([trial.genome.coefficients[0] for trial in search.ask(n)])  # noqa: E731
    assert np.array_equal(points(given, 20), np.vstack([starts[[0, 2]], points(plain, 20)]))
    assert given.front == plain.front == 18
    before = BayesianMap(box, TWO_GOALS, 0, BayesianMapSettings(samples=9))
    after = BayesianMap(box, TWO_GOALS, 0, BayesianMapSettings(samples=9), starts=starts)
    assert np.array_equal(points(after, 11), np.vstack([starts[[0, 2]], points(before, 9)]))
    assert after.design == 11
    with pytest.raises(InputError, match=r"starts: expected shape \(n, 3\), found \(1, 2\)"):
        MapSearch(box, TWO_GOALS, 0, starts=[[0.1, 0.2]])


def test_cma_es_begins_at_a_point() -> None:
    point = np.array([0.1, 0.2, 0.3, 0.4, 1.5, 0.6])
    search = CmaEs(BOX, GOALS, 0, CmaEsSettings(sigma=1e-6), point)
    found = search.ask(1)[0].genome.refined(SPACE.block_borders).ravel()
    assert found == pytest.approx(point.clip(0, 1), abs=1e-4)


def test_m2n2_with_noise_refuses_starts() -> None:
    archive = NicheArchive(GOALS, 5)
    with pytest.raises(InputError, match="breeding with noise begins with the models"):
        M2N2(SPACE, archive, M2N2Settings(mutation=0.1), 0, [Genome.uniform(24, [1.0, 0.0, 0.0])])


# -- the manager, and crashes --------------------------------------------------------------------------------

Chain = Callable[[], StagedSearch]
CHAINS: dict[str, Chain] = {
    "gradients": lambda: StagedSearch([nsga(), adamerging(7, most=2), nsga(None)], TWO_GOALS),
    "restarts": lambda: StagedSearch([nsga(7), adamerging(9, "archive", 2, restarts=2, patience=1), nsga()], TWO_GOALS),
}


def managed(chain: str, path: Path, pool: Simulated, order: Any = "strict") -> Manager:
    search = CHAINS[chain]()
    schedule = Schedule(evaluations=27, batch=2, in_flight=6, order=order)
    manager = begun(path, search, search.population, TWO_GOALS, pool, schedule)
    ended(manager)
    return manager


def standing(manager: Manager, path: Path) -> Any:
    members = [member.trial.number for member in manager.population.members]
    with Journal.open(path) as journal:
        report = json.dumps(manager.search.report(), default=np.ndarray.tolist)  # type: ignore[attr-defined]
        return members, sorted(manager.front.numbers), manager.progress.best, journal.digest(), report


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("schedule", [None, 5])
def test_crashed_anywhere_and_resumed_it_is_the_same_chain(chain: str, schedule: int | None, tmp_path: Path) -> None:
    whole = tmp_path / "whole" / "j.sqlite"
    expected = standing(managed(chain, whole, Simulated(score=scored)), whole)
    for crash in (0, 1, 6, 15, 23, 31):
        path = tmp_path / str(crash) / "j.sqlite"
        with pytest.raises(Crash):
            managed(chain, path, Simulated(schedule, scored, crash))
        with Journal.open(path) as journal:
            paid = {number for number, _ in journal.evaluations()}
        second = Simulated(schedule, scored)
        assert standing(managed(chain, path, second), path) == expected
        assert not set(second.submitted) & paid


def test_in_order_of_arrival_the_journal_replays_to_the_same_state(tmp_path: Path) -> None:
    for schedule in range(3):
        path = tmp_path / str(schedule) / "j.sqlite"
        first = standing(managed("gradients", path, Simulated(schedule, scored), "arrival"), path)
        idle = Simulated()
        assert standing(managed("gradients", path, idle, "arrival"), path) == first
        assert idle.submitted == []


def test_a_population_is_restored_after_its_search() -> None:
    driver = driven(nsga(), adamerging()).to(30)
    other = StagedSearch([nsga(), adamerging()], TWO_GOALS)
    with pytest.raises(SearchError, match=r"expected the state of stage 0, found that of stage 1\. Restore the search"):
        other.population.restore(driver.population.state())
    other.restore(driver.search.state())
    other.population.restore(driver.population.state())
    assert other.population.members == driver.population.members
    assert other.population.capacity == 5


def test_warnings_name_the_chains_trials() -> None:
    """The loss falls while the score falls: AdaMerging warns, and names its best trial."""

    def measure(trial: Trial) -> Evaluation:
        if trial.gradient is None:
            worth = -float(np.abs(trial.genome.coefficients - 1.0).sum())
            return Evaluation({"solved": worth, "length": 0.0})
        return Evaluation({trial.gradient.task: 1.0 / (1 + trial.gradient.step)}, gradient=np.ones((3, 3)))

    search = StagedSearch([nsga(5), adamerging(start="best")], TWO_GOALS)
    while not search.done:
        for trial in search.ask(4):
            search.tell(
                trial,
                measure(trial),
                search.population.add(trial, measure(trial)) if not trial.gradient else Outcome(False),
            )
    report = search.report()
    (start,) = report["stages"][1]["starts"]
    (text,) = report["warnings"]
    assert text.startswith("stage 1 (adamerging): line 0: the loss fell")
    assert f"trial {start} is its best" in text


# -- refusals ------------------------------------------------------------------------------------------------


def test_chains_that_cannot_be() -> None:
    with pytest.raises(InputError, match="expected one stage or more"):
        StagedSearch([], TWO_GOALS)
    with pytest.raises(InputError, match=r"search\[0\].start: the first stage has none before it, found 'front'"):
        StagedSearch([adamerging()], TWO_GOALS)


MAP: dict[str, Any] = {"algorithm": "map", "evaluations": 20, "samples": 12}
ADA: dict[str, Any] = {"algorithm": "adamerging", "steps": 4, "check_every": 2, "rate": 0.05}
CALL = {"type": "call", "call": "m:f"}
RECIPE: dict[str, Any] = {
    "name": "chain",
    "models": {
        "experts": ["a.safetensors", "b.safetensors"],
        "base": "c.safetensors",
        "architecture": {"call": "m:f"},
    },
    "merge": {"operator": "task_arithmetic"},
    "objectives": {"search": [{"name": "one", **CALL}, {"name": "two", **CALL}]},
    "calibration": [{"name": "one", "data": {"call": "m:f"}}],
    "search": [MAP, ADA],
    "budget": {"evaluations": 30},
}


def recipe_of(*stages: dict[str, Any], **others: Any) -> Recipe:
    return Recipe.from_record(RECIPE | {"search": list(stages)} | others)


def test_a_list_of_stages_round_trips() -> None:
    placed = {"algorithm": "cma_es", "start": 0.4, "evaluations": 3}
    recipe = recipe_of(MAP, placed, placed | {"start": "best"}, ADA | {"starts": 2})
    assert recipe.chain is not None
    assert recipe.search.algorithm == "map+cma_es+cma_es+adamerging"
    assert recipe.search.starts == ("none", "none", "best", "front")
    assert [stage.most for stage in recipe.search.stages] == [None, 1, 1, 2]
    record = json.loads(json.dumps(recipe.record()))
    assert [stage["start"] for stage in record["search"]] == [None, 0.4, "best", None]
    assert Recipe.from_record(record) == recipe
    assert Recipe.from_record(record).signature == recipe.signature
    assert recipe.signature != recipe_of(MAP, placed, placed | {"start": "best"}, ADA | {"starts": 3}).signature


def test_settings_reach_into_stages(tmp_path: Path) -> None:
    path = toy_recipe(tmp_path, search=[MAP, ADA])
    recipe = Recipe.from_yaml(path, {"search.1.rate": 0.5, "search.0.evaluations": 15})
    assert recipe.chain is not None
    assert (recipe.search.stages[0].evaluations, recipe.searches[1].rate) == (15, 0.5)  # type: ignore[union-attr]


M2N2_STAGE = {"algorithm": "m2n2", "evaluations": 5}


def groups(count: int, **others: Any) -> dict[str, Any]:
    return {"algorithm": "nsga2", "granularity": "groups", "groups": count, **others}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "search: expected one stage or more, found none."),
        (["map"], "search[0]: expected a mapping, found 'map'."),
        ([MAP | {"evaluation": 3}, ADA], "search[0].evaluation: unknown key. Did you mean 'evaluations'?"),
        ([MAP, ADA | {"stepps": 3}], "search[1].stepps: unknown key. Did you mean 'steps'?"),
        ([MAP, ADA | {"start": "frnt"}], "search[1].start: input should be 'front', 'best', 'archive' or 'none'"),
        ([MAP, ADA | {"start": 3}], "search[1].start: input should be 'front', 'best', 'archive' or 'none'"),
        ([MAP | {"evaluations": 0}, ADA], "search[0].evaluations: input should be greater than or equal to 1"),
        ([{"algorithm": "map"}, ADA], "search: stage 0: expected evaluations, its share of the budget"),
        ([MAP | {"start": "front"}, ADA], "search: stage 0: there is none before it"),
        ([MAP | {"evaluations": 30}, ADA], "budget.evaluations: expected more than 30, which the stages"),
        ([MAP, ADA | {"evaluations": 11}], "budget.evaluations: expected at least 31, which the stages"),
        (
            [ADA | {"evaluations": 5}, MAP | {"evaluations": None}],
            "search: stage 1 (map): its granularity, model, is coarser than that of the merges of stage 0, tensor;",
        ),
        ([M2N2_STAGE, ADA], "search: stage 1 (adamerging): its granularity, tensor, is coarser than that of"),
        (
            [groups(1, evaluations=5, granularity="block"), ADA | {"granularity": "components"}],
            "search: stage 1 (adamerging): its granularity, components, is coarser than that of the merges of stage 0",
        ),
        (
            [groups(1, evaluations=5, granularity="components"), ADA | {"granularity": "block"}],
            "search: stage 1 (adamerging): its granularity, block, cuts otherwise than that of the merges of stage 0",
        ),
        (
            [groups(1, evaluations=5, granularity="components"), ADA | {"granularity": "groups"}],
            "search: stage 1 (adamerging): its granularity, groups, is coarser than that of the merges of stage",
        ),
        (
            [M2N2_STAGE | {"granularity": "block"}, ADA | {"granularity": "model"}],
            "search: stage 1 (adamerging): its granularity, model, is coarser than that of the merges of stage 0, b",
        ),
        (
            [ADA | {"evaluations": 5}, M2N2_STAGE | {"granularity": "block"}, ADA | {"granularity": "block"}],
            "search: stage 2 (adamerging): its granularity, block, is coarser than that of the merges of stage 1, t",
        ),
        (
            [M2N2_STAGE | {"granularity": "tensor", "mutation": 0.1}, ADA],
            "search: stage 1 (adamerging): it cannot begin",
        ),
        (
            [MAP, {"algorithm": "m2n2", "mutation": 0.1, "start": "best"}],
            "search: stage 1 (m2n2): with mutation m2n2 breeds whole vectors of weights, beginning with the models;",
        ),
        ([MAP, {"algorithm": "random", "start": "front"}], "search: stage 1 (random): random search has no use"),
        (
            [MAP, {"algorithm": "nested_map", "start": "best"}],
            "search: stage 1 (nested_map): nested_map builds its tree",
        ),
    ],
)
def test_stages_that_are_refused_when_read(stages: list[Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        recipe_of(*stages)
    assert str(caught.value).startswith(message)


def test_what_each_stage_needs_is_asked_of_the_whole_recipe() -> None:
    with pytest.raises(InputError, match="calibration: adamerging learns on tasks given there, found none"):
        recipe_of(MAP, ADA, calibration=[])
    with pytest.raises(InputError, match=r"calibration: map\+nsga2 does not use it"):
        recipe_of(MAP, {"algorithm": "nsga2"})
    with pytest.raises(
        InputError, match=r"objectives.search: map looks for a front of two objectives or more, found 1"
    ):
        recipe_of(MAP, ADA, objectives={"search": [{"name": "one", **CALL}]})


def test_what_shows_when_the_models_are_known_is_refused_before_anything_is_scored() -> None:
    recipe = recipe_of(groups(2, evaluations=5), groups(1), calibration=[])
    with pytest.raises(
        InputError, match=r"search\[1\].granularity: the segments of the merges of stage 0 have borders"
    ):
        make_search(recipe, SPACE)
    make_search(recipe_of(groups(1, evaluations=5), groups(2), calibration=[]), SPACE)
    with pytest.raises(
        InputError, match=r"search\[1\].groups: expected between 1 and 2, the number of blocks, found 3"
    ):
        make_search(recipe_of(groups(2, evaluations=5), groups(3), calibration=[]), SPACE)
    with pytest.raises(
        InputError, match=r"search\[0\].evaluations: expected more than the 12 samples.*search\[0\].samp"
    ):
        make_search(recipe_of(MAP | {"evaluations": 12}, ADA), SPACE)
    with pytest.raises(InputError, match=r"search\[1\].weights: there is no calibration task 'two'"):
        make_search(recipe_of(MAP, ADA | {"weights": {"two": 1.0}}), SPACE)


def components(count: int = 1, **others: Any) -> dict[str, Any]:
    return groups(count, granularity="components", **others)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (groups(1, granularity="model"), components()),
        (groups(2), components(2)),
        (components(), components(2)),
        (components(2), {"algorithm": "cma_es", "granularity": "tensor"}),
        (components(), {"algorithm": "m2n2"}),
    ],
    ids=str,
)
def test_components_hold_what_is_the_same_in_all_their_tensors(first: dict[str, Any], then: dict[str, Any]) -> None:
    """The stage begins with the merges that the one before it found, as they are."""
    recipe = recipe_of(first | {"evaluations": 8, "population": 4}, then | {"start": "best"}, calibration=[])
    search, population = make_search(recipe, WOVEN)
    for number in range(9):
        (trial,) = search.ask(1)
        known = Evaluation({"one": abs(float(expanded(trial.genome).mean())), "two": float(number)})
        search.tell(trial, known, population.add(trial, known))
    started = search.running.search  # type: ignore[attr-defined]
    if hasattr(started, "box"):
        (start,) = search.running.starts.values()  # type: ignore[attr-defined]
        assert started.box.genome(started.box.point(start.trial.genome)) == start.trial.genome


def test_groups_apart_are_refused_where_components_share_their_coefficients() -> None:
    recipe = recipe_of(groups(2, evaluations=5), components(), calibration=[])
    with pytest.raises(
        InputError, match=r"search\[1\].granularity: the segments of the merges of stage 0 have coefficients apart that"
    ):
        make_search(recipe, WOVEN)


@pytest.mark.parametrize(
    "stage",
    [
        {"algorithm": "nsga2"},
        {"algorithm": "optuna"},
        {"algorithm": "optuna", "sampler": "nsga2"},
        {"algorithm": "bayesian_map", "samples": 5},
        {"algorithm": "map", "samples": 12},
        {"algorithm": "cma_es", "granularity": "model"},
        {"algorithm": "m2n2"},
        {"algorithm": "expert_merging"},
        {"algorithm": "random"},
        {"algorithm": "nested_map", "start": "none"},
    ],
    ids=lambda stage: "-".join(str(value) for value in stage.values()),
)
def test_every_algorithm_may_follow_another(stage: dict[str, Any]) -> None:
    goals = (Goal("one"), Goal("two"), Goal("three"))
    objectives = {"search": [{"name": goal.name, **CALL} for goal in goals]}
    loss = {"loss": "distillation"} if stage["algorithm"] == "expert_merging" else {}
    calibration = [{"name": "odd", "data": {"call": "m:f"}, **loss}] if loss else []
    first = groups(1, evaluations=8, granularity="model")
    budget = {"evaluations": 200}
    record = RECIPE | {"objectives": objectives, "calibration": calibration, "budget": budget, "search": [first, stage]}
    search, population = make_search(Recipe.from_record(record), SPACE)
    trials: list[Trial] = []

    def measure(trial: Trial) -> Evaluation:
        if trial.gradient is not None:
            return scored(trial)
        values = np.exp(-((expanded(trial.genome)[:15] - 0.3) ** 2)).reshape(3, 5)
        rows = dict(zip(("one", "two", "three"), values, strict=True))
        return Evaluation({name: float(row.mean()) for name, row in rows.items()}, rows)

    while len(trials) < 45 and not search.done:
        asked = search.ask(4)
        assert asked
        for trial in asked:
            trials.append(trial)
            known = measure(trial)
            outcome = Outcome(False) if trial.gradient else population.add(trial, known)
            search.tell(trial, known, outcome)
    report = search.report()["stages"][1]  # type: ignore[attr-defined]
    assert (len(report["starts"]) > 0) == (stage["algorithm"] not in ("random", "nested_map"))
    if stage["algorithm"] not in ("cma_es", "expert_merging", "random", "nested_map"):
        found = ParetoFront(goals)
        for trial in trials[:8]:
            found.add(trial.number, oriented(measure(trial).scores, goals))
        assert report["starts"] == sorted(found.numbers)
        digests = {trials[number].genome.digest for number in found.numbers}
        assert not digests & {trial.genome.digest for trial in trials[8:]}


# -- real runs -----------------------------------------------------------------------------------------------

RUN = [MAP | {"evaluations": 16}, ADA | {"starts": 2}]
QUICK = [{"algorithm": "nsga2", "evaluations": 16}, ADA | {"starts": 2}]


def outcome_of(path: Path) -> tuple[str, Any]:
    with Journal.open(path / "journal.sqlite") as journal:
        return journal.digest(), journal.fact(facts.REPORT)


@pytest.mark.slow
def test_map_then_adamerging_on_real_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = Recipe.from_yaml(toy_recipe(tmp_path, search=RUN))
    texts = {finding.subject: finding.text for finding in validate(recipe)}
    assert texts["search[0]"].startswith("map: 3 coefficients (1 x 3 models)")
    assert "begins with the front of stage 0, at most 2 merges, the rest of the budget" in texts["search[1]"]
    run = launch(recipe, tmp_path / "run", folders=(str(tmp_path),))
    digest, report = outcome_of(run.directory)
    assert report["algorithm"] == "map+adamerging"
    assert [stage["algorithm"] for stage in report["stages"]] == ["map", "adamerging"]
    starts = report["stages"][1]["starts"]
    assert report["stages"][1]["evaluations"] == 2 * len(starts)
    with run.journal() as journal:
        assert journal.fact(facts.ALGORITHM) == "map+adamerging"
        rows = {row.number: row for row in journal.rows()}
        for line, number in zip(report["stages"][1]["report"]["lines"], starts, strict=True):
            start = journal.trial(number).genome
            assert np.array_equal(line["start"], np.repeat(start.coefficients, 2, axis=0))
            for check in line["checks"]:
                scores = rows[check["number"]].scores
                assert scores is not None
                assert check["score"] == pytest.approx(np.mean(list(scores.values())))
    again = launch(recipe, tmp_path / "again", folders=(str(tmp_path),))
    assert outcome_of(again.directory) == (digest, report)


def test_stopped_in_its_second_stage_it_goes_on(tmp_path: Path) -> None:
    whole = launch(
        Recipe.from_yaml(toy_recipe(tmp_path / "a", search=QUICK)), tmp_path / "w", folders=(str(tmp_path / "a"),)
    )
    stopping = Recipe.from_yaml(toy_recipe(tmp_path / "b", stop=5, search=QUICK))
    with pytest.raises(KeyboardInterrupt):
        launch(stopping, tmp_path / "s", folders=(str(tmp_path / "b"),))
    with Journal.open(tmp_path / "s" / "journal.sqlite") as journal:
        assert len(list(journal.rows(unscored=True))) > len(list(journal.rows())) >= 16
    resume(tmp_path / "s")
    assert outcome_of(tmp_path / "s") == outcome_of(whole.directory)


def recorded(run: Path) -> list[tuple[int, bool]]:
    """Number of each trial with a result, and whether it is a gradient; none while the journal is being begun."""
    with contextlib.suppress(JournalError), Journal.open(run / "journal.sqlite") as journal:
        return [(row.number, row.gradient is not None) for row in journal.rows(unscored=True)]
    return []


@pytest.mark.slow
@pytest.mark.parametrize("stages", [RUN, QUICK], ids=["map", "nsga2"])
def test_killed_in_each_stage_it_goes_on_to_the_same(
    stages: list[dict[str, Any]], tmp_path: Path, ecotone: Ecotone
) -> None:
    share, moments = stages[0]["evaluations"], random.Random(stages[0]["algorithm"])
    first, second = moments.randint(1, share // 2), share + moments.randint(1, 10)
    whole = launch(
        Recipe.from_yaml(toy_recipe(tmp_path / "a", search=stages)), tmp_path / "w", folders=(str(tmp_path / "a"),)
    )
    recipe, run = toy_recipe(tmp_path / "b", delay=0.1, search=stages), tmp_path / "run"
    slowed = "--set=objectives.search.0.head.arguments.delay=0.1"
    killed("run", recipe, "--out", run, slowed, when=lambda: len(recorded(run)) >= first)
    paid = recorded(run)
    assert first <= len(paid) < share  # in the first stage
    assert Run(run).status()["state"] == "killed"

    killed("resume", run, when=lambda: len(recorded(run)) >= second)
    later = recorded(run)
    assert later[: len(paid)] == paid
    assert any(gradient for _, gradient in later)  # in the second
    assert Run(run).status()["state"] == "killed"

    assert ecotone("resume", run).code == 0
    assert recorded(run)[: len(later)] == later
    assert len(recorded(run)) > len(later)
    assert outcome_of(run) == outcome_of(whole.directory)


def test_of_warnings_only_the_search_s_own_numbers_are_the_chain_s() -> None:
    """What a user's exception says stays as it is."""
    told = {"number": 1, "warnings": ["the score fell; trial 2 is its best.", "line 0 failed: cannot read trial 40"]}
    found = _renumbered(told, [10, 11, 12])
    assert found == {"number": 11, "warnings": ["the score fell; trial 12 is its best.", told["warnings"][1]]}


@pytest.mark.parametrize("key", list(StageSettings.model_fields))
def test_a_search_with_a_field_of_the_name_of_a_stage_s_key_is_refused(key: str) -> None:
    text = f"Mine.\n\nAttributes:\n    algorithm: ``mine``.\n    {key}: A key.\n"
    fields = {"algorithm": Literal["mine"], key: Literal["here", "there"]}
    members = {"algorithm": "mine", key: "here", "__annotations__": fields, "__doc__": text, "__module__": __name__}
    with pytest.raises(InputError) as refused:
        SEARCHES.register("mine", type("Mine", (RandomSettings,), members))
    assert f"other names than the keys of a stage (search, evaluations, start, starts), found {key}." in str(
        refused.value
    )
