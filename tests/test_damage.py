"""Damaged journals: every damage shows or is harmless, `ecotone check` tells it, and a repaired run ends the same."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulation
from simulation import Plan, Trap, World, lived
from typer.testing import CliRunner

from ecotone.experiments import cli, damage
from ecotone.populations import checking, facts, salvage, sums
from ecotone.populations.database import connected, locked
from ecotone.populations.errors import DamagedJournalError, InputError, JournalError
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal
from ecotone.populations.pages import Pages
from ecotone.populations.sums import CHAINED, REPLACED, TABLES
from ecotone.populations.trial import Evaluation, Scores, Trial
from ecotone.search.manager import Schedule

KINDS = {"m2n2-dense": (60, 200), "adamerging": (12, 30), "raced-m2n2": (14, 30)}
"""Searches with residuals, with gradients, and with samples; their evaluations, and how often they are damaged."""


def plan(kind: str) -> Plan:
    return Plan(0, kind, 0, Schedule(evaluations=KINDS[kind][0], batch=3, in_flight=6), workers=3)


def searched(kind: str, path: Path, world: World | None = None) -> World:
    """A search from its beginning, or from what the journal has, to its end, with the rows of a real run."""
    world = world or World(lambda text: None)
    known = simulation.evaluated(path)
    lived(plan(kind), world, path, random.Random(0), known, Trap(None, None))
    with Journal.open(path, write=True) as journal:
        for name, genome in (("left", Genome.uniform(24, [1.0, 0, 0])), ("average", Genome.uniform(24, [1 / 3] * 3))):
            journal.refer(name, genome)
            journal.measured(genome, Scores("held_out"), Evaluation({"some": 0.5}, {"some": np.arange(40) < 20}))
        journal.note(facts.RECIPE, {"name": "x"})
        journal.note(facts.SIGNATURE, "0123456789abcdef")
        journal.note(facts.NAME, "x")
        journal.note(facts.STATE, "finished")
    return world


def read(path: Path) -> list[Any]:
    """All that a journal can be asked."""
    with Journal.open(path) as journal:
        numbers = [row.number for row in journal.rows(unscored=True)]
        return [
            journal.digest(),
            journal.events(),
            list(journal.batches()),
            [vars(row) for row in journal.rows(unscored=True)],
            [repr(vars(found)) for _, found in journal.evaluations()],
            [repr(vars(found)) for number in numbers if (found := journal.evaluation(number))],
            [journal.trial(number) for number in numbers if number not in journal.dense() - journal.kept()],
            journal.references(),
            [repr(journal.measurement(genome.digest, Scores("held_out"))) for _, genome in journal.references()],
            [journal.fact(fact) for fact in facts.FACTS],
            journal.examples("search"),
            journal.kept(),
            journal.sizes(),
        ]


def harmed(whole: bytes, seed: int) -> bytes:
    """Some bytes of a file changed: one, a few, a sector or a page."""
    rng, data = random.Random(seed), bytearray(whole)
    at, length = rng.randrange(len(data)), rng.choice([1, 1, 1, 4, 64, 512, 4096])
    for place in range(at, min(at + length, len(data))):
        data[place] ^= rng.randrange(1, 256)
    return bytes(data)


def resumed_equal(kind: str, path: Path, world: World, digest: str) -> int:
    """Go on with a repaired journal, which must end as the undisturbed search did; how many evaluations it kept."""
    known = simulation.evaluated(path)
    again = World(lambda text: None, now=world.now, waited=world.waited)
    again.measured = {number: world.measured[number] for number in known}
    searched(kind, path, again)
    with Journal.open(path) as journal:
        assert journal.digest() == digest
    return len(known)


def outcome(kind: str, path: Path, world: World, truth: list[Any], data: bytes) -> str:
    """What comes of a damaged journal; one that is refused is repaired and gone on with."""
    path.parent.mkdir()
    path.write_bytes(data)
    try:
        return "harmless" if read(path) == truth else "unnoticed"
    except DamagedJournalError as error:
        told = error
    assert "ecotone check" in told.remedy
    assert str(path) in told.message
    assert "\n" not in str(told)
    found = damage.check(path.parent)
    assert not found.whole
    kept = salvage.saved(path)
    salvage.replaced(path, kept)
    resumed_equal(kind, path, world, truth[0])
    return "repaired"


SEEDS = [
    pytest.param("m2n2-dense", range(4), id="few"),
    *(pytest.param(kind, range(count), id=kind, marks=pytest.mark.slow) for kind, (_, count) in KINDS.items()),
]


@pytest.mark.parametrize(("kind", "seeds"), SEEDS)
def test_damaged_bytes_are_noticed_or_harmless_and_the_run_can_go_on(kind: str, seeds: range, tmp_path: Path) -> None:
    path = tmp_path / "whole" / "journal.sqlite"
    world = searched(kind, path)
    whole, truth = path.read_bytes(), read(path)
    outcomes = Counter[str]()
    for seed in seeds:
        outcomes[outcome(kind, tmp_path / str(seed) / path.name, world, truth, harmed(whole, seed))] += 1
        shutil.rmtree(tmp_path / str(seed))
    assert set(outcomes) <= {"harmless", "repaired"}
    assert outcomes["repaired"]


# -- each kind of damage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, World]:
    path = tmp_path_factory.mktemp("finished") / "run" / "journal.sqlite"
    return path, searched("m2n2-dense", path)


@pytest.fixture
def run(finished: tuple[Path, World], tmp_path: Path) -> Path:
    shutil.copytree(finished[0].parent, tmp_path / "run")
    return tmp_path / "run" / "journal.sqlite"


@contextlib.contextmanager
def forged(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path, isolation_level=None)
    yield connection
    connection.close()


CHANGES = {
    "a score": ("UPDATE evaluations SET scores = scores || ' ' WHERE number = 7", "evaluations, trial 7"),
    "a row less": ("DELETE FROM evaluations WHERE number = 7", "evaluations, trial 8: a row before it is missing"),
    "the last row less": ("DELETE FROM events WHERE seq = (SELECT max(seq) FROM events)", "the end of the chain"),
    "two rows swapped": (
        "UPDATE trials SET number = CASE number WHEN 3 THEN -4 WHEN 4 THEN -3 END WHERE number IN (3, 4);"
        "UPDATE trials SET number = -number WHERE number < 0",
        "trials, trial 4",
    ),
    "two genomes swapped": (
        "CREATE TEMP TABLE t AS SELECT * FROM trials; UPDATE trials SET (genome, digest) = "
        "(SELECT genome, digest FROM t WHERE t.number = 7 - trials.number) WHERE number IN (3, 4)",
        "trials, trial 3",
    ),
    "a place in the chain": ("UPDATE trials SET link = link + 1 WHERE number = 5", "its place is damaged"),
    "a fact": ("UPDATE facts SET value = 'other' WHERE key = 'state'", "facts, key state"),
    "a fact less": ("DELETE FROM facts WHERE key = 'state'", "facts: its seal tells of"),
    "a measurement": ("UPDATE measurements SET seconds = 9", "measurements, digest"),
    "a residual": ("UPDATE residuals SET residual = zeroblob(96)", "residuals, trial"),
    "a reference": ("UPDATE reference_merges SET name = 'right' WHERE name = 'left'", "reference_merges, name right"),
    "a seal": ("UPDATE seals SET rows = rows + 1 WHERE name = 'residuals'", "residuals: its seal tells of"),
    "no seals": ("DELETE FROM seals", "the end of the chain"),
    "a table less": ("DROP TABLE residuals", "the list of tables"),
    "a table more": ("CREATE TABLE more (a)", "the list of tables"),
    "another type": ("UPDATE evaluations SET items = 'x' WHERE number = 2", "evaluations, trial 2"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_noticed_and_named(what: str, run: Path) -> None:
    statements, place = CHANGES[what]
    with forged(run) as connection:
        connection.executescript(statements)
    for write in (False, True):
        with pytest.raises(DamagedJournalError, match="damaged") as refused:
            Journal.open(run, write=write)
        assert place in refused.value.message
        assert f"`ecotone check {run.parent}` says what can be saved" in refused.value.remedy
    found = damage.check(run.parent)
    assert found.damage is not None
    assert place in found.damage


def test_a_genome_is_compared_with_its_digest(run: Path) -> None:
    """Also where all checksums are right."""
    with forged(run) as connection:
        rows = connection.execute(f"SELECT {', '.join(sums.REFERENCES.columns)} FROM reference_merges").fetchall()
        (one, other), ledger = rows, sums.Ledger(sums.recorded_seals(connection))
        ledger.put(connection, sums.REFERENCES, (*one[:2], other[2], one[3]))
        ledger.seal(connection)
    with Journal.open(run) as journal, pytest.raises(DamagedJournalError, match="its genome has the digest"):
        journal.references()
    assert damage.check(run.parent).damage is not None


def test_a_value_that_cannot_be_read_is_told_with_its_place(tmp_path: Path) -> None:
    """Also where all checksums are right: another program wrote it."""
    path = tmp_path / "journal.sqlite"
    values = {"scores": "[1", "shapes": '[["a", "<f8", 3, 4]]', "failure": "{}", "details": "\x00", "statistics": "{}"}
    with Journal.create(path) as journal:
        trials = [Trial(number, Genome.uniform(4, [1.0, number])) for number in range(len(values))]
        journal.asked(0, len(trials), trials)
        plain = Evaluation({"a": 1.0}, {"a": np.ones(3)})
        for trial, (column, value) in zip(trials, values.items(), strict=True):
            append = journal._rows_of.append

            def wrong(*given: Any, column: str = column, value: str = value, append: Any = append) -> None:
                connection, table, rows = given
                at = table.columns.index(column)
                append(connection, table, [(*row[:at], value, *row[at + 1 :]) for row in rows])

            journal._rows_of.append = wrong  # type: ignore[method-assign]
            journal.arrived([(trial, plain)])
            journal._rows_of.append = append  # type: ignore[method-assign]
    with Journal.open(path) as journal:
        for trial in trials:
            with pytest.raises(DamagedJournalError, match=f"evaluations, trial {trial.number}: a value cannot be read"):
                journal.evaluation(trial.number)
        with pytest.raises(JournalError, match="smaller number"):
            journal.trial(10**30)


# -- checking costs little -----------------------------------------------------------------------------------


def test_what_was_checked_is_not_checked_again_unless_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    verified = checking.verified

    def counted(connection: sqlite3.Connection, after: sums.Seal = sums.EMPTY[sums.CHAIN]) -> Any:
        calls.append(after.rows)
        return verified(connection, after)

    monkeypatch.setattr(checking, "verified", counted)
    monkeypatch.setattr(checking, "_SETTLED", 0.0)
    monkeypatch.setattr(checking, "_SHARE", 0.0)
    path = tmp_path / "journal.sqlite"
    trials = [Trial(number, Genome.uniform(4, [1.0, number])) for number in range(4)]
    with Journal.create(path) as journal:
        journal.asked(0, 2, trials[:2])
        Journal.open(path).close()
        Journal.open(path).close()
        assert calls == [0]
        journal.arrived([(trial, Evaluation({"a": 1.0})) for trial in trials[:2]])
        Journal.open(path).close()
        assert calls == [0, 3]  # only what was written since
    with forged(path) as connection:
        connection.execute("UPDATE trials SET batch = 9 WHERE number = 1")
    with pytest.raises(DamagedJournalError, match="trials, trial 1"):
        Journal.open(path)
    assert calls == [0, 3, 0]


# -- saving --------------------------------------------------------------------------------------------------


def test_pages_have_the_rows_that_sqlite_reads(run: Path) -> None:
    found = {table.name: set[Any]() for table in TABLES.values()}
    for table, row in salvage._raw(Pages(run)):
        found[table.name].add(row)
    with contextlib.closing(connected(run, write=False)) as connection:
        for table in (*CHAINED, *REPLACED):
            rows = connection.execute(table.select).fetchall()
            assert rows or table is sums.GRADIENTS
            assert set(rows) <= found[table.name]
    kept = salvage.saved(run)
    assert kept.whole
    with Journal.open(run) as journal:
        assert kept.counts == journal.sizes()


def first_page(data: bytearray) -> None:
    data[:4096] = bytes(4096)


def cut_short(data: bytearray) -> None:
    del data[len(data) // 2 :]


def roots(data: bytearray) -> None:
    for page in range(1, 10):
        data[4096 * page : 4096 * page + 12] = b"\xff" * 12


@pytest.mark.parametrize(
    "harm", [first_page, *(pytest.param(one, marks=pytest.mark.slow) for one in (cut_short, roots))]
)
def test_what_sqlite_cannot_read_is_saved_from_the_pages(
    harm: Callable[[bytearray], None], run: Path, finished: tuple[Path, World]
) -> None:
    data = bytearray(run.read_bytes())
    with Journal.open(run) as journal:
        digest = journal.digest()
    harm(data)
    run.write_bytes(data)
    with pytest.raises(DamagedJournalError):
        read(run)
    kept = salvage.saved(run)
    aside = salvage.replaced(run, kept)
    assert (aside / run.name).read_bytes() == bytes(data)
    count = resumed_equal("m2n2-dense", run, finished[1], digest)
    if harm is first_page:
        assert count == 60


@pytest.mark.slow
def test_a_killed_runs_log_is_saved_too(finished: tuple[Path, World], tmp_path: Path) -> None:
    path = tmp_path / "0" / "journal.sqlite"
    world = World(lambda text: None)
    trap = Trap("kill", 400)
    life = lived(plan("m2n2-dense"), world, path, random.Random(0), frozenset(), trap)
    assert life.path.with_name("journal.sqlite-wal").stat().st_size > 100_000
    known = simulation.evaluated(life.path)
    for file in life.path.parent.glob("*-shm"):
        file.unlink()
    before = life.path.with_name("journal.sqlite-wal").read_bytes()
    data = bytearray(before)
    for at in range(24, len(data), 24 + 4096):  # the page of the list of tables, and the roots, in all frames
        if 1 < int.from_bytes(data[at + 8 : at + 12], "big") < 4:
            data[at + 32 : at + 40] = b"\xff" * 8
    life.path.with_name("journal.sqlite-wal").write_bytes(data)
    kept = salvage.saved(life.path)
    assert 0 < kept.counts["evaluations"] <= len(known)
    salvage.replaced(life.path, kept)
    assert not life.path.with_name("journal.sqlite-wal").exists()
    with Journal.open(finished[0]) as journal:
        resumed_equal("m2n2-dense", life.path, finished[1], journal.digest())


@pytest.mark.parametrize("rows", [45, *(pytest.param(rows, marks=pytest.mark.slow) for rows in range(0, 160, 3))])
def test_a_run_can_go_on_from_any_first_part_of_its_chain(rows: int, run: Path, finished: tuple[Path, World]) -> None:
    with Journal.open(run) as journal:
        digest = journal.digest()
    whole = salvage.saved(run)
    chain = whole.chain[: salvage._settled(whole.chain[:rows])]
    others = {**whole.others, "residuals": []}
    salvage.replaced(run, salvage.Saved(chain, others, {}, whole=False))
    with Journal.open(run) as journal:
        assert journal.fact(facts.STATE) == "interrupted"
    resumed_equal("m2n2-dense", run, finished[1], digest)


# -- the command ---------------------------------------------------------------------------------------------


def ecotone(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(cli.app, [str(one) for one in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.output


def test_check_and_repair(run: Path, finished: tuple[Path, World]) -> None:
    with Journal.open(run) as journal:
        digest = journal.digest()
    code, said = ecotone("check", run.parent)
    assert code == 0
    assert "the journal is whole" in said
    assert "60 evaluations" in said
    assert json.loads(ecotone("check", run.parent, "--json")[1])["whole"] is True
    with pytest.raises(InputError, match="found a whole one"):
        damage.repair(run.parent)
    with forged(run) as connection:
        connection.execute("UPDATE evaluations SET scores = NULL WHERE number = 31")
    before = run.read_bytes()
    code, said = ecotone("check", run.parent)
    assert code == 1
    assert "evaluations, trial 31" in said
    assert run.read_bytes() == before
    told = json.loads(ecotone("check", run.parent, "--json")[1])
    assert 0 < told["kept"]["evaluations"] < 60
    assert told["kept"]["measurements"] == 2
    with contextlib.closing(locked(run)), pytest.raises(JournalError, match="is being written by"):
        ecotone("check", run.parent, "--repair")
    (run.parent / "recipe.yaml").write_text("name: [")
    with forged(run) as connection:
        connection.execute("DELETE FROM facts WHERE key = 'name'")
    code, said = ecotone("check", run.parent, "--repair")
    assert code == 0
    assert f"The damaged journal is in {run.parent / 'damaged-1'}" in said
    assert "Lost: name, " in said
    assert "ecotone resume" in said
    assert (run.parent / "damaged-1" / run.name).exists()
    assert ecotone("check", run.parent)[0] == 0
    assert resumed_equal("m2n2-dense", run, finished[1], digest) == told["kept"]["evaluations"]


@pytest.mark.parametrize("table", ["facts", "trials"])
def test_a_view_that_computes_for_ever_is_not_read(table: str, run: Path) -> None:
    endless = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT other.* FROM other, r"
    with contextlib.closing(sqlite3.connect(run)) as connection:
        connection.executescript(f"ALTER TABLE {table} RENAME TO other; CREATE VIEW {table} AS {endless}")
    with pytest.raises(DamagedJournalError):
        Journal.open(run)
    assert ecotone("check", run.parent)[0] == 1
    damage.repair(run.parent)
    Journal.open(run).close()


def test_check_of_no_run_and_of_a_url(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journal there"):
        ecotone("check", tmp_path)
    with pytest.raises(InputError, match=r"found the URL memory://x/y.*ecotone resume"):
        damage.repair("memory://x/y")
