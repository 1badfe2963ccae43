"""Recipes: what is refused and in which words, what the signature covers, and round trips."""

from __future__ import annotations

import copy
import importlib
import linecache
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from parts import call
from processes import ROOT
from pydantic import ValidationError

from ecotone.experiments import compose, preparation
from ecotone.experiments.checks import validate
from ecotone.experiments.fields import schema
from ecotone.experiments.recipe import Recipe, apply_settings, parse_settings
from ecotone.experiments.running import launch
from ecotone.experiments.statistics import gather
from ecotone.fitness.objectives import AccuracySettings
from ecotone.fitness.registry import OBJECTIVES
from ecotone.populations.errors import CheckpointError, InputError
from ecotone.populations.gram import GramTable
from ecotone.populations.niches import NicheArchive
from ecotone.populations.population import ElitistArchive
from ecotone.populations.space import Space
from ecotone.populations.trial import Statistics
from ecotone.search.cma_es import CmaEs
from ecotone.search.m2n2 import M2N2

PACKAGE = Path(__file__).parent.parent / "experiments" / "recipes"
PLAIN: dict[str, Any] = {
    "name": "plain",
    "models": {"experts": ["a.safetensors", "b.safetensors"], "base": "base.safetensors"},
    "merge": {"operator": "task_arithmetic"},
    "objectives": {
        "search": [{"name": "one", "type": "call", "call": "m:f", "arguments": {"x": 1}}],
        "held_out": [{"name": "one", "type": "accuracy", "data": {"call": "m:data"}, "batch": 64}],
    },
    "budget": {"evaluations": 100},
}
ALGORITHMS = ("m2n2", "random", "cma_es", "sep_cma_es", "map", "bayesian_map", "nested_map", "nsga2", "nsga3", "optuna")
LISTED = ", ".join((*ALGORITHMS, "adamerging", "expert_merging", "one_shot"))
TYPES = ", ".join(OBJECTIVES)


def changed(**settings: Any) -> dict[str, Any]:
    """``PLAIN`` with fields replaced; a double underscore stands for a dot."""
    return apply_settings(PLAIN, {key.replace("__", "."): value for key, value in settings.items()})


def two_objectives(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` with another objective like the first."""
    other = record["objectives"]["search"][0] | {"name": "other"}
    return apply_settings(record, {"objectives.search": [*record["objectives"]["search"], other]})


def refusal(record: Any) -> str:
    with pytest.raises(InputError) as caught:
        Recipe.from_record(record)
    return str(caught.value)


# -- unknown keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("", "sede", "seed"),
        ("", "objektives", "objectives"),
        ("models", "expert", "experts"),
        ("merge", "opperator", "operator"),
        ("objectives", "heldout", "held_out"),
        ("objectives.search.0", "argument", "arguments"),
        ("objectives.held_out.0", "batches", "batch"),
        ("objectives.held_out.0.data", "arguments_", "arguments"),
        ("budget", "evaluation", "evaluations"),
        ("scoring", "inflight", "in_flight"),
        ("runtime", "worker", "workers"),
        ("tracking", "url", "uri"),
        ("prepare", "argumants", "arguments"),
        ("models.architecture", "argumants", "arguments"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, wrong: str, right: str) -> None:
    record = changed(prepare={"call": "m:f"}, models__architecture={"call": "m:f"}, scoring={}, runtime={}, tracking={})
    record = apply_settings(record, {f"{key}.{wrong}".lstrip("."): 1})
    place = key.replace(".0", "[0]")
    assert f"{place}.{wrong}: unknown key. Did you mean {right!r}?".lstrip(".") in refusal(record)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_unknown_key_of_each_algorithm(algorithm: str) -> None:
    message = refusal(changed(search={"algorithm": algorithm, "archiv": 3}))
    assert message == "search.archiv: unknown key. Did you mean 'archive'?"


def test_a_key_of_another_algorithm_is_unknown() -> None:
    assert "search.alpha: unknown key." in refusal(changed(search={"algorithm": "random", "alpha": 1.0}))
    assert "search.sigma: unknown key." in refusal(changed(search={"algorithm": "m2n2", "sigma": 1.0}))


def test_a_key_like_nothing_lists_what_there_is() -> None:
    assert "budget.zzzzzz: unknown key. Known: evaluations, seconds." in refusal(changed(budget__zzzzzz=1))


def test_many_errors_are_told_together_but_not_all() -> None:
    message = refusal(PLAIN | {f"unknown{i}": i for i in range(9)})
    assert message.count("unknown key") == 5
    assert message.endswith("... and 4 more.")


# -- wrong values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"seed": "many"}, "seed: input should be a valid integer"),
        ({"seed": -1}, "seed: input should be greater than or equal to 0, found -1."),
        ({"name": "a/b"}, "name: string should match pattern"),
        ({"name": ""}, "name: string should match pattern"),
        ({"models__experts": []}, "models.experts: "),
        ({"models__experts": "a.safetensors"}, "models.experts: "),
        ({"models__experts__0": 3}, "models.experts[0]: input should be a valid string, found 3."),
        ({"models__names": ["one"]}, "models: names: expected 2, one an expert, found 1."),
        ({"merge__dtype": "float64"}, "merge.dtype: "),
        ({"budget": {}}, "budget: expected evaluations, seconds or both, found neither."),
        ({"budget__evaluations": 0}, "budget.evaluations: "),
        ({"budget__seconds": 0}, "budget.seconds: "),
        ({"budget__seconds": float("inf")}, "budget.seconds: input should be a finite number"),
        ({"search": {"algorithm": "m2n2", "archive": 1}}, "search.archive: "),
        ({"search": {"algorithm": "m2n2", "alpha": -1}}, "search.alpha: "),
        ({"search": {"algorithm": "m2n2", "crossover": False}}, "search: crossover: without it and with mutation 0"),
        ({"search": {"algorithm": "random", "low": 1.0, "high": 1.0}}, "search: low: expected less than high (1.0)"),
        ({"search": {"algorithm": "cma_es", "start": 2.0}}, "search: start: expected between 0.0 and 1.0, found 2.0."),
        ({"search": {"algorithm": "cma_es", "sigma": 0}}, "search.sigma: "),
        ({"scoring": {"batch": 0}}, "scoring.batch: "),
        ({"scoring": {"batch": 8, "in_flight": 4}}, "scoring: in_flight: expected at least batch (8), found 4."),
        ({"scoring": {"order": "random"}}, "scoring.order: "),
        ({"runtime": {"pool": "threads"}}, "runtime.pool: "),
        ({"runtime": {"workers": 0}}, "runtime.workers: "),
        ({"runtime": {"time_limit": 0}}, "runtime.time_limit: "),
        ({"runtime": {"idle_timeout": -1}}, "runtime.idle_timeout: "),
        ({"runtime": {"time_limit": 9, "pool": "serial"}}, "runtime: time_limit: the serial pool cannot stop"),
        ({"tracking": {"mlflow": "perhaps"}}, "tracking.mlflow: "),
        ({"objectives__search": []}, "objectives.search: "),
        ({"prepare": {"arguments": {}}}, "prepare.call: missing"),
        ({"prepare": 3}, "prepare: "),
    ],
)
def test_a_wrong_value_is_refused_by_field(settings: dict[str, Any], expected: str) -> None:
    assert refusal(changed(**settings)).startswith(expected)


@pytest.mark.parametrize("field", ["name", "models", "objectives", "budget"])
def test_a_missing_part_is_named(field: str) -> None:
    assert refusal({k: v for k, v in PLAIN.items() if k != field}).startswith(f"{field}: missing")


def test_an_unknown_algorithm_or_objective_type_lists_the_known_ones() -> None:
    message = refusal(changed(search={"algorithm": "cma-es"}))
    assert message.startswith(f"search.algorithm: expected one of {LISTED}, found 'cma-es'.")
    assert "Did you mean 'cma_es'?" in message
    message = refusal(changed(objectives__search=[{"name": "a", "type": "accurracy"}]))
    assert message.startswith(f"objectives.search[0].type: expected one of {TYPES}, found 'accurracy'.")
    assert "Did you mean 'accuracy'?" in message


def test_a_missing_algorithm_or_type_lists_the_known_ones() -> None:
    message = refusal(changed(search={"algorithm": None}))
    assert message.startswith(f"search.algorithm: expected one of {LISTED}, found None.")
    assert Recipe.from_record(changed(search={"archive": 10})).search.algorithm == "m2n2"
    message = refusal(changed(objectives__search=[{"name": "a", "call": "m:f"}]))
    assert message.startswith(f"objectives.search[0].type: expected one of {TYPES}, found None.")


def test_objectives_of_one_name_are_refused() -> None:
    twice = [PLAIN["objectives"]["search"][0]] * 2
    assert "search: expected objectives of different names, found ['one', 'one']" in refusal(
        changed(objectives__search=twice)
    )
    held_out = {"search": PLAIN["objectives"]["search"], "held_out": PLAIN["objectives"]["search"]}
    Recipe.from_record(changed(objectives=held_out))  # the same name in both groups is the normal case


def test_m2n2_refuses_to_minimise_and_says_what_to_do() -> None:
    record = changed(objectives__search__0__direction="minimize")
    message = refusal(record)
    assert message.startswith("objectives.search: m2n2 takes scores to maximise, found direction minimize")
    assert "exp(-loss)" in message
    for algorithm in ALGORITHMS[1:]:
        Recipe.from_record(two_objectives(apply_settings(record, {"search": {"algorithm": algorithm}})))


def test_accuracy_is_not_minimised() -> None:
    assert refusal(changed(objectives__held_out__0__direction="minimize")).startswith(
        "objectives.held_out[0].direction: "
    )


def test_prepared_paths_need_a_preparation_step() -> None:
    record = changed(models__experts=["prepared:a.safetensors"])
    assert "models: paths begin with 'prepared:' but the recipe has no `prepare` step" in refusal(record)
    record = changed(models__base="prepared:a.safetensors")
    assert "no `prepare` step" in refusal(record)
    Recipe.from_record(apply_settings(record, {"prepare": {"call": "m:f"}}))


def test_recipes_do_not_change() -> None:
    recipe = Recipe.from_record(PLAIN)
    with pytest.raises(ValidationError):
        recipe.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        recipe.search.archive = 3


# -- files ---------------------------------------------------------------------------------------------------


def written(folder: Path, record: Any = PLAIN) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(record if isinstance(record, str) else yaml.safe_dump(record))
    return path


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.yaml: no such recipe\. Known: .*digits-specialists"):
        Recipe.from_yaml(tmp_path / "nothing.yaml")
    with pytest.raises(InputError, match="expected a recipe file, found a directory"):
        Recipe.from_yaml(tmp_path)


def test_a_ready_recipe_is_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = Recipe.from_yaml(ROOT / "experiments" / "recipes" / "digits-specialists.yaml")
    monkeypatch.chdir(tmp_path)
    for name in ("digits-specialists", "digits-specialists.yaml", "experiments/recipes/digits-specialists.yaml"):
        assert Recipe.from_yaml(name).record() == ready.record()
    with pytest.raises(InputError, match=r"Did you mean 'digits-specialists'\?"):
        Recipe.from_yaml("digit-specialists")
    with pytest.raises(InputError, match=r"elsewhere/digits-specialists.yaml: no such recipe"):
        Recipe.from_yaml("elsewhere/digits-specialists.yaml")
    (tmp_path / "digits-specialists").mkdir()
    assert Recipe.from_yaml("digits-specialists").record() == ready.record()
    (tmp_path / "digits-specialists.yaml").write_text("name: mine")
    with pytest.raises(InputError, match="models: missing"):
        Recipe.from_yaml("digits-specialists.yaml")


@pytest.mark.parametrize("text", ["a: [1, 2", "a: b: c", "\tname: x"])
def test_a_file_that_is_not_yaml(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"recipe\.yaml: cannot be read as YAML"):
        Recipe.from_yaml(written(tmp_path, text))


def test_a_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match="cannot be read as YAML"):
        Recipe.from_yaml(path)


@pytest.mark.parametrize(("text", "found"), [("", "nothing: the file is empty"), ("[1, 2]", "list"), ("hello", "str")])
def test_a_file_of_something_else(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(InputError, match=f"expected a mapping of recipe fields, found {found}"):
        Recipe.from_yaml(written(tmp_path, text))


@pytest.mark.parametrize("line", ["seed: 2024-01-01", "2024-01-01: 3", "name: !!binary aGVsbG8=", "1: 2"])
def test_yaml_that_no_recipe_has(tmp_path: Path, line: str) -> None:
    with pytest.raises(InputError):
        Recipe.from_yaml(written(tmp_path, yaml.safe_dump({k: v for k, v in PLAIN.items() if k != "name"}) + line))


@pytest.mark.parametrize(("key", "shown"), [("1", "1"), ("null", "null"), ("2.5", "2.5"), ("true", "true")])
def test_keys_that_are_no_text_are_refused_wherever_they_stand(tmp_path: Path, key: str, shown: str) -> None:
    """JSON would turn them into text, and of 1 and true it would keep one."""
    said = f"expected text as keys of mappings, found {shown}; put it in quotes"
    record = yaml.safe_dump({name: part for name, part in PLAIN.items() if name != "objectives"})
    objective = f"{{name: a, type: call, call: 'm:f', arguments: {{d: {{{key}: a, x: b}}}}}}"
    with pytest.raises(InputError) as caught:
        Recipe.from_yaml(written(tmp_path, f"{record}\nobjectives: {{search: [{objective}]}}"))
    assert str(caught.value).startswith(f"{tmp_path}/recipe.yaml: cannot be read as YAML: line ")
    assert str(caught.value).endswith(f": {said}.")
    with pytest.raises(InputError, match=said):
        parse_settings([f"objectives.search.0.arguments={{d: {{{key}: a}}}}"])
    with pytest.raises(InputError, match=said):
        apply_settings({"name": {yaml.safe_load(key): 1}}, {})


def test_a_key_that_is_given_twice(tmp_path: Path) -> None:
    both = r"recipe\.yaml: .* line 3, column 1: 'name' is given twice, first in line 1, column 1"
    with pytest.raises(InputError, match=both):
        Recipe.from_yaml(written(tmp_path, "name: a\nseed: 1\nname: b\n"))
    with pytest.raises(InputError, match=r"--set search: .* 'low' is given twice"):
        parse_settings(["search={low: 0, low: 1}"])
    assert parse_settings(["a={x: &b {k: 1}, y: {<<: *b, k: 2}}"]) == {"a": {"x": {"k": 1}, "y": {"k": 2}}}


@pytest.mark.parametrize("depth", [150, 3000])
def test_yaml_that_is_nested_too_deep(tmp_path: Path, depth: int) -> None:
    with pytest.raises(InputError, match="expected at most 100 mappings and lists in each other"):
        Recipe.from_yaml(written(tmp_path, "name: " + "[" * depth + "]" * depth))
    with pytest.raises(InputError, match=r"--set name: .*expected at most 100"):
        parse_settings(["name=" + "[" * depth + "]" * depth])


def test_a_user_without_a_home(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        for field in ("experts[1]", "base", "tokenizer"):
            key = f"models.{field.replace('[', '.').replace(']', '')}"
            with pytest.raises(InputError) as caught:
                Recipe.from_record(apply_settings(PLAIN, {key: "~nobody-here/x"}), folder)
            assert str(caught.value).startswith(f"models.{field}: expected the home folder of a user, found '~nobody")
        with pytest.raises(InputError, match="expected the home folder of a user"):
            Recipe.from_record(changed(objectives__search__0__call="~nobody-here/x.py:f"), folder)


def test_text_that_no_file_can_hold() -> None:
    assert refusal(changed(objectives__search__0__name="a\ud800")) == (
        "objectives.search[0].name: expected 1 to 200 characters that can be printed, found 'a\\ud800'."
    )
    said = "objectives: expected text that UTF-8 can hold, found 'm:\\ud800'."
    assert said in refusal(changed(objectives__search__0__call="m:\ud800"))
    assert "found '\\udcff'" in refusal(changed(merge__dtype=None, objectives__search__0__arguments={"\udcff": 1}))


def test_what_is_no_recipe(tmp_path: Path) -> None:
    for use in (launch, validate, lambda record: gather(record, Statistics("magnitude", ()), tmp_path)):
        with pytest.raises(InputError, match=r"recipe: expected a Recipe, found dict\. Recipe\.from_record"):
            use(PLAIN)


def test_a_name_that_no_directory_can_have() -> None:
    with pytest.raises(InputError, match=r"name: expected at most 200 characters, .* found 300"):
        launch(Recipe.from_record(changed(name="a" * 300)))


def test_bounds_too_far_apart() -> None:
    wide = {"low": -1e308, "high": 1e308}
    assert "low: expected a finite distance to high" in refusal(changed(search={"algorithm": "cma_es", **wide}))
    ties = {"operator": "ties", "density": wide}
    assert "low: expected a finite distance" in refusal(changed(merge=ties, search={"algorithm": "cma_es"}))


@pytest.mark.parametrize(
    ("written_by", "newer"),
    [
        ("0.2rc1", True),
        ("0.2a1", True),
        ("1rc1", True),
        ("0.10b2", True),
        ("1", True),
        ("0.1.7", False),
        ("0.1rc1", False),
    ],
)
def test_a_newer_ecotone_is_told_of(tmp_path: Path, written_by: str, newer: bool) -> None:
    told = f"Ecotone {written_by} wrote this"
    with pytest.raises(InputError) as caught:
        Recipe.from_record(changed(sede=1), written_by=written_by)
    assert (told in str(caught.value)) is newer
    text = Recipe.from_record(PLAIN).text()
    assert text.startswith(f"# Written by Ecotone {version('ecotone')}.\n")
    rest = text.partition("\n")[2]
    with pytest.raises(InputError) as caught:
        Recipe.from_yaml(written(tmp_path, f"# Written by Ecotone {written_by}.\nsede: 1\n{rest}"))
    assert (told in str(caught.value)) is newer


def test_a_recipe_that_is_written_fits_its_schema(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    losses = [
        {"name": "a"},
        {"name": "b", "loss": "cross_entropy"},
        {"name": "c", "loss": "distillation", "expert": "a"},
    ]
    tasks = [{"data": {"call": "m:f"}, **loss} for loss in losses]
    search = {"algorithm": "adamerging"}
    record = changed(calibration=tasks, search=search, models__architecture={"call": "m:a"})
    recipe = Recipe.from_record(record, tmp_path)
    path = written(tmp_path, recipe.text())
    jsonschema.validate(yaml.safe_load(path.read_text()), schema())
    assert Recipe.from_yaml(path).record() == recipe.record()


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    record = changed(
        models__experts=["a.safetensors", "sub/b", "/absolute/c", "prepared:d", "../e"], prepare={"call": "m:f"}
    )
    folder = (tmp_path / "folder").resolve()
    (folder / "sub").mkdir(parents=True)
    models = Recipe.from_yaml(written(tmp_path / "folder", record)).models
    assert models.experts[:4] == (f"{folder}/a.safetensors", f"{folder}/sub/b", "/absolute/c", "prepared:d")
    assert Path(models.experts[4]).resolve() == folder.parent / "e"
    assert models.base == f"{folder}/base.safetensors"


def test_repositories_of_the_hub_keep_their_names(tmp_path: Path) -> None:
    models = Recipe.from_yaml(
        written(tmp_path, changed(models__experts=["org/name", "org/name@v1", "./org/name"]))
    ).models
    assert models.experts == ("org/name", "org/name@v1", f"{tmp_path.resolve()}/org/name")


def test_the_ready_recipes_are_valid() -> None:
    recipes = sorted(PACKAGE.glob("*.yaml"))
    assert len(recipes) >= 2
    for path in recipes:
        recipe = Recipe.from_yaml(path)
        assert recipe.name == path.stem
        assert recipe.objectives.held_out  # no result without data the search has not seen


# -- settings ------------------------------------------------------------------------------------------------


def test_settings_replace_fields_by_dotted_name(tmp_path: Path) -> None:
    settings = parse_settings(
        ["seed=3", "search.alpha=0", "objectives.search.0.name=new", "merge.dtype=null", "tracking.uri=http://h:1/a=b"]
    )
    assert settings == {
        "seed": 3,
        "search.alpha": 0,
        "objectives.search.0.name": "new",
        "merge.dtype": None,
        "tracking.uri": "http://h:1/a=b",
    }
    path = written(tmp_path, changed(search={"algorithm": "m2n2"}))
    recipe = Recipe.from_yaml(path, settings)
    assert (recipe.seed, recipe.search.alpha) == (3, 0.0)  # type: ignore[union-attr]
    assert recipe.objectives.search[0].name == "new"
    assert recipe.tracking.uri == "http://h:1/a=b"


def test_settings_do_not_touch_what_they_are_applied_to() -> None:
    before = copy.deepcopy(PLAIN)
    apply_settings(PLAIN, {"objectives.search.0.name": "new", "scoring.batch": 3})
    assert before == PLAIN


@pytest.mark.parametrize("pair", ["seed", "=3", ""])
def test_a_setting_without_a_key_or_value(pair: str) -> None:
    with pytest.raises(InputError, match="--set: expected key=value"):
        parse_settings([pair])


def test_a_setting_that_is_not_yaml() -> None:
    with pytest.raises(InputError, match="--set seed: cannot be read as a YAML value"):
        parse_settings(["seed=[1, 2"])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("objectives.search.7.name", "expected a position from 0 to 0, found '7'"),
        ("objectives.search.first.name", "expected a position from 0 to 0, found 'first'"),
        ("objectives.search.\N{SUPERSCRIPT TWO}", "expected a position from 0 to 0, found '\N{SUPERSCRIPT TWO}'"),
        ("objectives.search.7", "expected a position from 0 to 0, found '7'"),
        ("name.first", "'name' is 'plain', it has no fields"),
        ("objectives.search.0.name.first", "'name' is 'one', it has no fields"),
    ],
)
def test_a_setting_of_what_is_not_there(key: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        apply_settings(PLAIN, {key: 1})
    assert str(caught.value).startswith(f"--set {key}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(("key", "right"), [("sed", "seed"), ("search.alpa", "alpha"), ("runtime.worker", "workers")])
def test_a_setting_of_an_unknown_key_has_a_suggestion(tmp_path: Path, key: str, right: str) -> None:
    path = written(tmp_path, changed(search={"algorithm": "m2n2"}))
    with pytest.raises(InputError, match=f"{key}: unknown key. Did you mean '{right}'"):
        Recipe.from_yaml(path, {key: 1})


# -- signature and record ------------------------------------------------------------------------------------

FULL = changed(
    prepare={"call": "m:f", "arguments": {"n": 1}},
    models__architecture={"call": "m:a"},
    models__names=["x", "y"],
    search={"algorithm": "m2n2"},
    scoring={"batch": 4},
    runtime={"pool": "serial"},
    tracking={"mlflow": False},
)


@pytest.mark.parametrize(
    "setting",
    [
        {"name": "other"},
        {"budget": {"seconds": 3.0}},
        {"budget.evaluations": 5},
        {"runtime": {"pool": "ray", "workers": 7}},
        {"runtime.attempts": 9},
        {"tracking": {"uri": "http://host:1", "experiment": "e"}},
    ],
)
def test_the_signature_leaves_out_where_and_how_long(setting: dict[str, Any]) -> None:
    assert Recipe.from_record(apply_settings(FULL, setting)).signature == Recipe.from_record(FULL).signature


CHANGES: list[dict[str, Any]] = [
    {"seed": 1},
    {"prepare.call": "m:g"},
    {"prepare.arguments.n": 2},
    {"models.experts.0": "c.safetensors"},
    {"models.experts": ["b.safetensors", "a.safetensors"]},
    {"models.base": "other.safetensors"},
    {"models.names": ["y", "x"]},
    {"models.architecture.call": "m:b"},
    {"models.architecture": "auto"},
    {"merge.operator": "linear"},
    {"merge.dtype": "bfloat16"},
    {"objectives.search.0.name": "two"},
    {"objectives.search.0.call": "m:g"},
    {"objectives.search.0.arguments.x": 2},
    {"objectives.held_out": []},
    {"objectives.held_out.0.batch": 32},
    {"objectives.held_out.0.data.call": "m:other"},
    {"search.archive": 21},
    {"search.alpha": 0.5},
    {"search.resource": "one"},
    {"search.attraction": False},
    {"search.split": False},
    {"search.interpolation": "linear"},
    {"search.granularity": "tensor"},
    {"search.mutation": 0.1},
    {"search.max_segments": 5},
    {"search": {"algorithm": "random"}},
    {"search": {"algorithm": "cma_es"}},
    {"search": {"algorithm": "sep_cma_es"}},
    {"search": {"algorithm": "map"}},
    {"search": {"algorithm": "map", "samples": 20}},
    {"search": {"algorithm": "map", "design": "sobol"}},
    {"search": {"algorithm": "bayesian_map"}},
    {"search": {"algorithm": "bayesian_map", "acquisition": "bins"}},
    {"search": {"algorithm": "bayesian_map", "links": {"one": "sigmoid"}}},
    {"search": {"algorithm": "bayesian_map", "patience": None}},
    {"search": {"algorithm": "nested_map"}},
    {"search": {"algorithm": "nested_map", "preference": {"one": 2.0}}},
    {"search": {"algorithm": "nested_map", "owners": {"one": "a", "other": "b"}}},
    {"search": {"algorithm": "nsga2"}},
    {"search": {"algorithm": "nsga2", "granularity": "block"}},
    {"search": {"algorithm": "nsga2", "models_first": False}},
    {"search": {"algorithm": "nsga2", "high": 1.5}},
    {"search": {"algorithm": "nsga2", "population": 30}},
    {"search": {"algorithm": "nsga3"}},
    {"search": {"algorithm": "optuna"}},
    {"search": {"algorithm": "optuna", "sampler": "gp"}},
    {"search": {"algorithm": "optuna", "startup": 20}},
    {"scoring.batch": 5},
    {"scoring.in_flight": 40},
    {"scoring.order": "arrival"},
    {"scoring.threads": 2},
    {"scoring.device": "cpu"},
]


def test_the_signature_covers_everything_that_changes_results() -> None:
    whole = two_objectives(FULL)
    signatures = [Recipe.from_record(apply_settings(whole, change)).signature for change in CHANGES]
    signatures += [Recipe.from_record(whole).signature, Recipe.from_record(FULL).signature]
    assert len(set(signatures)) == len(CHANGES) + 2
    assert all(len(signature) == 16 for signature in signatures)


def test_a_default_written_out_is_the_same_recipe() -> None:
    spelled = apply_settings(FULL, {"search.archive": 20, "seed": 0, "scoring.order": "strict"})
    assert Recipe.from_record(spelled).signature == Recipe.from_record(FULL).signature


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_record_is_plain_and_gives_the_recipe_back(algorithm: str) -> None:
    recipe = Recipe.from_record(two_objectives(apply_settings(FULL, {"search": {"algorithm": algorithm}})))
    record = yaml.safe_load(yaml.safe_dump(recipe.record()))
    assert Recipe.from_record(record) == recipe
    assert Recipe.from_record(record).signature == recipe.signature


# -- what it is composed to ----------------------------------------------------------------------------------


def small_space() -> Space:
    vectors = np.random.default_rng(0).standard_normal((2, 12)).astype(np.float32)
    return Space(
        ("a", "b"),
        ("s", "t"),
        np.array([0, 5, 12]),
        ("s",),
        np.array([0, 12]),
        GramTable.from_vectors(vectors),
        np.eye(2),
        ("a", "b"),
        vectors,
    )


def test_every_switch_of_m2n2_reaches_it() -> None:
    switches = {
        "attraction": False,
        "split": False,
        "crossover": False,
        "interpolation": "linear",
        "granularity": "tensor",
        "mutation": 0.5,
        "max_segments": 7,
    }
    part = {"algorithm": "m2n2", "archive": 3, "alpha": 0.5, "resource": "one", **switches}
    search, population = compose.make_search(Recipe.from_record(changed(search=part, seed=9)), small_space())
    assert isinstance(search, M2N2)
    assert {name: getattr(search.settings, name) for name in switches} == switches
    assert search.seed == 9
    assert isinstance(population, NicheArchive)
    assert (population.capacity, population.alpha, population.resource) == (3, 0.5, "one")
    assert search.archive is population


# Every setting of each algorithm, none at its default.
SEARCHES: dict[str, dict[str, Any]] = {
    "random": {},
    "cma_es": {"start": -1.0, "sigma": 0.4, "population_size": 5},
    "sep_cma_es": {"start": -1.0, "sigma": 0.4, "population_size": 5},
    "map": {"samples": 17, "front": 3, "margin": 0.3, "caution": 0.5},
    "bayesian_map": {"acquisition": "bins", "patience": 70, "tolerance": 0.5, "paths": 8, "candidates": 64},
    "nsga2": {"population": 6, "crossover": 0.7, "crossover_index": 11.0, "mutation": 0.3, "mutation_index": 12.0},
    "nsga3": {"population": 6, "crossover": 0.7, "crossover_index": 11.0, "mutation": 0.3, "mutation_index": 12.0},
    "optuna": {"sampler": "tpe", "startup": 3, "multivariate": False, "constant_liar": False},
    "optuna-gp": {"sampler": "gp", "startup": 3, "history": 50},
    "optuna-nsga3": {"sampler": "nsga3", "population": 7},
    "optuna-cma_es": {"sampler": "cma_es", "startup": 2, "population": 7, "separable": True},
}


def composed(settings: dict[str, Any]) -> tuple[Any, Any]:
    return compose.make_search(Recipe.from_record(two_objectives(changed(search=settings, seed=9))), small_space())


@pytest.mark.parametrize("kind", SEARCHES)
def test_boxes_and_settings_reach_their_search(kind: str) -> None:
    settings = SEARCHES[kind]
    box = {"granularity": "tensor", "low": -2.0, "high": 0.5, "archive": 4}
    search, population = composed({"algorithm": kind.split("-")[0], **box, **settings})
    points = [trial.genome for trial in search.ask(5)]
    assert all(point.boundaries.tolist() == [0, 5, 12] for point in points)
    assert all(point.coefficients.min() >= -2.0 and point.coefficients.max() <= 0.5 for point in points)
    assert isinstance(population, ElitistArchive)
    assert population.capacity == 4
    assert search.seed == 9
    if isinstance(search, CmaEs):
        assert search.ask(1) == []  # the generation of five is out
        assert type(search._optimiser).__name__ == ("SepCMA" if kind == "sep_cma_es" else "CMA")
    elif kind != "random":
        for name, value in settings.items():
            np.testing.assert_equal(getattr(search.settings, name), value)


@pytest.mark.parametrize("kind", ["nsga2", "optuna"])
def test_the_models_may_come_first(kind: str) -> None:
    search, _ = composed({"algorithm": kind, "low": -1.0})
    first = [trial.genome.coefficients[0].tolist() for trial in search.ask(4)]
    assert first[:3] == [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    search, _ = composed({"algorithm": kind, "low": -1.0, "granularity": "tensor"})
    assert search.ask(1)[0].genome.coefficients.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    search, _ = composed({"algorithm": kind, "low": -1.0, "models_first": False})
    assert [trial.genome.coefficients[0].tolist() for trial in search.ask(3)] != first[:3]


def test_links_samples_and_reference_reach_both_maps() -> None:
    links = {"links": {"one": "softplus"}, "samples": 9}
    search, _ = composed({"algorithm": "map", **links})
    assert (search.links, search.samples) == ({"one": "softplus", "other": "auto"}, 9)
    search, _ = composed({"algorithm": "bayesian_map", **links, "reference": {"other": 0.2, "one": 0.1}})
    assert [link and link.name for link in search.links] == ["softplus", None]
    assert (search.design, search.reference.tolist()) == (9, [0.1, 0.2])
    assert composed({"algorithm": "bayesian_map", "links": "identity"})[0].links[1].name == "identity"


def test_settings_of_nested_map_reach_it() -> None:
    owners = {"one": "b", "other": "a"}
    settings = {"samples": 15, "front": 2, "caution": 0.5, "owners": owners, "preference": {"other": 3.0}}
    search, _ = composed({"algorithm": "nested_map", "links": "identity", **settings})
    assert (search.samples, search.front, search.settings.caution, search.owned) == (15, 2, 0.5, [1, 0])
    assert search.weights[1] == 3 * search.weights[0]
    assert set(search.links.values()) == {"identity"}
    defaults, _ = composed({"algorithm": "nested_map"})
    assert (defaults.samples, defaults.front, defaults.owned) == (12, 4, [0, 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "groups", "groups": 2}, r"search.granularity: nested MAP has one coefficient a model"),
        ({"low": 0.5}, r"search.low and search.high: nested MAP starts from each model by itself"),
        ({"owners": {"one": "c", "other": "a"}}, r"search.owners: .*'c'"),
        ({"preference": {"two": 1.0}}, r"search.preference: .*'two'"),
    ],
)
def test_what_nested_map_refuses_before_the_models_are_known(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked({"algorithm": "nested_map", **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"links": "sigmod"}, r"search.links: there is no link 'sigmod'. Did you mean 'sigmoid'"),
        ({"links": {"ones": "sigmoid"}}, r"search.links: there is no objective 'ones'. Did you mean 'one'"),
        ({"reference": {"one": 0.0}}, r"search.reference: expected a score for each of .*'one', 'other'.*, found"),
    ],
)
def test_what_surrogates_refuse(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        composed({"algorithm": "bayesian_map", **settings})


@pytest.mark.parametrize(
    "search",
    [
        {"algorithm": "map"},
        {"algorithm": "bayesian_map"},
        {"algorithm": "nsga3"},
        {"algorithm": "optuna", "sampler": "nsga3"},
    ],
)
def test_searches_for_a_front_refuse_one_objective(search: dict[str, Any]) -> None:
    message = refusal(changed(search=search))
    assert message == (
        f"objectives.search: {search['algorithm']} looks for a front of two objectives or more, found 1; "
        "for one use algorithm cma_es, or optuna with sampler tpe or gp."
    )


def checked(settings: dict[str, Any], **others: Any) -> Any:
    return compose.check_search(Recipe.from_record(two_objectives(changed(search=settings, **others))))


def test_what_fits_is_known_before_the_models_are() -> None:
    (found,) = checked({"algorithm": "bayesian_map", "granularity": "groups", "groups": 3})
    assert found.coefficients == (3, 2)
    for unknown in ({"algorithm": "bayesian_map", "granularity": "block"}, {"algorithm": "m2n2"}):
        (found,) = checked(unknown)
        assert (found.pair, found.coefficients) == (None, None)


@pytest.mark.parametrize("algorithm", ["map", "bayesian_map"])
def test_a_budget_that_the_samples_use_up(algorithm: str) -> None:
    settings = {"algorithm": algorithm, "samples": 20}
    checked(settings, budget={"evaluations": 21})
    checked(settings, budget={"seconds": 1.0})
    with pytest.raises(InputError, match=r"budget.evaluations: expected more than .*20.* samples .*found 20"):
        checked(settings, budget={"evaluations": 20})


@pytest.mark.parametrize("algorithm", ["map", "bayesian_map"])
def test_a_quadratic_in_too_many_variables(algorithm: str) -> None:
    many = {"granularity": "groups", "groups": 48}
    with pytest.raises(InputError, match=r" 96.*granularity: model.*nsga2"):
        checked({"algorithm": algorithm, **many})
    assert checked({"algorithm": "nsga2", **many})[0].coefficients == (48, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "gp", "multivariate": True}, "search.multivariate: sampler gp has no such setting"),
        ({"sampler": "tpe", "population": 9}, "search.population: sampler tpe has no such setting"),
        ({"sampler": "gp", "granularity": "groups", "groups": 48}, "search.sampler: gp models at most"),
    ],
)
def test_settings_of_another_sampler(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked({"algorithm": "optuna", **settings})


def test_the_schedule_is_that_of_scoring_and_budget() -> None:
    recipe = Recipe.from_record(changed(scoring={"batch": 3, "order": "arrival"}, budget={"seconds": 9.0}))
    schedule = compose.make_schedule(recipe)
    assert (schedule.batch, schedule.in_flight, schedule.order) == (3, 6, "arrival")
    assert (schedule.evaluations, schedule.seconds) == (None, 9.0)
    wider = Recipe.from_record(changed(scoring={"batch": 3, "in_flight": 20}))
    assert compose.make_schedule(wider).in_flight == 20


def test_the_worker_is_told_everything() -> None:
    recipe = Recipe.from_record(FULL | {"merge": {"operator": "task_arithmetic", "dtype": "bfloat16"}})
    spec = compose.worker_spec(recipe, None, ("folder",))
    assert (spec.experts, spec.base) == (("a.safetensors", "b.safetensors"), "base.safetensors")
    assert (spec.operator, spec.names, spec.dtype, spec.dense) == ("task_arithmetic", ("x", "y"), "bfloat16", False)
    assert spec.sys_path == ("folder",)
    (one,), (held_out,) = spec.search, spec.held_out
    assert (one.name, one.type, one.call, one.arguments) == ("one", "call", "m:f", {"x": 1})  # type: ignore[attr-defined]
    assert held_out == AccuracySettings(name="one", data=call("m:data"), batch=64)
    dense = Recipe.from_record(apply_settings(FULL, {"search.mutation": 0.1}))
    assert compose.worker_spec(dense, None).dense


def test_prepared_paths_in_arguments_are_made_whole(tmp_path: Path) -> None:
    arguments = {"data": "prepared:a.safetensors", "n": 3, "more": [{"deep": "prepared:b/c"}, "not prepared:d"]}
    record = changed(prepare={"call": "m:prepare"}, objectives__search__0__arguments=arguments)
    record = apply_settings(
        record,
        {
            "objectives.held_out.0.data.arguments": {"file": "prepared:e"},
            "models.architecture": {"call": "m:a", "arguments": {"config": "prepared:f"}},
        },
    )
    spec = compose.worker_spec(Recipe.from_record(record), tmp_path)
    (one,), (held_out,) = spec.search, spec.held_out
    expected = {"data": f"{tmp_path}/a.safetensors", "n": 3, "more": [{"deep": f"{tmp_path}/b/c"}, "not prepared:d"]}
    assert (one.call, one.arguments) == ("m:f", expected)  # type: ignore[attr-defined]
    assert held_out.data == call("m:data", {"file": f"{tmp_path}/e"})  # type: ignore[attr-defined]
    assert spec.architecture == call("m:a", {"config": f"{tmp_path}/f"})


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("models", {"models.experts.0": "prepared:a"}),
        ("models", {"models.base": "prepared:a"}),
        ("models", {"models.architecture": {"call": "m:f", "arguments": {"x": "prepared:a"}}}),
        ("objectives", {"objectives.search.0.arguments": {"x": ["prepared:a"]}}),
        ("objectives", {"objectives.held_out.0.data.arguments": {"x": {"y": "prepared:a"}}}),
    ],
)
def test_prepared_paths_need_a_preparation(field: str, settings: dict[str, Any]) -> None:
    message = refusal(apply_settings(PLAIN, settings))
    assert message == f"{field}: paths begin with 'prepared:' but the recipe has no `prepare` step."


# -- preparation ---------------------------------------------------------------------------------------------

MODULE = """
from pathlib import Path

from ecotone.populations.errors import CheckpointError

def write(directory, seed=0, fail=False, lacking=False):
    Path(directory, "half").write_text("x")
    if lacking:
        raise CheckpointError("data: not installed.", "Install it.")
    if fail:
        raise RuntimeError("no power")
    Path(directory, "seed").write_text(str(seed))

def seedless(directory):
    Path(directory, "made").write_text("x")
"""


@pytest.fixture
def preparing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from settings to a recipe that prepares with the module above, in a cache of its own."""
    (tmp_path / "preparing_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "preparing_module", raising=False)
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    return lambda **settings: Recipe.from_record(changed(prepare={"call": "preparing_module:write"}, **settings))


def test_preparation_is_done_once_and_depends_on_its_arguments(preparing: Any) -> None:
    first = preparation.prepare(preparing(seed=4))
    assert first is not None
    assert (first / "seed").read_text() == "4"
    (first / "seed").write_text("touched")
    assert preparation.prepare(preparing(seed=4)) == first
    assert (first / "seed").read_text() == "touched"
    second = preparation.prepare(preparing(seed=5))
    assert second not in (None, first)
    given = preparation.prepare(preparing(seed=5, prepare__arguments={"seed": 1}))
    assert given is not None
    assert (given / "seed").read_text() == "1"
    seedless = preparation.prepare(preparing(prepare__call="preparing_module:seedless"))
    assert seedless == preparation.prepare(preparing(prepare__call="preparing_module:seedless", seed=77))


def test_recipes_of_one_step_share_what_it_writes(preparing: Any) -> None:
    first = preparation.prepare(preparing(name="first"))
    assert first is not None
    assert preparation.prepare(preparing(name="second")) == first
    own = first.with_name(first.name.replace("first-", "second-"))
    first.rename(own)
    assert preparation.prepared_folder(preparing(name="first")) == own
    own.rename(first)
    own.mkdir()
    assert preparation.prepare(preparing(name="second")) == own
    assert preparation.prepare(preparing(name="first")) == first
    assert preparation.prepare(preparing(name="second", seed=1)) not in (first, own)


def test_an_edited_preparation_runs_again(preparing: Any, tmp_path: Path) -> None:
    before = preparation.prepare(preparing())
    (tmp_path / "preparing_module.py").write_text(MODULE.replace("str(seed)", "f'edited {seed}'"))
    sys.modules.pop("preparing_module")
    importlib.invalidate_caches()
    linecache.checkcache()
    after = preparation.prepare(preparing())
    assert after is not None
    assert after != before
    assert (after / "seed").read_text() == "edited 0"


def test_a_preparation_that_fails_leaves_nothing(preparing: Any, tmp_path: Path) -> None:
    recipe = preparing(prepare__arguments={"fail": True})
    with pytest.raises(InputError, match="prepare: preparing_module:write failed: RuntimeError: no power"):
        preparation.prepare(recipe)
    assert not [path for path in (tmp_path / "cache" / "prepared").iterdir() if path.is_dir()]


def test_a_preparation_says_itself_what_it_lacks(preparing: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        preparation.prepare(preparing(prepare__arguments={"lacking": True}))
    assert (caught.value.message, caught.value.remedy) == ("prepare: data: not installed.", "Install it.")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("preparing_module:wirte", "Did you mean 'write'"),
        ("preparing_modul:write", "no module named 'preparing_modul'"),
        ("preparing_module.write", "expected 'package.module:function'"),
    ],
)
def test_a_preparation_that_cannot_be_found(preparing: Any, call: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        preparation.prepare(preparing(prepare__call=call))


def test_a_recipe_without_preparation_has_no_folder() -> None:
    assert preparation.prepare(Recipe.from_record(PLAIN)) is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"runtime.workers": 2}, ""),
        ({"runtime.workers": 8, "scoring": {"batch": 4, "in_flight": 32}}, ""),
        ({"runtime.workers": 8, "runtime.pool": "serial"}, ""),
        ({"runtime.workers": 3}, "2 of 3 workers have work at a time: scoring.in_flight is 16, scoring.batch 8. "),
        ({"runtime.workers": 8, "scoring": {"batch": 4, "in_flight": 7}}, "1 of 8 workers have work at a time: "),
    ],
)
def test_workers_without_work_are_told_of(settings: dict[str, Any], expected: str) -> None:
    found = compose.unused_workers(Recipe.from_record(apply_settings(changed(), settings)))
    assert found.startswith(expected)
    assert bool(found) == bool(expected)
    if found:
        batch = settings.get("scoring", {}).get("batch", 8)
        assert found.endswith(f"An in_flight of {2 * settings['runtime.workers'] * batch} or so keeps all busy.")
