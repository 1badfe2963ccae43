"""AdaMerging on losses whose gradients are known: against torch's Adam, known minima, failures and its report."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from managing import begun, ended
from parts import calibration, call
from pydantic import ValidationError

from ecotone.fitness.pools import Batch, Completed
from ecotone.populations.errors import InputError, SearchError
from ecotone.populations.genome import Floats, Genome
from ecotone.populations.gram import GramTable
from ecotone.populations.pareto import ParetoFront
from ecotone.populations.population import ElitistArchive
from ecotone.populations.space import Space
from ecotone.populations.trial import Evaluation, Goal, Outcome, Trial, oriented
from ecotone.search.adamerging import AdaMerging, AdaMergingSettings
from ecotone.search.descent import LINES, Adam, Descent, GradientSettings, Line
from ecotone.search.kinds import Context, Pair
from ecotone.search.manager import Schedule
from ecotone.search.protocol import numbered

BORDERS = np.array([0, 4, 10, 24])
SHAPE = (3, 2)
TASKS = ("left", "right")
GOALS = (Goal("near-left"), Goal("far-right", "minimize"))
RNG = np.random.default_rng(5)
TARGETS = {"left": RNG.uniform(0.0, 1.0, SHAPE), "right": RNG.uniform(0.0, 1.0, SHAPE)}
Measure = Callable[[Trial], Evaluation]


def search_of(**settings: Any) -> AdaMerging:
    arguments: dict[str, Any] = {"rate": 0.02, "steps": 60, "check_every": 20} | settings
    tasks, seed, starts = arguments.pop("tasks", TASKS), arguments.pop("seed", 0), arguments.pop("starts", None)
    return AdaMerging(BORDERS, 2, tasks, GOALS, seed, AdaMergingSettings(**arguments), starts)


def of(trial: Trial) -> Floats:
    return trial.genome.refined(BORDERS)


def half_square(c: Floats, task: str) -> float:
    return 0.5 * float(np.sum((c - TARGETS[task]) ** 2))


def measured(trial: Trial, noise: float = 0.0) -> Evaluation:
    """Half the squared distance to the task's target, its gradient, and scores that agree with both losses."""
    c, batch = of(trial), trial.gradient
    if batch is None:
        return Evaluation({"near-left": -half_square(c, "left"), "far-right": half_square(c, "right")})
    gradient = np.zeros(SHAPE)
    for task, weight in zip(batch.tasks, batch.weights, strict=True):
        wobble = noise * np.random.default_rng([batch.step, TASKS.index(task)]).standard_normal(SHAPE)
        gradient += weight * (c - TARGETS[task] + wobble)
    details = {Evaluation.detail_of(task, "diversity"): 0.9 for task in batch.tasks}
    return Evaluation({task: half_square(c, task) for task in batch.tasks}, gradient=gradient, details=details)


def noisy(trial: Trial) -> Evaluation:
    return measured(trial, noise=0.3)


def run(search: Descent[Any], measure: Measure = measured, n: int = 100, shuffle: int | None = None) -> list[Trial]:
    """Drive it to its end, telling all that is in flight at once, in order or shuffled; returns its trials."""
    trials: list[Trial] = []
    while not search.done:
        asked = search.ask(n)
        assert asked, "it waits although everything is told"
        assert numbered(len(trials), asked)
        trials += asked
        if shuffle is not None:
            random.Random(shuffle + len(trials)).shuffle(asked)
        for trial in asked:
            search.tell(trial, measure(trial), Outcome(False))
    assert search.ask(n) == []
    return trials


def path_of(trials: list[Trial], task: str = "left") -> Floats:
    """(steps, S, K) coefficients of the gradient trials of a task."""
    return np.array([of(trial) for trial in trials if trial.gradient is not None and trial.gradient.task == task])


def final(search: AdaMerging, line: int = 0) -> Floats:
    return np.asarray(search.report()["lines"][line]["coefficients"])


# -- steps ---------------------------------------------------------------------------------------------------


def torch_path(steps: int, rate: float, weights: dict[str, float], clamp: bool, noise: float, init: float) -> Floats:
    """Coefficients before each step and after the last of torch.optim.Adam on the same losses, by autograd."""
    raw = torch.full(SHAPE, init, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([raw], lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    path = []
    for step in range(steps):
        used = raw.clamp(0, 1) if clamp else raw
        path.append(used.detach().numpy().copy())
        loss = torch.zeros((), dtype=torch.float64)
        for task, weight in weights.items():
            wobble = noise * np.random.default_rng([step, TASKS.index(task)]).standard_normal(SHAPE)
            loss = loss + weight * (0.5 * ((used - torch.from_numpy(TARGETS[task])) ** 2).sum())
            loss = loss + weight * (used * torch.from_numpy(wobble)).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return np.array([*path, (raw.clamp(0, 1) if clamp else raw).detach().numpy()])


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("weights", [{"left": 1.0, "right": 1.0}, {"left": 0.25, "right": 3.0}])
@pytest.mark.parametrize("rate", [1e-3, 0.05])
def test_its_steps_are_those_of_torchs_adam(clamp: bool, weights: dict[str, float], rate: float) -> None:
    search = search_of(rate=rate, steps=80, clamp=clamp, weights=weights)
    trials = run(search, lambda trial: measured(trial, noise=3.0))
    expected = torch_path(80, rate, weights, clamp, 3.0, 0.3)
    assert path_of(trials) == pytest.approx(expected[:-1], abs=1e-12, rel=0)
    assert final(search) == pytest.approx(expected[-1], abs=1e-12, rel=0)
    if rate == 0.05:
        free = torch_path(80, rate, weights, False, 3.0, 0.3)
        assert free.min() < 0.0, "the clamp must have something to do"


def test_it_starts_where_the_paper_does_and_at_equal_weights() -> None:
    search = search_of()
    first = search.ask(3)
    assert [of(trial).tolist() for trial in first] == [np.full(SHAPE, 0.3).tolist()] * 3
    assert [trial.gradient and (trial.gradient.task, trial.gradient.step) for trial in first] == [
        None,
        ("left", 0),
        ("right", 0),
    ]
    assert search.report()["lines"][0]["weights"] == {"left": 1.0, "right": 1.0}


def test_it_converges_to_the_minimum_of_the_weighted_losses() -> None:
    search = search_of(steps=1500, weights={"left": 3.0, "right": 1.0}, check_every=500)
    run(search)
    assert final(search) == pytest.approx(0.75 * TARGETS["left"] + 0.25 * TARGETS["right"], abs=1e-6)


def test_layer_wise_with_equal_gradients_is_task_wise() -> None:
    """The gradient of a shared coefficient is the sum over segments; Adam does not mind a scale but for its eps."""
    pull = np.array([0.8, 0.1])

    def toward(trial: Trial) -> Evaluation:
        if trial.gradient is None:
            return Evaluation({"near-left": 0.0, "far-right": 0.0})
        return Evaluation({trial.gradient.task: 1.0}, gradient=trial.genome.coefficients - pull)

    settings = AdaMergingSettings(steps=200, rate=0.01)
    wise = AdaMerging(np.array([0, 24]), 2, TASKS, GOALS, 0, settings)
    layers = AdaMerging(BORDERS, 2, TASKS, GOALS, 0, settings)
    whole, layered = run(wise, toward), run(layers, toward)
    assert [trial.genome.digest for trial in layered] == [trial.genome.digest for trial in whole]
    assert final(layers).tolist() == [final(wise)[0].tolist()] * 3


def test_a_task_of_weight_zero_is_never_asked_for() -> None:
    search = search_of(weights={"left": 0.0})
    trials = run(search)
    assert {trial.gradient.task for trial in trials if trial.gradient is not None} == {"right"}
    assert final(search) == pytest.approx(torch_path(60, 0.02, {"right": 1.0}, False, 0.0, 0.3)[-1], abs=1e-12)
    assert [check["losses"].keys() for check in search.report()["lines"][0]["checks"]] == [{"right"}] * 4


# -- clamping ------------------------------------------------------------------------------------------------


def test_clamped_1_3_behaves_as_1() -> None:
    """Inside and outside the interval; the gradient of what is outside is zero, so it stays where it is."""
    outside, edge = np.full(SHAPE, 0.5), np.full(SHAPE, 0.5)
    outside[0], outside[1] = 1.3, -0.2
    edge[0], edge[1] = 1.0, 0.0
    search = search_of(starts=[outside, edge], clamp=True)
    trials = run(search)
    first = [trial for trial in trials if trial.number in (0, 3)]  # the checks of both lines at step 0
    assert first[0].genome.digest == first[1].genome.digest
    assert of(first[0]).tolist() == edge.tolist()
    stuck = final(search)
    assert stuck[:2].tolist() == edge[:2].tolist()
    assert (stuck[2] != edge[2]).all()
    assert (final(search, 1) != edge).all()  # on the border the gradient lives
    assert any("line 0: 4 of 6 coefficients ended outside [0, 1]" in text for text in search.report()["warnings"])


def test_without_a_clamp_coefficients_are_free() -> None:
    far = {task: np.full(SHAPE, 1.6) for task in TASKS}

    def beyond(trial: Trial) -> Evaluation:
        if trial.gradient is None:
            return Evaluation({"near-left": 0.0, "far-right": 0.0})
        return Evaluation({trial.gradient.task: 1.0}, gradient=of(trial) - far[trial.gradient.task])

    free, clamped = search_of(steps=1000), search_of(steps=1000, clamp=True)
    run(free, beyond)
    run(clamped, beyond)
    assert final(free) == pytest.approx(np.full(SHAPE, 1.6), abs=1e-3)
    assert final(clamped).tolist() == np.ones(SHAPE).tolist()


# -- what is asked, and when ---------------------------------------------------------------------------------


def test_it_checks_at_the_start_now_and_then_and_at_the_end() -> None:
    search = search_of(steps=45)
    trials = run(search)
    line = search.report()["lines"][0]
    assert [check["step"] for check in line["checks"]] == [0, 20, 40, 45]
    checks = [trial for trial in trials if trial.gradient is None]
    assert [trial.number for trial in checks] == [check["number"] for check in line["checks"]]
    assert [trial.parents for trial in checks] == [(), *((trial.number,) for trial in checks[:-1])]
    assert of(checks[-1]).tolist() == np.asarray(line["coefficients"]).tolist()
    assert len(trials) - len(checks) == 45 * 2
    assert search.evaluations == len(checks) == 4
    assert (line["steps"], line["ended"]) == (45, "all steps done")


@pytest.mark.parametrize(("steps", "every", "checks"), [(40, 20, 3), (41, 20, 4), (1, 20, 2), (3, 1, 4)])
def test_evaluations_are_the_checks_of_a_complete_run(steps: int, every: int, checks: int) -> None:
    search = search_of(steps=steps, check_every=every, restarts=2)
    assert search.evaluations == 2 * checks
    assert sum(trial.gradient is None for trial in run(search)) == 2 * checks


def test_lines_take_turns_and_a_line_that_waits_keeps_no_other_waiting() -> None:
    search = search_of(tasks=("left",), starts=[np.zeros(SHAPE), np.ones(SHAPE)], check_every=100)
    a, b = search.ask(2)[1], search.ask(2)[1]
    assert search.ask(4) == []  # both wait
    search.tell(a, measured(a), Outcome(False))
    assert search.ask(4) == []  # its check is missing
    first_check = Trial(0, a.genome)
    search.tell(first_check, measured(first_check), Outcome(True))
    for step in range(1, 6):  # the other line still waits for its first step
        (trial,) = search.ask(4)
        assert trial.gradient is not None
        assert trial.gradient.step == step
        search.tell(trial, measured(trial), Outcome(False))
    assert b.gradient is not None
    assert search.report()["lines"][1]["steps"] == 0
    search.tell(b, measured(b), Outcome(False))
    second_check = Trial(2, b.genome)
    search.tell(second_check, measured(second_check), Outcome(True))
    assert [trial.gradient.step for trial in search.ask(4) if trial.gradient] == [6, 1]


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_how_many_are_asked_for_at_once_does_not_matter(n: int) -> None:
    settings: dict[str, Any] = {"restarts": 3, "steps": 20, "check_every": 7}
    whole, parts = search_of(**settings), search_of(**settings)
    run(whole, noisy)
    run(parts, noisy, n)
    for line in range(3):
        assert final(parts, line).tolist() == final(whole, line).tolist()


@pytest.mark.parametrize("shuffle", range(5))
def test_the_order_of_results_within_a_step_does_not_matter(shuffle: int) -> None:
    names = tuple("abcdefg")
    pulls = {name: np.random.default_rng(i).standard_normal(SHAPE) * 10.0**i for i, name in enumerate(names)}

    def pulled(trial: Trial) -> Evaluation:
        if trial.gradient is None:
            return measured(trial)
        task = trial.gradient.task
        details = {Evaluation.detail_of(task, "diversity"): float(np.abs(pulls[task]).mean())}
        return Evaluation({task: float(pulls[task].sum())}, gradient=of(trial) - pulls[task], details=details)

    ordered, shuffled = search_of(tasks=names, steps=20), search_of(tasks=names, steps=20)
    expected = [trial.genome.digest for trial in run(ordered, pulled)]
    assert [trial.genome.digest for trial in run(shuffled, pulled, shuffle=shuffle)] == expected
    assert final(shuffled).tolist() == final(ordered).tolist()
    assert json.dumps(shuffled.report(), default=np.ndarray.tolist) == json.dumps(
        ordered.report(), default=np.ndarray.tolist
    )


# -- several tasks in a trial --------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, {"left": 0.25}])
def test_tasks_together_take_the_same_steps_with_fewer_trials(weights: dict[str, float] | None) -> None:
    settings: dict[str, Any] = {"weights": weights, "starts": [np.zeros(SHAPE), np.ones(SHAPE)], "accumulate": 2}
    alone, together = search_of(**settings), search_of(**settings, together=2)
    first, second = run(alone, noisy), run(together, noisy)
    gradients = [[trial.gradient for trial in trials if trial.gradient] for trials in (first, second)]
    assert len(gradients[0]) == 2 * len(gradients[1]) == 2 * 60 * 2 * 2
    assert {batch.tasks for batch in gradients[1]} == {TASKS}
    assert {batch.weights for batch in gradients[1]} == {(0.25 if weights else 1.0, 1.0)}
    for line in range(2):
        assert final(together, line) == pytest.approx(final(alone, line), abs=1e-12)
        one, other = (search.report()["lines"][line]["checks"] for search in (alone, together))
        assert [check["losses"] for check in one] == [pytest.approx(check["losses"]) for check in other]
        assert [check["diversity"] for check in one] == [pytest.approx(check["diversity"]) for check in other]


def test_tasks_are_grouped_in_order_and_those_without_a_weight_are_left_out() -> None:
    search = search_of(tasks=tuple("abcdef"), weights={"b": 0.0, "e": 2.0}, together=2, accumulate=2)
    batches = [trial.gradient for trial in search.ask(100) if trial.gradient]
    assert [(batch.tasks, batch.step) for batch in batches] == [
        *((tasks, step) for step in (0, 1) for tasks in (("a", "c"), ("d", "e"), ("f",))),
    ]
    assert [batch.weights for batch in batches[:3]] == [(1.0, 1.0), (1.0, 2.0), (1.0,)]


def test_a_failure_names_the_tasks_that_were_together() -> None:
    def failing(trial: Trial) -> Evaluation:
        return measured(trial) if trial.gradient is None else Evaluation.failed("exception", "no")

    search = search_of(together=2)
    run(search, failing)
    assert search.report()["lines"][0]["ended"] == "failed at step 0, tasks 'left', 'right': exception: no"


# -- several lines -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_of_weightings_yields_the_front_between_two_tasks() -> None:
    """The minimum of w1 L1 + w2 L2 is between the targets, at the share of the weights: the exact front."""
    search = search_of(sweep=5, steps=1500, check_every=1500)
    trials = run(search)
    lines = search.report()["lines"]
    assert [list(line["weights"].values()) for line in lines] == [[0, 2], [0.5, 1.5], [1, 1], [1.5, 0.5], [2, 0]]
    for i, line in enumerate(lines):
        expected = (i * TARGETS["left"] + (4 - i) * TARGETS["right"]) / 4
        assert np.asarray(line["coefficients"]) == pytest.approx(expected, abs=1e-5)
    front = ParetoFront(GOALS)
    for trial in trials:
        if trial.gradient is None:
            front.add(trial.number, oriented(measured(trial).scores, GOALS))
    last = {line["checks"][-1]["number"] for line in lines}
    assert last <= set(front.numbers)


def test_a_sweep_over_three_tasks_has_at_most_so_many_lines() -> None:
    search = AdaMerging(BORDERS, 2, ("a", "b", "c"), GOALS, 0, AdaMergingSettings(sweep=7))
    table = np.array([list(line["weights"].values()) for line in search.report()["lines"]])
    assert table.shape == (6, 3)
    assert table.sum(axis=1) == pytest.approx(np.full(6, 3.0))


def test_restarts_begin_beside_the_first_and_the_seed_decides_where() -> None:
    def begins(seed: int) -> list[Any]:
        search = search_of(restarts=400, spread=0.2, seed=seed)
        return [line["start"].tolist() for line in search.report()["lines"]]

    starts = np.array(begins(1))
    assert starts[0].tolist() == np.full(SHAPE, 0.3).tolist()
    assert len({start.tobytes() for start in starts}) == 400
    assert starts[1:].mean() == pytest.approx(0.3, abs=0.02)
    assert starts[1:].std() == pytest.approx(0.2, abs=0.02)
    assert begins(1) == starts.tolist()
    assert begins(2)[1:] != starts.tolist()[1:]


def test_every_start_weighting_and_restart_has_its_line() -> None:
    starts = [np.full(SHAPE, 0.2), np.full(SHAPE, 0.6)]
    search = search_of(starts=starts, sweep=3, restarts=2)
    lines = search.report()["lines"]
    assert search.lines == len(lines) == 12
    assert [line["start"][0, 0] for line in lines[::2]] == [0.2] * 3 + [0.6] * 3
    assert [line["weights"]["left"] for line in lines[:6]] == [0, 0, 1, 1, 2, 2]


# -- ends ----------------------------------------------------------------------------------------------------


def test_patience_ends_a_line_whose_checks_get_no_better() -> None:
    """The score is best at 0.5: on the way from 0.3 to the target at 0.9 it rises, then falls."""

    def passing(trial: Trial) -> Evaluation:
        c = of(trial)
        if trial.gradient is None:
            return Evaluation({"near-left": 1.0 - abs(c[0, 0] - 0.5), "far-right": 0.0})
        return Evaluation({trial.gradient.task: 1.0}, gradient=c - 0.9)

    search = search_of(steps=1000, rate=0.01, check_every=5, patience=3)
    run(search, passing)
    line = search.report()["lines"][0]
    scores = [check["score"] for check in line["checks"]]
    best = int(np.argmax(scores))
    assert line["checks"][best]["step"] == 20  # steps of 0.01, about
    assert len(scores) == best + 1 + 3
    assert (line["steps"], line["ended"]) == (35, "no better score in 3 checks")


def test_without_patience_all_steps_are_done() -> None:
    search = search_of(steps=40, check_every=2)
    run(search, lambda trial: measured(trial) if trial.gradient else Evaluation({"near-left": 0, "far-right": 0}))
    assert search.report()["lines"][0]["steps"] == 40


def test_a_failed_check_is_one_without_a_better_score() -> None:
    def unscored(trial: Trial) -> Evaluation:
        return measured(trial) if trial.gradient else Evaluation.failed("exception", "no")

    search = search_of(steps=100, check_every=10, patience=2)
    trials = run(search, unscored)
    line = search.report()["lines"][0]
    assert [check["score"] for check in line["checks"]] == [None, None]
    assert {trial.parents for trial in trials} == {()}
    patient = search_of(steps=100, check_every=10)
    run(patient, unscored)
    assert patient.report()["lines"][0]["steps"] == 100


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        (Evaluation.failed("out of memory", "20 GiB"), "out of memory: 20 GiB"),
        (Evaluation({"right": 1.0}), "no loss with its gradient"),
        (Evaluation({"left": 1.0}, gradient=np.zeros(SHAPE)), "no loss with its gradient"),
        (Evaluation({"right": 1.0}, gradient=np.zeros((1, 2))), r"expected a gradient of shape (3, 2), found (1, 2)"),
        (Evaluation({"right": 1.0}, gradient=np.full(SHAPE, np.inf)), "not finite"),
        (Evaluation({"right": np.nan}, gradient=np.zeros(SHAPE)), "not finite"),
    ],
)
@pytest.mark.parametrize("n", [1, 2, 100])
def test_a_failed_gradient_ends_its_line_and_no_other(evaluation: Evaluation, words: str, n: int) -> None:
    unlucky = np.full(SHAPE, 0.9)
    search = search_of(starts=[unlucky, np.full(SHAPE, 0.3)], steps=30)

    def failing(trial: Trial) -> Evaluation:
        batch = trial.gradient
        bad = batch is not None and (batch.task, batch.step) == ("right", 4) and of(trial)[0, 0] > 0.7
        return evaluation if bad else measured(trial)

    trials = run(search, failing, n)
    ended, other = search.report()["lines"]
    assert ended["steps"] == 4
    assert words in ended["ended"]
    assert "failed at step 4, task 'right'" in ended["ended"]
    assert other["ended"] == "all steps done"
    assert final(search, 1).tolist() == torch_like(30).tolist()
    assert [text for text in search.report()["warnings"] if text.startswith("line 0 failed at step 4")]
    assert sum(trial.gradient is not None for trial in trials) == 2 * 30 + 2 * 5


@pytest.mark.parametrize("n", [1, 2, 100])
@pytest.mark.parametrize("step", [0, 20, 38])
def test_what_a_line_has_learned_until_it_fails_is_scored(step: int, n: int) -> None:
    search = search_of(steps=60, check_every=20)

    def failing(trial: Trial) -> Evaluation:
        batch = trial.gradient
        bad = batch is not None and (batch.task, batch.step) == ("left", step)
        return Evaluation.failed("out of memory", "20 GiB") if bad else measured(trial)

    trials = run(search, failing, n)
    line = search.report()["lines"][0]
    assert line["ended"].startswith(f"failed at step {step}")
    assert [check["step"] for check in line["checks"]] == sorted({*range(0, step + 1, 20), step})[: len(line["checks"])]
    assert line["checks"][-1]["step"] == step
    scored = [trial for trial in trials if trial.gradient is None]
    assert len(scored) == len(line["checks"]) <= search.evaluations
    assert np.array_equal(of(scored[-1]), torch_like(step))


def torch_like(steps: int) -> Floats:
    """Where our Adam gets to from 0.3 on the sum of both losses."""
    adam = Adam(np.full(SHAPE, 0.3), 0.02)
    for _ in range(steps):
        adam.step((adam.point - TARGETS["left"]) + (adam.point - TARGETS["right"]))
    return adam.point


def test_when_the_first_gradient_fails_the_rest_of_the_step_is_not_asked_for() -> None:
    search = search_of()
    check, left = search.ask(2)
    search.tell(left, Evaluation.failed("not finite", "NaN"), Outcome(False))
    assert search.ask(5) == []
    assert not search.done  # the check is in flight
    search.tell(check, measured(check), Outcome(True))
    assert search.done
    line = search.report()["lines"][0]
    assert [(entry["scores"] is None, entry["losses"]) for entry in line["checks"]] == [(False, {})]


# -- resuming ------------------------------------------------------------------------------------------------

WINDOW = Schedule(batch=2, in_flight=8)


class Crash(BaseException):
    """A kill -9, as far as one process can have it."""


class LatePool:
    """A pool that gives its batches back out of order, and may crash after so many calls.

    Args:
        seed: Of the order.
        calls: Submissions and deliveries before the crash; None for no crash.
    """

    slots = 4

    def __init__(self, seed: int, calls: int | None = None, measure: Measure = noisy) -> None:
        self._random, self._calls, self._measure = random.Random(seed), calls, measure
        self._flying: list[Batch] = []
        self.submitted: list[int] = []

    def start(self) -> Space:
        vectors, names = np.eye(2, 24, dtype=np.float32), ("a", "b")
        whole = np.array([0, 24])
        return Space(names, ("t",), whole, ("t",), whole, GramTable.from_vectors(vectors), np.eye(2), names, None)

    def _called(self) -> None:
        if self._calls is not None:
            self._calls -= 1
            if self._calls < 0:
                raise Crash

    def submit(self, batch: Batch) -> None:
        self._called()
        self.submitted += [trial.number for trial in batch.trials]
        self._flying.append(batch)

    def completed(self, timeout: float | None = None) -> Completed:
        self._called()
        self._random.shuffle(self._flying)
        ready, self._flying = self._flying[:2], self._flying[2:]
        return [(batch, [self._measure(trial) for trial in batch.trials]) for batch in ready]

    def close(self) -> None:
        self._flying = []

    def __enter__(self) -> LatePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def managed(path: Path, pool: LatePool, schedule: Schedule = WINDOW, **settings: Any) -> tuple[str, AdaMerging]:
    """Run or resume to the end: why it stopped, and the search."""
    search = search_of(**({"restarts": 3, "steps": 12, "check_every": 5} | settings))
    return ended(begun(path, search, ElitistArchive(GOALS, 4), GOALS, pool, schedule)), search


def bits(search: AdaMerging) -> str:
    return json.dumps(search.report(), default=np.ndarray.tolist)


def test_results_that_come_late_and_out_of_order_change_nothing(tmp_path: Path) -> None:
    plain = search_of(restarts=3, steps=12, check_every=5)
    run(plain, noisy, 2)
    for seed in range(4):
        reason, search = managed(tmp_path / str(seed) / "j.sqlite", LatePool(seed))
        assert reason == "converged"
        assert [final(search, line).tolist() for line in range(3)] == [final(plain, line).tolist() for line in range(3)]


@pytest.mark.parametrize("order", ["strict", "arrival"])
def test_killed_anywhere_and_resumed_it_has_the_same_coefficients_to_the_last_bit(order: Any, tmp_path: Path) -> None:
    schedule = Schedule(batch=2, in_flight=8, order=order)
    whole = LatePool(7)
    _, through = managed(tmp_path / "whole" / "j.sqlite", whole, schedule)
    expected = [line["coefficients"].tolist() for line in through.report()["lines"]]
    for calls in range(0, 70, 7):
        path = tmp_path / str(calls) / "j.sqlite"
        with pytest.raises(Crash):
            managed(path, LatePool(7, calls), schedule)
        pool = LatePool(3)
        _, search = managed(path, pool, schedule)
        assert [line["coefficients"].tolist() for line in search.report()["lines"]] == expected
        assert order == "arrival" or bits(search) == bits(through)
        assert calls < 20 or len(pool.submitted) < len(whole.submitted)
    idle = LatePool(0)
    _, replayed = managed(tmp_path / "whole" / "j.sqlite", idle, schedule)
    assert bits(replayed) == bits(through)
    assert idle.submitted == []


def test_the_budget_counts_checks_alone(tmp_path: Path) -> None:
    pool = LatePool(0)
    reason, search = managed(tmp_path / "j.sqlite", pool, Schedule(evaluations=5, batch=1, in_flight=4), restarts=1)
    assert reason == "converged"
    assert search.evaluations == 4
    assert len(pool.submitted) == 4 + 12 * 2
    reason, search = managed(tmp_path / "k.sqlite", LatePool(0), Schedule(evaluations=3, batch=1), restarts=1)
    assert reason == "evaluations"
    assert search.report()["lines"][0]["ended"] == "unfinished"
    assert [check["step"] for check in search.report()["lines"][0]["checks"]] == [0, 5, 10]


def test_when_everything_fails_the_cause_is_shown(tmp_path: Path) -> None:
    def broken(trial: Trial) -> Evaluation:
        return Evaluation.failed("exception", "KeyError: 'pixel_values'")

    with pytest.raises(SearchError, match="KeyError: 'pixel_values'"):
        managed(tmp_path / "j.sqlite", LatePool(0, measure=broken))


@pytest.mark.parametrize("at", [0, 1, 5, 30, 71])
def test_restored_in_the_middle_of_a_step_it_reports_the_same(at: int) -> None:
    def driven(search: AdaMerging, flying: list[Trial], trials: int) -> list[Trial]:
        """One trial asked for and one told at a time, with up to five in flight."""
        for _ in range(trials):
            flying += search.ask(min(2, 5 - len(flying)))
            if flying:
                trial = flying.pop(len(flying) // 2)
                search.tell(trial, noisy(trial), Outcome(False))
        return flying

    settings: dict[str, Any] = {"restarts": 2, "steps": 40, "check_every": 3, "patience": 4}
    through, resumed = search_of(**settings), search_of(**settings)
    flying = driven(through, [], at)
    resumed.restore(through.state())
    assert bits(resumed) == bits(through)
    again = list(flying)
    driven(through, flying, 300)
    driven(resumed, again, 300)
    assert bits(resumed) == bits(through)
    assert through.done
    assert resumed.done


# -- report --------------------------------------------------------------------------------------------------


def test_losses_of_a_check_are_means_since_the_last_one() -> None:
    def counting(trial: Trial) -> Evaluation:
        batch = trial.gradient
        if batch is None:
            return measured(trial)
        loss = float(batch.step + 100 * TASKS.index(batch.task))
        details = (
            {} if batch.task == "right" else {Evaluation.detail_of(batch.task, "diversity"): 1.0 / (1 + batch.step)}
        )
        return Evaluation({batch.task: loss}, gradient=np.zeros(SHAPE), details=details)

    search = search_of(steps=10, check_every=4)
    run(search, counting)
    checks = search.report()["lines"][0]["checks"]
    assert [check["losses"]["left"] for check in checks] == [0.0, 2.5, 6.5, 9.0]
    assert [check["losses"]["right"] for check in checks] == [100.0, 102.5, 106.5, 109.0]
    assert [check["diversity"].keys() for check in checks] == [{"left"}] * 4
    assert checks[1]["diversity"]["left"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4)


def collapsing(score_at_end: float, loss_at_end: float, diversity_at_end: float) -> list[str]:
    """Warnings of a run whose score, loss and diversity go evenly from 0.8, 2 and 1 to these."""

    def sliding(trial: Trial) -> Evaluation:
        share = 1 - min(float(of(trial)[0, 0]), 1.0)
        if trial.gradient is None:
            return Evaluation({"near-left": 2 * (0.8 + share * (score_at_end - 0.8)), "far-right": 0.0})
        loss, diversity = 2 + share * (loss_at_end - 2), 1 + share * (diversity_at_end - 1)
        details = {Evaluation.detail_of(trial.gradient.task, "diversity"): diversity}
        return Evaluation({trial.gradient.task: loss}, gradient=np.ones(SHAPE), details=details)

    search = search_of(init=1.0, rate=0.01, steps=100, check_every=10)
    run(search, sliding)
    warnings: list[str] = search.report()["warnings"]
    return warnings


def test_collapse_is_said() -> None:
    assert collapsing(0.85, 0.1, 0.9) == []  # learns
    assert collapsing(0.799, 0.1, 0.9) == []  # as good as before
    assert collapsing(0.5, 2.5, 0.9) == []  # gets worse, but its loss says so
    (fallen,) = collapsing(0.5, 0.1, 0.9)
    assert "the loss fell from 4 to 0" in fallen
    assert "and yet near-left went from 1.6 (step 0) to 1 (step 100): the merge" in fallen
    assert "trial 0 is its best" in fallen
    left, right = collapsing(0.85, 0.1, 0.1)
    assert "task 'left': the diversity of the predictions fell from 1 to" in left
    assert "task 'right'" in right


def test_a_report_is_plain_json_also_before_the_end() -> None:
    search = search_of(restarts=2)
    empty = json.loads(json.dumps(search.report(), default=np.ndarray.tolist, allow_nan=False))
    assert [line["ended"] for line in empty["lines"]] == ["unfinished"] * 2
    for trial in search.ask(3):
        search.tell(trial, measured(trial), Outcome(False))
    told = json.loads(json.dumps(search.report(), default=np.ndarray.tolist, allow_nan=False))
    assert [line["steps"] for line in told["lines"]] == [1, 0]
    assert told["lines"][0]["checks"][0]["losses"] == {
        task: pytest.approx(half_square(np.full(SHAPE, 0.3), task)) for task in TASKS
    }
    assert told["warnings"] == []


# -- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rate": 0.0}, "rate\n  Input should be greater than 0"),
        ({"rate": -1e-3}, "rate\n  Input should be greater than 0"),
        ({"rate": float("nan")}, "rate\n  Input should be a finite number"),
        ({"init": float("inf")}, "init\n  Input should be a finite number"),
        ({"spread": -0.1}, "spread\n  Input should be greater than or equal to 0"),
        ({"spread": 0.0, "restarts": 3}, "spread: with 0 all 3 restarts would be the same; raise it"),
        ({"steps": 0}, "steps\n  Input should be greater than or equal to 1"),
        ({"check_every": 0}, "check_every\n  Input should be greater than or equal to 1"),
        ({"patience": 0}, "patience\n  Input should be greater than or equal to 1"),
        ({"restarts": 0}, "restarts\n  Input should be greater than or equal to 1"),
        ({"sweep": 1}, "sweep\n  Input should be greater than or equal to 2"),
        ({"weights": {"left": float("nan")}}, "weights.left\n  Input should be a finite number"),
        ({"weights": {"left": 1.0}, "sweep": 3}, "a sweep chooses the weights of the tasks; give weights or sweep"),
        ({"groups": 2}, "groups: expected granularity: groups with it, found granularity: tensor"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        AdaMergingSettings(**settings)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": {"lift": 1.0}}, "search.weights: there is no calibration task 'lift'. Did you mean 'left'?"),
        ({"weights": {"left": -1.0}}, "search.weights.left: expected a number of at least 0, found -1.0"),
        ({"weights": {"left": 0.0, "right": 0.0}}, "search.weights: all are 0"),
        ({"sweep": 3, "tasks": ("left",)}, "search.sweep: expected two calibration tasks or more to weigh"),
        (
            {"sweep": 2, "tasks": ("a", "b", "c")},
            "search.sweep: expected at least 3 weightings, one a calibration",
        ),
        ({"tasks": ()}, "calibration: adamerging learns from calibration tasks, and there are none"),
        ({"tasks": ("left", "left")}, "two tasks named 'left'"),
        ({"starts": []}, "search.start: expected one start or more"),
        ({"starts": [np.zeros((2, 3))]}, r"search.start: expected coefficients of shape (3, 2)"),
        ({"starts": [np.full(SHAPE, np.nan)]}, "search.start: expected finite coefficients"),
    ],
)
def test_mistakes_are_refused_in_words(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        search_of(**settings)
    assert words in str(caught.value)


# -- what it says of itself ----------------------------------------------------------------------------------


def context_of(tensors: int = 3, starts: tuple[Genome, ...] = ()) -> Context:
    names = tuple(f"tensor-{i}" for i in range(tensors))
    gram = GramTable.from_vectors(RNG.standard_normal((2, 24)).astype(np.float32))
    space = Space(TASKS, names, BORDERS, ("first", "second"), np.array([0, 10, 24]), gram, np.eye(2), TASKS)
    return Context(space, GOALS, 7, tasks=TASKS, starts=starts)


@pytest.mark.parametrize(
    ("settings", "segments"),
    [
        (AdaMergingSettings(), 3),
        (AdaMergingSettings(granularity="block"), 2),
        (AdaMergingSettings(granularity="groups", groups=2), 2),
        (AdaMergingSettings(granularity="model"), 1),
    ],
)
def test_settings_make_the_search_they_describe(settings: AdaMergingSettings, segments: int) -> None:
    context = context_of()
    search, population = settings.make(context)
    assert isinstance(search, AdaMerging)
    assert search.settings is settings
    assert (search.tasks, search.goals, search.seed) == (TASKS, GOALS, 7)
    assert population.capacity == settings.archive
    genome = search.ask(1)[0].genome
    assert genome.refined(settings.borders(context.space)).shape == (segments, 2)
    assert (genome.coefficients == 0.3).all()
    assert settings.fineness() == settings.granularity


def test_settings_say_how_many_checks_a_complete_run_takes() -> None:
    settings = AdaMergingSettings(steps=12, check_every=5, restarts=3, archive=4)
    context = context_of()
    search, _ = settings.make(context)
    assert settings.describe(search, context) == "; 3 x 12 steps on 2 tasks, scored 12 times"
    assert settings.describe(None, context) == ""
    assert isinstance(search, AdaMerging)
    assert sum(trial.gradient is None for trial in run(search)) == 12


def test_settings_begin_with_given_merges() -> None:
    starts = (Genome.uniform(24, [0.1, 0.9]), Genome(BORDERS, TARGETS["left"]))
    settings = AdaMergingSettings()
    search, _ = settings.make(context_of(starts=starts))
    begun = [trial.genome for trial in search.ask(100) if trial.gradient is None]
    assert [genome.digest for genome in begun] == [start.digest for start in starts]
    assert settings.begins().most == LINES
    assert not settings.begins().refusal


def test_it_needs_gradients_and_takes_any_losses() -> None:
    needs = AdaMergingSettings().needs()
    assert (needs.gradients, needs.affine, needs.geometry, needs.objectives) == (True, True, False, 1)
    tasks = [calibration(loss, call("m:data"), loss) for loss in ("entropy", "cross_entropy")]
    AdaMergingSettings().check("linear", needs_base=False, tasks=tasks)


class HalvingSettings(GradientSettings):
    """A descent of another package."""

    algorithm: Literal["halving"] = "halving"
    init: float = 0.5
    rate: float = 0.02
    spread: float = 0.1

    def make(self, context: Context) -> Pair:
        search = Halving(self.borders(context.space), 2, context.tasks, context.goals, context.seed, self)
        return search, ElitistArchive(context.goals, self.archive)


class Halving(Descent[HalvingSettings]):
    """Adam moves twice the coefficients."""

    def _point(self, coefficients: Floats) -> Floats:
        return 2.0 * coefficients

    def _used(self, point: Floats) -> Floats:
        return point / 2.0

    def _pulled(self, line: Line, gradient: Floats) -> Floats:
        return gradient / 2.0


def test_a_descent_of_another_package_needs_only_what_adam_moves() -> None:
    settings = HalvingSettings(steps=300, check_every=100)
    search = Halving(BORDERS, 2, ("left",), GOALS, 0, settings)
    assert (search.ask(1)[0].genome.coefficients == 0.5).all()
    search = Halving(BORDERS, 2, ("left",), GOALS, 0, settings)
    for trial in run(search):
        assert trial.genome.sources == 2
    report = search.report()
    assert report["algorithm"] == "halving"
    assert report["lines"][0]["coefficients"] == pytest.approx(TARGETS["left"], abs=0.02)
    with pytest.raises(InputError, match="calibration: halving learns from calibration tasks"):
        Halving(BORDERS, 2, (), GOALS, 0, settings)
