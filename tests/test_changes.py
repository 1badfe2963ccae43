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

from ecotone.experiments import changes, compose, named, report
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
from ecotone.populations.sums import FACTS

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
        slow(
            "helpers/scale.py", append, r"objectives\.search\.near: helpers/scale\.py has changed since the run began"
        ),
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
    assert any("accepted: objectives.search.near: helpers/scale.py has changed" in text for text in said)
    with done.journal() as journal:
        assert [(row.number, row.scores) for row in journal.rows()][:8] == before
        accepted = journal.fact(facts.ACCEPTED)
    assert [(one["file"], one["evaluations"], one["command"]) for one in accepted] == [
        ("helpers/scale.py", 8, "resume"),
        ("data.jsonl", 8, "resume"),
    ]
    longer(run, 20)  # what was accepted is not asked for again
    words = "objectives.search.near: helpers/scale.py has changed since the run began"
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
    with pytest.raises(
        InputError, match=r"objectives\.search\.near: helpers/scale\.py has changed since the run began"
    ):
        verify(folder / "merged")


@pytest.mark.slow
def test_an_older_journal_is_compared_by_inner_products(folder):
    run = begun(folder)
    with Journal.open(run / "journal.sqlite", write=True) as journal, journal.transaction():
        for fact in (facts.CONTENTS, facts.FINGERPRINTS):
            journal._rows_of.drop(journal._connection, FACTS, (fact.name,))
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
        "helpers/__init__.py": "code",
        "helpers/scale.py": "code",
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
    assert {"images/cats/1.png", "head.safetensors"} <= record["objectives.search.images"].keys()
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
    assert {"plugged.py", "helpers/scale.py"} <= files.keys()
    del sys.modules["plugged"]


def test_validate_tells_the_hashes(folder):
    told = {one.subject: one.text for one in validate(recipe_of(folder))}
    assert re.fullmatch(r"1 file, 1\d\d bytes, xxh3_128 [0-9a-f]{32}", told["contents of models.experts[0]"])
    assert re.fullmatch(r"\d+ bytes hashed in \S+ s; of these 0 bytes were remembered", told["contents"])
    assert re.search(r"metrics\.py [0-9a-f]{12}, ", told["files of objectives.search.near"])


# -- data that code names -----------------------------------------------------------------------------------------

TOLD = """
import argparse, importlib, json, os
from pathlib import Path
HERE = Path(__file__).parent
"""


def written_into(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def files_of(folder, body, files=(), arguments=None):
    """The names of the files that a function of that body depends on."""
    written_into(folder, dict.fromkeys(files, "1") | {"m.py": TOLD + body})
    score = {"name": "s", "type": "call", "call": "./m.py:score", "arguments": arguments or {}}
    return found_in(folder, objectives={"search": [score]})["objectives.search.s"].keys() - {"m.py"}


@pytest.mark.parametrize(
    ("body", "file", "arguments"),
    [
        ('def score(m): return open(HERE / "data" / "q.jsonl")', "data/q.jsonl", {}),
        ('def score(m): return (HERE / "q.txt").read_text()', "q.txt", {}),
        ('def score(m): return load(HERE / "q.pt")', "q.pt", {}),
        ('def score(m): return importlib.import_module("dynhelp").f(m)', "dynhelp.py", {}),
        ("def score(m, kind): return importlib.import_module(kind).f(m)", "dynhelp.py", {"kind": "dynhelp"}),
        ('def score(m, folder): return list((HERE / folder).glob("*"))', "d2/1.dat", {"folder": "d2"}),
        ("def score(m, parts): return load(HERE / 'd3' / parts[0][1])", "d3/deep/w.dat", {"parts": [["a", "w.dat"]]}),
        ('def score(m): return open(os.path.join(os.path.dirname(__file__), "data", "q.db"))', "data/q.db", {}),
        ('def score(m): return open(f"{HERE}/data/q.md")', "data/q.md", {}),
        ('def score(m, split): return open(f"{HERE}/{split}.jsonl")', "test.jsonl", {"split": "test"}),
        ('def score(m, n): return open(HERE / "parts" / f"{n}.bin")', "parts/3.bin", {"n": 3}),
        ('def score(m): return open(str(HERE) + "/data/q.csv")', "data/q.csv", {}),
        ('def score(m): return open("data/%s.gz" % "a")', "data/a.gz", {}),
        ('def score(m): return sorted(HERE.glob("*.lst"))', "one.lst", {}),
        ('def score(m): return open(Path(__file__).with_suffix(".words"))', "m.words", {}),
        ('def score(m):\n    x = load(HERE / "q.npy")\n    save("kept", x)', "q.npy", {}),
        ('def make(): (HERE / "q.txt").write_text("1")\ndef score(m): return open(HERE / "q.txt")', "q.txt", {}),
        ('def score(m): return open(HERE / "vocabulary")', "vocabulary", {}),
    ],
)
def test_the_data_that_code_names(folder, body, file, arguments):
    assert file in files_of(folder, body, [file], arguments)
    before = found_in(folder, objectives={"search": [{**RECIPES, "arguments": arguments}]})
    (folder / file).write_text("2")
    after = found_in(folder, objectives={"search": [{**RECIPES, "arguments": arguments}]})
    assert [change.file for change in changes.code_changes(before, after)] == [file]


RECIPES = {"name": "s", "type": "call", "call": "./m.py:score"}


@pytest.mark.parametrize(
    ("body", "file", "arguments"),
    [
        ('def score(m):\n    "q.txt"\n    return 1', "q.txt", {}),
        ('def score(m):\n    print("q.txt")\n    raise ValueError("q.txt")', "q.txt", {}),
        ("def score(m): return 1", "README.md", {}),
        (f"LONG = {'a long text, ' * 60!r}", "README.md", {"prompt": "q: {} " * 60}),
        ('def score(m):\n    with open(HERE / "m.log", "a") as f: f.write("x")', "m.log", {}),
        ('def score(m):\n    (HERE / "results.json").write_text("x")', "results.json", {}),
        ('LOG = HERE / "m.jsonl"\ndef score(m):\n    with LOG.open("a") as f: f.write("x")', "m.jsonl", {}),
        (
            'def score(m):\n    p = HERE / "b.json"\n    b = p.read_text() if p.exists() else 0\n    p.write_text("1")',
            "b.json",
            {},
        ),
        ('def score(m): return m["results"]', "results/x.json", {}),
        ('def score(m): return m["data"] if "data" in m else 1', "data/x.json", {}),
        ('def score(m): return 1\nif __name__ == "__main__":\n    p = "results.json"', "results.json", {}),
        ('def score(m): return "data"', "data/.hidden/x.json", {}),
        ('def score(m): return "data"', "data/__pycache__/x.pyc", {}),
        ('def score(m): return "data"', "data/.ipynb_checkpoints/m-checkpoint.ipynb", {}),
        ('def score(m): return "q.json"', "out/x/q.json", {}),
        ('def score(m): return "q.json"', "env/lib/q.json", {}),
        ("def score(m, out): return 1", "results/x.json", {"out": "results"}),
        ('def score(m): return "left.safetensors"', "left.safetensors", {}),
    ],
)
def test_what_is_no_data(folder, body, file, arguments):
    written_into(folder, {"out/x/journal.sqlite": "", "env/pyvenv.cfg": ""})
    assert files_of(folder, body, [file], arguments) == set()


def test_data_above_the_code_and_in_the_working_directory(folder, monkeypatch):
    written_into(folder, {"src/m.py": TOLD + 'def score(m): return HERE.parent / "data" / "q.txt", open("in/cwd.txt")'})
    written_into(folder, {"data/q.txt": "1", "elsewhere/in/cwd.txt": "1"})
    (folder / "elsewhere").mkdir(exist_ok=True)
    score = {**RECIPES, "call": f"{folder}/src/m.py:score"}
    recipe = recipe_of(folder, objectives={"search": [score]})
    monkeypatch.chdir(folder / "elsewhere")
    found = fingerprints(recipe, compose.worker_spec(recipe, None, (str(folder),)))["objectives.search.s"]
    assert found.keys() == {"m.py", "q.txt", "cwd.txt"}


def test_new_files_rename_none_and_walks_are_bounded(folder, monkeypatch, caplog):
    body, objectives = 'def score(m): return open(HERE / "q.txt"), open("gone.txt")', {"search": [RECIPES]}
    assert files_of(folder, body, ["q.txt", "a/b/gone.txt"]) == {"q.txt", "a/b/gone.txt"}
    before = found_in(folder, objectives=objectives)
    written_into(folder, {"other/q.txt": "1", "other/deep/q.txt": "2"})
    assert changes.code_changes(before, found_in(folder, objectives=objectives)) == []
    monkeypatch.setattr(named, "WALKED", 8)
    cut = found_in(folder, objectives=objectives)
    assert "a/b/gone.txt" not in cut["objectives.search.s"]
    assert changes.code_changes(before, cut) == []
    assert "'gone.txt' may name data below" in caplog.text


def test_of_a_folder_of_many_files_the_first_count(folder, monkeypatch, caplog):
    objectives = {"search": [RECIPES]}
    files_of(folder, 'def score(m): return HERE / "data"', [f"data/{number}.txt" for number in (3, 4, 5)])
    monkeypatch.setattr(named, "LISTED", 3)
    before = found_in(folder, objectives=objectives)
    assert not caplog.text
    written_into(folder, {"data/1.txt": "1", "data/3.txt": "2"})
    after = found_in(folder, objectives=objectives)
    assert after["objectives.search.s"].keys() == {"m.py", "data/1.txt", "data/3.txt", "data/4.txt"}
    assert [one.file for one in changes.code_changes(before, after)] == ["data/3.txt"]
    assert "has more than 3 files" in caplog.text


def test_of_much_data_that_code_names_the_sizes_count(folder, monkeypatch):
    objectives = {"search": [RECIPES]}
    files_of(folder, 'def score(m): return HERE / "data"', ["data/small.txt"])
    written_into(folder, {"data/large.txt": "1" * 1000})
    before = found_in(folder, objectives=objectives)
    monkeypatch.setattr("ecotone.experiments.fingerprints.READ_BYTES", 500)
    assert changes.code_changes(before, found_in(folder, objectives=objectives)) == []
    written_into(folder, {"data/large.txt": "1" * 1001, "data/small.txt": "2"})
    found = changes.code_changes(before, found_in(folder, objectives=objectives))
    assert {one.file for one in found} == {"data/small.txt", "data/large.txt"}


@pytest.mark.slow
def test_a_run_below_the_code_goes_on_after_ordinary_work(folder):
    body = (
        '\ndef score(m):\n    with open(HERE / "calls.jsonl", "a") as f: f.write("x")\n'
        '    cache = HERE / "store"\n    return float((HERE / "data" / "q.txt").read_text())\n'
        'NAMES = ["store", "out"]\n'
    )
    written_into(folder, {"m.py": TOLD + body, "data/q.txt": "1", "store/1.json": "1", "README.md": "1"})
    recipe = recipe_of(folder, objectives={"search": [RECIPES]})
    launch(recipe, folder / "out" / "x")
    written_into(folder, {"README.md": "2", "data/.ipynb_checkpoints/q.txt": "3", "data/new.txt": "4", "out/y.txt": ""})
    assert resume(folder / "out" / "x", {"budget.evaluations": 12}).status()["evaluations"] == 12
    (folder / "data" / "q.txt").write_text("5")
    with pytest.raises(InputError, match=r"objectives\.search\.s: data/q\.txt has changed since the run began"):
        resume(folder / "out" / "x", {"budget.evaluations": 16})


def test_other_working_directories_are_no_change_and_hide_none(folder, tmp_path_factory, monkeypatch):
    """Files there have the names of data, of a split and of a helper."""
    other = tmp_path_factory.mktemp("other")
    (folder / "helpers" / "scale.py").write_text("from numbers_of import scaled as scaled\n")
    (folder / "numbers_of.py").write_text("def scaled(value, split='test'): return 2 * value\n")
    (other / "numbers_of").mkdir()
    for name in ("bias.json", "data.jsonl", "test", "near", "numbers_of/__init__.py", "numbers_of/scaled.py"):
        (other / name).write_text("1")
    run = begun(folder)
    monkeypatch.chdir(other)
    longer(run)
    export(Run(run), "best", other / "export")
    assert not Run(run).status()["accepted_changes"]
    (folder / "bias.json").write_text("1")
    with pytest.raises(InputError, match=r"bias\.json has changed"):
        longer(run, 24)
