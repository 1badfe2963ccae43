"""Functions that recipes name: files beside the recipe, the order of the Python path, and names of former versions."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from processes import Ecotone
from safetensors.numpy import save_file

from ecotone import Recipe, launch
from ecotone.experiments import preparation
from ecotone.experiments.running import _moved
from ecotone.fitness import former_names
from ecotone.fitness.callables import put_last, resolve
from ecotone.fitness.former_names import present_name
from ecotone.populations.errors import InputError

METRICS = """
from dataclasses import dataclass

import counting

counting.loaded.append(__name__)


@dataclass
class Weights:
    total: float


class Scores:
    @staticmethod
    def mean(model):
        return float(model["w"].mean())


def total(model, times=1.0):
    return Weights(times * float(model["w"].sum())).total


number = 3
"""


@pytest.fixture(autouse=True)
def path() -> Iterator[None]:
    """The Python path, and the modules loaded from files, stay as they were."""
    before, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = before
    for name in sys.modules.keys() - modules:
        if name.startswith("_ecotone_file_") or name in ("counting", "tabulate"):
            del sys.modules[name]
    former_names.tell.cache_clear()


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    (tmp_path / "counting.py").write_text("loaded = []\n")
    file = tmp_path / "metrics.py"
    file.write_text(METRICS)
    return file


def weights(value: float) -> Any:
    return {"w": np.full(2, value, np.float32)}


# -- files ---------------------------------------------------------------------------------------------------


def test_a_function_of_a_file(metrics: Path) -> None:
    assert resolve(f"{metrics}:total")(weights(2.0), times=3.0) == 12.0
    assert resolve(f"{metrics}:Scores.mean")(weights(2.0)) == 2.0


def test_a_file_is_loaded_once_however_it_is_spelled(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(metrics.parent)
    (metrics.parent / "deep").mkdir()
    spellings = (metrics, "metrics.py", "./metrics.py", "deep/../metrics.py")
    functions = {resolve(f"{spelling}:total") for spelling in spellings}
    assert len(functions) == 1
    (function,) = functions
    import counting  # type: ignore[import-not-found, unused-ignore]

    assert counting.loaded == [function.__module__]
    assert inspect.getmodule(function) is sys.modules[function.__module__]


def test_a_files_name_clashes_with_nothing(tmp_path: Path) -> None:
    """Files that are called as modules are, ours and others', and as one another."""
    for folder, value in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "json.py").write_text(f"def value(): return {value}\n")
    (tmp_path / "search.py").write_text("import json\ndef value(): return json.loads('3')\n")
    found = [resolve(f"{tmp_path / name}:value")() for name in ("one/json.py", "two/json.py", "search.py")]
    assert found == [1, 2, 3]
    assert "search" not in sys.modules


@pytest.mark.parametrize(
    ("text", "call", "expected"),
    [
        ("def score(): ...", "metric.py:score", ["no such file", "metric.py", "Did you mean 'metrics.py'?"]),
        ("def score(): ...", "metrics.py:scor", ["has no 'scor'", "Did you mean 'score'?"]),
        ("number = 3", "metrics.py:number", ["expected a function", "found int"]),
        ("number = 3", "metrics.py:score", ["has no 'score'", "metrics.py, and has no functions"]),
        ("def score(): ...", "metrics.py:", ["expected 'package.module:function' or './file.py:function'"]),
        ("\n\nraise KeyError('a')", "metrics.py:score", ["metrics.py, line 3", "raised KeyError: 'a'"]),
        ("def f():\n  return 1/0\nf()", "metrics.py:score", ["metrics.py, line 2", "raised ZeroDivisionError"]),
        ("a = 1\nb = (", "metrics.py:score", ["metrics.py, line 2", "raised SyntaxError"]),
        ("\nimport not_there", "metrics.py:score", ["metrics.py, line 2", "needs the module 'not_there'"]),
        ("import sys\nsys.exit(2)", "metrics.py:score", ["metrics.py, line 2", "raised SystemExit"]),
    ],
)
def test_what_cannot_be_called_is_said_in_words(tmp_path: Path, text: str, call: str, expected: list[str]) -> None:
    (tmp_path / "metrics.py").write_text(text)
    with pytest.raises(InputError) as caught:
        resolve(f"{tmp_path}/{call}", "objectives.search.a: call")
    for part in ("objectives.search.a: call: ", *expected):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ("./metrics:score", "'./metrics'"),
        ("../metrics.txt:score", "'../metrics.txt'"),
        ("folder/metrics:score", "'folder/metrics'"),
        ("~/metrics:score", "'~/metrics'"),
        ("./metrics.py:score:x", "'score:x' after './metrics.py'"),
        ("metrics.py:score:x", "'score:x' after 'metrics.py'"),
    ],
)
def test_a_file_that_is_written_wrongly_is_said_in_words(call: str, found: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(call, "here")
    assert caught.value.message == f"here: expected 'package.module:function' or './file.py:function', found {call!r}."
    assert caught.value.remedy.endswith(
        f"A file's name ends in .py, and one function follows after a colon: found {found}."
    )


def test_a_file_that_raised_is_loaded_anew_once_it_is_mended(tmp_path: Path) -> None:
    file = tmp_path / "metrics.py"
    file.write_text("raise ValueError")
    with pytest.raises(InputError, match="raised ValueError"):
        resolve(f"{file}:score")
    file.write_text("def score(): return 4.0\n# mended")
    assert resolve(f"{file}:score")() == 4.0


# -- recipes -------------------------------------------------------------------------------------------------


def recipe_in(folder: Path, **others: Any) -> Path:
    """A recipe with two models and objectives of the file ``metrics.py``, beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "counting.py").write_text("loaded = []\n")
    (folder / "metrics.py").write_text(METRICS)
    for value, name in ((1.0, "left"), (2.0, "right")):
        save_file(weights(value), folder / f"{name}.safetensors")
    objective = {"name": "total", "type": "call", "call": "./metrics.py:total"}
    record = {
        "name": "files",
        "models": {"experts": ["left.safetensors", "right.safetensors"]},
        "objectives": {"search": [objective], "held_out": [{**objective, "call": "metrics.py:Scores.mean"}]},
        "search": {"algorithm": "random"},
        "budget": {"evaluations": 16},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
        **others,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(record))
    return path


def test_every_function_of_a_recipe_may_be_one_of_a_file(tmp_path: Path) -> None:
    def named(name: str) -> dict[str, Any]:
        return {"call": f"./m.py:{name}", "arguments": {"call": "./stays.py:so"}}

    classifier = {"name": "a", "type": "accuracy", "data": named("data"), "head": named("head")}
    path = recipe_in(
        tmp_path,
        prepare=named("prepare"),
        models={"experts": ["prepared:a.safetensors", "b.safetensors"], "architecture": named("net")},
        objectives={"search": [classifier], "held_out": [{"name": "b", "type": "call", "call": "../n.py:f"}]},
        calibration=[{"name": "c", "data": named("batches"), "head": named("head")}],
        search={"algorithm": "adamerging"},
        merge={"operator": "linear"},
    )
    recipe = Recipe.from_yaml(path)
    calls = str(recipe.record())
    assert calls.count(f"'{tmp_path}/m.py:") == 6
    assert f"'{tmp_path}/../n.py:f'" in calls
    assert calls.count("'./stays.py:so'") == 6
    assert Recipe.from_record(recipe.record()).record() == recipe.record()


def test_a_recipe_without_a_folder_names_files_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = yaml.safe_load(recipe_in(tmp_path).read_text())
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "metrics.py") in str(Recipe.from_record(record).record())


def test_a_recipe_with_files_runs_is_exported_verified_and_resumed_elsewhere(
    tmp_path: Path, ecotone: Ecotone, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_in(tmp_path / "mine")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    commands: list[list[object]] = [
        ["validate", path],
        ["run", path, "--out", tmp_path / "run"],
        ["export", tmp_path / "run", "--to", tmp_path / "merged"],
        ["verify", tmp_path / "merged"],
        ["resume", tmp_path / "run", "--set", "budget.evaluations=20"],
    ]
    for command in commands:
        said = ecotone(*command)
        assert said.code == 0, said.err


def test_a_preparation_in_a_file_runs_again_after_an_edit_and_not_after_a_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of a cluster lies in another folder each time it is resumed; what it prepared is taken as it is."""

    def folder_of(place: str, text: str) -> Path:
        step = {"call": "./metrics.py:write", "arguments": {}}
        path = recipe_in(tmp_path / place, prepare=step)
        (path.parent / "metrics.py").write_text(f"{METRICS}\ndef write(directory): {text}\n")
        found = preparation.prepared_folder(Recipe.from_yaml(path))
        assert found is not None
        return found

    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    first = folder_of("one", "...")
    assert folder_of("two", "...") == first
    assert folder_of("three", "return 1") != first


def test_a_file_is_found_where_a_job_was_unpacked() -> None:
    recorded = {"call": "/old/place/metrics.py:score", "head": ["/old/placed/m.py:f", "package.module:f"]}
    assert _moved(recorded, "/old/place", "/new") == {
        "call": "/new/metrics.py:score",
        "head": ["/old/placed/m.py:f", "package.module:f"],
    }


# -- the Python path -----------------------------------------------------------------------------------------


def test_folders_come_last_wherever_they_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    monkeypatch.setattr(sys, "path", ["", two, "/usr/lib/python3", f"{one}/", "/site-packages"])
    put_last([one, two, str(tmp_path), one])
    assert sys.path == ["/usr/lib/python3", "/site-packages", one, two, str(tmp_path)]
    put_last([one])
    assert sys.path == ["/usr/lib/python3", "/site-packages", two, str(tmp_path), one]


SHADOWING = """
import tabulate, shadowing_toys.mine

from ecotone.search.protocol import Search


def installed(model):
    return float("site-packages" in tabulate.__file__)


def own(model):
    return shadowing_toys.mine.three()
"""


@pytest.fixture
def shadowing(tmp_path: Path) -> Path:
    """A recipe beside modules that are called as installed ones are."""
    pytest.importorskip("tabulate")
    sys.modules.pop("tabulate", None)
    (tmp_path / "shadowing_toys").mkdir()
    for name, text in {
        "tabulate.py": "raise ImportError('the user has this module for something else')",
        "numpy.py": "raise ImportError('which a worker imports before it has a path of its own')",
        "fitness.py": SHADOWING,
        "shadowing_toys/mine.py": "def three(): return 3.0",
    }.items():
        (tmp_path / name).write_text(text)
    objectives = [{"name": name, "type": "call", "call": f"./fitness.py:{name}"} for name in ("installed", "own")]
    return recipe_in(tmp_path, objectives={"search": objectives}, budget={"evaluations": 4})


@pytest.mark.parametrize("pool", ["serial", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_users_modules_hide_no_installed_package(
    shadowing: Path, pool: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Neither in the manager nor in a worker process, to whose path Ray adds the manager's working directory."""
    if pool == "ray":
        pytest.importorskip("ray")
    monkeypatch.chdir(shadowing.parent)
    sys.path.insert(0, "")
    recipe = Recipe.from_yaml(shadowing, {"runtime.pool": pool})
    run = launch(recipe, tmp_path_factory.mktemp("shadowing") / "run")
    assert run.status()["failures"] == 0
    best = run.best()
    assert best is not None
    assert best.scores == {"installed": 1.0, "own": 3.0}


@pytest.mark.slow
def test_a_users_module_may_be_called_as_a_folder_of_ours(tmp_path: Path) -> None:
    """Ray puts the folder that this package is in, here the checkout, at the front of a worker's path."""
    pytest.importorskip("ray")
    (tmp_path / "search.py").write_text("def score(model): return 5.0")
    objectives = {"search": [{"name": "mine", "type": "call", "call": "search:score"}]}
    recipe = recipe_in(tmp_path, objectives=objectives, budget={"evaluations": 4})
    program = [Path(sys.executable).with_name("ecotone"), "run", recipe, "--set", "runtime.pool=ray", "--out", "run"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


# -- names of former versions --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", former_names._MOVED)
def test_former_names_of_ready_data_lead_to_todays(name: str) -> None:
    assert present_name(name) == former_names._MOVED[name]


def test_other_former_names_lead_into_ecotone() -> None:
    assert present_name("fitness.callables") == "ecotone.fitness.callables"
    assert present_name("search.m2n2") == "ecotone.search.m2n2"
    assert present_name("populations") == "ecotone.populations"
    assert present_name("experiments.surely_not_there") is None
    assert present_name("search.m2n2.deeper") is None
    assert present_name("numpy") is None


def test_a_former_name_works_with_one_note(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ecotone"):
        functions = {resolve("experiments.digits:mlp"), resolve("experiments.digits:mlp")}
    assert functions == {resolve("ecotone.experiments.examples.digits:mlp")}
    (note,) = [record.getMessage() for record in caplog.records]
    for part in ("experiments.digits", "ecotone.experiments.examples.digits", former_names.ENDS):
        assert part in note


def test_a_users_own_module_of_that_name_wins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("experiments.digits", "experiments"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").touch()
    (tmp_path / "experiments" / "digits.py").write_text("def mlp(): return 'mine'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert resolve("experiments.digits:mlp")() == "mine"
    finally:
        for name in ("experiments.digits", "experiments"):
            sys.modules.pop(name, None)
    assert not caplog.records


def test_a_wrong_name_of_a_former_folder_is_refused() -> None:
    with pytest.raises(InputError, match=r"data: no module named 'experiments"):
        resolve("experiments.digitz:mlp", "data")
    with pytest.raises(InputError, match=r"has no 'mpl'.*Did you mean 'mlp'"):
        resolve("experiments.digits:mpl", "data")
