"""The journal: what goes in comes out, all or nothing, one writer and any number of readers, and real faults."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ecotone.populations import birth, facts
from ecotone.populations.errors import JournalError
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Event, Journal
from ecotone.populations.migrations import FORMAT
from ecotone.populations.trial import Evaluation, Failure, Gradient, Scores, Trial


def genome(number: int) -> Genome:
    return Genome(np.array([0, 3, 10]), np.array([[number / 7, 1.0], [0.1, -number]]), {"density": 0.5})


def dense(number: int, size: int = 10) -> Trial:
    return Trial(number, Genome.dense(np.random.default_rng(number).standard_normal(size), sources=2), (0, 1))


def scored(value: float) -> Evaluation:
    return Evaluation({"acc": value})


def written(path: Path, trials: int = 6, batch: int = 2) -> Path:
    """A journal of ``trials`` scored and told trials."""
    with Journal.create(path, [facts.NAME.note("test")]) as journal:
        for number in range(0, trials, batch):
            some = [Trial(i, genome(i)) for i in range(number, number + batch)]
            journal.asked(number // batch, batch, some)
            journal.arrived([(trial, scored(trial.number / 10)) for trial in some])
            journal.told(number // batch)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "journal.sqlite"


# -- round trips ---------------------------------------------------------------------------------------------


def test_facts_and_events(path: Path) -> None:
    with Journal.create(path, [facts.NAME.note("a"), facts.ERROR.note("ünï\n'\"%")]) as journal:
        journal.asked(0, 4, [Trial(0, genome(0)), Trial(1, genome(1))])
        journal.asked(1, 3, [Trial(2, genome(2))])
        journal.told(1)
        journal.told(0)
        journal.note(facts.NAME, "b")
    with Journal.open(path) as journal:
        assert journal.fact(facts.NAME) == "b"
        assert journal.fact(facts.ERROR) == "ünï\n'\"%"
        assert journal.fact(facts.REPORT) is None
        assert (journal.fact(facts.CREATED) or 0) == pytest.approx(time.time(), abs=60)
        assert journal.events() == [Event("ask", 0, 4), Event("ask", 1, 3), Event("tell", 1), Event("tell", 0)]
        assert next(journal.batches()) == [(0, genome(0).digest), (1, genome(1).digest)]


def test_trials_come_back_exactly(path: Path) -> None:
    trial = Trial(0, genome(3), (4, 5))
    with Journal.create(path) as journal:
        journal.asked(0, 1, [trial])
    with Journal.open(path) as journal:
        back = journal.trial(0)
        assert back == trial
        assert back.genome.coefficients.tobytes() == trial.genome.coefficients.tobytes()
        assert back.genome.parameters == {"density": 0.5}
        with pytest.raises(JournalError, match=r"trial 7: not in .* \(it has 0 to 0\)"):
            journal.trial(7)


@pytest.mark.parametrize(
    "values",
    [
        np.array([True, False, True, True, False, False, True, False, True]),
        np.array([], np.bool_),
        np.array([0.1, 1 / 3, 5e-324, -0.0]),
        np.array([0.1, 2.5], np.float32),
        np.arange(300),
        np.array([1.5, 2.5], ">f8"),
    ],
    ids=["bool", "empty", "float64", "float32", "integers", "big endian"],
)
def test_per_example_scores_come_back_exactly(path: Path, values: np.ndarray) -> None:
    other = np.array([False, True])
    evaluation = Evaluation({"acc": 0.1 + 0.2}, {"acc": values, "other": other}, seconds=1.5, items=9)
    with Journal.create(path) as journal:
        journal.asked(0, 1, [Trial(0, genome(0))])
        journal.arrived([(Trial(0, genome(0)), evaluation)])
    with Journal.open(path) as journal:
        back = journal.evaluation(0)
        assert back is not None
        assert back.scores == {"acc": 0.1 + 0.2}
        assert list(back.per_example) == ["acc", "other"]
        assert back.per_example["acc"].dtype == values.dtype.newbyteorder("=")
        assert back.per_example["acc"].astype(values.dtype).tobytes() == values.tobytes()
        assert back.per_example["other"].tolist() == [False, True]
        assert (back.seconds, back.items, back.ok) == (1.5, 9, True)
        assert [number for number, _ in journal.evaluations()] == [0]


def test_failures_and_details_come_back(path: Path) -> None:
    failed = Evaluation.failed("worker died", "exit 137", "a\nlog", seconds=3.0)
    told = Evaluation({"acc": 1.0}, details={"worker": "w1", "attempts": 2})
    with Journal.create(path) as journal:
        trials = [Trial(i, genome(i), (i,)) for i in range(3)]
        journal.asked(0, 3, trials)
        journal.arrived([(trials[0], failed), (trials[1], told)])
    with Journal.open(path) as journal:
        back = journal.evaluation(0)
        assert back is not None
        assert back.failure == Failure("worker died", "exit 137", "a\nlog")
        assert back.seconds == 3.0
        assert dict(journal.evaluations())[1].details == {"worker": "w1", "attempts": 2}
        assert journal.evaluation(2) is None
        rows = list(journal.rows())
        assert [(row.number, row.parents, row.failure is None) for row in rows] == [(0, (0,), False), (1, (1,), True)]
        assert rows[1].scores == {"acc": 1.0}
        assert [row.number for row in journal.rows(after=0)] == [1]


def test_gradients_come_back_exactly_and_are_no_scores(path: Path) -> None:
    gradient = np.array([[0.1, 1 / 3], [-0.0, 5e-324]])
    asked = [
        Trial(0, genome(0), wants=Gradient.of("math", 7)),
        Trial(1, genome(0)),
        Trial(2, genome(1), wants=Gradient(("code", "math"), 8, (0.1, 2.0))),
    ]
    with Journal.create(path) as journal:
        journal.asked(0, 3, asked)
        told = [Evaluation({"math": 2.5}, gradient=gradient), scored(0.5), Evaluation.failed("not finite", "NaN")]
        journal.arrived(zip(asked, told, strict=True))
        everything = journal.digest()
    with Journal.open(path) as journal:
        assert [journal.trial(number) for number in range(3)] == asked
        back = dict(journal.evaluations())
        assert back[0].gradient is not None
        assert back[0].gradient.tobytes() == gradient.tobytes()
        assert back[0].gradient.shape == (2, 2)
        assert back[1].gradient is None
        assert [row.number for row in journal.rows()] == [1]
        assert [row.number for row in journal.rows(0, unscored=True)] == [1, 2]
        rows = list(journal.rows(unscored=True))
        assert [row.gradient for row in rows] == [trial.gradient for trial in asked]
        assert [row.scores for row in rows] == [{"math": 2.5}, {"acc": 0.5}, {}]
        of_genome = journal.evaluation_of(genome(0).digest)
        assert of_genome is not None
        assert of_genome.scores == {"acc": 0.5}
        assert journal.digest() == everything


def test_a_digest_tells_losses(tmp_path: Path) -> None:
    digests = set()
    for number, value in enumerate((1.0, 1.5)):
        trial = Trial(0, genome(0), wants=Gradient.of("math", 0))
        with Journal.create(tmp_path / str(number) / "journal.sqlite") as journal:
            journal.asked(0, 1, [trial])
            journal.arrived([(trial, Evaluation({"math": value}, gradient=np.zeros((2, 2))))])
            digests.add(journal.digest())
    assert len(digests) == 2


def test_residuals_are_kept_for_whom_they_are_kept(path: Path) -> None:
    trials = [dense(i) for i in range(3)]
    with Journal.create(path) as journal:
        journal.asked(0, 3, trials)
        journal.keep(trials[:2], [])
        journal.keep([trials[0]], [])  # again: no harm
        journal.keep([trials[2]], [0])
        assert journal.kept() == {1, 2}
    with Journal.open(path) as journal:
        for number in (1, 2):
            back = journal.trial(number).genome
            assert back == trials[number].genome
            assert back.residual is not None
            assert trials[number].genome.residual is not None
            assert back.residual.tobytes() == trials[number].genome.residual.tobytes()
        with pytest.raises(JournalError, match="trial 0: its weights were not kept"):
            journal.trial(0)


def test_measurements_and_references(path: Path) -> None:
    with Journal.create(path) as journal:
        journal.refer("low", genome(0))
        journal.refer("high", genome(1))
        journal.refer("low", genome(2))  # the first stays
        journal.measured(genome(0), Scores("held_out"), scored(0.5))
        journal.measured(genome(0), Scores(), scored(0.75))
        journal.measured(genome(0), Scores(), scored(0.8))  # the last stays
    with Journal.open(path) as journal:
        assert journal.references() == [("low", genome(0)), ("high", genome(1))]
        found = journal.measurement(genome(0).split(5).digest, Scores("held_out"))
        assert found is not None
        assert found.scores == {"acc": 0.5}
        again = journal.measurement(genome(0).digest, Scores())
        assert again is not None
        assert again.scores == {"acc": 0.8}
        assert journal.measurement(genome(1).digest, Scores()) is None


# -- the digest ----------------------------------------------------------------------------------------------


def digest_of(path: Path, *results: tuple[int, Genome, Evaluation]) -> str:
    with Journal.create(path, [facts.NAME.note(path.stem)]) as journal:
        for batch, (number, one, evaluation) in enumerate(results):
            journal.asked(batch, 1, [Trial(number, one)])
            journal.arrived([(Trial(number, one), evaluation)])
        return journal.digest()


def test_the_digest_depends_on_numbers_genomes_and_scores_alone(tmp_path: Path) -> None:
    a, b = (0, genome(0), scored(0.5)), (1, genome(1), scored(0.25))
    same = [
        [a, b],
        [b, a],
        [(0, genome(0).split(1), Evaluation({"acc": 0.5}, {"acc": np.ones(3)}, seconds=9.0, items=4)), b],
    ]
    others = [
        [a],
        [a, (2, genome(1), scored(0.25))],
        [a, (1, genome(2), scored(0.25))],
        [a, (1, genome(1), scored(np.nextafter(0.25, 1)))],
        [a, (1, genome(1), Evaluation({"loss": 0.25}))],
        [a, (1, genome(1), Evaluation.failed("exception", "no"))],
        [a, (1, genome(1), Evaluation.failed("not finite", "no"))],
        [],
    ]
    first = {digest_of(tmp_path / f"same-{i}" / "j.sqlite", *results) for i, results in enumerate(same)}
    rest = {digest_of(tmp_path / f"other-{i}" / "j.sqlite", *results) for i, results in enumerate(others)}
    assert len(first) == 1
    assert len(rest) == len(others)
    assert not first & rest


# -- all or nothing ------------------------------------------------------------------------------------------


def _write_and_raise(journal: Journal) -> None:
    with journal.transaction():
        journal.asked(3, 1, [Trial(6, genome(6))])
        journal.arrived([(Trial(6, genome(6)), scored(1.0))])
        raise RuntimeError("half way")


def test_a_transaction_that_raises_leaves_nothing(path: Path) -> None:
    written(path)
    with Journal.open(path, write=True) as journal:
        before = journal.digest()
        with pytest.raises(RuntimeError, match="half way"):
            _write_and_raise(journal)
        assert journal.digest() == before
        assert len(journal.events()) == 6
        journal.asked(3, 1, [Trial(6, genome(6))])  # and it can go on
        assert list(journal.batches())[3] == [(6, genome(6).digest)]


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import numpy as np
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal
from ecotone.populations.trial import Evaluation, Trial
journal = Journal.open({path!r}, write=True)
for number in range(6, 10):
    trial = Trial(number, Genome.uniform(10, [1.0, number]))
    with journal.transaction():
        journal.asked(number, 1, [trial])
        journal.arrived([(trial, Evaluation({{"acc": 0.5}}))])
        if number == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        journal.told(number)
"""


def test_kill_9_inside_a_transaction(path: Path) -> None:
    written(path)
    root = str(Path(__file__).parent.parent)
    killed = subprocess.run([sys.executable, "-c", KILLED.format(tests=root, path=str(path))], check=False)
    assert killed.returncode == -signal.SIGKILL
    with Journal.open(path) as journal:
        assert [row.number for row in journal.rows()] == list(range(8))
        assert journal.events()[-2:] == [Event("ask", 7, 1), Event("tell", 7)]
        assert journal.fact(facts.NAME) == "test"
        assert not journal.in_use
    with Journal.open(path, write=True) as journal:  # the lock died with its owner
        journal.told(99)


# -- writers and readers -------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_by_name(path: Path) -> None:
    written(path)
    with Journal.open(path, write=True), Journal.open(path) as reader:
        assert reader.in_use
        with pytest.raises(JournalError, match=rf"being written by process {os.getpid()}.*then resume"):
            Journal.open(path, write=True)
    with Journal.open(path, write=True) as journal:
        assert journal.in_use
    with Journal.open(path) as reader:
        assert not reader.in_use


def test_a_reader_that_looks_whether_someone_writes_does_not_keep_the_writer_out(path: Path) -> None:
    """``status`` and the MLflow mirror look often, by taking the lock for a moment."""
    written(path)
    with path.with_suffix(".lock").open("r") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.1, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        with Journal.open(path, write=True) as journal:
            assert journal.fact(facts.NAME) == "test"


def test_create_does_not_overwrite(path: Path) -> None:
    written(path)
    with pytest.raises(JournalError, match="a run is there already"):
        Journal.create(path)


def test_readers_see_whole_transactions_while_the_writer_works(path: Path) -> None:
    written(path, trials=0)
    stop, seen = threading.Event(), []

    def read() -> None:
        with Journal.open(path) as journal:
            while not stop.is_set():
                rows, events = list(journal.rows()), journal.events()
                seen.append((len(rows), len(events)))
                journal.digest()

    thread = threading.Thread(target=read)
    with Journal.open(path, write=True) as journal:
        thread.start()
        for number in range(0, 400, 4):
            some = [Trial(i, genome(i)) for i in range(number, number + 4)]
            with journal.transaction():
                journal.asked(number // 4, 4, some)
                journal.arrived([(trial, scored(0.5)) for trial in some])
        stop.set()
        thread.join()
    assert seen
    assert all(rows % 4 == 0 for rows, _ in seen)
    assert [rows for rows, _ in seen] == sorted(rows for rows, _ in seen)


def test_a_reader_cannot_write(path: Path) -> None:
    written(path)
    with Journal.open(path) as journal, pytest.raises(JournalError, match="journal"):
        journal.note(facts.NAME, "other")


# -- what is no journal --------------------------------------------------------------------------------------


def test_a_missing_journal(path: Path) -> None:
    with pytest.raises(JournalError, match=r"no journal there\. Give a run directory"):
        Journal.open(path)


def test_a_file_that_is_no_journal(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"hello, this is no database at all" * 50)
    for write in (False, True):
        with pytest.raises(JournalError, match="not a journal of Ecotone, or damaged"):
            Journal.open(path, write=write)


def test_another_database(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE other (a)")
    connection.close()
    with pytest.raises(JournalError, match="not a journal of Ecotone"):
        Journal.open(path)


def test_a_refused_journal_is_not_locked(path: Path) -> None:
    """Although the error is kept."""
    Journal.create(path).close()
    whole = path.read_bytes()
    path.write_bytes(b"no database at all, but long enough to be read as one" * 100)
    with pytest.raises(JournalError, match="not a journal") as refused:
        Journal.open(path, write=True)
    path.write_bytes(whole)
    Journal.open(path, write=True).close()
    assert refused.value


def test_a_journal_of_a_later_format(path: Path) -> None:
    written(path)
    with Journal.open(path, write=True) as journal:
        journal.note(facts.FORMAT_OF, FORMAT + 1)
    with pytest.raises(
        JournalError, match=rf"newer Ecotone \(format {FORMAT + 1}; this one reads up to {FORMAT}\)\. Update Ecotone"
    ):
        Journal.open(path)


def _read_all(path: Path) -> None:
    with Journal.open(path) as journal:
        list(journal.evaluations())
        journal.digest()


@pytest.mark.parametrize("harm", ["truncated", "overwritten"])
def test_a_damaged_journal_is_named(path: Path, harm: str) -> None:
    written(path, trials=400)
    whole = path.read_bytes()
    if harm == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_bytes(whole[:8192] + b"\xff" * (len(whole) - 8192))
    with pytest.raises(JournalError, match=r"journal\.sqlite: not a journal of Ecotone, or damaged"):
        _read_all(path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JournalError, match=r"Not a directory|File exists"):
        Journal.create(tmp_path / "file" / "run" / "journal.sqlite")


def test_a_journal_that_cannot_be_begun_leaves_nothing_in_the_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(connection: sqlite3.Connection, notes: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(birth, "begin", full)
        with pytest.raises(JournalError, match=r"cannot be written .*\. Free some space, then run it again\."):
            Journal.create(path, [facts.NAME.note("a")])
    assert not path.parent.exists()
    with Journal.create(path, [facts.NAME.note("b")]) as journal:
        assert journal.fact(facts.NAME) == "b"


def test_a_full_disk_in_words_and_nothing_lost(path: Path) -> None:
    """SQLite is told to stop growing: the error is the one that a full file system gives."""
    written(path)
    with Journal.open(path, write=True) as journal:
        before = journal.digest()
        pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
        journal._connection.execute(f"PRAGMA max_page_count={pages + 1}")
        trials = [dense(i, size=20_000) for i in range(6, 9)]
        with pytest.raises(JournalError, match=r"cannot be written \(database or disk is full\).*ecotone resume"):
            journal.keep(trials, [])
        assert journal.digest() == before
        assert journal.kept() == set()
        journal._connection.execute("PRAGMA max_page_count=100000")
        journal.keep(trials, [])
        assert journal.kept() == {6, 7, 8}


# -- birth ---------------------------------------------------------------------------------------------------


def test_whoever_makes_a_journal_is_its_writer(path: Path) -> None:
    with Journal.create(path) as journal:
        assert journal.in_use
        with pytest.raises(JournalError, match="being written by process"):
            Journal.create(path)
    Journal.open(path, write=True).close()
    assert sorted(one.name for one in path.parent.iterdir()) == ["journal.lock", "journal.sqlite"]


def older_empty(path: Path) -> None:
    """A journal that an earlier version was killed in making: its header, and no tables."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.close()


LEFT: dict[str, Callable[[Path], object]] = {
    "a lock": lambda path: path.with_suffix(".lock").write_text("process 1"),
    "an empty file": lambda path: path.touch(),
    "a database without tables": older_empty,
    "drafts": lambda path: [path.with_name(f"{path.name}.7-ab.new{end}").write_bytes(b"half") for end in ("", "-wal")],
}


@pytest.mark.parametrize("what", LEFT)
def test_an_unborn_directory_is_told_of_and_taken_over(path: Path, what: str) -> None:
    path.parent.mkdir()
    LEFT[what](path)
    for write in (False, True):
        with pytest.raises(JournalError, match=r"before it began.* `ecotone run RECIPE --out .* begins it"):
            Journal.open(path, write=write)
    path.with_name("recipe.yaml").write_text("name: mine")
    with pytest.raises(JournalError, match=r"`ecotone run .*recipe\.yaml --out .*/run` begins it"):
        Journal.open(path)
    with Journal.create(path, [facts.NAME.note("a")]) as journal:
        assert journal.fact(facts.NAME) == "a"
    assert not list(path.parent.glob("*.new*"))
    assert path.with_name("recipe.yaml").read_text() == "name: mine"


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_finished_journal_is_never_replaced(path: Path, hard_links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it appears after all that looks for it: the lock may have failed on a file system of a network."""
    if not hard_links:
        monkeypatch.setattr(os, "link", unsupported)
    written(path.with_name("other.sqlite"))
    whole = path.with_name("other.sqlite").read_bytes()

    def made(draft: Path, notes: object) -> None:
        draft.write_bytes(b"another")
        path.write_bytes(whole)

    monkeypatch.setattr(birth, "_write", made)
    with pytest.raises(JournalError, match="a run is there already"):
        Journal.create(path)
    assert path.read_bytes() == whole
    assert not list(path.parent.glob("*.new*"))


def unsupported(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_file_system_without_hard_links(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", unsupported)
    written(path)
    with Journal.open(path) as journal:
        assert len(list(journal.rows())) == 6
    with pytest.raises(JournalError, match="a run is there already"):
        Journal.create(path)


BEGINS = """
import sys, time
from ecotone.populations import facts
from ecotone.populations.journal import Journal
print("ready", flush=True)
sys.stdin.readline()
with Journal.create({path!r}, [facts.NAME.note("x" * 20_000)]) as journal:
    print("made", flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_of_birth_leaves_a_whole_journal_or_none(path: Path) -> None:
    """Thirty processes are killed at moments spread over twice the time that making a journal takes."""
    outcomes = Counter[str]()
    took = 0.004
    for number in range(-2, 30):
        command = [sys.executable, "-c", BEGINS.format(path=str(path))]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin
        assert process.stdout
        with process, process.stdin, process.stdout:
            assert process.stdout.readline() == "ready\n"
            began = time.perf_counter()
            process.stdin.write("\n")
            process.stdin.flush()
            if number < 0:
                assert process.stdout.readline() == "made\n"
                took = time.perf_counter() - began
            else:
                time.sleep(2 * took * number / 30)
                process.kill()
        if birth.born(path):
            outcomes["born"] += 1
            with Journal.open(path, write=True) as journal:
                assert len(journal.fact(facts.NAME) or "") == 20_000
            path.unlink()
        else:
            outcomes["unborn"] += 1
            with Journal.create(path, [facts.NAME.note("next")]) as journal:
                assert journal.fact(facts.NAME) == "next"
            assert not list(path.parent.glob("*.new*"))
            path.unlink()
    assert set(outcomes) == {"born", "unborn"}
