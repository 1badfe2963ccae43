"""M2N2 whose children learn before they are scored: Adam's steps, who is refined, failures, crashes, real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from managing import begun, ended
from pydantic import ValidationError
from test_adamerging_recipes import toy_recipe
from test_manager import GOALS, SPACE, Crash, Simulated, scored

from ecotone.experiments.checks import validate
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch, resume
from ecotone.populations import facts
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats
from ecotone.populations.journal import Journal
from ecotone.populations.niches import NicheArchive
from ecotone.populations.trial import Evaluation, Outcome, Trial
from ecotone.search.m2n2 import M2N2, M2N2Settings
from ecotone.search.manager import Manager, Schedule
from ecotone.search.refined import Refined, RefineSettings

TASKS = ("left", "right")
SEEDS = 2


def bred(**settings: Any) -> tuple[M2N2, NicheArchive]:
    archive = NicheArchive(GOALS, 6)
    return M2N2(SPACE, archive, M2N2Settings(**settings), 3), archive


def refined(tasks: tuple[str, ...] = TASKS, **settings: Any) -> tuple[Refined, NicheArchive]:
    search, archive = bred()
    return Refined(search, tasks, RefineSettings(**{"every": 3, "steps": 4, "rate": 0.05, **settings})), archive


def pull(coefficients: Floats, task: str, step: int) -> Floats:
    """The gradient of half the squared distance to a point of the task, with noise of the batch."""
    wobble = np.random.default_rng([step, len(task)]).standard_normal(coefficients.shape[1])
    return coefficients - (0.3 if task == "left" else -0.2) - 0.1 * wobble


def measured(trial: Trial) -> Evaluation:
    if trial.gradient is None:
        return scored(trial)
    task, step = trial.gradient.task, trial.gradient.step
    gradient = pull(trial.genome.coefficients, task, step)
    return Evaluation({task: 0.5 * float(np.sum(gradient**2))}, gradient=gradient)


def unlucky(trial: Trial) -> Evaluation:
    """The gradient of ``left`` fails in each child's second step."""
    if trial.gradient is not None and trial.gradient.step % 4 == 1 and trial.gradient.task == "left":
        return Evaluation.failed("out of memory", "no room")
    return measured(trial)


def run(search: Any, archive: NicheArchive, count: int, n: int = 1, measure: Any = measured) -> list[Trial]:
    """Ask for ``n``, tell them, and so on until ``count`` trials were told."""
    trials: list[Trial] = []
    while len(trials) < count:
        asked = search.ask(n)
        assert asked
        for trial in asked:
            evaluation = measure(trial)
            outcome = Outcome(False) if trial.gradient else archive.add(trial, evaluation)
            search.tell(trial, evaluation, outcome)
        trials += asked
    return trials


# -- what is refined, and how --------------------------------------------------------------------------------


def test_a_child_takes_torchs_adam_steps_from_where_it_was_bred() -> None:
    search, archive = refined()
    trials = run(search, archive, SEEDS + 2 + 4 * len(TASKS) + 1)
    child = run(*bred(), SEEDS + 3)[-1].genome  # the third child, had it not learned
    point = torch.tensor(child.coefficients.copy(), requires_grad=True)
    optimiser = torch.optim.Adam([point], lr=0.05)
    for step in range(4):
        asked = [trial for trial in trials if trial.gradient and trial.gradient.step == step]
        assert [trial.gradient.task for trial in asked if trial.gradient] == list(TASKS)
        for trial in asked:
            assert np.allclose(trial.genome.coefficients, point.detach().numpy(), rtol=0, atol=1e-12)
        here = point.detach().numpy()
        point.grad = torch.from_numpy(sum(pull(here, task, step) for task in TASKS))
        optimiser.step()
    last = trials[-1]
    assert last.gradient is None
    assert np.array_equal(last.genome.boundaries, child.boundaries)
    assert np.allclose(last.genome.coefficients, point.detach().numpy(), rtol=0, atol=1e-12)
    (record,) = search.report()["refined"]
    assert record["number"] == last.number == SEEDS + 2 + 8
    assert record["last"] < record["first"]
    assert archive.members[-1].trial is last


def test_refining_no_child_is_plain_m2n2() -> None:
    plain = run(*bred(), 60, n=3)
    search, archive = refined(every=1000)
    same = run(search, archive, 60, n=3)
    assert [(t.number, t.genome.digest, t.parents) for t in same] == [
        (t.number, t.genome.digest, t.parents) for t in plain
    ]
    assert search.report()["refined"] == []


@pytest.mark.parametrize("every", [1, 2, 5])
def test_every_so_many_children_are_refined_but_no_seed(every: int) -> None:
    search, archive = refined(every=every, steps=2)
    trials = run(search, archive, 150)
    scores = [trial.number for trial in trials if trial.gradient is None]
    numbers = [record["number"] for record in search.report()["refined"]]
    assert numbers == scores[SEEDS + every - 1 :: every]
    parents = {parent for trial in trials for parent in trial.parents}
    assert parents & set(numbers)  # what was acquired is inherited
    assert parents <= set(scores)


def test_children_learn_from_different_batches() -> None:
    search, archive = refined(every=2)
    trials = run(search, archive, 120, n=4)
    steps = [trial.gradient.step for trial in trials if trial.gradient and trial.gradient.task == "left"]
    assert len(steps) == len(set(steps)) > 20
    assert sorted(steps) == list(range(len(steps)))


def test_other_children_go_on_while_one_learns() -> None:
    search, archive = refined(every=2)
    run(search, archive, SEEDS)
    asked = search.ask(8)
    kinds = [trial.gradient is not None for trial in asked]
    assert kinds == [False, True, True, False, True, True, False, True]
    assert search.ask(2) != []  # nothing of these was told


def test_a_failed_gradient_leaves_the_child_as_it_was_bred() -> None:
    search, archive = refined()
    trials = run(search, archive, SEEDS + 2 + 2 + 1 + 1, measure=unlucky)
    child = run(*bred(), SEEDS + 3)[-1].genome
    assert trials[-1].gradient is None
    assert trials[-1].genome == child
    assert [t.gradient.task for t in trials if t.gradient] == ["left", "right", "left"]  # no more was asked for
    report = search.report()
    assert report["refined"][0]["failure"] == "step 1, task 'left': out of memory: no room"
    assert report["refined"][0]["last"] is not None
    assert report["warnings"] == [
        "none of 1 children could be refined; the last: step 1, task 'left': out of memory: no room"
    ]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (Evaluation({"left": 1.0}), "no loss with its gradient"),
        (Evaluation({"left": 1.0}, gradient=np.zeros((7, 2))), "expected a gradient of shape"),
        (Evaluation({"left": 1.0}, gradient=np.full((1, 2), np.nan)), "a gradient"),
    ],
)
def test_gradients_that_are_none(evaluation: Evaluation, message: str) -> None:
    search, archive = refined(("left",), every=1)
    run(search, archive, 20, measure=lambda trial: evaluation if trial.gradient else scored(trial))
    failures = [record["failure"] for record in search.report()["refined"]]
    assert len(failures) > 3
    assert all(message in failure or "not finite" in failure for failure in failures)


def test_learning_finds_what_crossover_alone_does_not() -> None:
    """The best merge has coefficients that no mixture of the seeds has."""

    def near(trial: Trial) -> Evaluation:
        away = trial.genome.coefficients + 0.5
        if trial.gradient is not None:
            return Evaluation({trial.gradient.task: float(np.sum(away**2))}, gradient=2 * away)
        score = float(np.exp(-np.abs(away).mean()))
        return Evaluation({"first": score, "second": score})

    def best(search: Any, archive: NicheArchive) -> float:
        run(search, archive, 200, measure=near)
        return max(member.evaluation.scores["first"] for member in archive.members)

    plain, learned = best(*bred()), best(*refined(("left",), every=2, rate=0.1))
    assert plain < 0.63  # coefficients of a mixture stay above 0
    assert learned > 0.95


# -- crashes -------------------------------------------------------------------------------------------------


def managed(path: Path, pool: Simulated, order: Any = "strict") -> Manager:
    schedule = Schedule(evaluations=30, batch=2, in_flight=8, order=order)
    manager = begun(path, *refined(every=2, steps=2), GOALS, pool, schedule)
    ended(manager)
    return manager


def standing(manager: Manager, path: Path) -> Any:
    members = [member.trial.number for member in manager.population.members]
    with Journal.open(path) as journal:
        for member in manager.population.members:  # what was scored is what is kept
            assert journal.trial(member.trial.number).genome == member.trial.genome
        report = json.dumps(manager.search.report())  # type: ignore[attr-defined]
        return members, sorted(manager.front.numbers), manager.progress.best, journal.digest(), report


@pytest.mark.parametrize("schedule", [None, 7])
@pytest.mark.parametrize("measure", [measured, unlucky])
def test_crashed_anywhere_and_resumed_it_is_the_same_search(schedule: int | None, measure: Any, tmp_path: Path) -> None:
    whole = tmp_path / "whole" / "j.sqlite"
    first = managed(whole, Simulated(score=measure))
    expected = standing(first, whole)
    assert first.progress.evaluations == 30
    assert first.progress.gradients > 30
    for crash in range(0, 33, 4):
        path = tmp_path / str(crash) / "j.sqlite"
        with pytest.raises(Crash):
            managed(path, Simulated(schedule, measure, crash))
        with Journal.open(path) as journal:
            paid = {number for number, _ in journal.evaluations()}
        second = Simulated(schedule, measure)
        assert standing(managed(path, second), path) == expected
        assert not set(second.submitted) & paid


def test_in_order_of_arrival_the_journal_replays_to_the_same_state(tmp_path: Path) -> None:
    for schedule in range(3):
        path = tmp_path / str(schedule) / "j.sqlite"
        first = standing(managed(path, Simulated(schedule, unlucky), "arrival"), path)
        idle = Simulated()
        assert standing(managed(path, idle, "arrival"), path) == first
        assert idle.submitted == []


# -- refusals and recipes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every\n.*greater than or equal to 1"),
        ({"steps": 0}, "steps\n.*greater than or equal to 1"),
        ({"rate": 0.0}, "rate\n.*greater than 0"),
        ({"rate": float("nan")}, "rate\n.*finite"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RefineSettings(**settings)


def test_without_tasks_there_is_nothing_to_learn() -> None:
    with pytest.raises(InputError, match="calibration: refinement learns from calibration tasks, and there are none"):
        refined(tasks=())


def test_whole_vectors_cannot_be_refined() -> None:
    with pytest.raises(InputError, match="with mutation children are whole vectors"):
        Refined(bred(mutation=0.1)[0], TASKS)


M2N2_REFINED: dict[str, Any] = {"algorithm": "m2n2", "archive": 6, "refine": {"every": 2, "steps": 3, "rate": 0.05}}
BUDGET = {"evaluations": 24}


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"calibration": []}, "calibration: m2n2 learns on tasks given there, found none."),
        ({"search": M2N2_REFINED | {"mutation": 0.1}}, "search: refine: with mutation children are whole vectors,"),
        ({"search": M2N2_REFINED | {"refine": {"evry": 3}}}, "search.refine.evry: unknown key. Did you mean 'every'?"),
        (
            {"search": M2N2_REFINED | {"refine": {"rate": 0}}},
            "search.refine.rate: input should be greater than 0, found",
        ),
        ({"search": {"algorithm": "m2n2"}}, "calibration: m2n2 does not use it"),
    ],
)
def test_recipes_that_are_refused(others: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        Recipe.from_yaml(toy_recipe(tmp_path, **{"search": M2N2_REFINED, "budget": BUDGET, **others}))
    assert str(caught.value).startswith(message)


def outcome(path: Path) -> tuple[str, Any]:
    with Journal.open(path / "journal.sqlite") as journal:
        return journal.digest(), journal.fact(facts.REPORT)


def test_a_real_run_and_one_that_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.from_yaml(toy_recipe(tmp_path / "a", search=M2N2_REFINED, budget=BUDGET))
    monkeypatch.syspath_prepend(str(tmp_path / "a"))
    texts = {finding.subject: finding.text for finding in validate(recipe)}
    assert texts["search"] == "m2n2: one child in 2 takes 3 steps on 2 tasks before it is scored"
    run = launch(recipe, tmp_path / "run", folders=(str(tmp_path / "a"),))
    digest, report = outcome(run.directory)
    learned = report["refined"]
    assert len(learned) >= 9
    assert all(record["failure"] == "" for record in learned)
    assert np.mean([record["last"] < record["first"] for record in learned]) > 0.6
    stopping = Recipe.from_yaml(toy_recipe(tmp_path / "b", stop=31, search=M2N2_REFINED, budget=BUDGET))
    with pytest.raises(KeyboardInterrupt):
        launch(stopping, tmp_path / "stopped", folders=(str(tmp_path / "b"),))
    resume(tmp_path / "stopped")
    assert outcome(tmp_path / "stopped") == (digest, report)


def test_a_refined_stage(tmp_path: Path) -> None:
    """MAP finds a front, M2N2 breeds it and lets children learn."""
    stages = [{"algorithm": "map", "evaluations": 16, "samples": 12}, M2N2_REFINED | {"granularity": "tensor"}]
    recipe = Recipe.from_yaml(toy_recipe(tmp_path, search=stages, budget={"evaluations": 32}))
    run = launch(recipe, tmp_path / "run", folders=(str(tmp_path),))
    _, report = outcome(run.directory)
    second = report["stages"][1]
    assert second["evaluations"] == 16
    with run.journal() as journal:
        scored_rows = {row.number: row for row in journal.rows()}
        for record in second["report"]["refined"]:
            assert record["number"] in scored_rows
            assert record["number"] >= second["first"]
            assert scored_rows[record["number"]].parents
