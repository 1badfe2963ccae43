"""AdaMerging through its recipe: stopped, killed, on other workers it is the same; what is told of it; bad recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
import yaml
from processes import ROOT, killed
from safetensors.numpy import save_file

from ecotone.experiments import report
from ecotone.experiments.checks import validate
from ecotone.experiments.examples import digit_questions
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch, resume
from ecotone.experiments.runs import Run
from ecotone.populations.errors import EcotoneError, InputError

STEPS, EVERY, TASKS = 12, 4, 2
CHECKS = 1 + STEPS // EVERY
GRADIENTS = STEPS * TASKS
# An encoder and two tasks with frozen heads. The log has a line a batch whose loss is computed, and at `stop` lines
# the process stops as if by Ctrl-C.
TOYS = """
import signal
import time
import numpy as np
import torch
from torch import nn


def encoder():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh())


def examples(task):
    rng = np.random.default_rng(10 + task)
    inputs = rng.standard_normal((40, 6)).astype(np.float32)
    return inputs, (inputs[:, task] > 0).astype(np.int64)


class Head(nn.Module):
    def __init__(self, task, log, delay, stop):
        super().__init__()
        self.linear = nn.Linear(5, 2)
        weight = np.random.default_rng(20 + task).standard_normal((2, 5))
        self.linear.weight.data = torch.from_numpy(weight.astype(np.float32))
        self.linear.bias.data.zero_()
        self.log, self.delay, self.stop = log, delay, stop

    def forward(self, outputs, inputs):
        time.sleep(self.delay)
        if self.log and torch.is_grad_enabled():
            with open(self.log, "a") as file:
                file.write("x\\n")
            if self.stop and len(open(self.log).readlines()) == self.stop:
                signal.raise_signal(signal.SIGINT)  # as Ctrl-C
        return self.linear(outputs)


def head(task, log="", delay=0.0, stop=0):
    return Head(task, log, delay, stop)


def broken(task):
    return lambda outputs, inputs: outputs.sum(1, keepdim=True).expand(-1, 2) * float("nan")
"""


def toy_recipe(folder: Path, delay: float = 0.0, stop: int = 0, **others: Any) -> Path:
    """Three small encoders and their base; two tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ada_toys.py").write_text(TOYS)
    names = ("base", "left", "middle", "right")
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        tensors = {"0.weight": rng.standard_normal((5, 6)), "0.bias": rng.standard_normal(5)}
        save_file({key: value.astype(np.float32) for key, value in tensors.items()}, folder / f"{name}.safetensors")

    def task(number: int, **arguments: Any) -> dict[str, Any]:
        return {
            "name": f"task {number}",
            "data": {"call": "ada_toys:examples", "arguments": {"task": number}},
            "head": {"call": "ada_toys:head", "arguments": {"task": number, **arguments}},
        }

    record = {
        "name": "toy",
        "models": {
            "base": "base.safetensors",
            "experts": [f"{name}.safetensors" for name in names[1:]],
            "architecture": {"call": "ada_toys:encoder"},
        },
        "merge": {"operator": "task_arithmetic"},
        "calibration": [
            task(number, log=str(folder / "calls"), delay=delay, stop=stop) | {"batch": 8} for number in range(TASKS)
        ],
        "objectives": {
            "search": [task(number) | {"type": "accuracy"} for number in range(TASKS)],
            "held_out": [task(0) | {"type": "entropy"}],
        },
        "search": {"algorithm": "adamerging", "steps": STEPS, "check_every": EVERY, "rate": 0.05},
        "scoring": {"batch": 2, "in_flight": 4},
        "budget": {"evaluations": 50},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
        **others,
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(record))
    return path


Outcome: TypeAlias = tuple[str, str, int, int, str]


def outcome(run: Run) -> Outcome:
    """Its state, why it stopped, its evaluations and gradients, and its digest."""
    status = run.status()
    return tuple(status[key] for key in ("state", "stop_reason", "evaluations", "gradients", "digest"))  # type: ignore[return-value]


def calls(folder: Path) -> int:
    """How many batches have been differentiated."""
    log = folder / "calls"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture(autouse=True)
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toys can be imported in this process, too."""
    (tmp_path / "ada_toys.py").write_text(TOYS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Outcome]:
    """How a run ended that nothing happened to."""
    known: list[Outcome] = []

    def of() -> Outcome:
        if not known:
            folder = tmp_path_factory.mktemp("undisturbed")
            known.append(outcome(launch(Recipe.from_yaml(toy_recipe(folder)), folder / "run")))
        return known[0]

    return of


# -- stopped, killed, resumed, elsewhere ---------------------------------------------------------------------


def test_it_ends_when_its_steps_are_done(undisturbed: Callable[[], Outcome]) -> None:
    assert undisturbed()[:-1] == ("finished", "converged", CHECKS, GRADIENTS)


@pytest.mark.parametrize("stop", [1, 7, GRADIENTS])
def test_stopped_and_resumed_it_is_the_same(stop: int, tmp_path: Path, undisturbed: Callable[[], Outcome]) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        launch(Recipe.from_yaml(toy_recipe(tmp_path, stop=stop)), run)
    assert outcome(resume(run)) == undisturbed()


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_same_at_the_same_price(
    tmp_path: Path, undisturbed: Callable[[], Outcome]
) -> None:
    recipe, run = toy_recipe(tmp_path, delay=0.1), tmp_path / "run"
    killed("run", recipe, "--out", run, when=lambda: calls(tmp_path) >= 11)
    status, before = Run(run).status(), calls(tmp_path)
    assert status["state"] == "killed"
    assert before - status["gradients"] <= 4  # only what was in flight is lost
    assert outcome(resume(run)) == undisturbed()
    assert calls(tmp_path) - before == GRADIENTS - status["gradients"]


@pytest.mark.slow
def test_ray_workers_find_the_same(tmp_path: Path, undisturbed: Callable[[], Outcome]) -> None:
    pytest.importorskip("ray")
    recipe = Recipe.from_yaml(toy_recipe(tmp_path), {"runtime": {"pool": "ray", "workers": 2}})
    assert outcome(launch(recipe, tmp_path / "run", folders=(str(tmp_path),))) == undisturbed()


def test_a_budget_of_evaluations_does_not_count_gradients(tmp_path: Path) -> None:
    run = launch(Recipe.from_yaml(toy_recipe(tmp_path), {"budget.evaluations": 3}), tmp_path / "run")
    state, reason, evaluations, gradients, _ = outcome(run)
    assert (state, reason, evaluations) == ("finished", "evaluations", 3)
    assert GRADIENTS > gradients >= 2 * EVERY * TASKS


# -- what is told of it --------------------------------------------------------------------------------------


def test_front_and_best_are_scored_merges(tmp_path: Path) -> None:
    run = launch(Recipe.from_yaml(toy_recipe(tmp_path)), tmp_path / "run")
    with run.journal() as journal:
        scored = {row.number for row in journal.rows()}
        rows = list(journal.rows(unscored=True))
    assert len(rows) == CHECKS + GRADIENTS
    assert {member.id for member in run.front()} <= scored
    best = run.best()
    assert best is not None
    assert best.id in scored
    assert all(row.scores and set(row.scores) == {row.gradient.task} for row in rows if row.gradient is not None)


def test_the_report_tells_how_each_line_went(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(toy_recipe(tmp_path), {"search.restarts": 2})
    run = launch(recipe, tmp_path / "run")
    found = run.report()
    assert found is not None
    assert [line["steps"] for line in found["lines"]] == [STEPS, STEPS]
    text = report.search_report_text(found, run.goals)
    assert "Lines of gradient descent" in text
    assert "all steps done" in text
    assert report.search_warnings({"warnings": ["look out."]}) == ["Warning: look out."]


def test_a_sweep_of_weightings_makes_a_front(tmp_path: Path) -> None:
    run = launch(Recipe.from_yaml(toy_recipe(tmp_path), {"search.sweep": 3, "search.rate": 0.2}), tmp_path / "run")
    found = run.report()
    assert found is not None
    assert [line["weights"] for line in found["lines"]] == [
        {"task 0": first, "task 1": 2 - first} for first in (0.0, 1.0, 2.0)
    ]
    finals = [np.array(line["coefficients"]) for line in found["lines"]]
    assert not np.allclose(finals[0], finals[2], atol=0.1)


def test_tasks_together_come_to_the_same_merge_with_half_the_trials(tmp_path: Path) -> None:
    found, coefficients = [], []
    for together in (1, 2):
        recipe = Recipe.from_yaml(toy_recipe(tmp_path / str(together)), {"search.together": together})
        run = launch(recipe, tmp_path / str(together) / "run")
        (line,) = (run.report() or {})["lines"]
        coefficients.append(np.array(line["coefficients"]))
        found.append(run.status()["gradients"])
        with run.journal() as journal:
            losses = [row.scores for row in journal.rows(unscored=True) if row.gradient is not None]
        assert all(len(each or {}) == together for each in losses)
    assert found == [GRADIENTS, GRADIENTS // 2]
    np.testing.assert_allclose(coefficients[0], coefficients[1], atol=1e-4)
    assert np.abs(coefficients[0] - 0.3).max() > 0.1


def test_tasks_together_stopped_and_resumed_are_the_same(tmp_path: Path) -> None:
    settings = {"search.together": 2}
    expected = outcome(launch(Recipe.from_yaml(toy_recipe(tmp_path / "whole"), settings), tmp_path / "whole" / "run"))
    recipe = Recipe.from_yaml(toy_recipe(tmp_path, stop=7), settings)  # between the two tasks of a trial
    with pytest.raises(KeyboardInterrupt):
        launch(recipe, tmp_path / "run")
    assert outcome(resume(tmp_path / "run")) == expected


def test_a_loss_that_is_nan_ends_the_line_and_is_told(tmp_path: Path) -> None:
    broken = {"call": "ada_toys:broken", "arguments": {"task": 0}}
    recipe = Recipe.from_yaml(toy_recipe(tmp_path), {"calibration.0.head": broken})
    run = launch(recipe, tmp_path / "run")
    (line,) = (run.report() or {})["lines"]
    assert line["ended"].startswith("failed at step 0, task 'task 0': not finite")
    (warning, *_) = report.search_warnings(run.report() or {})
    assert warning.startswith("Warning: line 0 failed at step 0")
    assert run.status()["last_failure"].startswith("not finite")
    assert run.status()["evaluations"] == 1


def test_when_nothing_can_be_scored_the_run_stops_with_the_cause(tmp_path: Path) -> None:
    broken = {"call": "ada_toys:broken", "arguments": {"task": 0}}
    places = ("calibration.0", "calibration.1", "objectives.search.0", "objectives.search.1")
    settings = {f"{place}.head": broken for place in places}
    with pytest.raises(EcotoneError, match=r"objective 'task 0': expected a finite score, found nan.*tried out"):
        launch(Recipe.from_yaml(toy_recipe(tmp_path), settings), tmp_path / "run")


def test_validate_tells_lines_steps_and_checks(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(toy_recipe(tmp_path), {"search.restarts": 3})
    told = {finding.subject: finding.text for finding in validate(recipe)}
    assert told["search"] == ("adamerging: 6 coefficients (2 x 3 models); 3 x 12 steps on 2 tasks, scored 12 times")
    assert told["calibration.task 0"] == "entropy of ada_toys:examples with ada_toys:head, 8 examples a step"
    assert told["objectives.held_out.task 0"] == "entropy ada_toys:examples with ada_toys:head, minimize"


# -- bad recipes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration": []}, "calibration: adamerging learns on tasks given there, found none"),
        ({"search": {"algorithm": "random"}}, r"calibration: random does not use it .*found \['task 0', 'task 1'\]"),
        ({"calibration.1.name": "task 0"}, "calibration: expected tasks of different names"),
        ({"calibration.0.loss": "entrpy"}, r"calibration\[0\]\.loss: expected one of entropy, .* found 'entrpy'\. Did"),
        ({"calibration.0.batch": 0}, r"calibration\[0\]\.batch"),
        ({"search.rate": 0}, r"search\.adamerging\.rate|search\.rate"),
        ({"search.groups": 2}, "search: groups: expected granularity: groups with it, found granularity: tensor"),
        ({"models.architecture": None}, r"models\.architecture: expected a function .*calibration .*none; .*say auto"),
        ({"merge.density": 1.5, "merge.operator": "ties_vectors"}, r"merge\.density"),
        ({"objectives.search.0.type": "entropy", "objectives.search.0.direction": "maximize"}, "direction"),
    ],
)
def test_recipes_that_do_not_fit(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.from_yaml(toy_recipe(tmp_path), settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search.weights": {"task 3": 1.0}, "search.granularity": "model"}, "there is no calibration task 'task 3'"),
        ({"search.sweep": 4, "search.weights": {"task 0": 1.0}, "search.granularity": "model"}, "weights or sweep"),
        ({"merge.density": 0.5}, "density"),
        ({"calibration.0.head": {"call": "ada_toys:nothing"}}, "nothing"),
    ],
)
def test_what_is_refused_before_anything_is_scored(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        launch(Recipe.from_yaml(toy_recipe(tmp_path), settings), tmp_path / "run")
    assert not (tmp_path / "run" / "journal.sqlite").exists()


# -- the ready recipe ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"search.granularity": "model"}, {"merge.operator": "ties_vectors"}])
def test_the_digits_recipe(changes: dict[str, Any], tmp_path: Path) -> None:
    few = {"search.steps": 20, "search.check_every": 10, "search.rate": 0.01, "tracking.mlflow": False, **changes}
    recipe = Recipe.from_yaml(ROOT / "experiments" / "recipes" / "digits-adamerging.yaml", few)
    run = launch(recipe, tmp_path / "run")
    found = run.report()
    assert found is not None
    (line,) = found["lines"]
    first, last = (sum(check["losses"].values()) for check in (line["checks"][0], line["checks"][-1]))
    assert last < first  # the entropy falls
    assert all(member.held_out is not None for member in run.front())
    json.dumps(found)


def test_a_question_has_its_answers() -> None:
    images, answers = digit_questions.answered("remainder", "test")
    _, digits = digit_questions.shuffled("test")
    assert images.shape == (len(digits), 64)
    assert answers.tolist() == (digits % 3).tolist()
    assert digit_questions.answered("odd", "test")[1].tolist() == (digits % 2).tolist()
    assert (
        digit_questions.answered("enclosed", "test")[1].tolist() == np.isin(digits, (0, 6, 8, 9)).astype(int).tolist()
    )
    with pytest.raises(InputError, match=r"question: expected one of odd, .*found 'even'"):
        digit_questions.answered("even", "test")  # type: ignore[arg-type]


def test_a_head_is_the_linear_map_it_was_fitted_as(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((3, 64)).astype(np.float32), rng.standard_normal(3).astype(np.float32)
    save_file({"odd.weight": weight, "odd.bias": bias}, tmp_path / "heads.safetensors")
    features = rng.standard_normal((5, 64)).astype(np.float32)
    logits = digit_questions.head(str(tmp_path / "heads.safetensors"), "odd")(torch.from_numpy(features), None)
    assert logits.detach().numpy() == pytest.approx(features @ weight.T + bias, abs=1e-5)
