"""Records that were made elsewhere: nothing that they name is run, read or asked, unless the user says so."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import stat
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import yaml
from fsspec.implementations.local import LocalFileSystem
from processes import Ecotone, Said
from safetensors import safe_open
from safetensors.numpy import save_file

from ecotone.experiments import gate, jobs, marks, storage, tracking, trust
from ecotone.experiments.exports import verify
from ecotone.experiments.jobs import JobServer, Parcel
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch, resume
from ecotone.experiments.runs import JOURNAL, Run
from ecotone.experiments.tracking import following, notes
from ecotone.experiments.tracking.mlflow import store
from ecotone.experiments.trust import UntrustedError
from ecotone.fitness.statistics.cache import Cache
from ecotone.populations import facts
from ecotone.populations.errors import EcotoneError, InputError, JournalError
from ecotone.populations.facts import Note
from ecotone.populations.journal import Journal
from ecotone.search.registry import SEARCHES

TOYS = """
import numpy as np

PROBES = np.random.default_rng(0).standard_normal((64, 27))


def right(model):
    vector = np.concatenate([tensor.numpy().ravel() for tensor in model.values()]).astype(np.float64)
    answers = PROBES @ vector > 0.3
    return float(answers.mean()), answers
"""


def toy(folder: Path, **others: Any) -> Path:
    """A recipe, its models and the file of its function."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trust_toys.py").write_text(TOYS)
    for name in ("left", "right"):
        rng = np.random.default_rng(len(name))
        tensors = {"w": rng.standard_normal((8, 3)).astype(np.float32), "b": rng.standard_normal(3).astype(np.float32)}
        save_file(tensors, folder / f"{name}.safetensors")
    record = {
        "name": "toy",
        "models": {"experts": ["left.safetensors", "right.safetensors"]},
        "objectives": {"search": [{"name": "right", "type": "call", "call": "./trust_toys.py:right"}]},
        "search": {"algorithm": "random"},
        "budget": {"evaluations": 6},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
        **others,
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(record))
    return path


class Asked(LocalFileSystem):
    """Files of this machine, at ``asked:///path``, that counts how often it is asked."""

    protocol = "asked"
    cachable = False
    times = 0

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> Any:
        Asked.times += 1
        return super().ls(path, detail)


fsspec.register_implementation("asked", Asked, clobber=True)


class Server(HTTPServer):
    """A server that remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.asked.append(f"{self.path} {self.headers.get('Authorization')}")
        self.send_response(404)
        self.end_headers()

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield one
        one.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its run and an export of it, made with this session's key."""
    folder = tmp_path_factory.mktemp("made")
    run = launch(Recipe.from_yaml(toy(folder)), folder / "run")
    run.export("best", folder / "merged")
    return folder


@pytest.fixture
def mine(made: Path, tmp_path: Path) -> Path:
    """A copy of this user's own run."""
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def become(user: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on as a user with a key of their own."""
    monkeypatch.setenv("ECOTONE_KEY_FILE", str(folder / user / "key"))


@pytest.fixture
def theirs(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, as another user meets it."""
    become("other", tmp_path, monkeypatch)
    return mine


def rewritten(directory: Path, **changes: Any) -> None:
    """Change facts of a journal, and leave its mark."""
    with Journal.open(directory / JOURNAL, write=True) as journal, journal.transaction():
        for name, value in changes.items():
            journal._keep(Note(name, json.dumps(value)))


def recipe_of(directory: Path) -> dict[str, Any]:
    with Journal.open(directory / JOURNAL) as journal:
        return json.loads(json.dumps(journal.fact(facts.RECIPE)))


def refused(said: Said, *words: str) -> None:
    assert said.code == 1, said.err
    assert "it was made elsewhere" in said.err
    assert "--trust" in said.err
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err, said.err


# -- the key -------------------------------------------------------------------------------------------------


def test_the_key_is_made_once_and_for_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ECOTONE_KEY_FILE")
    monkeypatch.delenv("ECOTONE_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    file = tmp_path / "config" / "ecotone" / "key"
    assert not marks.is_marked("export", {}, "0" * 64)
    assert not file.exists()  # to look at a mark makes none
    before = os.umask(0)
    try:
        mark = marks.mark_of("export", {"a": 1})
    finally:
        os.umask(before)
    assert len(file.read_bytes()) == marks.BYTES
    assert [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent)] == [0o600, 0o700]
    assert list(file.parent.iterdir()) == [file]
    assert marks.is_marked("export", {"a": 1}, mark)
    file.chmod(0o644)
    assert marks.mark_of("export", {"a": 1}) == mark
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_processes_that_make_the_key_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    become("me", tmp_path, monkeypatch)
    ready, go = os.pipe()
    children = []
    for number in range(6):
        child = os.fork()
        if child == 0:
            try:
                os.close(go)
                os.read(ready, 1)  # ends for all at once
                (tmp_path / f"mark-{number}").write_text(str(marks.mark_of("export", "x")))
            finally:
                os._exit(0)
        children.append(child)
    os.close(ready)
    os.close(go)
    for child in children:
        os.waitpid(child, 0)
    found = {(tmp_path / f"mark-{number}").read_text() for number in range(6)}
    assert found == {marks.mark_of("export", "x")}
    assert [path.name for path in (tmp_path / "me").iterdir()] == ["key"]


@pytest.mark.parametrize("content", [None, b"too short"])
def test_without_a_key_runs_bear_no_mark_and_say_so(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(content or b"")
    monkeypatch.setenv("ECOTONE_KEY_FILE", str(tmp_path / "file" if content else tmp_path / "file" / "key"))
    marks._tell.cache_clear()
    with caplog.at_level(logging.WARNING, "ecotone"):
        assert marks.mark_of("export", {}) is None
        assert marks.with_mark([facts.NAME.note("a")]) == [facts.NAME.note("a")]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "This user's key cannot be used (" in warning
    assert str(tmp_path / "file") in warning
    assert "to act on them takes --trust" in warning


def test_a_mark_is_of_one_sort_one_value_and_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    become("me", tmp_path, monkeypatch)
    value = {"recipe": {"seed": 1, "text": "ü\ud800"}, "paths": [1.5, None]}
    mark = marks.mark_of("journal", value)
    assert marks.is_marked("journal", json.loads(json.dumps(value)), mark)
    assert not marks.is_marked("export", value, mark)
    assert not marks.is_marked("journal", {**value, "paths": [1.5]}, mark)
    for other in (None, "", 7, mark[:-1] if mark else "", "ü" * 64, [mark]):
        assert not marks.is_marked("journal", value, other)
    assert not marks.is_marked("journal", {1, 2}, mark)
    become("other", tmp_path, monkeypatch)
    marks.mark_of("journal", value)
    assert not marks.is_marked("journal", value, mark)


# -- what a record names -------------------------------------------------------------------------------------

DIGITS = "ecotone.experiments.examples.digits"
CALL = {"call": "os:system", "arguments": {"command": "x"}}


@pytest.mark.parametrize(
    ("record", "lines"),
    [
        ({"prepare": CALL}, ["prepare calls os:system(command='x')"]),
        ({"models": {"architecture": CALL}}, ["models.architecture calls os:system(command='x')"]),
        (
            {"objectives": {"search": [{"name": "acc", "type": "accuracy", "data": CALL}]}},
            ["objectives.search.acc.data calls os:system(command='x')"],
        ),
        ({"objectives": {"held_out": [{"type": "call", **CALL}]}}, ["objectives.held_out[0] calls os:system("]),
        ({"calibration": [{"name": "t", "head": CALL}]}, ["calibration.t.head calls os:system("]),
        ({"prepare": {"call": f"{DIGITS}:specialists", "arguments": {"groups": {"a": [1]}}}}, []),
        ({"prepare": {"call": f"{DIGITS}:specialists", "arguments": {"groups": {"../a": [1]}}}}, ["prepare calls"]),
        ({"prepare": {"call": f"{DIGITS}:random_models", "arguments": {"directory": "x"}}}, ["prepare calls"]),
        ({"prepare": {"call": f"{DIGITS}:one_thread"}}, ["prepare calls"]),
        ({"prepare": {"call": "ecotone.experiments.examples.smollm:experts"}}, ["prepare calls"]),
        ({"prepare": {"call": "ecotone.fitness.callables:resolve", "arguments": {"path": "x"}}}, ["prepare calls"]),
        (
            {
                "calibration": [
                    {
                        "name": "t",
                        "head": {
                            "call": "ecotone.experiments.examples.digit_questions:head",
                            "arguments": {"file": "prepared:heads.safetensors", "question": "odd"},
                        },
                    }
                ]
            },
            [],
        ),
        (
            {"prepare": {"call": "ecotone.experiments.examples.digit_questions:head", "arguments": {"file": "h"}}},
            ["prepare calls"],
        ),
        (
            {"models": {"experts": ["prepared:a", "prepared:../a", "/home/x/a", "org/name"], "base": "/b"}},
            [
                "models.experts[1] reads prepared:../a",
                "models.experts[2] reads /home/x/a",
                "models.experts[3] reads org/name of the Hugging Face hub",
                "models.base reads /b",
            ],
        ),
        ({"models": {"experts": ["RECORD/a.safetensors", "RECORD/../a"]}}, ["models.experts[1] reads "]),
        (
            {"objectives": {"search": [{"name": "p", "type": "perplexity", "data": ["/etc/passwd", "a.txt"]}]}},
            ["objectives.search.p.data reads /etc/passwd", "objectives.search.p.data reads a.txt"],
        ),
        (
            {"objectives": {"search": [{"name": "l", "type": "lm_eval", "task": "t", "allow_code": True}]}},
            ["objectives.search.l loads the task t of lm-eval", "objectives.search.l.allow_code runs Python"],
        ),
        ({"search": {"algorithm": "hill"}}, ["search.algorithm is hill, a search algorithm of another package"]),
        ({"search": [{"algorithm": "random"}, {"algorithm": "hill"}]}, ["search[1].algorithm is hill"]),
        ({"merge": {"operator": "damped"}}, ["merge.operator is damped, a operator of another package"]),
        ({"scoring": {"backend": "vllm"}}, ["scoring.backend is vllm"]),
        ({"objectives": {"search": [{"name": "o", "type": "mine"}]}}, ["objectives.search.o.type is mine"]),
        ({"calibration": [{"name": "t", "loss": "mine"}]}, ["calibration.t.loss is mine"]),
        ({"scoring": {"server": "http://10.0.0.1/x"}}, ["scoring.server names http://10.0.0.1/x"]),
        ({"runtime": {"address": "ray://10.0.0.1:1"}}, ["runtime.address connects to ray://10.0.0.1:1"]),
        ({"runtime": {"address": "auto"}, "search": {"algorithm": "random"}, "merge": {"operator": "linear"}}, []),
        ({"prepare": {"call": "a\x1b[2K:b"}}, ["prepare calls a\\x1b[2K:b()"]),
        ({"models": "x", "objectives": {"search": 3}, "search": None, "prepare": {"call": 3}}, []),
        ({"search": {"algorithm": ["x"]}}, ["search.algorithm is ['x']"]),
        ({"merge": {"operator": {}}}, ["merge.operator is {}"]),
        ([], []),
    ],
)
def test_what_a_recorded_recipe_names_is_listed(record: Any, lines: list[str], tmp_path: Path) -> None:
    record = json.loads(json.dumps(record).replace("RECORD", str(tmp_path)))
    found = trust.of_recipe(record, tmp_path, runtime=True)
    assert len(found) == len(lines), found
    for line, begun in zip(found, lines, strict=True):
        assert line.startswith(begun)


def test_a_recipe_that_is_nested_too_deep_is_refused_in_words(tmp_path: Path) -> None:
    record: dict[str, Any] = {}
    for _ in range(900):
        record = {"models": record}
    with pytest.raises(InputError, match="expected at most 100 mappings and lists in each other"):
        trust.of_recipe(record, tmp_path)


def test_facts_of_another_shape_are_refused(theirs: Path) -> None:
    rewritten(theirs, recipe=["x"], tracking=["x"])
    with Journal.open(theirs / JOURNAL) as journal:
        with pytest.raises(JournalError, match="expected a JSON object, found a list"):
            gate.resumable(journal, "run", {}, trust=False)
        with pytest.raises(JournalError, match="expected a JSON object, found a list"):
            gate.exportable(journal, "run", trust=False)
    with pytest.raises(JournalError, match="expected a JSON object, found a list"):
        gate.sendable(theirs, "run", trust=False)


@pytest.mark.parametrize(
    ("trackers", "lines"),
    [
        ({"mlflow": {"uri": None, "experiment": "x"}}, []),
        ({"mlflow": {"uri": "http://u:secret@h/p?key=secret"}}, ["tracking.uri sends the run to http://h/p"]),
        (
            {"wandb": {"entity": "them", "dir": "/tmp/x"}},
            [
                "tracking.wandb sends the run to project ecotone of them of Weights & Biases",
                "tracking.wandb.dir writes to /tmp/x",
            ],
        ),
        ({"mine": {"path": "x"}}, ["tracking.mine is run by another package's tracker"]),
        ({"mine": None}, []),
    ],
)
def test_what_recorded_trackers_name_is_listed(trackers: Any, lines: list[str], tmp_path: Path) -> None:
    assert trust.of_trackers(trackers, tmp_path) == lines


# -- exports -------------------------------------------------------------------------------------------------


def poisoned(made: Path, folder: Path) -> tuple[Path, Path]:
    """A stranger's export whose record has a program run, and the file that it would make."""
    target, file = Path(shutil.copytree(made / "merged", folder / "merged")), folder / "was run"
    record = json.loads((target / "ecotone.json").read_text())
    touch = {"call": "subprocess:check_output", "arguments": {"args": ["touch", str(file)]}}
    record["recipe"]["models"]["architecture"] = touch
    record["sys_path"] = [str(folder)]
    (target / "ecotone.json").write_text(json.dumps(record))
    return target, file


def test_a_strangers_export_runs_nothing(made: Path, tmp_path: Path, ecotone: Ecotone) -> None:
    target, file = poisoned(made, tmp_path)
    said = ecotone("verify", target)
    line = f"models.architecture calls subprocess:check_output(args=['touch', '{file}'])"
    refused(said, line, "Nothing of this was run")
    assert "trust_toys.py:right()" in said.err
    assert "models.experts[0] reads " in said.err
    with pytest.raises(UntrustedError):
        verify(target)
    assert not file.exists()
    said = ecotone("verify", target, "--trust")  # what the program returns is no module
    assert f"Trusted: {line}" in said.err
    assert file.exists()


def test_an_export_is_this_users_own_until_its_recipe_changes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads((made / "merged" / "ecotone.json").read_text())
    assert "sys_path" not in record
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [one.difference for one in verify(made / "merged")] == [0.0]
    told: list[str] = []
    become("other", tmp_path, monkeypatch)
    with pytest.raises(UntrustedError, match=r"objectives\.search\.right calls .*trust_toys\.py:right\(\)"):
        verify(made / "merged")
    assert [one.difference for one in verify(made / "merged", trust=True, notify=told.append)] == [0.0]
    assert all(line.startswith("Trusted: ") for line in told)
    assert len(told) == 3  # the function and two models


def test_one_file_bears_the_mark_too(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Run(mine).export("best", tmp_path / "merged.safetensors")
    with safe_open(path, "np") as file:
        assert "sys_path" not in json.loads(file.metadata()["ecotone"])
    assert [one.difference for one in verify(path)] == [0.0]
    become("other", tmp_path, monkeypatch)
    with pytest.raises(UntrustedError):
        verify(path)


def test_no_record_holds_the_key(made: Path) -> None:
    key = marks.key_file().read_bytes()
    files = [path for path in made.rglob("*") if path.is_file()]
    assert len(files) > 6
    for path in files:
        content = path.read_bytes()
        assert key not in content
        assert key.hex().encode() not in content


def test_the_card_says_that_functions_are_listed(made: Path) -> None:
    card = (made / "merged" / "README.md").read_text()
    assert "it lists the functions and files that the record names" in card


def test_a_harmless_record_finds_no_modules_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/usr/lib/python"])
    import sys

    assert gate.python_paths("harmless", (), ("/recorded",)) == ()
    assert gate.python_paths("trusted", ("/given",), ("/recorded",)) == ("/given", str(tmp_path))
    assert "/recorded" not in sys.path
    assert gate.python_paths("own", (), ("/recorded",)) == ("/recorded", str(tmp_path))


# -- runs ----------------------------------------------------------------------------------------------------


def test_a_strangers_run_is_shown_and_not_acted_on(theirs: Path, tmp_path: Path, ecotone: Ecotone) -> None:
    file = tmp_path / "was run"
    recipe = recipe_of(theirs)
    touch = {"call": "subprocess:check_output", "arguments": {"args": ["touch", str(file)]}}
    recipe["models"]["architecture"] = touch
    rewritten(theirs, recipe=recipe, sys_path=[str(tmp_path / "their modules")])
    for command in (["status"], ["front"], ["compare"]):
        said = ecotone(*command, theirs)
        assert said.code == 0, said.err
    line = f"models.architecture calls subprocess:check_output(args=['touch', '{file}'])"
    for command in (
        ["resume", theirs],
        ["export", theirs, "--to", tmp_path / "a"],
        ["export", theirs, "--to", tmp_path / "b.yaml", "--format", "mergekit"],
        ["export", theirs, "--to", tmp_path / "c", "--format", "lora"],
    ):
        refused(ecotone(*command), line, "models.experts[0] reads ", "marks a run of yours that an older Ecotone")
    with pytest.raises(UntrustedError):
        resume(theirs)
    with pytest.raises(UntrustedError):
        Run(theirs).export("best", tmp_path / "d")
    assert not file.exists()
    assert not list(tmp_path.glob("[abcd]*"))


def test_a_changed_recipe_bears_no_mark(mine: Path, ecotone: Ecotone) -> None:
    recipe = recipe_of(mine)
    recipe["objectives"]["search"][0]["call"] = "os:abort"
    rewritten(mine, recipe=recipe)
    refused(ecotone("resume", mine), "objectives.search.right calls os:abort()")
    with Journal.open(mine / JOURNAL) as journal:
        assert journal.fact(facts.MARK)
        assert not marks.has_mark(journal)


@pytest.mark.parametrize("fact", ["tracking", "sys_path"])
def test_changed_places_bear_no_mark(fact: str, mine: Path) -> None:
    rewritten(mine, **{fact: {"mlflow": {"uri": "http://x"}} if fact == "tracking" else ["/theirs"]})
    with Journal.open(mine / JOURNAL) as journal:
        assert not marks.has_mark(journal)


def test_resume_keeps_the_mark_and_with_trust_makes_one(
    mine: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    resume(mine, {"budget.evaluations": 8}, notify=told.append)
    with Journal.open(mine / JOURNAL) as journal:
        assert marks.has_mark(journal)
        folders = journal.fact(facts.SYS_PATH)
    assert not [line for line in told if "Trusted" in line or "mark" in line]
    become("other", tmp_path, monkeypatch)
    with pytest.raises(UntrustedError):
        resume(mine, {"budget.evaluations": 9})
    resume(mine, {"budget.evaluations": 9}, notify=told.append, trust=True)
    assert f"Trusted: objectives.search.right calls {made / 'trust_toys.py'}:right()" in told
    assert "The run is marked as yours from now on." in told
    with Journal.open(mine / JOURNAL) as journal:
        assert journal.fact(facts.SYS_PATH) == (str(tmp_path),)  # and not the stranger's folders
    assert folders != (str(tmp_path),)
    resume(mine, {"budget.evaluations": 10})
    assert Run(mine).status()["evaluations"] == 10


def test_a_runs_own_mark_survives_a_kill_between_two_notes(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(journal: Journal) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(marks, "mark_journal", broken)
    with pytest.raises(KeyboardInterrupt):
        resume(mine, {"budget.evaluations": 8})
    with Journal.open(mine / JOURNAL) as journal:
        assert marks.has_mark(journal)
    assert recipe_of(mine)["budget"]["evaluations"] == 6


def test_a_cluster_that_a_record_names_is_not_connected_to(theirs: Path, ecotone: Ecotone) -> None:
    recipe = recipe_of(theirs)
    recipe["runtime"] |= {"pool": "ray", "address": "ray://10.9.8.7:10001"}
    rewritten(theirs, recipe=recipe)
    refused(ecotone("resume", theirs), "runtime.address connects to ray://10.9.8.7:10001")
    said = ecotone("resume", theirs, "--workers", "0", "--set", "runtime.address=null")
    assert "10.9.8.7" not in said.err


def test_a_plug_in_that_a_record_names_is_not_imported(
    theirs: Path, ecotone: Ecotone, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(theirs)
    recipe["search"] = {"algorithm": "theirs"}
    rewritten(theirs, recipe=recipe)
    monkeypatch.setattr(SEARCHES, "get", lambda *_: pytest.fail("a kind was looked up"))
    refused(ecotone("resume", theirs), "search.algorithm is theirs, a search algorithm of another package")


# -- places --------------------------------------------------------------------------------------------------


def test_no_request_goes_to_the_url_in_a_strangers_storage_json(theirs: Path, tmp_path: Path, ecotone: Ecotone) -> None:
    url = f"asked://{tmp_path}/bucket"
    (theirs / storage.HOME).write_text(json.dumps({"url": url, "home": "x", "mark": "0" * 64}))
    Asked.times = 0
    said = ecotone("status", theirs, "--json")
    assert said.json["storage"]["url"] == url
    assert "not asked" in said.json["storage"]["error"]
    assert said.json["directory"] == str(theirs)
    for command in ("front", "compare", "status"):
        assert ecotone(command, theirs).code == 0
    for words in ([], ["--trust"]):  # the run there is another one, which nobody has looked at
        said = ecotone("resume", theirs, *words)
        assert said.code == 1
        assert f"it says that it stands for {url}. Nothing was asked there." in said.err
        assert "give the URL itself" in said.err
    with pytest.raises(UntrustedError):
        resume(theirs, trust=True)
    assert Asked.times == 0
    assert not (tmp_path / "bucket").exists()


def test_a_run_at_a_url_that_the_user_gives_needs_no_word(made: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(made / "toy.yaml", {"runtime.mirror_every": 0.01})
    run = launch(recipe, f"file://{tmp_path}/bucket/toy")
    assert storage.url_of(run.directory) == f"file://{tmp_path}/bucket/toy"
    assert Run(run.directory).where == run.where == f"file://{tmp_path}/bucket/toy"
    resume(run.directory, {"budget.evaluations": 8})  # the working directory stands for the URL
    assert Run(f"file://{tmp_path}/bucket/toy").status()["evaluations"] == 8
    (run.directory / storage.HOME).write_text(
        json.dumps({**json.loads((run.directory / storage.HOME).read_text()), "url": "asked:///elsewhere"})
    )
    assert storage.url_of(run.directory) is None
    resume(run.where, {"budget.evaluations": 9})  # given by the user, it is written down anew
    assert storage.url_of(run.directory) == run.where


def test_a_copys_manifest_names_objects_and_no_paths(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with pytest.raises(storage.DamagedCopyError, match="names no object of a copy"):
        storage._get(storage.Store(f"file://{tmp_path}/bucket"), {"object": "../secret"}, tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_a_journals_server_gets_no_request_and_no_token(
    theirs: Path, server: Server, ecotone: Ecotone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "planted")
    recipe = recipe_of(theirs)
    recipe["tracking"] |= {"mlflow": True, "uri": server.url}
    rewritten(theirs, recipe=recipe, tracking={"mlflow": {"uri": server.url, "experiment": "x"}})
    (theirs / "tracking.json").write_text(
        json.dumps({"mlflow": {"uri": server.url, "experiment_id": "1", "run_id": "a" * 32, "page": server.url}})
    )
    line = f"tracking.uri sends the run to {server.url}"
    for command in (
        ["sync", theirs],
        ["sync", theirs, "--tracker", "mlflow"],
        ["ui", theirs],
        ["ui", theirs, "--open"],
        ["resume", theirs],
        ["export", theirs, "--to", theirs / "x", "--register", "name"],
    ):
        refused(ecotone(*command), line if command[0] != "export" else "tracking.uri sends the run to")
    for command in (["status", theirs], ["front", theirs], ["compare", theirs], ["ui", theirs, "--json"]):
        assert ecotone(*command).code == 0
    for call in (tracking.mirror, tracking.mirror_all, tracking.serve):
        with pytest.raises(UntrustedError):
            call(theirs)
    monkeypatch.setattr(os, "nice", lambda _: 0)  # of this process
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert following.main([str(theirs)]) == 1
    assert following.main([str(theirs), "--follow", "1"]) == 1
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert server.asked == []


def test_nothing_is_written_through_a_strangers_links(theirs: Path, tmp_path: Path, ecotone: Ecotone) -> None:
    (tmp_path / "mine").write_text("mine")
    for name in ("ui.log", "log.jsonl", "tracking.log"):
        (theirs / name).unlink(missing_ok=True)
        (theirs / name).symlink_to(tmp_path / "mine")
    (theirs / "inside").symlink_to(theirs / JOURNAL)
    for command in ("ui", "sync", "resume"):
        if command == "ui":
            (theirs / "tracking.json").write_text(json.dumps({"mlflow": {"uri": "sqlite:///x", "run_id": "a"}}))
        said = ecotone(command, theirs)
        refused(said, f"ui.log is a link to {tmp_path / 'mine'}", "log.jsonl is a link", "tracking.log is a link")
        assert "inside is a link" not in said.err
    assert (tmp_path / "mine").read_text() == "mine"


def test_links_at_any_depth_are_listed_before_files_are_read(theirs: Path, tmp_path: Path, ecotone: Ecotone) -> None:
    (tmp_path / "mine").write_text("mine")
    (theirs / "models" / "deep").mkdir(parents=True)
    (theirs / "models" / "deep" / "model.safetensors").symlink_to(tmp_path / "mine")
    for command in (("resume", theirs), ("export", theirs, "--to", tmp_path / "export")):
        refused(ecotone(*command), f"models/deep/model.safetensors is a link to {tmp_path / 'mine'}")
    record = {"recipe": {}, "scores": {"search": {}, "held_out": None}}
    (theirs / "ecotone.json").write_text(json.dumps(record))
    refused(ecotone("verify", theirs), f"models/deep/model.safetensors is a link to {tmp_path / 'mine'}")


def test_a_tracker_that_is_off_is_asked_about_too(theirs: Path, server: Server, ecotone: Ecotone) -> None:
    recipe = recipe_of(theirs)
    recipe["tracking"] |= {"mlflow": False, "uri": server.url}
    rewritten(theirs, recipe=recipe)
    refused(ecotone("sync", theirs), f"tracking.uri sends the run to {server.url}")
    assert server.asked == []


def test_notes_of_others_lead_into_no_run_and_no_store(mine: Path, tmp_path: Path) -> None:
    """The journal is this user's own; ``tracking.json`` was changed by another."""
    report = notes.MirrorReport("sqlite:////somewhere/mlflow.db", "1", "a" * 32, 6)
    notes.note(mine, "mlflow", report, {"memory": {"end": "finished"}})
    assert notes.own_notes(mine, "mlflow")["run_id"] == "a" * 32
    assert "mark" not in notes.status(mine, "mlflow")
    gate.check_notes(mine, "run", "", trust=False)
    known = json.loads((mine / "tracking.json").read_text())
    for change in ({"run_id": "b" * 32}, {"uri": "http://x"}, {"memory": {"end": "x"}}, {"mark": None}):
        (mine / "tracking.json").write_text(json.dumps({"mlflow": {**known["mlflow"], **change}}))
        assert notes.own_notes(mine, "mlflow") == {}
        with pytest.raises(UntrustedError, match=r"tracking\.json has the MLflow run"):
            gate.check_notes(mine, "run", "", trust=False)
    told: list[str] = []
    gate.check_notes(mine, "run", "", trust=True, notify=told.append)
    assert told[0].startswith("Trusted: tracking.json has the MLflow run")


def test_an_mlflow_run_leads_to_a_url_by_this_users_mark_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags: dict[str, str] = {"ecotone.run_dir": "asked:///bucket/run"}
    data = SimpleNamespace(data=SimpleNamespace(tags=tags))
    monkeypatch.setattr(store, "client_of", lambda uri: SimpleNamespace(get_run=lambda run_id: data))
    Asked.times = 0
    with pytest.raises(tracking.TrackingError, match="without a mark of yours, so nothing is fetched there"):
        tracking.find_run_dir("a" * 32, "http://x")
    tags["ecotone.mark"] = str(marks.mark_of("mlflow", "asked:///bucket/run"))
    assert tracking.find_run_dir("a" * 32, "http://x") == "asked:///bucket/run"
    become("other", tmp_path, monkeypatch)
    with pytest.raises(tracking.TrackingError):
        tracking.find_run_dir("a" * 32, "http://x")
    assert Asked.times == 0


def test_statistics_that_a_journal_names_lie_in_the_cache_alone(tmp_path: Path) -> None:
    tensors = {"layer": torch.ones(3)}
    kept = Cache(tmp_path / "cache").write("key", tensors, {})
    (tmp_path / "other.safetensors").write_bytes((tmp_path / "cache" / "key.safetensors").read_bytes())
    assert Cache(tmp_path / "cache").holds(kept)
    for key in ("../other", str(tmp_path / "other")):
        assert not Cache(tmp_path / "cache").holds(replace(kept, key=key))


# -- jobs ----------------------------------------------------------------------------------------------------


class Cluster:
    """A job server's client that keeps what it is given."""

    def __init__(self, *jobs: dict[str, Any]) -> None:
        self.sent = list(jobs)

    def list_jobs(self) -> list[Any]:
        ended = {"status": "STOPPED", "start_time": 1, "end_time": 2, "message": ""}
        return [SimpleNamespace(**ended, submission_id=j["submission_id"], metadata=j["metadata"]) for j in self.sent]

    def submit_job(self, **job: Any) -> None:
        self.sent.append(job)


def test_a_folder_that_anothers_job_names_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "secrets", "given"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    known = {"ecotone": "first", "out": "/runs/first", "folder": str(tmp_path / "secrets"), "grace": "30"}
    cluster = Cluster({"submission_id": "first", "metadata": known})
    monkeypatch.setattr(jobs, "_client", lambda address: cluster)
    server = JobServer("http://127.0.0.1:8265")
    with pytest.raises(UntrustedError, match=f"folder is sent to the cluster: {tmp_path / 'secrets'}"):
        server.resume("first")
    assert len(cluster.sent) == 1
    assert server.resume("first", Parcel(folder=tmp_path / "given")).folder == str(tmp_path / "given")
    assert " --trust " not in cluster.sent[-1]["entrypoint"]
    # What was sent from here bears a mark, and is sent again without a word.
    assert server.resume("first").folder == str(tmp_path / "given")
    cluster.sent[1:] = []
    assert server.resume("first", Parcel(trust=True)).folder == str(tmp_path / "secrets")
    assert "resume /runs/first --trust --log json" in cluster.sent[-1]["entrypoint"]


def test_the_key_does_not_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy(tmp_path / "project")
    become("project", tmp_path, monkeypatch)
    cluster = Cluster()
    monkeypatch.setattr(jobs, "_client", lambda address: cluster)
    JobServer("http://127.0.0.1:8265").submit(tmp_path / "project" / "toy.yaml", "first")
    (job,) = cluster.sent
    assert "/key" in job["runtime_env"]["excludes"]
    key = marks.key_file().read_bytes()
    assert key.hex() not in json.dumps(job)
    assert "ECOTONE_KEY_FILE" not in job["runtime_env"]["env_vars"]


@pytest.mark.slow
def test_a_run_that_a_job_made_is_resumed_where_the_files_lie_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECOTONE_JOB", "toy")
    toy(tmp_path / "first")
    monkeypatch.chdir(tmp_path / "first")
    launch(Recipe.from_yaml("toy.yaml"), tmp_path / "run")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    monkeypatch.chdir(tmp_path / "second")
    run = resume(tmp_path / "run", {"budget.evaluations": 8})
    assert run.status()["evaluations"] == 8
    with run.journal() as journal:
        assert marks.has_mark(journal)
    become("other", tmp_path, monkeypatch)
    with pytest.raises(UntrustedError):
        resume(tmp_path / "run", {"budget.evaluations": 9})
    assert resume(tmp_path / "run", {"budget.evaluations": 9}, trust=True).status()["evaluations"] == 9


# -- harmless records ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_strangers_run_of_the_digits_is_checked_and_gone_on_with_without_a_word(
    tmp_path: Path, ecotone: Ecotone, monkeypatch: pytest.MonkeyPatch
) -> None:
    become("stranger", tmp_path, monkeypatch)
    settings = {"runtime.pool": "serial", "budget.evaluations": 6, "tracking.mlflow": False}
    run = launch(Recipe.from_yaml("digits-scratch", settings), tmp_path / "run")
    run.export("best", tmp_path / "merged")
    become("me", tmp_path, monkeypatch)
    rewritten(tmp_path / "run", sys_path=[str(tmp_path / "their modules")])
    monkeypatch.chdir(tmp_path)
    said = ecotone("verify", tmp_path / "merged")
    assert said.code == 0, said.err
    assert "Trusted" not in said.err
    said = ecotone("resume", tmp_path / "run", "--set", "budget.evaluations=8")
    assert said.code == 0, said.err
    with Run(tmp_path / "run").journal() as journal:
        assert marks.has_mark(journal)
        assert str(tmp_path / "their modules") not in (journal.fact(facts.SYS_PATH) or ())


def test_a_module_that_is_not_found_names_the_option(mine: Path, ecotone: Ecotone) -> None:
    with Journal.open(mine / JOURNAL, write=True) as journal, journal.transaction():
        recipe = json.loads(json.dumps(journal.fact(facts.RECIPE)))
        recipe["objectives"]["search"][0]["call"] = "no_such_trust_toys:right"
        journal.note(facts.RECIPE, recipe)
        marks.mark_journal(journal)
    said = ecotone("resume", mine, "--set", "budget.evaluations=8")
    assert said.code == 1
    assert "--folder DIR" in said.err


def test_errors_are_of_the_kinds_that_callers_catch() -> None:
    assert issubclass(UntrustedError, InputError)
    assert issubclass(UntrustedError, EcotoneError)
