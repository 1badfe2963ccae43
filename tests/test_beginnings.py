"""Runs begin once: of two in one directory one begins, what was killed before it began is taken over, all in words."""

from __future__ import annotations

import errno
import json
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from processes import started
from test_cli import toy_recipe

from ecotone.experiments import beginnings, damage, storage
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch, resume
from ecotone.experiments.runs import Run
from ecotone.populations import birth, database, facts
from ecotone.populations.errors import EcotoneError, InputError, JournalError
from ecotone.populations.journal import Journal


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recipe]:
    path = toy_recipe(tmp_path, budget={"evaluations": 12})
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Recipe.from_yaml(path)
    sys.modules.pop("cli_toys", None)


def other(recipe: Recipe) -> Recipe:
    return Recipe.from_record({**recipe.record(), "seed": 7})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_a_run_that_is_beginning_keeps_another_out(recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with birth.claimed(run / "journal.sqlite"):
        before = contents(run)
        with pytest.raises(JournalError, match="being written by process"):
            launch(recipe, run)
        assert contents(run) == before


def test_a_run_that_comes_late_changes_nothing(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other begins and ends between its first look and its lock."""
    run, claimed = tmp_path / "run", beginnings.claimed

    @contextmanager
    def late(file: Path) -> Iterator[IO[str]]:
        monkeypatch.setattr(beginnings, "claimed", claimed)
        launch(recipe, run)
        whole.update(contents(run))
        with claimed(file) as lock:
            yield lock

    whole: dict[str, bytes] = {}
    monkeypatch.setattr(beginnings, "claimed", late)
    with pytest.raises(InputError, match=r"a run is there already.*ecotone resume"):
        launch(other(recipe), run)
    assert whole
    assert contents(run) == {**whole, "journal.lock": contents(run)["journal.lock"]}
    assert Run(run).status()["state"] == "finished"


def test_an_unborn_run_is_taken_over_and_its_files_are_kept(recipe: Recipe, tmp_path: Path) -> None:
    run, said = tmp_path / "run", list[str]()
    run.mkdir()
    for name in ("journal.lock", "journal.sqlite", "journal.sqlite.7-ab.new", "tracking.json", "log.jsonl"):
        (run / name).touch()
    (run / "recipe.yaml").write_text(other(recipe).text())
    with pytest.raises(JournalError, match=r"before it began.*`ecotone run .*/recipe\.yaml --out .*/run` begins it"):
        resume(run)
    assert not storage.begun(str(run))
    launch(recipe, run, notify=said.append)
    assert any("was to begin there and never did" in text for text in said)
    assert {file.name for file in (run / "unborn-1").iterdir()} == {"tracking.json", "log.jsonl", "recipe.yaml"}
    assert (run / "unborn-1" / "recipe.yaml").read_text() == other(recipe).text()
    assert (run / "recipe.yaml").read_text() == recipe.text()
    assert not list(run.glob("*.new"))
    assert Run(run).status()["evaluations"] == 12


def test_a_file_of_the_users_is_not_taken_for_one_of_a_run(recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("mine")
    with pytest.raises(InputError, match="a file is there that the run would overwrite"):
        launch(recipe, run)
    assert contents(run) == {"recipe.yaml": b"mine"}


@pytest.mark.parametrize("sort", ["link", "folder"])
def test_what_is_no_file_in_the_journals_place_is_told_and_left(recipe: Recipe, tmp_path: Path, sort: str) -> None:
    journal = tmp_path / "run" / "journal.sqlite"
    journal.parent.mkdir()
    if sort == "link":
        journal.symlink_to(tmp_path / "unmounted" / "journal.sqlite")
    else:
        journal.mkdir()
    words = f"expected a journal or nothing, found a {sort}"
    for command in (lambda: launch(recipe, journal.parent), lambda: resume(journal.parent)):
        with pytest.raises(JournalError, match=words):
            command()
    assert journal.is_symlink() or journal.is_dir()


@pytest.mark.parametrize("where", ["lock", "journal", "sync"])
def test_a_full_disk_before_the_journal_leaves_nothing_and_does_not_advise_to_resume(
    where: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        if where == "journal":
            raise sqlite3.OperationalError("database or disk is full")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(birth, {"lock": "locked", "journal": "begin", "sync": "synchronised"}[where], full)
        with pytest.raises(EcotoneError) as refused:
            launch(recipe, tmp_path / "run")
    assert "resume" not in str(refused.value)
    assert refused.value.remedy == "Free some space, then run it again."
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_repaired_run_gets_its_lost_facts_again(recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch(recipe, run)
    file, before = run / "journal.sqlite", Run(run).status()
    with Journal.open(file) as journal:
        geometry = journal.fact(facts.GEOMETRY)
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("DELETE FROM facts WHERE key IN ('recipe', 'goals', 'seed', 'geometry', 'models')")
    connection.execute("DELETE FROM evaluations WHERE number = 6")
    connection.close()
    for act in (lambda: Run(run), lambda: resume(run)):
        with pytest.raises(JournalError, match="damaged"):
            act()
    found, _ = damage.repair(run)
    assert set(found.lost) == {"recipe", "goals", "seed", "geometry", "models"}
    assert Run(run).status()["state"] == "interrupted"
    after = resume(run).status()
    assert (after["digest"], after["evaluations"], after["seed"]) == (before["digest"], 12, before["seed"])
    assert damage.check(run).whole
    with Journal.open(file) as journal:
        assert journal.fact(facts.GEOMETRY) == geometry


def test_a_lock_that_was_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    """Whoever waits for the lock of a run that did not begin must not hold a file that nobody else will open."""
    file = tmp_path / "journal.sqlite"
    taken = database._taken

    def slow(handle: IO[str]) -> bool:
        found = taken(handle)
        if not calls:
            database.lock_file(file).unlink()
        calls.append(handle.name)
        return found

    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(database, "_taken", slow)
        lock = database.locked(file)
    assert len(calls) == 2
    with lock:
        assert database.is_locked(file)


# -- processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_several_runs_at_once_one_begins(tmp_path: Path) -> None:
    """Whatever the delays between them."""
    recipe, run = toy_recipe(tmp_path, budget={"evaluations": 12}), tmp_path / "run"
    for number, delay in enumerate((0.0, 0.02, 0.3, 1.0)):
        out = run / str(number)
        with started("run", recipe, "--out", out, "--json") as first:
            time.sleep(delay)
            with started("run", recipe, "--out", out, "--json", "--set", "seed=5") as second:
                said = [process.communicate(timeout=120) for process in (first, second)]
        codes = sorted(process.returncode for process in (first, second))
        assert codes == [0, 1], said
        assert sum("is being written by" in err or "a run is there already" in err for _, err in said) == 1
        assert not any("Traceback" in err for _, err in said)
        winner = 0 if first.returncode == 0 else 1
        with Journal.open(out / "journal.sqlite") as journal:
            assert journal.fact(facts.SEED) == (0, 5)[winner]
        assert Recipe.from_yaml(out / "recipe.yaml").seed == (0, 5)[winner]
        assert json.loads(said[winner][0])["evaluations"] == 12


@pytest.mark.slow
def test_a_run_killed_while_it_begins_is_begun_or_gone_on_with(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, budget={"evaluations": 12})
    took, outcomes, digests = 4.0, Counter[str](), set[str]()
    for number in range(16):
        out = tmp_path / "runs" / str(number)
        with started("run", recipe, "--out", out) as process:
            began = time.perf_counter()
            if number == 0:
                while not (out / "recipe.yaml").exists():
                    time.sleep(0.001)
                took = time.perf_counter() - began
            else:
                time.sleep(took * (0.9 + 0.2 * number / 16))
            process.kill()
            process.wait()
        begun = storage.begun(str(out))
        outcomes["begun" if begun else "unborn"] += 1
        command = ("resume", out) if begun else ("run", recipe, "--out", out)
        with started(*command, "--json") as again:
            told, words = again.communicate(timeout=120)
        assert again.returncode == 0, words
        digests.add(json.loads(told)["digest"])
    assert len(digests) == 1
