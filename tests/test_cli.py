"""The command line as a user meets it: shapes of its JSON, exit codes, and words instead of tracebacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from processes import Ecotone, Said
from safetensors.numpy import load_file, save_file

from ecotone.experiments import cli
from ecotone.experiments.runs import Run
from ecotone.extras import how_to_install
from ecotone.populations.errors import InputError

# Two small models and objectives over them; the recipe's own module, beside it.
TOYS = '''
import math
import numpy as np
import torch

PROBES = np.random.default_rng(0).standard_normal((40, 27))


def flat(model):
    return np.concatenate([tensor.numpy().ravel() for tensor in model.values()]).astype(np.float64)


def right(model, part=0, mode="fine"):
    """Per-example bools of one half of the probes; ``mode`` breaks all candidates or every third."""
    vector = flat(model)
    often = int(abs(vector.sum()) * 1e4) % 3 == 0
    if mode == "raise all" or (mode == "raise some" and often):
        raise ValueError("bad label 7")
    if mode == "nan all" or (mode == "nan some" and often):
        return math.nan
    answers = PROBES[part * 20 : part * 20 + 20] @ vector > 0.3
    return float(answers.mean()), answers


def nothing():
    return 0.0


def loss(model):
    return float(np.exp(-flat(model).mean()))


def minus(model):
    return -abs(float(flat(model).sum())) - 1


def same(model):
    return 1.0


def ends(model):
    weights = [np.random.default_rng(len(name)).standard_normal((8, 3)) for name in ("left", "right")]
    return 0.5 if any(np.allclose(one, model["w"]) for one in weights) else loss(model)


def write_models(directory, seed=0):
    from pathlib import Path
    from safetensors.numpy import save_file
    for name in ("left", "right"):
        rng = np.random.default_rng([seed, len(name)])
        tensors = {"w": rng.standard_normal((8, 3)).astype(np.float32), "b": np.zeros(3, np.float32)}
        save_file(tensors, Path(directory, f"{name}.safetensors"))
'''


def toy_models(folder: Path, **shapes: tuple[int, ...]) -> None:
    for name in ("left", "right"):
        rng = np.random.default_rng(len(name))
        shape = shapes.get(name, (8, 3))
        tensors = {"w": rng.standard_normal(shape).astype(np.float32), "b": rng.standard_normal(3).astype(np.float32)}
        save_file(tensors, folder / f"{name}.safetensors")


def toy_recipe(folder: Path, mode: str = "fine", **others: Any) -> Path:
    """A recipe with its models and module in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cli_toys.py").write_text(TOYS)
    toy_models(folder)

    def objective(name: str, part: int) -> dict[str, Any]:
        return {
            "name": name,
            "type": "call",
            "call": "cli_toys:right",
            "arguments": {"part": part, "mode": mode},
        }

    record = {
        "name": "toy",
        "models": {"experts": ["left.safetensors", "right.safetensors"]},
        "objectives": {
            "search": [objective("one", 0), objective("two", 1)],
            "held_out": [objective("one", 1)],
        },
        "search": {"algorithm": "m2n2", "archive": 6},
        "scoring": {"batch": 4, "in_flight": 8},
        "budget": {"evaluations": 60},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
        **others,
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(record))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, for reading only."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = toy_recipe(folder)
    program = [sys.executable, "-m", "ecotone.experiments.cli", "run", str(recipe), "--out", str(folder / "run")]
    done = subprocess.run(program, check=False, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert "best (member" in done.stdout
    assert "ecotone export" in done.stdout
    return folder / "run"


def in_words(said: Said, *parts: str, code: int = 1) -> None:
    """One message, no traceback, the exit code of a failure."""
    assert said.code == code
    assert "Traceback" not in said.err
    for part in parts:
        assert part in said.err


# -- help ----------------------------------------------------------------------------------------------------

COMMANDS = (
    *("run", "resume", "validate", "recipe", "plugins", "status", "front", "compare"),
    *("check", "export", "import-mergekit", "verify", "ui", "sync"),
    *("submit", "jobs", "logs", "stop", "statistics", "merge", "cache"),
)


def test_help_lists_every_command(ecotone: Ecotone) -> None:
    said = ecotone("--help")
    assert said.code == 0
    assert all(command in said.out for command in COMMANDS)
    assert set(COMMANDS) == {command.name or command.callback.__name__ for command in cli.app.registered_commands}  # type: ignore[union-attr]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(ecotone: Ecotone, command: str) -> None:
    said = ecotone(command, "--help")
    assert said.code == 0
    assert "Usage" in said.out
    assert "--json" in said.out
    assert len(said.out.splitlines()) > 8


def test_version(ecotone: Ecotone) -> None:
    from importlib.metadata import version

    said = ecotone("--version")
    assert (said.code, said.out) == (0, f"ecotone {version('ecotone')}\n")


def test_wrong_usage(ecotone: Ecotone) -> None:
    in_words(ecotone("rnu"), "No such command", code=2)
    in_words(ecotone("run"), "Missing argument", code=2)
    in_words(ecotone("run", "x.yaml", "--workers", "-1"), "--workers", code=2)
    in_words(ecotone("status", "x", "--jsn"), "No such option", code=2)


IMPORTED = """
import sys
sys.argv = ["ecotone", *{arguments!r}]
from ecotone.experiments import cli
try:
    cli.main()
except SystemExit as ended:
    print("code", ended.code, file=sys.stderr)
heavy = ("torch", "ray", "mlflow", "pydantic", "transformers", "sklearn")
print("heavy", sorted(name for name in heavy if name in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "forbidden"),
    [
        (["--help"], {"torch", "ray", "mlflow", "pydantic", "transformers", "sklearn"}),
        (["run", "--help"], {"torch", "ray", "mlflow", "transformers", "sklearn"}),
        (["status", "RUN", "--json"], {"torch", "ray", "mlflow", "transformers", "sklearn"}),
        (["status", "RUN"], {"torch", "ray", "mlflow", "transformers", "sklearn"}),
        (["front", "RUN", "--json"], {"torch", "ray", "mlflow", "transformers", "sklearn"}),
        (["front", "RUN"], {"torch", "ray", "mlflow", "transformers", "sklearn"}),
    ],
)
def test_quick_commands_import_nothing_heavy(finished: Path, arguments: list[str], forbidden: set[str]) -> None:
    program = IMPORTED.format(arguments=[str(finished) if a == "RUN" else a for a in arguments])
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=root)
    assert "code 0" in done.stderr
    loaded = done.stderr.split("heavy ")[1]
    assert not {name for name in forbidden if f"'{name}'" in loaded}


# -- run, status, front --------------------------------------------------------------------------------------


def test_run_prints_its_status_as_json(ecotone: Ecotone, tmp_path: Path) -> None:
    said = ecotone("run", toy_recipe(tmp_path), "--out", tmp_path / "run", "--json", "--set", "seed=3")
    assert said.code == 0
    assert (said.json["state"], said.json["evaluations"], said.json["seed"]) == ("finished", 60, 3)
    assert said.json["stop_reason"] == "evaluations"
    assert "Starting the workers" in said.err
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["seed"] == 3
    assert ecotone("status", tmp_path / "run", "--json").json["digest"] == said.json["digest"]


def test_status_as_json(ecotone: Ecotone, finished: Path) -> None:
    status = ecotone("status", finished, "--json").json
    assert status["state"] == "finished"
    assert (status["evaluations"], status["failures"]) == (60, 0)
    assert status["evaluations_per_second"] == pytest.approx(60 / status["seconds"])
    assert set(status["best"]) == {"id", "scores"}
    assert set(status["best"]["scores"]) == {"one", "two"}
    assert len(status["digest"]) == 32
    assert status["name"] == "toy"
    assert status["algorithm"] == "m2n2"
    assert status["budget"] == {"evaluations": 60, "seconds": None}
    assert {"python", "numpy", "torch", "ecotone"} <= set(status["versions"])
    assert status["tracking"].get("run_id") is None


def test_status_for_a_person(ecotone: Ecotone, finished: Path) -> None:
    said = ecotone("status", finished)
    assert said.code == 0
    assert "finished" in said.out
    assert "evaluations" in said.out


def test_front_as_json(ecotone: Ecotone, finished: Path) -> None:
    front = ecotone("front", finished, "--json").json
    assert front["objectives"] == [
        {"name": "one", "direction": "maximize"},
        {"name": "two", "direction": "maximize"},
    ]
    members = front["members"]
    assert members
    for member in members:
        assert set(member) == {"id", "scores", "held_out", "parents"}
        assert set(member["scores"]) == {"one", "two"}
        assert set(member["held_out"]) == {"one"}
        assert member["held_out"]["one"] == member["scores"]["two"]  # here they are the same examples
    means = [sum(member["scores"].values()) / 2 for member in members]
    assert means == sorted(means, reverse=True)
    best = ecotone("status", finished, "--json").json["best"]
    assert members[0]["id"] == best["id"]
    for one in members:
        for other in members:
            better = [other["scores"][name] >= one["scores"][name] for name in ("one", "two")]
            assert one is other or not all(better)


def test_front_for_a_person(ecotone: Ecotone, finished: Path) -> None:
    said = ecotone("front", finished)
    assert said.code == 0
    assert "front of" in said.out
    assert "held out" in said.out


def test_the_tables_show_references_and_held_out_scores(ecotone: Ecotone, tmp_path: Path) -> None:
    said = ecotone("run", toy_recipe(tmp_path), "--out", tmp_path / "run")
    assert said.code == 0
    for word in ("left", "right", "average", "best (member", "held out"):
        assert word in said.out


def test_commands_to_copy_are_never_broken(ecotone: Ecotone, tmp_path: Path) -> None:
    run = tmp_path / ("long" * 40) / "with a space"
    said = ecotone("run", toy_recipe(tmp_path, budget={"evaluations": 4}), "--out", run)
    assert f"  ecotone front '{run}'   # list the front" in said.out


def test_minimised_objectives(ecotone: Ecotone, tmp_path: Path) -> None:
    objectives = {"search": [{"name": "loss", "type": "call", "call": "cli_toys:loss", "direction": "minimize"}]}
    for algorithm in ("random", "cma_es", "sep_cma_es"):
        recipe = toy_recipe(tmp_path / algorithm, objectives=objectives, search={"algorithm": algorithm})
        status = ecotone("run", recipe, "--out", tmp_path / algorithm / "run", "--json").json
        front = ecotone("front", tmp_path / algorithm / "run", "--json").json
        assert front["objectives"] == [{"name": "loss", "direction": "minimize"}]
        assert [member["id"] for member in front["members"]] == [status["best"]["id"]]
        assert front["members"][0]["held_out"] is None
        with cli._run(str(tmp_path / algorithm / "run")).journal() as journal:
            assert status["best"]["scores"]["loss"] == min(row.scores["loss"] for row in journal.rows() if row.scores)


def test_a_run_without_out_gets_a_folder_of_its_own(
    ecotone: Ecotone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy_recipe(tmp_path / "recipes", budget={"evaluations": 4})
    monkeypatch.chdir(tmp_path)
    first, second = ecotone("run", recipe, "--json").json, ecotone("run", recipe, "--json").json
    assert first["directory"].startswith("runs/toy-")
    assert first["directory"] != second["directory"]
    assert first["digest"] == second["digest"]


# -- validate ------------------------------------------------------------------------------------------------


def test_validate(ecotone: Ecotone, tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path)
    found = ecotone("validate", recipe, "--json").json
    assert found["valid"] is True
    assert len(found["signature"]) == 16
    assert "27 parameters" in found["findings"]["layout"]
    assert "left, right" in found["findings"]["models"]
    assert "objectives.search.one" in found["findings"]
    said = ecotone("validate", recipe)
    assert said.code == 0
    assert "The recipe is valid." in said.out


def test_validate_a_recipe_whose_models_are_still_to_be_made(ecotone: Ecotone, tmp_path: Path) -> None:
    recipe = toy_recipe(
        tmp_path,
        prepare={"call": "cli_toys:write_models"},
        models={"experts": ["prepared:left.safetensors", "prepared:right.safetensors"]},
        seed=int.from_bytes(os.urandom(3), "big"),
    )
    assert "not written yet" in ecotone("validate", recipe, "--json").json["findings"]["models"]
    assert ecotone("run", recipe, "--out", tmp_path / "run").code == 0
    assert "same names, shapes and types" in ecotone("validate", recipe, "--json").json["findings"]["models"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["sede=3"], "sede: unknown key. Did you mean 'seed'?"),
        (["search.algorithm=cma"], "search.algorithm: expected one of"),
        (["objectives.search.0.call=cli_toys:rigth"], "Did you mean 'right'?"),
        (["objectives.search.0.call=cli_tois:right"], "no module named 'cli_tois'"),
        (["objectives.search.0.call=nothing"], "expected 'package.module:function'"),
        (["merge.operator=liner"], "linear"),
        (["models.experts.0=gone.safetensors"], "gone.safetensors"),
        (["models.experts=[left.safetensors]", "merge.operator=task_arithmetic"], "base"),
        (["seed"], "--set: expected key=value"),
        (["models.experts.0.x=5"], "--set models.experts.0.x: '0' is 'left.safetensors', it has no fields"),
        (
            ["objectives.search.0.arguments={part: {1: 2}}"],
            "expected text as keys of mappings, found 1; put it in quotes",
        ),
        (["models.architecture=auto"], "'auto' needs a config.json"),
    ],
)
def test_validate_and_run_refuse_in_the_same_words(
    ecotone: Ecotone, tmp_path: Path, settings: list[str], words: str
) -> None:
    recipe = toy_recipe(tmp_path)
    options = [part for setting in settings for part in ("--set", setting)]
    in_words(ecotone("validate", recipe, *options), "error: ", words)
    in_words(ecotone("run", recipe, "--out", tmp_path / "run", *options), "error: ", words)
    assert not (tmp_path / "run" / "journal.sqlite").exists()


@pytest.mark.parametrize(
    ("package", "extra", "settings", "field"),
    [
        ("ray", "ray", ["runtime.pool=ray"], "runtime.pool"),
        ("optuna", "optuna", ["search={algorithm: optuna}"], "search.algorithm"),
        ("greenlet", "optuna", ["search={algorithm: optuna, sampler: gp}"], "search.algorithm"),
        ("transformers", "hf", ["models.architecture=auto"], "models.architecture"),
        (
            *("transformers", "hf", ["objectives.search.1={name: p, type: likelihood, data: [x.txt]}"]),
            "objectives.search.p",
        ),
        (
            *("lm_eval", "language", ["objectives.held_out.0={name: l, type: lm_eval, task: t}"]),
            "objectives.held_out.l",
        ),
        ("sklearn", "digits", ["prepare={call: experiments.digits:random_models}"], "prepare"),
    ],
)
def test_validate_and_run_refuse_without_a_package(
    ecotone: Ecotone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    extra: str,
    settings: list[str],
    field: str,
) -> None:
    """Even where the models are still to be made, and so little else is known."""
    monkeypatch.setitem(sys.modules, package, None)
    models = {"experts": ["prepared:left.safetensors", "prepared:right.safetensors"]}
    recipe = toy_recipe(tmp_path, models=models, prepare={"call": "cli_toys:write_models"}, seed=id(tmp_path))
    options = [part for setting in settings for part in ("--set", setting)]
    said = f"error: {field}: expected the package {package}, found it not installed.\n`{how_to_install(extra)}`"
    assert said in ecotone("validate", recipe, *options).err
    assert said in ecotone("run", recipe, "--out", tmp_path / "run", *options).err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["objectives.search.0.arguments={prat: 1}"], "unexpected keyword argument 'prat'"),
        (["objectives.search.0.call=cli_toys:nothing"], "arguments: expected those of cli_toys:nothing()"),
        (["models.architecture.call=cli_toys:flat"], "missing a required argument: 'model'"),
        (
            ["prepare.call=cli_toys:write_models", "prepare.arguments={sede: 1}"],
            "prepare: arguments: expected those of",
        ),
    ],
)
def test_validate_knows_what_functions_take(ecotone: Ecotone, tmp_path: Path, settings: list[str], words: str) -> None:
    recipe = toy_recipe(tmp_path)
    options = [part for setting in settings for part in ("--set", setting)]
    in_words(ecotone("validate", recipe, *options), words)


def test_one_wrong_field_of_the_only_objective_is_one_error(ecotone: Ecotone, tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path)
    said = ecotone("validate", recipe, "--set", "objectives.search.1=3", "--set", "objectives.held_out=[]")
    in_words(said, "objectives.search[1]")
    assert "at least" not in said.err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["objectives.search.0.call=cli_toys:loss"], None),
        (
            ["objectives.search.0.call=cli_toys:minus"],
            "one: expected scores of at least 0, which the search shares out",
        ),
        (["search={algorithm: map, samples: 6}", "objectives.search.0.call=cli_toys:same"], "found 1 for every expert"),
        (["search={algorithm: random}", "objectives.search.0.call=cli_toys:same"], None),
        (["search={algorithm: map, samples: 6}", "objectives.search.0.call=cli_toys:ends"], None),
    ],
)
def test_scores_that_the_search_cannot_use_cost_nothing(
    ecotone: Ecotone, tmp_path: Path, settings: list[str], words: str | None
) -> None:
    recipe, out = toy_recipe(tmp_path), tmp_path / "run"
    settings = [*settings, "objectives.search.0.arguments={}", "budget.evaluations=8", "objectives.held_out=[]"]
    options = [part for setting in settings for part in ("--set", setting)]
    for said in (ecotone("validate", recipe, *options), ecotone("run", recipe, "--out", out, *options)):
        if words is None:
            assert said.code == 0
            shown = " ".join((said.out + said.err).split())
            assert ("Warning: " in shown and "does it depend" in shown) == ("loss" not in settings[0])
        else:
            in_words(said, "error: objectives.search.", words)
    assert (out / "journal.sqlite").exists() is (words is None)


# -- models that cannot be used ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "found NaN in right"), (np.inf, "weights of right hold infinity")]
)
def test_weights_that_are_no_numbers(ecotone: Ecotone, tmp_path: Path, value: float, words: str) -> None:
    """NaN is refused at the start, by the expert's name; infinity, which merges may do without, is told of."""
    recipe = toy_recipe(tmp_path, search={"algorithm": "random"})
    tensors = load_file(tmp_path / "right.safetensors")
    tensors["w"][3, 1] = value
    save_file(tensors, tmp_path / "right.safetensors")
    said = ecotone("run", recipe, "--out", tmp_path / "run")
    assert words in said.err
    assert (tmp_path / "run" / "journal.sqlite").exists() is (value == np.inf)


@pytest.mark.parametrize("command", ["validate", "run"])
def test_models_that_cannot_be_used(ecotone: Ecotone, tmp_path: Path, command: str) -> None:
    recipe = toy_recipe(tmp_path)
    options = ["--out", tmp_path / "run"] if command == "run" else []
    expert = tmp_path / "right.safetensors"

    expert.rename(tmp_path / "elsewhere")
    in_words(ecotone(command, recipe, *options), "right.safetensors")

    toy_models(tmp_path, right=(8, 4))
    in_words(ecotone(command, recipe, *options), "right.safetensors", "(8, 3)", "(8, 4)", "w")

    tensors = load_file(tmp_path / "left.safetensors")
    save_file({"w": tensors["w"], "bias": tensors["b"]}, expert)
    in_words(ecotone(command, recipe, *options), "right.safetensors", "'b'")

    save_file({"w": tensors["w"].astype(np.float64), "b": tensors["b"]}, expert)
    in_words(ecotone(command, recipe, *options), "right.safetensors", "float64")

    expert.write_bytes((tmp_path / "left.safetensors").read_bytes()[:-5])
    in_words(ecotone(command, recipe, *options), "right.safetensors")

    torch.save({"w": torch.zeros(8, 3)}, tmp_path / "right.bin")
    in_words(
        ecotone(command, recipe, *options, "--set", "models.experts.1=right.bin"), "right.bin", "pickle", "safetensors"
    )
    assert not (tmp_path / "run" / "journal.sqlite").exists()


def test_missing_recipes_and_runs(ecotone: Ecotone, tmp_path: Path) -> None:
    in_words(ecotone("run", tmp_path / "no.yaml"), "no.yaml: no such recipe")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    in_words(ecotone("validate", tmp_path / "list.yaml"), "expected a mapping")
    for command in ("status", "front", "resume", "ui", "sync"):
        in_words(ecotone(command, tmp_path / "no-run"), "no journal there")
    in_words(ecotone("resume", "digits"), "ecotone resume digits --address http://HEAD:8265")
    in_words(ecotone("export", tmp_path / "no-run", "--to", tmp_path / "x"), "no journal there")
    in_words(ecotone("verify", tmp_path / "nothing"), "nothing")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "journal.sqlite").write_bytes(b"no database " * 100)
    for command in ("status", "front", "resume"):
        in_words(ecotone(command, tmp_path / "broken"), "not a journal of Ecotone, or damaged")


@pytest.mark.slow
@pytest.mark.parametrize("on", [pytest.param(False, marks=pytest.mark.slow), True])
def test_mlflow_is_what_comes_next_only_where_it_is_on(ecotone: Ecotone, tmp_path: Path, on: bool) -> None:
    if on:
        pytest.importorskip("mlflow")
    path = toy_recipe(tmp_path, budget={"evaluations": 8}, tracking={"mlflow": on, "uri": f"sqlite:///{tmp_path}/m.db"})
    said = ecotone("run", path, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    assert "ecotone front" in said.out
    assert ("ecotone ui" in said.out) == on


@pytest.mark.parametrize(
    "command",
    [
        ["statistics", "toy.yaml", "--kind", "magnitude", "--out", "s3://x/y"],
        ["export", "RUN", "--to", "s3://x/y"],
        ["export", "RUN", "--to", "s3://x/y.yaml", "--format", "mergekit"],
        ["compare", "RUN", "--html", "s3://x/y"],
        ["import-mergekit", "toy.yaml", "--to", "s3://x/y"],
        ["import-mergekit", "s3://x/y"],
        ["verify", "s3://x/y"],
        ["validate", "s3://x/y"],
    ],
)
def test_a_url_is_no_folder(
    ecotone: Ecotone, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    toy_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    said = ecotone(*(finished if one == "RUN" else one for one in command))
    in_words(said, ": expected a path on this machine, found the URL s3://x/y")
    assert not (tmp_path / "s3:").exists()
    with pytest.raises(InputError, match="to: expected a path on this machine"):
        Run(finished).export("best", "s3://x/y")


def test_a_run_is_not_overwritten(ecotone: Ecotone, finished: Path, tmp_path: Path) -> None:
    in_words(ecotone("run", toy_recipe(tmp_path), "--out", finished), "a run is there already", "ecotone resume")


# -- objectives that fail ------------------------------------------------------------------------------------


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """An objective that can be computed for an expert fails later."""
    from ecotone.fitness.worker import Worker

    monkeypatch.setattr(Worker, "try_out", lambda self, number=0: {})


@pytest.mark.parametrize(
    ("mode", "words"),
    [("raise all", "ValueError: bad label 7"), ("nan all", "expected a finite score, found nan")],
)
def test_an_objective_that_fails_for_an_expert_costs_nothing(
    ecotone: Ecotone, tmp_path: Path, mode: str, words: str
) -> None:
    """An expert is tried out before there is a run; ``validate`` does the same."""
    recipe = toy_recipe(tmp_path, mode)
    for command in (("run", recipe, "--out", tmp_path / "run"), ("validate", recipe)):
        said = ecotone(*command)
        assert said.code == 1
        assert said.err.count("error: objective 'one': ") == 1
        assert words in said.err
        assert "tried out on the first expert" in said.err
        if mode == "raise all":
            assert "cli_toys.py" in said.err  # where in the user's code: the one traceback a user may see is theirs
    assert not (tmp_path / "run" / "journal.sqlite").exists()
    assert ecotone("validate", recipe, "--headers").code == 0


@pytest.mark.parametrize(
    ("mode", "words"),
    [("raise all", "ValueError: bad label 7"), ("nan all", "expected a finite score, found nan")],
)
@pytest.mark.usefixtures("untried")
def test_an_objective_that_fails_for_all_candidates_stops_the_run(
    ecotone: Ecotone, tmp_path: Path, mode: str, words: str
) -> None:
    said = ecotone("run", toy_recipe(tmp_path, mode), "--out", tmp_path / "run")
    assert said.code == 1
    assert said.err.count("error: all of the first") == 1
    assert words in said.err
    assert "'one'" in said.err  # which objective
    if mode == "raise all":
        assert "cli_toys.py" in said.err  # where in the user's code: the one traceback a user may see is theirs
    status = ecotone("status", tmp_path / "run", "--json").json
    assert status["state"] == "failed"
    assert words in status["error"]
    assert status["failures"] == status["evaluations"] > 0
    assert status["best"] is None
    assert "begin a new run" in said.err
    assert ecotone("front", tmp_path / "run", "--json").json["members"] == []
    in_words(ecotone("export", tmp_path / "run", "--to", tmp_path / "x"), "nothing has been scored yet")


@pytest.mark.parametrize(
    ("mode", "words"),
    [("raise some", "ValueError: bad label 7"), ("nan some", "expected a finite score, found nan")],
)
@pytest.mark.parametrize("algorithm", ["m2n2", "random", "cma_es"])
def test_an_objective_that_fails_for_some_candidates_does_not(
    ecotone: Ecotone, tmp_path: Path, mode: str, words: str, algorithm: str
) -> None:
    recipe = toy_recipe(tmp_path, mode, search={"algorithm": algorithm})
    status = ecotone("run", recipe, "--out", tmp_path / "run", "--json").json
    assert (status["state"], status["evaluations"]) == ("finished", 60)
    assert 0 < status["failures"] < 60
    assert words in status["last_failure"]
    failed = next(number for number in range(60) if not cli._run(str(tmp_path / "run")).journal().evaluation(number).ok)  # type: ignore[union-attr]
    in_words(
        ecotone("export", tmp_path / "run", "--member", failed, "--to", tmp_path / "x"), f"member {failed}: failed"
    )


def test_a_run_that_failed_goes_on_once_its_cause_is_gone(
    ecotone: Ecotone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy_recipe(tmp_path, budget={"evaluations": 30})
    ecotone("run", recipe, "--out", tmp_path / "whole")
    from ecotone.experiments import running

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(running, "_judge", full)
        patched.setattr(sys, "argv", ["ecotone", "run", str(recipe), "--out", str(tmp_path / "run")])
        with pytest.raises((OSError, SystemExit)):
            cli.main()
    assert ecotone("status", tmp_path / "run", "--json").json["state"] == "failed"
    assert ecotone("resume", tmp_path / "run").code == 0
    status = ecotone("status", tmp_path / "run", "--json").json
    assert (status["state"], status["error"]) == ("finished", "")
    assert status["digest"] == ecotone("status", tmp_path / "whole", "--json").json["digest"]


# -- resume --------------------------------------------------------------------------------------------------


def test_resuming_a_finished_run_raises_its_budget(ecotone: Ecotone, tmp_path: Path) -> None:
    ecotone("run", toy_recipe(tmp_path), "--out", tmp_path / "run")
    before = ecotone("status", tmp_path / "run", "--json").json
    assert ecotone("resume", tmp_path / "run", "--json").json["digest"] == before["digest"]
    status = ecotone("resume", tmp_path / "run", "--set", "budget.evaluations=80", "--json").json
    assert (status["state"], status["evaluations"], status["budget"]["evaluations"]) == ("finished", 80, 80)
    assert status["signature"] == before["signature"]
    front = ecotone("front", tmp_path / "run", "--json").json["members"]
    assert all(member["held_out"] is not None for member in front)


@pytest.mark.parametrize("setting", ["seed=4", "search.alpha=0", "models.experts.0=x", "scoring.batch=2", "name=x"])
def test_a_resumed_run_keeps_what_its_trials_depend_on(ecotone: Ecotone, finished: Path, setting: str) -> None:
    in_words(ecotone("resume", finished, "--set", setting), f"--set {setting.split('=')[0]}", "start a new run")


def test_a_resumed_run_refuses_other_weights(ecotone: Ecotone, tmp_path: Path) -> None:
    ecotone("run", toy_recipe(tmp_path), "--out", tmp_path / "run")
    shutil.copy(tmp_path / "left.safetensors", tmp_path / "right.safetensors")
    resume = ("resume", tmp_path / "run", "--set", "budget.evaluations=90")
    told = "models.experts[1]: right.safetensors has changed since the run began"
    in_words(ecotone(*resume), told)
    assert ecotone("status", tmp_path / "run", "--json").json["evaluations"] == 60
    export = ("export", tmp_path / "run", "--to", tmp_path / "best")
    in_words(ecotone(*export), told)
    in_words(ecotone(*resume, "--accept-changes"), "m2n2 proposes merges by the models' weights")
    assert f"accepted: {told}" in ecotone(*export, "--accept-changes").err
    assert told in ecotone("status", tmp_path / "run", "--json").json["accepted_changes"][0]


# -- export and verify ---------------------------------------------------------------------------------------


def test_export_and_verify_a_directory_and_a_file(ecotone: Ecotone, finished: Path, tmp_path: Path) -> None:
    best = ecotone("status", finished, "--json").json["best"]["id"]
    for target in (tmp_path / "merged", tmp_path / "merged.safetensors"):
        said = ecotone("export", finished, "--to", target, "--json")
        assert said.json == {"member": best, "path": str(target)}
        checked = ecotone("verify", target, "--json")
        assert checked.code == 0
        assert checked.json["equal"] is True
        assert {(one["subset"], one["objective"]) for one in checked.json["scores"]} == {
            ("search", "one"),
            ("search", "two"),
            ("held_out", "one"),
        }
        assert all(one["recorded"] == one["found"] for one in checked.json["scores"])
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"member {best}" in card
    assert "held-out" in card
    record = json.loads((tmp_path / "merged" / "ecotone.json").read_text())
    assert record["member"] == best
    assert str(best) in record["lineage"]


def test_export_a_chosen_member(ecotone: Ecotone, finished: Path, tmp_path: Path) -> None:
    said = ecotone("export", finished, "--member", "0", "--to", tmp_path / "zero")
    assert said.code == 0
    assert f"ecotone verify {tmp_path / 'zero'}" in said.out
    merged = load_file(tmp_path / "zero" / "model.safetensors")
    expert = load_file(finished.parent / "left.safetensors")
    assert all(merged[name].tobytes() == expert[name].tobytes() for name in expert)  # trial 0 is the first expert


def test_verify_notices_a_tampered_checkpoint(ecotone: Ecotone, finished: Path, tmp_path: Path) -> None:
    ecotone("export", finished, "--to", tmp_path / "merged")
    weights = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: -tensor for name, tensor in tensors.items()}, weights)
    said = ecotone("verify", tmp_path / "merged", "--json")
    assert said.code == 1
    assert said.json["equal"] is False
    plain = ecotone("verify", tmp_path / "merged")
    assert plain.code == 1
    assert "The scores differ." in plain.out
    assert ecotone("verify", tmp_path / "merged", "--tolerance", "1").code == 0
    weights.write_bytes(weights.read_bytes()[:-3])
    in_words(ecotone("verify", tmp_path / "merged"), "model.safetensors")


def test_what_cannot_be_exported(ecotone: Ecotone, finished: Path, tmp_path: Path) -> None:
    target = tmp_path / "taken"
    in_words(ecotone("export", finished, "--member", "9999", "--to", target), "trial 9999: not in")
    in_words(ecotone("export", finished, "--member", "first", "--to", target), "expected a trial's number or 'best'")
    target.mkdir()
    (target / "mine").write_text("keep me")
    in_words(ecotone("export", finished, "--to", target), "taken")
    assert (target / "mine").read_text() == "keep me"


def test_what_cannot_be_verified(ecotone: Ecotone, finished: Path, tmp_path: Path) -> None:
    in_words(ecotone("verify", finished), "expected a checkpoint written by `ecotone export`")
    in_words(ecotone("verify", finished.parent / "left.safetensors"), "found no record of one")


def test_the_recipes_own_module_is_found_from_anywhere(
    ecotone: Ecotone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its preparation step is a function beside the recipe; later commands run elsewhere, without it imported."""
    recipe = toy_recipe(
        tmp_path / "recipes",
        prepare={"call": "cli_toys_apart:write_models"},
        models={"experts": ["prepared:left.safetensors", "prepared:right.safetensors"]},
        budget={"evaluations": 12},
    )
    (recipe.parent / "cli_toys_apart.py").write_text(TOYS)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = list(sys.path)
    commands: list[list[object]] = [
        ["run", recipe, "--out", tmp_path / "run"],
        ["export", tmp_path / "run", "--to", tmp_path / "merged"],
        ["verify", tmp_path / "merged", "--folder", recipe.parent],
        ["resume", tmp_path / "run", "--set", "budget.evaluations=16"],
    ]
    for command in commands:
        sys.modules.pop("cli_toys_apart", None)
        sys.path[:] = path
        said = ecotone(*command)
        assert said.code == 0, said.err


def test_only_kept_dense_weights_can_be_exported(ecotone: Ecotone, tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, search={"algorithm": "m2n2", "archive": 3, "mutation": 0.05})
    assert ecotone("run", recipe, "--out", tmp_path / "run").code == 0
    run = cli._run(str(tmp_path / "run"))
    with run.journal() as journal:
        kept = journal.kept()
    gone = next(number for number in range(60) if number not in kept)
    in_words(ecotone("export", run.directory, "--member", gone, "--to", tmp_path / "gone"), "its weights were not kept")
    assert not (tmp_path / "gone").exists()
    for member in run.front():
        target = tmp_path / f"member-{member.id}"
        assert ecotone("export", run.directory, "--member", member.id, "--to", target).code == 0
        assert ecotone("verify", target).code == 0


# -- awkward users -------------------------------------------------------------------------------------------


def test_what_an_objective_prints_does_not_spoil_the_json(ecotone: Ecotone, tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, budget={"evaluations": 8})
    noisy = TOYS.replace("    vector = flat(model)\n", '    vector = flat(model)\n    print("scoring ...")\n', 1)
    assert noisy != TOYS
    (tmp_path / "cli_toys_noisy.py").write_text(noisy)
    options = [
        f"--set=objectives.{group}.call=cli_toys_noisy:right" for group in ("search.0", "search.1", "held_out.0")
    ]
    run = ecotone("run", recipe, "--out", tmp_path / "run", "--json", *options)
    assert run.json["state"] == "finished"
    assert "scoring ..." in run.err
    assert ecotone("resume", tmp_path / "run", "--json", "--set", "budget.evaluations=12").json["evaluations"] == 12
    ecotone("export", tmp_path / "run", "--to", tmp_path / "merged")
    assert ecotone("verify", tmp_path / "merged", "--json").json["equal"] is True


def test_brackets_are_printed_as_they_are(ecotone: Ecotone, tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, budget={"evaluations": 8})
    run = tmp_path / "run [bold][/x]"
    said = ecotone("run", recipe, "--out", run, "--set", "objectives.search.0.name=acc [red][/red] [/x]")
    assert said.code == 0
    assert "acc [red][/red] [/x]" in said.out
    assert f"ecotone front {run}" in said.out.replace("'", "")
    assert "[/x]" in ecotone("status", run).out
    assert "acc [red][/red] [/x]" in ecotone("front", run).out


def test_a_recipe_of_the_users_is_not_overwritten(
    ecotone: Ecotone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy_recipe(tmp_path, budget={"evaluations": 8}).rename(tmp_path / "recipe.yaml")
    recipe.write_text("# my own words\n" + recipe.read_text())
    before = recipe.read_text()
    monkeypatch.chdir(tmp_path)
    in_words(ecotone("run", "recipe.yaml", "--out", "."), "recipe.yaml", "--out")
    assert recipe.read_text() == before
    assert not (tmp_path / "journal.sqlite").exists()


def test_stopped_before_anything_was_recorded(
    ecotone: Ecotone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ecotone.experiments import preparation

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    recipe = toy_recipe(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(preparation, "prepare", stopped)
        in_words(ecotone("run", recipe, "--out", tmp_path / "run"), "Nothing was recorded yet.", code=130)
    assert ecotone("run", recipe, "--out", tmp_path / "run", "--set", "budget.evaluations=4").code == 0


def test_models_of_a_preparation_step_are_made_again_when_the_cache_is_gone(
    ecotone: Ecotone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    recipe = toy_recipe(
        tmp_path,
        prepare={"call": "cli_toys:write_models"},
        models={"experts": ["prepared:left.safetensors", "prepared:right.safetensors"]},
        budget={"evaluations": 12},
    )
    assert ecotone("run", recipe, "--out", tmp_path / "run").code == 0
    shutil.rmtree(tmp_path / "cache")
    assert ecotone("export", tmp_path / "run", "--to", tmp_path / "merged").code == 0
    assert ecotone("verify", tmp_path / "merged").code == 0
    shutil.rmtree(tmp_path / "cache")
    assert ecotone("resume", tmp_path / "run", "--set", "budget.evaluations=16").code == 0


@pytest.mark.usefixtures("untried")
def test_a_held_out_objective_that_fails_leaves_the_search_whole(ecotone: Ecotone, tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, budget={"evaluations": 12})
    setting = "objectives.held_out.0.arguments.mode=raise all"
    said = ecotone("run", recipe, "--out", tmp_path / "run", "--set", setting)
    assert said.code == 0
    front = ecotone("front", tmp_path / "run", "--json").json["members"]
    assert front
    assert all(member["held_out"] is None for member in front)
    assert ecotone("export", tmp_path / "run", "--to", tmp_path / "merged").code == 0
    assert ecotone("verify", tmp_path / "merged", "--json").json["equal"] is True


def test_one_expert_and_the_same_expert_twice(ecotone: Ecotone, tmp_path: Path) -> None:
    for experts in (["left.safetensors"], ["left.safetensors"] * 2):
        for algorithm in ("m2n2", "random", "cma_es"):
            run = tmp_path / f"{algorithm}-{len(experts)}"
            recipe = toy_recipe(run, models={"experts": experts}, search={"algorithm": algorithm})
            said = ecotone("run", recipe, "--out", run / "run", "--json")
            assert said.code == 0, said.err
            assert said.json["failures"] == 0


def test_a_budget_of_seconds(ecotone: Ecotone, tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, budget={"seconds": 0.3})
    status = ecotone("run", recipe, "--out", tmp_path / "run", "--json").json
    assert status["stop_reason"] == "seconds"
    assert status["seconds"] >= 0.3
    assert status["evaluations"] > 0
    more = f"budget.seconds={status['seconds'] + 0.3}"
    longer = ecotone("resume", tmp_path / "run", "--set", more, "--json").json
    assert longer["evaluations"] > status["evaluations"]


def test_arrival_order(ecotone: Ecotone, tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, search={"algorithm": "m2n2", "archive": 3, "mutation": 0.05})
    said = ecotone("run", recipe, "--out", tmp_path / "run", "--set", "scoring.order=arrival", "--json")
    assert said.json["state"] == "finished"
    again = ecotone("resume", tmp_path / "run", "--set", "budget.evaluations=90", "--json")
    assert again.json["evaluations"] == 90
    for member in ecotone("front", tmp_path / "run", "--json").json["members"]:
        assert (
            ecotone("export", tmp_path / "run", "--member", member["id"], "--to", tmp_path / str(member["id"])).code
            == 0
        )


def test_status_is_watched_until_the_run_ends(
    finished: Path, ecotone: Ecotone, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = ["running", "running", "finished"]
    status = cli._status(str(finished))
    monkeypatch.setattr(cli, "_EVERY", 0.0)
    monkeypatch.setattr(cli, "_status", lambda run: {**status, "state": states.pop(0)})
    said = ecotone("status", finished, "--watch")
    assert said.code == 0
    assert [line.split()[1] for line in said.out.splitlines() if line.startswith(" state")] == [
        "running",
        "running",
        "finished",
    ]
    in_words(ecotone("status", finished, "--watch", "--json"), "--watch: expected without --json")
