"""Functions that say which way is better, and recipes in Python that name functions."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_cli import toy_recipe

import ecotone
from ecotone.experiments.checks import validate
from ecotone.fitness.callables import resolve
from ecotone.populations.errors import InputError

METRICS = """
import numpy as np
from ecotone import objective


@objective(direction="minimize")
def loss(model, part=0):
    return float(sum((np.asarray(t) ** 2).sum() for t in model.values())) + part


@objective
def score(model):
    return -loss(model)


def unmarked(model):
    return 1.0 / (1.0 + loss(model))
"""


def recipe_of(folder: Path, **objective: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.py").write_text(METRICS)
    search = [{"name": "one", "type": "call", **objective}]
    return toy_recipe(folder, objectives={"search": search}, search={"algorithm": "random"}, budget={"evaluations": 3})


@pytest.mark.parametrize(
    ("function", "said", "recipe"), [("loss", "minimize", "maximize"), ("score", "maximize", "minimize")]
)
def test_a_direction_that_the_function_contradicts_is_refused(
    tmp_path: Path, function: str, said: str, recipe: str
) -> None:
    call = {"call": f"./metrics.py:{function}"}
    for direction in ({"direction": recipe}, {} if recipe == "maximize" else {"direction": recipe}):
        chosen = ecotone.Recipe.from_yaml(recipe_of(tmp_path, **call, **direction))
        for act in (validate, lambda chosen: ecotone.launch(chosen, tmp_path / "run")):
            with pytest.raises(InputError) as refused:
                act(chosen)
            assert f"objective 'one': direction: expected {said}, as " in refused.value.message
            assert refused.value.remedy == f"Say direction: {said} in the recipe."
    assert not (tmp_path / "run" / "journal.sqlite").exists()


def test_the_right_direction_and_unmarked_functions_run(tmp_path: Path) -> None:
    for index, (function, direction) in enumerate(
        (("loss", "minimize"), ("score", "maximize"), ("unmarked", "maximize"), ("unmarked", "minimize"))
    ):
        recipe = recipe_of(tmp_path, call=f"./metrics.py:{function}", direction=direction)
        run = ecotone.launch(ecotone.Recipe.from_yaml(recipe), tmp_path / str(index))
        assert run.status()["failures"] == 0


def test_a_recipe_in_python_names_a_function_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "marked_metrics.py").write_text(METRICS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import marked_metrics  # type: ignore[import-not-found]

    part = ecotone.as_objective(marked_metrics.loss, part=2)
    assert part == {
        "name": "loss",
        "type": "call",
        "direction": "minimize",
        "call": "marked_metrics:loss",
        "arguments": {"part": 2},
    }
    assert ecotone.as_objective(marked_metrics.unmarked, "mine")["direction"] == "maximize"


SCRIPT = (
    METRICS
    + """
if __name__ == "__main__":
    from ecotone import Recipe, as_objective, launch

    record = {
        "name": "script",
        "models": {"experts": [FOLDER + "/left.safetensors", FOLDER + "/right.safetensors"]},
        "objectives": {"search": [as_objective(loss, part=1)]},
        "search": {"algorithm": "random", "granularity": "model"},
        "budget": {"evaluations": 3},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
    }
    run = launch(Recipe.from_record(record), FOLDER + "/run")
    print(run.status()["failures"], run.goals)
"""
)


def test_a_script_names_its_own_functions_by_its_file(tmp_path: Path) -> None:
    toy_recipe(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(f"FOLDER = {str(tmp_path)!r}\n{SCRIPT}")
    done = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0 (Goal(name='loss', direction='minimize'),)"


def test_functions_that_workers_cannot_import_are_refused() -> None:
    with pytest.raises(InputError, match=r"expected a function that workers can import, found .*<lambda>"):
        ecotone.as_objective(lambda model: 0.0)
    with pytest.raises(InputError, match="direction: expected maximize or minimize, found 'up'"):
        ecotone.objective(direction="up")  # type: ignore[call-overload]


class Scorer:
    def __call__(self, model: Any) -> float:
        return 0.0

    def method(self, model: Any) -> float:
        return 0.0

    @classmethod
    def of_class(cls, model: Any) -> float:
        return 0.0


class Inheritor(Scorer):
    pass


@functools.cache
def cached(model: Any) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("found", "described", "remedy"),
    [
        (functools.partial(cached, 1), "a functools.partial", "Wrap it in a def"),
        (functools.update_wrapper(functools.partial(cached, 1), cached), "a functools.partial", "Wrap it in a def"),
        (Scorer(), "an object of type 'Scorer'", "Wrap it in a def"),
        (len, "the builtin 'len'", "Wrap it in a def"),
        (str.lower, "an object of type 'method_descriptor'", "Wrap it in a def"),
        (Scorer().method, "the bound method 'Scorer.method'", "Wrap it in a def"),
        (Inheritor.of_class, "the bound method 'Scorer.of_class'", "Wrap it in a def"),
        (Scorer, "the class 'Scorer'", "Wrap it in a def"),
        (staticmethod(cached), "an object of type 'staticmethod'", "Put @objective below @staticmethod."),
        ("minimize", "'minimize'", '@objective(direction="minimize")'),
        ("maximize", "'maximize'", '@objective(direction="maximize")'),
        (3, "3", "Wrap it in a def"),
    ],
)
def test_what_is_no_function_of_a_module_is_refused_in_words(found: Any, described: str, remedy: str) -> None:
    for act in (ecotone.objective, ecotone.as_objective):
        with pytest.raises(InputError) as refused:
            act(found)
        expected = "expected a function at the top level of a module or a script"
        assert refused.value.message == f"objective: {expected}, found {described}."
        assert remedy in refused.value.remedy


def test_what_stands_under_its_name_in_a_module_may_be_named() -> None:
    assert ecotone.as_objective(ecotone.objective(cached, direction="minimize"))["direction"] == "minimize"
    for function in (cached, Scorer.of_class):
        assert resolve(ecotone.as_objective(function)["call"]) == function


def test_a_function_of_a_calls_file_is_named_by_the_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.py"
    file.write_text(f"{METRICS}\nfrom ecotone import as_objective\ndef part(): return as_objective(loss)\n")
    assert resolve(f"{file}:part")()["call"] == f"{file.resolve()}:loss"


def test_a_function_may_have_arguments_of_any_name() -> None:
    part = ecotone.as_objective(cached, "mine", function=3, name="a")
    assert (part["name"], part["arguments"]) == ("mine", {"function": 3, "name": "a"})
