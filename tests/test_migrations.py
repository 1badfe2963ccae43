"""Journals that older Ecotones made: they are read as they are, migrated on resume, and what is unknown is refused.

``tests/journals`` holds real ones, made by the code that had format 3 and format 4: of AdaMerging (gradient trials) and
of a race (samples), each whole and killed midway. Where paths were, they say FOLDER. Those of format 5 are of format 4,
migrated by the code that had format 5.
"""

from __future__ import annotations

import gzip
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ROOT
from test_adamerging_recipes import toy_recipe

from ecotone.experiments import marks
from ecotone.experiments.compare import compare
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch, resume
from ecotone.experiments.runs import Run
from ecotone.populations import facts, migrations
from ecotone.populations.errors import JournalError
from ecotone.populations.journal import Journal
from ecotone.populations.migrations import FORMAT, OLDEST
from ecotone.populations.trial import Gradient, Scores

JOURNALS = ROOT / "tests" / "journals"
# By name, the digest that the old code told, and how many trials of each sort there are.
DIGESTS = {
    "gradients-whole": "287edb51ef584e4fc71584bb2fbfe9fc",
    "gradients-killed": "ebbbe741c84c65d7c22fd75b1703c0ca",
    "samples-whole": "9e09b4dbfc0e371fee3d50bfb2afd0b9",
    "samples-killed": "19b9c1a22b93ed5562b4b331a0be7375",
}
COUNTS = {
    "gradients-whole": {"evaluations": 4, "samples": 0, "gradients": 24},
    "gradients-killed": {"evaluations": 2, "samples": 0, "gradients": 12},
    "samples-whole": {"evaluations": 10, "samples": 44, "gradients": 0},
    "samples-killed": {"evaluations": 2, "samples": 18, "gradients": 0},
}
OLD = [f"format-{number}-{name}" for number in range(OLDEST, FORMAT) for name in DIGESTS]


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a run directory with one of the old journals; its models and functions lie in ``tmp_path``."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ada_toys", raising=False)
    toy_recipe(tmp_path)

    def made(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        file = folder / "journal.sqlite"
        file.write_bytes(gzip.decompress((JOURNALS / f"{name}.sqlite.gz").read_bytes()))
        with sqlite3.connect(file) as connection:
            connection.execute("UPDATE facts SET value = replace(value, 'FOLDER', ?)", (str(tmp_path),))
        connection.close()
        return folder

    return made


def format_of(folder: Path) -> str:
    with sqlite3.connect(folder / "journal.sqlite") as connection:
        return connection.execute("SELECT value FROM facts WHERE key = 'format'").fetchone()[0]


def columns(file: Path) -> dict[str, list[tuple[object, ...]]]:
    """Of each table, the columns: place, name, type, whether it may be empty, default, place in the key."""
    with sqlite3.connect(file) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master ORDER BY name")]
        return {name: connection.execute(f"PRAGMA table_info({name})").fetchall() for name in names}


# -- reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OLD)
def test_an_old_journal_is_read_and_not_changed(name: str, recorded: Callable[[str], Path]) -> None:
    folder, kind = recorded(name), name.split("-", 2)[2]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    status = Run(folder).status()
    assert status["digest"] == DIGESTS[kind]
    assert {key: status[key] for key in COUNTS[kind]} == COUNTS[kind]
    assert status["state"] == ("finished" if "whole" in kind else "killed")
    with Journal.open(folder / "journal.sqlite") as journal:
        assert len(list(journal.evaluations())) == sum(COUNTS[kind].values())
        with pytest.raises(JournalError, match="readonly"):
            journal.note(facts.NAME, "other")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", [name for name in OLD if "whole" in name])
def test_reports_of_an_old_run(name: str, recorded: Callable[[str], Path], tmp_path: Path) -> None:
    run = Run(recorded(name))
    best = run.best()
    assert best is not None
    assert any(member.id == best.id and member.held_out for member in run.front())
    assert [one.id for one in run.references()] == ["base", "left", "middle", "right", "average"]
    assert all(one.scores and one.held_out for one in run.references())
    assert run.examples() == {"search": {"task 0": 40, "task 1": 40}, "held_out": {"task 0": 40}}
    assert run.export("best", tmp_path / "best", trust=True).exists()  # it bears no mark
    assert [line.searched.label for line in compare([run]).lines] == [name]
    assert format_of(run.directory) == name.split("-")[1]


@pytest.mark.parametrize("number", range(OLDEST, FORMAT))
def test_old_trials_say_what_they_wanted(number: int, recorded: Callable[[str], Path]) -> None:
    with Journal.open(recorded(f"format-{number}-gradients-whole") / "journal.sqlite") as journal:
        wanted = [journal.trial(row.number).wants for row in journal.rows(unscored=True)]
        assert wanted[0] == Scores()
        assert [wish for wish in wanted if wish.gradient] == [
            Gradient.of(f"task {task}", step) for step in range(12) for task in range(2)
        ]
        assert {found.gradient.shape for _, found in journal.evaluations() if found.gradient is not None} == {(2, 3)}
    with Journal.open(recorded(f"format-{number}-samples-whole") / "journal.sqlite") as journal:
        rows = list(journal.rows(unscored=True))
        assert Counter((row.scored, row.partial) for row in rows) == {(True, False): 10, (False, True): 44}
        assert {row.wants for row in rows} == {Scores()}


# -- resuming ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(OLDEST, FORMAT))
@pytest.mark.parametrize("kind", ["samples", "gradients"])
def test_an_old_run_is_gone_on_with(number: int, kind: str, recorded: Callable[[str], Path], tmp_path: Path) -> None:
    folder = recorded(f"format-{number}-{kind}-killed")
    with Journal.open(folder / "journal.sqlite") as journal:
        before = [(row.number, row.digest, row.scores) for row in journal.rows(unscored=True)]
    status = resume(folder, trust=True).status()
    assert format_of(folder) == str(FORMAT)
    with Run(folder).journal() as journal:
        assert marks.has_mark(journal)
    assert (status["state"], status["failures"]) == ("finished", 0)
    with Journal.open(folder / "journal.sqlite") as journal:
        after = [(row.number, row.digest, row.scores) for row in journal.rows(unscored=True)]
    assert after[: len(before)] == before
    assert {key: status[key] for key in COUNTS[f"{kind}-whole"]} == COUNTS[f"{kind}-whole"]
    if kind == "samples":  # scores that are counts: the same on every processor
        assert status["digest"] == DIGESTS["samples-whole"]


def test_an_old_run_that_is_gone_on_with_equals_one_that_was_never_stopped(
    recorded: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of gradients, whose last bits depend on the processor: only where it is the one that the journals are of."""
    whole = launch(Recipe.from_yaml(toy_recipe(tmp_path)), tmp_path / "new", folders=(str(tmp_path),))
    if whole.status()["digest"] != DIGESTS["gradients-whole"]:
        pytest.skip("another kind of processor, or another version of torch")
    want = whole.status()["digest"]
    for number in range(OLDEST, FORMAT):
        assert resume(recorded(f"format-{number}-gradients-killed"), trust=True).status()["digest"] == want


@pytest.mark.parametrize("name", OLD)
def test_a_migrated_journal_has_the_tables_of_a_new_one(name: str, recorded: Callable[[str], Path]) -> None:
    file = recorded(name) / "journal.sqlite"
    Journal.open(file, write=True).close()
    Journal.create(file.with_name("new.sqlite")).close()
    assert columns(file) == columns(file.with_name("new.sqlite"))
    with Journal.open(file) as journal:
        assert journal.digest() == DIGESTS[name.split("-", 2)[2]]


KILLED = """
import os, signal, sys
from ecotone.populations import migrations
from ecotone.populations.journal import Journal

def killed(connection):
    last(connection)
    os.kill(os.getpid(), signal.SIGKILL)

number = max(migrations.STEPS)
last = migrations.STEPS[number]
migrations.STEPS = {**migrations.STEPS, number: killed}
Journal.open(sys.argv[1], write=True)
"""


@pytest.mark.parametrize("number", range(OLDEST, FORMAT))
def test_a_migration_that_is_killed_leaves_the_old_journal(number: int, recorded: Callable[[str], Path]) -> None:
    folder = recorded(f"format-{number}-samples-killed")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder / "journal.sqlite")],
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == -signal.SIGKILL
    assert format_of(folder) == str(number)
    assert Run(folder).status()["digest"] == DIGESTS["samples-killed"]
    assert resume(folder, trust=True).status()["digest"] == DIGESTS["samples-whole"]


def test_a_migration_that_fails_leaves_the_old_journal(
    recorded: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recorded("format-3-gradients-killed")
    before = columns(folder / "journal.sqlite")

    def fails(connection: sqlite3.Connection) -> None:
        connection.execute("DROP TABLE trials")
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(migrations, "STEPS", {**migrations.STEPS, FORMAT - 1: fails})
        with pytest.raises(JournalError, match=r"cannot be written \(database or disk is full\)"):
            Journal.open(folder / "journal.sqlite", write=True)
    assert columns(folder / "journal.sqlite") == before
    Journal.open(folder / "journal.sqlite", write=True).close()
    assert format_of(folder) == str(FORMAT)


# -- refusing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(
    ("written", "said"),
    [
        (str(FORMAT + 2), rf"newer Ecotone \(format {FORMAT + 2}; this one reads up to {FORMAT}\)\. Update Ecotone\."),
        (str(OLDEST - 1), rf"much older Ecotone \(format {OLDEST - 1}; this one reads {OLDEST} to {FORMAT}\)\. Use"),
        ("five", "not a journal of Ecotone, or damaged"),
        (None, "not a journal of Ecotone, or damaged"),
    ],
)
def test_formats_that_are_refused(tmp_path: Path, written: str | None, said: str, write: bool) -> None:
    file = tmp_path / "journal.sqlite"
    Journal.create(file).close()
    with sqlite3.connect(file) as connection:
        if written is None:
            connection.execute("DELETE FROM facts WHERE key = 'format'")
        else:
            connection.execute("UPDATE facts SET value = ? WHERE key = 'format'", (written,))
    connection.close()
    with pytest.raises(JournalError, match=said):
        Journal.open(file, write=write)


def test_there_is_a_step_from_each_format_to_the_next() -> None:
    assert sorted(migrations.STEPS) == list(range(OLDEST, FORMAT))


def test_an_old_journal_is_read_where_nobody_can_write(recorded: Callable[[str], Path]) -> None:
    folder = recorded("format-3-samples-whole")
    shutil.rmtree(folder.parent / "locked", ignore_errors=True)
    folder.chmod(0o555)
    try:
        assert Run(folder).status()["digest"] == DIGESTS["samples-whole"]
    finally:
        folder.chmod(0o755)
