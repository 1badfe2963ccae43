"""The schema of a recipe, and fields in words: the schema takes what a recipe takes, and every field has a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ecotone.experiments import words
from ecotone.experiments.fields import STAGE, everything, explained_path, page, schema
from ecotone.experiments.recipe import Recipe, apply_settings
from ecotone.populations.errors import InputError

RECIPES = sorted((Path(__file__).parent.parent / "experiments" / "recipes").glob("*.yaml"))
PLAIN = yaml.safe_load((Path(__file__).parent.parent / "experiments/recipes/digits-specialists.yaml").read_text())
STAGES = [{"algorithm": "bayesian_map", "evaluations": 60}, {"algorithm": "cma_es", "start": "best", "starts": 2}]


@pytest.fixture(scope="module")
def complaints() -> Any:
    """What the schema says against a record."""
    check = pytest.importorskip("jsonschema").Draft202012Validator(schema())
    return lambda record: [f"{list(one.path)}: {one.message}" for one in check.iter_errors(record)]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_schema_takes_every_recipe_of_ours(complaints: Any, file: Path) -> None:
    assert complaints(yaml.safe_load(file.read_text())) == []


ACCEPTED = {
    "stages": {"search": STAGES},
    "a number where a stage's search begins": {"search": [{"algorithm": "cma_es", "start": 0.3}]},
    "a solved merge to begin with": {"search": {"algorithm": "nsga2", "start": {"solve": "lines", "alpha": 0.2}}},
    "several": {"search": {"algorithm": "cma_es", "start": {"solve": ["karcher"]}}},
    "several of a stage": {"search": [{"algorithm": "nsga2", "start": {"solve": ["average", {"solve": "one_shot"}]}}]},
    "the default search": {"search": {"archive": 5}},
    "an operator's setting": {"merge": {"operator": "ties", "density": 0.3}},
    "bounds": {"search": {"algorithm": "cma_es"}, "merge": {"operator": "ties", "density": {"low": 0.1, "high": 0.3}}},
    "no wandb": {"tracking": {"wandb": False}},
}
REFUSED = {
    "no stage": {"search": []},
    "a stage's mistyped key": {"search": [{"algorithm": "cma_es", "evaluationz": 60}]},
    "a stage that begins with something else": {"search": [STAGES[0], {"algorithm": "nsga2", "start": "bestt"}]},
    "a mistyped solver": {"search": {"algorithm": "nsga2", "start": {"solve": "averag"}}},
    "a mistyped solver in a list": {"search": {"algorithm": "nsga2", "start": {"solve": ["averag"]}}},
    "another solver's setting": {"search": {"algorithm": "nsga2", "start": {"solve": "average", "alpha": 0.2}}},
    "a number where a search takes solvers alone": {"search": {"algorithm": "nsga2", "start": 0.3}},
    "stages as a mapping": {"search": {"stages": [{"search": STAGES[0]}]}},
    "a field of another search": {"search": {"algorithm": "random", "split": "uniform"}},
    "a field that the default search lacks": {"search": {"generation": 5}},
    "another operator's setting": {"merge": {"operator": "linear", "density": 0.3}},
    "a setting that the default operator lacks": {"merge": {"density": 0.3}},
}


def is_taken(record: dict[str, Any]) -> bool:
    try:
        Recipe.from_record(record)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("case", [*ACCEPTED, *REFUSED])
def test_the_schema_takes_what_a_recipe_takes(complaints: Any, case: str) -> None:
    record = {**PLAIN, **(ACCEPTED | REFUSED)[case]}
    assert is_taken(record) == (case in ACCEPTED)
    assert (complaints(record) == []) == (case in ACCEPTED)


def test_every_field_has_a_text_and_is_on_the_page() -> None:
    fields, written = everything(), page()
    assert len(fields) > 150
    assert [field.path for field in fields if not field.text] == []
    assert [field.path for field in fields if f"`{field.path}`" not in written] == []


@pytest.mark.parametrize("path", ["search.evaluations", "search.starts", "search.1.start"])
def test_the_keys_of_a_stage_are_explained(path: str) -> None:
    assert ("stage",) in [field.kinds for field in explained_path(path)]


def test_the_bounds_of_a_setting_that_is_searched_are_explained() -> None:
    (low,) = {field.text for field in explained_path("merge.density.low")}
    assert low
    with pytest.raises(InputError, match="no field of a recipe has that path"):
        explained_path("merge.scope.low")


def test_a_path_that_no_field_has_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no field of a recipe has that path\. Did you mean 'search\.archive'"):
        explained_path("search.archiv")


@pytest.mark.parametrize("path", ["objectives.search[0].name", "objectives.search.0.name"])
def test_positions_are_written_as_in_messages(path: str) -> None:
    assert {field.path for field in explained_path(path)} == {"objectives.search.name"}


@pytest.mark.parametrize(
    ("path", "begin"),
    [
        ("qqqqqqqqqqqqqq", "Fields of a recipe: name, models, "),
        ("budget.qqqqqqqqqqqqqqq", "Fields of budget: evaluations, seconds."),
        ("tracking.wandb.qqqqqqqqqqqqqqq.z", "Fields of tracking.wandb: project, "),
        ("tracking.qqqqqqqqqqqqqqq.folder", "Fields of tracking: uri, experiment, mlflow, wandb"),
    ],
)
def test_a_path_like_no_other_gets_the_fields_of_its_part(path: str, begin: str) -> None:
    with pytest.raises(InputError) as caught:
        explained_path(path)
    assert caught.value.remedy.startswith(begin)
    assert len(caught.value.remedy) < 250


DEFAULTS = {
    "objectives.search.type": {"required": True},
    "calibration.loss": {'"entropy"': ("entropy",), "required": True},
    "search.algorithm": {'"m2n2"': ("m2n2",), "required": True},
    "search.start": {"none": True, "front, where the algorithm can begin with given merges": STAGE},
    "search": {"algorithm: m2n2": ()},
    "scoring": {"backend: resident": ()},
    "merge": {"the defaults of its fields": ()},
}


@pytest.mark.parametrize("path", DEFAULTS)
def test_the_default_is_what_holds_when_a_field_is_not_given(path: str) -> None:
    told = explained_path(path)
    assert {field.default for field in told} == set(DEFAULTS[path])
    kinds = {default: kinds for default, kinds in DEFAULTS[path].items() if kinds is not True}
    assert {field.default: field.kinds for field in told if field.default in kinds} == kinds


@pytest.mark.parametrize("path", ["search.algorithm", "calibration.loss", "objectives.search.type"])
def test_the_page_says_the_same_defaults(path: str) -> None:
    lines = [line for line in page().splitlines() if line.startswith(f"| `{path}` |")]
    assert len([line for line in lines if "| `required` |" not in line]) == ("objectives" not in path)


def test_types_that_are_hard_to_say() -> None:
    (merge,) = explained_path("merge")
    (stage,) = [field for field in explained_path("search.start") if field.kinds == STAGE]
    assert (merge.type, stage.type) == ("a mapping of the fields below", "one of front, best, archive, none")


@pytest.mark.parametrize("key", [3, None, True])
def test_keys_of_merge_that_are_no_text(key: Any) -> None:
    with pytest.raises(InputError, match=f"merge.*keys should be strings, found {key!r}"):
        Recipe.from_record(apply_settings(PLAIN, {"merge": {"operator": "ties", key: 4}}))


@pytest.mark.parametrize(("version", "said"), [("9.0.0", True), ("0.2.0", True), ("0.1.9", False), ("", False)])
def test_a_record_of_a_newer_ecotone_is_said_to_be_one(monkeypatch: Any, version: str, said: bool) -> None:
    monkeypatch.setattr(words, "version", lambda package: "0.1.3")
    with pytest.raises(InputError, match=r"budget\.future: unknown key") as caught:
        Recipe.read_back({**PLAIN, "budget": {"future": 3}}, version)
    assert (f"Ecotone {version} wrote this" in str(caught.value)) == said


@pytest.mark.parametrize("record", [3, {**PLAIN, "tracking": 3}])
def test_a_damaged_record_is_refused_in_words(record: Any) -> None:
    with pytest.raises(InputError, match="expected a mapping, found"):
        Recipe.read_back(record, "")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("objectives.search", [], "objectives.search: expected a list of 1 or more, found 0."),
        ("objectives.search", 3, "objectives.search: expected a list, found 3."),
        ("prepare.arguments", 3, "prepare.arguments: expected a mapping, found 3."),
    ],
)
def test_lists_and_mappings_are_called_so(field: str, value: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        Recipe.from_record(apply_settings(PLAIN, {field: value}))
    assert words in str(caught.value)
