"""Searches for a front through their recipes: stopped, killed and resumed they are the same; bad recipes in words."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from experiments.recipe import Recipe
from experiments.running import launch, resume
from experiments.runs import Run

ROOT = Path(__file__).parent.parent
EVALUATIONS = 36
# Two accuracies that no merge of the models has both of. The log has a line a candidate; at `stop` lines the process
# stops as if by Ctrl-C.
TOYS = """
import math, os, time
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
            raise KeyboardInterrupt
    return float(answers.mean()), answers


def constant(model):
    return 0.5
"""
SEARCHES: dict[str, dict[str, Any]] = {
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
    """Three small models and two objectives; the search is one of ``SEARCHES``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "map_toys.py").write_text(TOYS)
    names = ("left", "middle", "right")
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        tensors = {"w": rng.standard_normal((8, 3)).astype(np.float32), "b": rng.standard_normal(3).astype(np.float32)}
        save_file(tensors, folder / f"{name}.safetensors")

    def objectives(**arguments: Any) -> list[dict[str, Any]]:
        one = {"type": "call", "call": "map_toys:right"}
        return [one | {"name": f"task {task}", "arguments": {"task": task, **arguments}} for task in (0, 1)]

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


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The command line in a process of its own; gone at the end whatever happens."""
    program = [sys.executable, "-m", "experiments.cli", *map(str, arguments)]
    process = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"it ended early: {process.communicate()[1]}")
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.002)


def digest(run: Path) -> str:
    return str(Run(run).status()["digest"])


@pytest.fixture(autouse=True)
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toys can be imported in this process, too."""
    (tmp_path / "map_toys.py").write_text(TOYS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The digest of a search that nothing happened to."""
    known: dict[str, str] = {}

    def of(kind: str) -> str:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            known[kind] = digest(launch(Recipe.from_yaml(toy_recipe(folder, kind)), folder / "run").directory)
        return known[kind]

    return of


# -- stopped, killed, resumed --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SEARCHES)
def test_stopped_and_resumed_it_is_the_same_search(
    kind: str, tmp_path: Path, undisturbed: Callable[[str], str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        launch(Recipe.from_yaml(toy_recipe(tmp_path, kind, stop=23)), run)
    paid = Run(run).status()["evaluations"]
    assert 0 < paid < EVALUATIONS
    finished = resume(run).status()
    assert (finished["state"], finished["evaluations"]) == ("finished", EVALUATIONS)
    assert finished["digest"] == undisturbed(kind)


QUICK = ("nsga2",)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in SEARCHES])
def test_killed_and_resumed_it_is_the_same_search_at_the_same_price(
    kind: str, tmp_path: Path, undisturbed: Callable[[str], str]
) -> None:
    recipe, run = toy_recipe(tmp_path, kind, delay=0.05), tmp_path / "run"
    with started("run", recipe, "--out", run) as process:
        wait_until(lambda: calls(tmp_path) >= 21, process)
        process.kill()
        process.wait()
    status, before = Run(run).status(), calls(tmp_path)
    assert status["state"] == "killed"
    assert before - status["evaluations"] <= 8  # only what was in flight is lost
    finished = resume(run).status()
    assert (finished["state"], finished["digest"]) == ("finished", undisturbed(kind))
    references = 4  # the models and their average, for the closing table
    assert calls(tmp_path) - before <= EVALUATIONS - status["evaluations"] + references


def test_the_seed_matters(tmp_path: Path, undisturbed: Callable[[str], str]) -> None:
    recipe = Recipe.from_yaml(toy_recipe(tmp_path, "nsga2"), {"seed": 1})
    assert digest(launch(recipe, tmp_path / "run").directory) != undisturbed("nsga2")
