"""Models, code and data that change between the parts of a run: told, refused, and accepted where the user says so."""

import json
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from ecotone.experiments import changes, compose, report
from ecotone.experiments.checks import validate
from ecotone.experiments.exports import export, verify
from ecotone.experiments.fingerprints import fingerprints
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch, resume
from ecotone.experiments.runs import Run
from ecotone.experiments.tracking.subject import Subject
from ecotone.populations import facts
from ecotone.populations.errors import InputError
from ecotone.populations.journal import Journal

METRICS = """
import json
from pathlib import Path
from helpers.scale import scaled

def near(model, data, log=None):
    # The nearness of the weights to numbers of a file.
    wanted = [json.loads(line)["x"] for line in open(data)]
    if log:
        with open(log, "a") as file: file.write("called\\n")
    vector = model["w"].numpy().ravel()
    bias = json.loads(Path(__file__).with_name("bias.json").read_text())
    return scaled(1 / (1 + float(((vector[: len(wanted)] - wanted) ** 2).mean()))) + bias
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A recipe with a function in a file beside it, its helper, and data; three models."""
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "__init__.py").write_text("")
    (tmp_path / "helpers" / "scale.py").write_text("def scaled(value): return 2 * value\n")
    (tmp_path / "metrics.py").write_text(METRICS)
    (tmp_path / "data.jsonl").write_text('{"x": 0.5}\n{"x": -0.5}\n')
    (tmp_path / "bias.json").write_text("0")
    for seed, name in enumerate(("left", "right")):
        save_file(
            {"w": np.random.default_rng(seed).standard_normal((4, 3)).astype(np.float32)},
            tmp_path / f"{name}.safetensors",
        )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(("helpers", "_ecotone_file_"))]:
        del sys.modules[name]


def recipe_of(folder, evaluations=8, algorithm="cma_es", **others):
    score = {
        "name": "near",
        "type": "call",
        "call": "./metrics.py:near",
        "arguments": {"data": str(folder / "data.jsonl")},
    }
    record = {
        "name": "toy",
        "models": {"experts": ["left.safetensors", "right.safetensors"]},
        "objectives": {"search": [score]},
        "search": {"algorithm": algorithm},
        "scoring": {"batch": 4, "in_flight": 4},
        "budget": {"evaluations": evaluations},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
        **others,
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(record))
    return Recipe.from_yaml(path)


def begun(folder, **others):
    """A run of half its budget."""
    launch(recipe_of(folder, **others), folder / "run")
    return folder / "run"


def longer(run, evaluations=16, **others):
    return resume(run, {"budget.evaluations": evaluations}, **others)


def append(path, text="# changed\n"):
    with path.open("a") as file:
        file.write(text)


def reversed_rows(path):
    """A model whose inner products are those of before: the rows of all models are reversed."""
    for name in ("left", "right"):
        file = path.with_name(f"{name}.safetensors")
        save_file({"w": np.ascontiguousarray(load_file(file)["w"][::-1])}, file)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# -- resume ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("metrics.py", append, r"objectives\.search\.near: metrics\.py has changed since the run began \(was"),
        slow("helpers/scale.py", append, r"objectives\.search\.near: scale\.py has changed since the run began"),
        slow(
            "data.jsonl", lambda path: append(path, '{"x": 0}\n'), r"objectives\.search\.near: data\.jsonl has changed"
        ),
        slow("bias.json", lambda path: path.write_text("1"), r"objectives\.search\.near: bias\.json has changed"),
        ("left.safetensors", reversed_rows, r"models\.experts\[0\]: left\.safetensors has changed .* \(and 1 more"),
    ],
)
def test_a_change_is_refused_by_name(folder, tmp_path_factory, name, change, words):
    kept = tmp_path_factory.mktemp("kept") / "all"
    run = begun(folder)
    shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("run"))
    change(folder / name)
    with pytest.raises(InputError, match=words) as error:
        longer(run)
    assert "--accept-changes" in error.value.remedy
    with pytest.raises(InputError, match=words.partition(" has")[0]):
        export(Run(run), "best", folder / "merged")
    assert not (folder / "merged").exists()
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    assert longer(run).status()["evaluations"] == 16
    assert export(Run(run), "best", folder / "merged").is_dir()


@pytest.mark.slow
def test_a_copy_elsewhere_and_new_times_are_no_change(folder):
    run = begun(folder)
    for file in (*folder.glob("*.safetensors"), folder / "metrics.py"):
        shutil.copyfile(file, folder / "copy")
        (folder / "copy").replace(file)
    assert longer(run).status()["accepted_changes"] == []


@pytest.mark.slow
def test_files_that_the_function_writes_are_none(folder):
    objective = recipe_of(folder).objectives.search[0].model_dump()
    objective["arguments"]["log"] = str(folder / "calls.jsonl")
    (folder / "calls.jsonl").write_text("before\n")
    run = begun(folder, objectives={"search": [{**objective, "call": "./metrics.py:near"}]})
    assert longer(run).status()["evaluations"] == 16


def test_accepted_changes_are_told_from_then_on(folder):
    run, said = begun(folder), []
    with Run(run).journal() as journal:
        before = [(row.number, row.scores) for row in journal.rows()]
    append(folder / "helpers" / "scale.py", "def scaled(value): return 3 * value\n")
    append(folder / "data.jsonl", '{"x": 0}\n')
    done = longer(run, accept_changes=True, notify=said.append)
    assert any("accepted: objectives.search.near: scale.py has changed" in text for text in said)
    with done.journal() as journal:
        assert [(row.number, row.scores) for row in journal.rows()][:8] == before
        accepted = journal.fact(facts.ACCEPTED)
    assert [(one["file"], one["evaluations"], one["command"]) for one in accepted] == [
        ("scale.py", 8, "resume"),
        ("data.jsonl", 8, "resume"),
    ]
    longer(run, 20)  # what was accepted is not asked for again
    words = "objectives.search.near: scale.py has changed since the run began"
    assert words in Run(run).status()["accepted_changes"][0]
    assert words in report.accepted_lines(done)[0]
    with done.journal() as journal:
        assert words in Subject.of(journal, run).tags["ecotone.accepted_changes"]
    export(done, "best", folder / "merged")
    assert json.loads((folder / "merged" / "ecotone.json").read_text())["accepted_changes"] == accepted
    assert words in (folder / "merged" / "README.md").read_text()


@pytest.mark.slow
def test_accepted_models_are_searched_on_with(folder):
    run = begun(folder)
    reversed_rows(folder / "left.safetensors")
    done = longer(run, accept_changes=True)
    assert len(done.status()["accepted_changes"]) == 2
    longer(run, 20)
    begun_again = folder / "another"
    launch(recipe_of(folder, algorithm="m2n2"), begun_again)
    reversed_rows(folder / "left.safetensors")
    with pytest.raises(InputError, match="m2n2 proposes merges by the models' weights"):
        longer(begun_again, accept_changes=True)


def test_an_export_may_accept_a_change(folder):
    run = begun(folder)
    append(folder / "metrics.py")
    export(Run(run), "best", folder / "merged", accept_changes=True)
    record = json.loads((folder / "merged" / "ecotone.json").read_text())
    assert [one["command"] for one in record["accepted_changes"]] == ["export"]
    assert len(Run(run).status()["accepted_changes"]) == 1
    assert verify(folder / "merged")[0].difference == 0
    export(Run(run), "best", folder / "merged.safetensors")  # once is enough


@pytest.mark.slow
def test_an_export_is_not_compared_by_other_code(folder):
    run = begun(folder)
    export(Run(run), "best", folder / "merged")
    append(folder / "helpers" / "scale.py")
    with pytest.raises(InputError, match=r"objectives\.search\.near: scale\.py has changed since the run began"):
        verify(folder / "merged")


@pytest.mark.slow
def test_an_older_journal_is_compared_by_inner_products(folder):
    run = begun(folder)
    lacking = (facts.CONTENTS, facts.FINGERPRINTS, facts.FORMAT_OF, facts.CREATED)
    with Journal.open(run / "journal.sqlite") as journal:
        known = {fact: journal.fact(fact) for fact in facts.FACTS if fact not in lacking}
    (run / "journal.sqlite").unlink()
    # As if by a version that noted no hashes, killed before its first trial.
    Journal.create(
        run / "journal.sqlite", [fact.note(value) for fact, value in known.items() if value is not None]
    ).close()
    append(folder / "metrics.py")
    longer(run)
    with Run(run).journal() as journal:
        assert set(journal.fact(facts.CONTENTS)) == {"models.experts[0]", "models.experts[1]"}
        assert "metrics.py" in journal.fact(facts.FINGERPRINTS)["objectives.search.near"]


@pytest.mark.slow
def test_other_versions_are_told(folder, monkeypatch):
    run, said = begun(folder), []
    monkeypatch.setattr(compose, "versions", lambda: {"numpy": "0.1"})
    longer(run, notify=said.append)
    assert any(re.search(r"other versions than when the run began: .*numpy \S+ -> 0\.1", text) for text in said)


# -- fingerprints ---------------------------------------------------------------------------------------------


def found_in(folder, **others):
    recipe = recipe_of(folder, **others)
    return fingerprints(recipe, compose.worker_spec(recipe, None, (str(folder),)))


def test_code_data_and_what_code_imports(folder):
    record = found_in(folder)
    assert record.keys() == {"objectives.search.near"}
    assert {name: one["sort"] for name, one in record["objectives.search.near"].items()} == {
        "metrics.py": "code",
        "__init__.py": "code",
        "scale.py": "code",
        "data.jsonl": "data",
        "bias.json": "data",
    }


def test_a_moved_folder_has_the_same_fingerprints(folder, tmp_path_factory, monkeypatch):
    here = found_in(folder)
    there = tmp_path_factory.mktemp("there")
    shutil.copytree(folder, there, dirs_exist_ok=True)
    monkeypatch.chdir(there)
    assert changes.code_changes(here, found_in(there)) == []


def test_folders_of_data_heads_and_lm_eval_tasks(folder):
    pytest.importorskip("lm_eval")
    (folder / "images" / "cats").mkdir(parents=True)
    (folder / "images" / "cats" / "1.png").write_bytes(b"png")
    (folder / "head.safetensors").write_bytes(b"head")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "base.yaml").write_text("dataset_path: json\ndataset_kwargs: {data_files: questions.jsonl}\n")
    (folder / "tasks" / "mine.yaml").write_text(
        "task: mine\ninclude: base.yaml\nprocess_docs: !function more.documents\n"
    )
    (folder / "tasks" / "other.yaml").write_text("task: other\n")
    (folder / "tasks" / "more.py").write_text("def documents(all): return all\n")
    (folder / "questions.jsonl").write_text("{}\n")
    (folder / "tok").mkdir()
    search = [
        {
            "name": "images",
            "type": "accuracy",
            "data": {"call": "./metrics.py:near", "arguments": {"data": f"{folder}/images"}},
            "head": {"call": "./metrics.py:near", "arguments": {"file": "head.safetensors", "odd": ["~no/x", "", "/"]}},
        },
        {"name": "mine", "type": "lm_eval", "task": "mine", "folder": "tasks", "allow_code": True},
    ]
    models = {
        "experts": ["left.safetensors", "right.safetensors"],
        "architecture": {"call": "./metrics.py:near"},
        "tokenizer": "tok",
    }
    record = found_in(folder, objectives={"search": search}, models=models)
    assert {"1.png", "head.safetensors"} <= record["objectives.search.images"].keys()
    assert record["objectives.search.mine"].keys() == {"base.yaml", "mine.yaml", "more.py", "questions.jsonl"}
    assert "metrics.py" in record["models.architecture"]


def test_a_plug_ins_module_counts(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    (folder / "plugged.py").write_text(
        "from typing import Literal\n"
        "from ecotone.fitness.objectives import AccuracySettings\n"
        "import helpers.scale\n"
        "class Mine(AccuracySettings):\n"
        '    """Mine.\n\n    Attributes:\n        type: Mine.\n    """\n'
        "    type: Literal['mine'] = 'mine'\n"
    )
    import plugged

    settings = plugged.Mine(name="m", data={"call": "./metrics.py:near"})
    recipe = recipe_of(folder)
    spec = replace(compose.worker_spec(recipe, None, ()), search=(settings,))
    files = fingerprints(recipe, spec)["objectives.search.m"]
    assert {"plugged.py", "scale.py"} <= files.keys()
    del sys.modules["plugged"]


def test_validate_tells_the_hashes(folder):
    told = {one.subject: one.text for one in validate(recipe_of(folder))}
    assert re.fullmatch(r"1 file, 1\d\d bytes, xxh3_128 [0-9a-f]{32}", told["contents of models.experts[0]"])
    assert re.fullmatch(r"\d+ bytes hashed in \S+ s; of these 0 bytes were remembered", told["contents"])
    assert re.search(r"metrics\.py [0-9a-f]{12}, ", told["files of objectives.search.near"])
