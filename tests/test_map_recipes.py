"""Searches for a front through their recipes: stopped, killed and resumed they are the same; bad recipes in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import yaml
from processes import ROOT, killed
from safetensors.numpy import save_file

from ecotone.experiments.checks import validate
from ecotone.experiments.compose import check_search
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch, resume
from ecotone.experiments.runs import Run
from ecotone.populations import facts
from ecotone.populations.errors import EcotoneError, InputError

EVALUATIONS = 36
# Accuracies that no merge of the models has all of. The log has a line a candidate; at `stop` lines the process
# stops as if by Ctrl-C.
TOYS = """
import math, os, signal, time
import numpy as np

PROBES = np.random.default_rng(1).standard_normal((200, 27)) / 5


def right(model, task, log="", delay=0.0, stop=0):
    vector = np.concatenate([tensor.numpy().ravel() for tensor in model.values()]).astype(np.float64)
    answers = PROBES[task::2] @ vector > 0.1 + 0.2 * task
    time.sleep(delay)
    if log and task == 0:
        with open(log, "a") as file:
            file.write("x\\n")
        if stop and len(open(log).readlines()) == stop:
            signal.raise_signal(signal.SIGINT)  # as Ctrl-C
    return float(answers.mean()), answers


def constant(model):
    return 0.5
"""
SEARCHES: dict[str, dict[str, Any]] = {
    "map": {},
    "bayesian_map": {},
    "bayesian_map-bins": {"acquisition": "bins"},
    "nested_map": {},
    "nsga2": {"population": 8},
    "nsga3": {"population": 8},
    "optuna-tpe": {"sampler": "tpe"},
    "optuna-gp": {"sampler": "gp"},
    "optuna-nsga2": {"sampler": "nsga2", "population": 8},
    "optuna-nsga3": {"sampler": "nsga3", "population": 8},
    "optuna-cma_es": {"sampler": "cma_es"},
    "optuna-random": {"sampler": "random"},
    "optuna-qmc": {"sampler": "qmc"},
}


def toy_recipe(folder: Path, kind: str, delay: float = 0.0, stop: int = 0, **others: Any) -> Path:
    """Three small models and two objectives (for nested MAP three); the search is one of ``SEARCHES``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "map_toys.py").write_text(TOYS)
    names = ("left", "middle", "right")
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        tensors = {"w": rng.standard_normal((8, 3)).astype(np.float32), "b": rng.standard_normal(3).astype(np.float32)}
        save_file(tensors, folder / f"{name}.safetensors")

    def objectives(**arguments: Any) -> list[dict[str, Any]]:
        one = {"type": "call", "call": "map_toys:right"}
        tasks = range(3 if kind == "nested_map" else 2)
        return [one | {"name": f"task {task}", "arguments": {"task": task, **arguments}} for task in tasks]

    record = {
        "name": "toy",
        "models": {"experts": [f"{name}.safetensors" for name in names]},
        "objectives": {
            "search": objectives(log=str(folder / "calls"), delay=delay, stop=stop),
            "held_out": objectives(),
        },
        "search": {"algorithm": kind.split("-")[0], **SEARCHES[kind]},
        "scoring": {"batch": 4, "in_flight": 8},
        "budget": {"evaluations": EVALUATIONS},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
        **others,
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(record))
    return path


def calls(folder: Path) -> int:
    """How many candidates have been paid for."""
    log = folder / "calls"
    return len(log.read_text().splitlines()) if log.exists() else 0


Outcome: TypeAlias = tuple[str, str, int, str]


def outcome(run: Run) -> Outcome:
    """Its state, why it stopped, its evaluations and its digest."""
    status = run.status()
    return status["state"], status["stop_reason"], status["evaluations"], status["digest"]


@pytest.fixture(autouse=True)
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toys can be imported in this process, too."""
    (tmp_path / "map_toys.py").write_text(TOYS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """How a search ended that nothing happened to."""
    known: dict[str, Outcome] = {}

    def of(kind: str) -> Outcome:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            known[kind] = outcome(launch(Recipe.from_yaml(toy_recipe(folder, kind)), folder / "run"))
        return known[kind]

    return of


LONG = ("optuna-gp",)


# -- stopped, killed, resumed --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k in LONG else []) for k in SEARCHES])
def test_stopped_and_resumed_it_is_the_same_search(
    kind: str, tmp_path: Path, undisturbed: Callable[[str], Outcome]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        launch(Recipe.from_yaml(toy_recipe(tmp_path, kind, stop=23)), run)
    paid = Run(run).status()["evaluations"]
    assert 0 < paid < EVALUATIONS
    assert outcome(resume(run)) == undisturbed(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEARCHES)
def test_killed_and_resumed_it_is_the_same_search_at_the_same_price(
    kind: str, tmp_path: Path, undisturbed: Callable[[str], Outcome]
) -> None:
    recipe, run = toy_recipe(tmp_path, kind, delay=0.05), tmp_path / "run"
    killed("run", recipe, "--out", run, when=lambda: calls(tmp_path) >= 21)
    status, before = Run(run).status(), calls(tmp_path)
    assert status["state"] == "killed"
    assert before - status["evaluations"] <= 8  # only what was in flight is lost
    assert outcome(resume(run)) == undisturbed(kind)
    assert undisturbed(kind)[0] == "finished"
    references = 4  # the models and their average, for the closing table
    assert calls(tmp_path) - before <= EVALUATIONS - status["evaluations"] + references


def test_the_seed_matters(tmp_path: Path, undisturbed: Callable[[str], Outcome]) -> None:
    recipe = Recipe.from_yaml(toy_recipe(tmp_path, "nsga2"), {"seed": 1})
    assert outcome(launch(recipe, tmp_path / "run"))[-1] != undisturbed("nsga2")[-1]


# -- what a search says of itself, and of what it cannot use -------------------------------------------------


def test_map_reports_the_front_as_predicted_and_as_measured(tmp_path: Path) -> None:
    run = launch(Recipe.from_yaml(toy_recipe(tmp_path, "map")), tmp_path / "run")
    with run.journal() as journal:
        report = journal.fact(facts.REPORT)
        scores = {row.number: journal.trial(row.number) for row in journal.rows()}
    assert report["design"] == list(range(20))  # twice the ten coefficients of a quadratic in three variables
    assert [member["number"] for member in report["members"]] == list(range(20, EVALUATIONS))
    assert set(scores) == set(range(EVALUATIONS))
    for name in ("task 0", "task 1"):
        assert abs(report["gap"][name]["mean"]) < 0.1


@pytest.mark.parametrize("algorithm", ["map", "bayesian_map", "nested_map"])
def test_an_objective_that_is_the_same_everywhere(algorithm: str, tmp_path: Path) -> None:
    path = toy_recipe(tmp_path, algorithm)
    constant = {"name": "task 1", "type": "call", "call": "map_toys:constant"}
    recipe = Recipe.from_yaml(path, {"objectives.search.1": constant})
    with pytest.raises(EcotoneError, match="task 1: expected scores that differ between merges"):
        launch(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "journal.sqlite").exists()  # none of the budget is spent


def test_a_budget_that_the_samples_use_up_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(toy_recipe(tmp_path, "map"), {"budget.evaluations": 20})
    with pytest.raises(InputError, match="expected more than the 20 samples"):
        launch(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert calls(tmp_path) == 0


def test_validate_tells_the_coefficients_and_samples(tmp_path: Path) -> None:
    def told(kind: str = "map", **search: Any) -> str:
        recipe = Recipe.from_yaml(toy_recipe(tmp_path, kind), {"search": search} if search else {})
        return {finding.subject: finding.text for finding in validate(recipe)}["search"]

    samples = "samples before it proposes anything"
    assert told(algorithm="map") == f"map: 3 coefficients (1 x 3 models), each from 0 to 1; 20 {samples}"
    tensors = {"granularity": "tensor", "high": 1.5, "samples": 30}
    assert told(algorithm="map", **tensors) == f"map: 6 coefficients (2 x 3 models), each from 0 to 1.5; 30 {samples}"
    assert told(algorithm="bayesian_map").endswith(f"each from 0 to 1; 8 {samples}")
    assert told("nested_map").endswith("each from 0 to 1; 2 pairs of 12 samples and 4 members of a front")
    assert told(algorithm="nsga2") == "nsga2: 3 coefficients (1 x 3 models), each from 0 to 1"


@pytest.mark.slow
def test_map_with_a_larger_budget_goes_on_where_it_ended(tmp_path: Path, undisturbed: Callable[[str], Outcome]) -> None:
    launch(Recipe.from_yaml(toy_recipe(tmp_path, "map"), {"budget.evaluations": 28}), tmp_path / "run")
    assert outcome(resume(tmp_path / "run", {"budget.evaluations": EVALUATIONS})) == undisturbed("map")


def test_nested_map_shows_its_tree(tmp_path: Path) -> None:
    run = launch(Recipe.from_yaml(toy_recipe(tmp_path, "nested_map")), tmp_path / "run")
    with run.journal() as journal:
        (root,) = journal.fact(facts.REPORT)["tree"]
        scores = journal.trial(root["number"])
    assert sorted(root["models"]) == ["left", "middle", "right"]
    assert list(root["coefficients"].values()) == pytest.approx(scores.genome.coefficients[0])
    assert sorted(len(child["models"]) for child in root["children"]) == [1, 2]


@pytest.mark.parametrize("name", ["digits-groups-map", "digits-four-groups-map", "text-map"])
@pytest.mark.parametrize("algorithm", ["map", "bayesian_map", "nested_map", "nsga2", "nsga3", "optuna", "random"])
def test_ready_recipes_take_any_search_for_a_front(name: str, algorithm: str) -> None:
    """Only the name of the algorithm has to be changed to compare them on the same coefficients."""
    recipe = Recipe.from_yaml(ROOT / "experiments" / "recipes" / f"{name}.yaml", {"search.algorithm": algorithm})
    (checked,) = check_search(recipe)
    assert checked.coefficients == (1, len(recipe.models.experts))
    assert (checked.settings.low, checked.settings.high) == (0.0, 1.5)  # type: ignore[attr-defined]
