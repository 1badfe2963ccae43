"""The journal: every trial that a search asked and every result that it was told, in one SQLite file.

The journal is the checkpoint. Replaying it rebuilds a resumed search, so nothing else has to be saved. Nothing in it is
a pickle. Tables:

- ``facts``: records of the run as a whole, as text by name (``ecotone.populations.facts``).
- ``events``: the search's steps in order: ``ask`` (it proposed a batch) and ``tell`` (it learned from one).
- ``trials``: number, batch, genome, digest, parents; the wish ``wants`` as JSON (``Wish.record``); and whether it gives
  scores of all examples.
- ``evaluations``: the results of trials, committed on arrival, before they are told. Of statistics it has the key and
  the digest: the tensors lie in a cache.
- ``gradients``: the gradients of gradient trials, in float64.
- ``residuals``: dense parts of genomes evolved from scratch, kept for members and the front only.
- ``measurements``: results outside the search (held-out data, reference merges, statistics), by genome digest and
  wish.
- ``reference_merges``: the seed models and their average.

Commits use SQLite's write-ahead log with ``synchronous=NORMAL``: a killed process loses nothing that was committed. A
power cut may lose the last moments, never consistency. One process writes, which holds a lock file; any number may read
meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import struct
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ecotone.populations.database import connected, explained, is_locked, locked
from ecotone.populations.errors import JournalError
from ecotone.populations.facts import CREATED, FORMAT_OF, Fact, Note, Value
from ecotone.populations.folders import private, private_folder
from ecotone.populations.genome import Genome
from ecotone.populations.migrations import FORMAT, create, current
from ecotone.populations.rows import (
    COLUMNS,
    evaluation_of,
    evaluation_row,
    failure_of,
    scores_of,
    trial_row,
    wish_of,
    wish_text,
)
from ecotone.populations.trial import Evaluation, Failure, Gradient, Scores, Subset, Trial, Wish


@dataclass(frozen=True)
class Event:
    """One step of the search: ``ask`` for ``requested`` trials that became batch ``batch``, or ``tell`` of it."""

    kind: Literal["ask", "tell"]
    batch: int
    requested: int = 0


@dataclass(frozen=True)
class Row:
    """A trial as the journal's overview shows it: without genome, gradient, per-example scores and tensors.

    ``scored`` says whether it has scores of all examples, unless it failed. ``wants`` lacks its sample.
    """

    number: int
    digest: str
    parents: tuple[int, ...]
    scores: dict[str, float] | None
    failure: Failure | None
    seconds: float
    time: float
    statistics: str | None = None
    wants: Wish = field(default_factory=Scores)
    scored: bool = True

    @property
    def partial(self) -> bool:
        """True when it was scored on a sample."""
        return self.wants.scored and not self.scored

    @property
    def gradient(self) -> Gradient | None:
        """The gradient that it wanted, if any."""
        return self.wants.gradient


class Journal:
    """The journal of one run, at ``path``.

    Use ``Journal.create`` for a new run and ``Journal.open`` for an existing one; both are context managers.

    Raises:
        JournalError: The file is missing, not a journal, in use by another writer, or cannot be written.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: IO[str] | None) -> None:
        self.path = path
        self._connection = connection
        self._lock = lock
        self._depth = 0

    @classmethod
    def create(cls, path: str | Path, notes: Iterable[Note] = ()) -> Journal:
        """A new journal with the facts ``notes``. The file must not exist."""
        file = Path(path)
        if file.exists():
            raise JournalError(
                f"{file}: a run is there already.", f"Use `ecotone resume {file.parent}`, or another --out."
            )
        with explained(file):
            private_folder(file.parent)
            lock = locked(file)
            try:
                journal = cls(file, connected(file, write=True), lock)
                journal._begin(notes)
                journal._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # synced: a power cut leaves a journal
            except BaseException:  # leave no half journal behind: another attempt would be refused
                for suffix in ("", "-wal", "-shm"):
                    file.with_name(file.name + suffix).unlink(missing_ok=True)
                lock.close()
                raise
        return journal

    @classmethod
    def open(cls, path: str | Path, write: bool = False) -> Journal:
        """An existing journal, for reading or as its one writer.

        Opening for writing migrates a journal of an older format. Opening for reading does not change it: it migrates
        and reads a private copy, which shows the journal at the time of opening.
        """
        file = Path(path)
        if not file.is_file():
            raise JournalError(f"{file}: no journal there.", "Give a run directory made by `ecotone run`.")
        with explained(file):
            lock = locked(file) if write else None
            try:
                journal = cls(file, current(connected(file, write), file, write), lock)
            except BaseException:  # who holds the error holds no lock
                if lock is not None:
                    lock.close()
                raise
        return journal

    def _begin(self, notes: Iterable[Note]) -> None:
        with self.transaction():
            create(self._connection)
            for note in (FORMAT_OF.note(FORMAT), CREATED.note(time.time()), *notes):
                self._keep(note)

    def close(self) -> None:
        """Close the file and let the next writer in."""
        self._connection.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- writing -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside is committed together at the end, or not at all."""
        with explained(self.path):
            if self._depth:
                yield
                return
            self._depth += 1
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    def note(self, fact: Fact[Value], value: Value) -> None:
        """Set a fact."""
        self._keep(fact.note(value))

    def _keep(self, note: Note) -> None:
        with explained(self.path):
            self._connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", note)

    def asked(self, batch: int, requested: int, trials: Sequence[Trial]) -> None:
        """Record that ``ask(requested)`` proposed ``trials``, which make up batch number ``batch``."""
        with self.transaction():
            self._connection.execute("INSERT INTO events VALUES (NULL, 'ask', ?, ?)", (batch, requested))
            self._connection.executemany(
                "INSERT INTO trials VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [trial_row(trial, batch) for trial in trials],
            )

    def arrived(self, results: Iterable[tuple[Trial, Evaluation]]) -> None:
        """Record the results of trials, in the order of arrival."""
        now, found = time.time(), list(results)
        with self.transaction():
            self._connection.executemany(
                "INSERT INTO evaluations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [(trial.number, *evaluation_row(evaluation, now)) for trial, evaluation in found],
            )
            self._connection.executemany(
                "INSERT INTO gradients VALUES (?, ?, ?)",
                [
                    (trial.number, len(one.gradient), np.asarray(one.gradient, "<f8").tobytes())
                    for trial, one in found
                    if one.gradient is not None
                ],
            )

    def told(self, batch: int) -> None:
        """Record that the search was told batch ``batch``."""
        with self.transaction():
            self._connection.execute("INSERT INTO events VALUES (NULL, 'tell', ?, NULL)", (batch,))

    def keep(self, trials: Iterable[Trial], dropped: Iterable[int]) -> None:
        """Store the residuals of ``trials`` that have one, and drop the residuals of the numbers ``dropped``."""
        with self.transaction():
            self._connection.executemany("DELETE FROM residuals WHERE number = ?", [(n,) for n in dropped])
            self._connection.executemany(
                "INSERT OR IGNORE INTO residuals VALUES (?, ?)",
                [
                    (t.number, t.genome.residual.astype("<f4").tobytes())
                    for t in trials
                    if t.genome.residual is not None
                ],
            )

    def measured(self, genome: Genome, wants: Wish, evaluation: Evaluation) -> None:
        """Record a result of a genome outside the search."""
        with self.transaction():
            self._connection.execute(
                "INSERT OR REPLACE INTO measurements VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (genome.digest, wish_text(wants), *evaluation_row(evaluation, time.time())),
            )

    def refer(self, name: str, genome: Genome) -> None:
        """Record a merge to compare with: a seed model, the average."""
        with self.transaction():
            (position,) = self._connection.execute("SELECT count(*) FROM reference_merges").fetchone()
            self._connection.execute(
                "INSERT OR IGNORE INTO reference_merges VALUES (?, ?, ?, ?)",
                (name, position, genome.to_json(), genome.digest),
            )

    # -- reading -----------------------------------------------------------------------------------------

    def fact(self, fact: Fact[Value]) -> Value | None:
        """The value of a fact, or None where it was never noted."""
        row = next(iter(self._rows("SELECT value FROM facts WHERE key = ?", (fact.name,))), None)
        return None if row is None else fact.read(str(row[0]))

    def events(self) -> list[Event]:
        """All events, in order."""
        rows = self._rows("SELECT kind, batch, requested FROM events ORDER BY seq")
        return [Event(kind, batch, requested or 0) for kind, batch, requested in rows]

    def batches(self) -> Generator[list[tuple[int, str]]]:
        """Numbers and genome digests of the trials of each batch, in order."""
        rows = self._rows("SELECT batch, number, digest FROM trials ORDER BY number")
        for _, batch in groupby(rows, key=itemgetter(0)):
            yield [(number, digest) for _, number, digest in batch]

    def rows(self, after: int = -1, unscored: bool = False) -> Iterator[Row]:
        """The trials numbered above ``after`` that have been evaluated, in order of number.

        Args:
            after: A trial's number.
            unscored: Include trials that wanted gradients (their scores are losses by task) or statistics, and trials
                that were scored on some of the examples only.
        """
        for number, digest, parents, wants, whole, scores, failure, seconds, when, statistics in self._rows(
            "SELECT number, digest, parents, wants, scored, scores, failure, seconds, time, statistics "
            "FROM trials JOIN evaluations USING (number) WHERE number > ? AND (? OR scored) ORDER BY number",
            (after, unscored),
        ):
            yield Row(
                number,
                digest,
                tuple(json.loads(parents)),
                scores_of(scores),
                failure_of(failure),
                float(seconds),
                when,
                None if statistics is None else json.loads(statistics)["digest"],
                wish_of(wants),
                bool(whole),
            )

    def trial(self, number: int) -> Trial:
        """The trial with its genome, residual included, but without its sample.

        Raises:
            JournalError: There is no such trial, or its dense weights were not kept.
        """
        query = "SELECT genome, parents, dense, wants FROM trials WHERE number = ?"
        row = next(iter(self._rows(query, (number,))), None)
        if row is None:
            (count,) = next(iter(self._rows("SELECT count(*) FROM trials")))
            raise JournalError(f"trial {number}: not in {self.path} (it has 0 to {count - 1}).", "See `ecotone front`.")
        genome = Genome.from_json(row[0])
        if row[2]:
            genome = Genome(genome.boundaries, genome.coefficients, genome.parameters, self._residual(number))
        return Trial(number, genome, tuple(json.loads(row[1])), wish_of(row[3]))

    def evaluation(self, number: int) -> Evaluation | None:
        """The result of a trial; None before it comes."""
        return next(
            (
                evaluation_of(row)
                for row in self._rows(f"SELECT {COLUMNS} FROM evaluations WHERE number = ?", (number,))
            ),
            None,
        )

    def evaluations(self) -> Generator[tuple[int, Evaluation]]:
        """All trial numbers with their results, gradients included, in order of number."""
        for number, *row, segments, blob in self._rows(
            f"SELECT number, {COLUMNS}, segments, gradient FROM evaluations LEFT JOIN gradients USING (number) "
            "ORDER BY number"
        ):
            found = evaluation_of(row)
            if blob is not None:
                found = replace(found, gradient=np.frombuffer(blob, "<f8").astype(np.float64).reshape(segments, -1))
            yield number, found

    def evaluation_of(self, digest: str) -> Evaluation | None:
        """The result of the first scored trial with that genome, or None."""
        query = (
            f"SELECT {COLUMNS} FROM evaluations JOIN trials USING (number) WHERE digest = ? AND scored "
            "ORDER BY number LIMIT 1"
        )
        return next((evaluation_of(row) for row in self._rows(query, (digest,))), None)

    def measurement(self, digest: str, wants: Wish) -> Evaluation | None:
        """The result of a genome outside the search, or None."""
        query = f"SELECT {COLUMNS} FROM measurements WHERE digest = ? AND wants = ?"
        return next((evaluation_of(row) for row in self._rows(query, (digest, wish_text(wants)))), None)

    def statistics(self) -> list[tuple[str, Wish, Evaluation]]:
        """Statistics gathered outside the search: the genome's digest, the wish, and the result."""
        rows = self._rows(f"SELECT digest, wants, {COLUMNS} FROM measurements WHERE statistics IS NOT NULL")
        return [(digest, wish_of(wants), evaluation_of(row)) for digest, wants, *row in rows]

    def examples(self, subset: Subset) -> dict[str, int]:
        """The number of examples behind the scores, by objective. Objectives without scores by example are left out."""
        query = "SELECT shapes FROM measurements WHERE wants = ? AND shapes IS NOT NULL LIMIT 1"
        row = next(iter(self._rows(query, (wish_text(Scores(subset)),))), None)
        if row is None and subset == "search":
            query = (
                "SELECT shapes FROM evaluations JOIN trials USING (number) WHERE scored AND shapes IS NOT NULL LIMIT 1"
            )
            row = next(iter(self._rows(query)), None)
        return {} if row is None else {name: size for name, _, size, _ in json.loads(row[0])}

    def references(self) -> list[tuple[str, Genome]]:
        """Names and genomes of the merges to compare with, in the order they were recorded."""
        rows = self._rows("SELECT name, genome FROM reference_merges ORDER BY position")
        return [(name, Genome.from_json(text)) for name, text in rows]

    @property
    def version(self) -> int:
        """A number that changes when another connection has changed the journal."""
        return int(next(iter(self._rows("PRAGMA data_version")))[0])

    def counts(self) -> tuple[int, int, int]:
        """The numbers of events, evaluations and measurements: of two copies of a run, the newer has more."""
        tables = ("events", "evaluations", "measurements")
        found = next(iter(self._rows("SELECT " + ", ".join(f"(SELECT count(*) FROM {name})" for name in tables))))
        return tuple(found)

    def snapshot(self, path: str | Path) -> None:
        """Copy the journal as it is now to ``path``, as one plain file, even while somebody writes it."""
        with explained(Path(path)), contextlib.closing(sqlite3.connect(private(path), isolation_level=None)) as copy:
            self._connection.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")

    def kept(self) -> set[int]:
        """Numbers of the trials whose residual is stored."""
        return {number for (number,) in self._rows("SELECT number FROM residuals")}

    def digest(self) -> str:
        """A hash over the number, genome, scores and statistics of all evaluated trials, equal for equal searches."""
        hasher = hashlib.blake2b(digest_size=16)
        for row in self.rows(unscored=True):
            hasher.update(f"{row.number}:{row.digest}:".encode())
            if row.failure is not None:
                hasher.update(f"failed {row.failure.kind}".encode())
            for name, value in sorted((row.scores or {}).items()):
                hasher.update(name.encode() + struct.pack("<d", value))
            if row.statistics is not None:
                hasher.update(f"statistics {row.statistics}".encode())
        return hasher.hexdigest()

    @property
    def in_use(self) -> bool:
        """True while some process writes this journal."""
        return self._lock is not None or is_locked(self.path)

    def _rows(self, query: str, values: Sequence[Any] = ()) -> Iterator[Any]:
        with explained(self.path):
            yield from self._connection.execute(query, values)

    def _residual(self, number: int) -> NDArray[np.float32]:
        row = next(iter(self._rows("SELECT residual FROM residuals WHERE number = ?", (number,))), None)
        if row is None:
            raise JournalError(
                f"trial {number}: its weights were not kept (from scratch, only the archive's and the front's are).",
                "Choose a member that `ecotone front` lists.",
            )
        return np.frombuffer(row[0], "<f4").astype(np.float32)
