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
- ``seals``: the number of rows and the last checksum, by which a row that is missing shows.

Every row has a checksum. Events, trials, evaluations and gradients are never changed: each row's checksum depends on
the row written before it, so that they form one chain. Other rows are replaced or dropped, and have checksums of their
own (``ecotone.populations.sums`` explains both). ``Journal.open`` checks them all (``ecotone.populations.checking``),
and a genome that is read is compared with its digest. `ecotone check` says what of a damaged journal is whole, and
`ecotone check --repair` keeps the chain before the damage (``ecotone.populations.salvage``). The write-ahead log has
checksums of SQLite's own: a log that is damaged ends there, and what came after is evaluated again.

Commits use SQLite's write-ahead log with ``synchronous=NORMAL``: a killed process loses nothing that was committed. A
power cut may lose the last moments, never consistency. One process writes, which holds a lock file; any number may read
meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import struct
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ecotone.populations.arrays import numbers
from ecotone.populations.birth import born, bring_forth, claimed, missing
from ecotone.populations.checking import known
from ecotone.populations.database import connected, damaged, explained, is_locked, locked
from ecotone.populations.errors import EcotoneError, JournalError
from ecotone.populations.facts import CREATED, Fact, Note, Value
from ecotone.populations.folders import private
from ecotone.populations.genome import Genome
from ecotone.populations.migrations import current
from ecotone.populations.rows import (
    COLUMNS,
    UNDECODABLE,
    evaluation_of,
    evaluation_row,
    failure_of,
    gradient_of,
    parents_of,
    scores_of,
    sizes_of,
    statistics_of,
    trial_row,
    wish_of,
    wish_text,
)
from ecotone.populations.sums import (
    EVALUATIONS,
    FACTS,
    GRADIENTS,
    MEASUREMENTS,
    REFERENCES,
    RESIDUALS,
    TABLES,
    TRIALS,
    Ledger,
    recorded_seals,
)
from ecotone.populations.trial import Evaluation, Failure, Gradient, Scores, Subset, Trial, Wish

Made = TypeVar("Made")


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
        self._ledger: Ledger | None = None  # read from the file when it is needed
        self._claim = contextlib.ExitStack()  # on the directory, of a journal that was made here

    @classmethod
    def create(cls, path: str | Path, notes: Iterable[Note] = (), lock: IO[str] | None = None) -> Journal:
        """A new journal with the facts ``notes``. The file must not exist. It appears whole, or not at all.

        Args:
            path: Its file.
            notes: The facts.
            lock: The lock of ``ecotone.populations.birth.claimed``, if the caller has taken it. The journal closes it.
        """
        file = Path(path)
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(claimed(file)) if lock is None else lock
            with explained(file):
                if born(file):
                    raise _there(file)
                try:
                    bring_forth(file, map(_storable, (CREATED.note(time.time()), *notes)))
                except FileExistsError as error:
                    raise _there(file) from error
                journal = cls(file, connected(file, write=True), lock)
            journal._claim = stack.pop_all()  # it is born, and keeps the lock
        return journal

    @classmethod
    def open(cls, path: str | Path, write: bool = False) -> Journal:
        """An existing journal, for reading or as its one writer. Its rows are checked.

        Opening for writing migrates a journal of an older format. Opening for reading does not change it: it migrates
        and reads a private copy, which shows the journal at the time of opening.
        """
        file = Path(path)
        with explained(file):
            if not born(file):
                raise missing(file)
            lock = locked(file) if write else None
            connection = None
            try:
                connection = connected(file, write)
                shown = current(connection, file, write)
                if shown is connection:
                    known(connection, file, growing=not write and is_locked(file))
                return cls(file, shown, lock)
            except BaseException:  # who holds the error holds no lock
                if connection is not None:
                    connection.close()
                if lock is not None:
                    lock.close()
                raise

    def close(self) -> None:
        """Close the file and let the next writer in."""
        self._connection.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        self._claim.close()

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
                if self._ledger is not None:
                    self._ledger.seal(self._connection)
                self._connection.execute("COMMIT")
            except BaseException:
                self._ledger = None  # the file knows where it stands
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    def note(self, fact: Fact[Value], value: Value) -> None:
        """Set a fact."""
        self._keep(fact.note(value))

    def complete(self, notes: Iterable[Note]) -> None:
        """Set those facts that were never noted, or were lost with a damaged journal."""
        with self.transaction():
            for note in notes:
                self._rows_of.put(self._connection, FACTS, _storable(note), replace=False)

    def _keep(self, note: Note) -> None:
        with self.transaction():
            self._rows_of.put(self._connection, FACTS, _storable(note))

    @property
    def _rows_of(self) -> Ledger:
        """The writer of rows, inside a transaction."""
        if self._ledger is None:
            self._ledger = Ledger(recorded_seals(self._connection))
        return self._ledger

    def asked(self, batch: int, requested: int, trials: Sequence[Trial]) -> None:
        """Record that ``ask(requested)`` proposed ``trials``, which make up batch number ``batch``."""
        with self.transaction():
            self._rows_of.event(self._connection, "ask", batch, requested)
            self._rows_of.append(self._connection, TRIALS, [trial_row(trial, batch) for trial in trials])

    def arrived(self, results: Iterable[tuple[Trial, Evaluation]]) -> None:
        """Record the results of trials, in the order of arrival."""
        now = time.time()
        with self.transaction():
            rows: list[tuple[Any, ...]] = []
            for trial, one in results:
                if one.gradient is not None:  # it comes before its evaluation: that one is never without it
                    self._rows_of.append(self._connection, EVALUATIONS, rows)
                    rows.clear()
                    blob = np.asarray(one.gradient, "<f8").tobytes()
                    self._rows_of.append(self._connection, GRADIENTS, [(trial.number, len(one.gradient), blob)])
                rows.append((trial.number, *evaluation_row(one, now)))
            self._rows_of.append(self._connection, EVALUATIONS, rows)

    def told(self, batch: int) -> None:
        """Record that the search was told batch ``batch``."""
        with self.transaction():
            self._rows_of.event(self._connection, "tell", batch, None)

    def keep(self, trials: Iterable[Trial], dropped: Iterable[int]) -> None:
        """Store the residuals of ``trials`` that have one, and drop the residuals of the numbers ``dropped``."""
        with self.transaction():
            for number in dropped:
                self._rows_of.drop(self._connection, RESIDUALS, (number,))
            for trial in trials:
                if (residual := trial.genome.residual) is not None:
                    row = (trial.number, residual.astype("<f4").tobytes())
                    self._rows_of.put(self._connection, RESIDUALS, row, replace=False)

    def measured(self, genome: Genome, wants: Wish, evaluation: Evaluation) -> None:
        """Record a result of a genome outside the search."""
        row = (genome.digest, wish_text(wants), *evaluation_row(evaluation, time.time()))
        with self.transaction():
            self._rows_of.put(self._connection, MEASUREMENTS, row)

    def refer(self, name: str, genome: Genome) -> None:
        """Record a merge to compare with: a seed model, the average."""
        with self.transaction():
            (position,) = self._connection.execute("SELECT count(*) FROM reference_merges").fetchone()
            row = (name, position, genome.to_json(), genome.digest)
            self._rows_of.put(self._connection, REFERENCES, row, replace=False)

    # -- reading -----------------------------------------------------------------------------------------

    def fact(self, fact: Fact[Value]) -> Value | None:
        """The value of a fact, or None where it was never noted."""
        rows = self._rows("SELECT key, value FROM facts WHERE key = ?", (fact.name,))
        return next(self._decoded("facts", rows, lambda text: fact.read(str(text))), None)

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
        rows = self._rows(
            "SELECT number, number, digest, parents, wants, scored, scores, failure, seconds, time, statistics "
            "FROM trials JOIN evaluations USING (number) WHERE number > ? AND (? OR scored) ORDER BY number",
            (after, unscored),
        )
        yield from self._decoded("evaluations", rows, _row)

    def trial(self, number: int) -> Trial:
        """The trial with its genome, residual included, but without its sample.

        Raises:
            JournalError: There is no such trial, its dense weights were not kept, or its genome is another's.
        """
        query = "SELECT number, genome, digest, parents, dense, wants FROM trials WHERE number = ?"

        def made(text: str, digest: str, parents: str, dense: int, wants: str) -> Trial:
            genome = Genome.from_json(text)
            if dense:
                genome = Genome(genome.boundaries, genome.coefficients, genome.parameters, self._residual(number))
            return Trial(number, _same(genome, digest), parents_of(parents), wish_of(wants))

        found = next(self._decoded("trials", self._rows(query, (number,)), made), None)
        if found is None:
            (count,) = next(iter(self._rows("SELECT count(*) FROM trials")))
            raise JournalError(f"trial {number}: not in {self.path} (it has 0 to {count - 1}).", "See `ecotone front`.")
        return found

    def evaluation(self, number: int) -> Evaluation | None:
        """The result of a trial; None before it comes."""
        return self._evaluation("FROM evaluations WHERE number = ?", (number,))

    def evaluations(self) -> Generator[tuple[int, Evaluation]]:
        """All trial numbers with their results, gradients included, in order of number."""

        def made(number: int, *row: Any) -> tuple[int, Evaluation]:
            *values, segments, blob = row
            found = evaluation_of(values)
            return number, found if blob is None else replace(found, gradient=gradient_of(segments, blob))

        rows = self._rows(
            f"SELECT number, number, {COLUMNS}, segments, gradient FROM evaluations LEFT JOIN gradients USING (number) "
            "ORDER BY number"
        )
        yield from self._decoded("evaluations", rows, made)

    def evaluation_of(self, digest: str) -> Evaluation | None:
        """The result of the first scored trial with that genome, or None."""
        query = "FROM evaluations JOIN trials USING (number) WHERE digest = ? AND scored ORDER BY number LIMIT 1"
        return self._evaluation(query, (digest,))

    def _evaluation(self, query: str, values: Sequence[Any]) -> Evaluation | None:
        rows = self._rows(f"SELECT number, {COLUMNS} {query}", values)
        return next(self._decoded("evaluations", rows, lambda *row: evaluation_of(row)), None)

    def measurement(self, digest: str, wants: Wish) -> Evaluation | None:
        """The result of a genome outside the search, or None."""
        rows = self._rows(
            f"SELECT digest, {COLUMNS} FROM measurements WHERE digest = ? AND wants = ?", (digest, wish_text(wants))
        )
        return next(self._decoded("measurements", rows, lambda *row: evaluation_of(row)), None)

    def statistics(self) -> list[tuple[str, Wish, Evaluation]]:
        """Statistics gathered outside the search: the genome's digest, the wish, and the result."""
        rows = self._rows(f"SELECT digest, digest, wants, {COLUMNS} FROM measurements WHERE statistics IS NOT NULL")
        return list(
            self._decoded(
                "measurements", rows, lambda digest, wants, *row: (digest, wish_of(wants), evaluation_of(row))
            )
        )

    def examples(self, subset: Subset) -> dict[str, int]:
        """The number of examples behind the scores, by objective. Objectives without scores by example are left out."""
        query = "SELECT digest, shapes FROM measurements WHERE wants = ? AND shapes IS NOT NULL LIMIT 1"
        found = next(self._decoded("measurements", self._rows(query, (wish_text(Scores(subset)),)), sizes_of), None)
        if found is None and subset == "search":
            query = (
                "SELECT number, shapes FROM evaluations JOIN trials USING (number) "
                "WHERE scored AND shapes IS NOT NULL LIMIT 1"
            )
            found = next(self._decoded("evaluations", self._rows(query), sizes_of), None)
        return found or {}

    def references(self) -> list[tuple[str, Genome]]:
        """Names and genomes of the merges to compare with, in the order they were recorded.

        Raises:
            JournalError: A genome is another's.
        """
        rows = self._rows("SELECT name, name, genome, digest FROM reference_merges ORDER BY position")
        return list(
            self._decoded(
                "reference_merges", rows, lambda name, text, digest: (name, _same(Genome.from_json(text), digest))
            )
        )

    @property
    def version(self) -> int:
        """A number that changes when another connection has changed the journal."""
        return int(next(iter(self._rows("PRAGMA data_version")))[0])

    def counts(self) -> tuple[int, int, int]:
        """The numbers of events, evaluations and measurements: of two copies of a run, the newer has more."""
        tables = ("events", "evaluations", "measurements")
        found = next(iter(self._rows("SELECT " + ", ".join(f"(SELECT count(*) FROM {name})" for name in tables))))
        return tuple(found)

    def sizes(self) -> dict[str, int]:
        """The number of rows, by table."""
        query = "SELECT " + ", ".join(f"(SELECT count(*) FROM {name})" for name in TABLES)
        return dict(zip(TABLES, next(iter(self._rows(query))), strict=True))

    def snapshot(self, path: str | Path) -> None:
        """Copy the journal as it is now to ``path``, as one plain file, even while somebody writes it."""
        with explained(Path(path)), contextlib.closing(sqlite3.connect(private(path), isolation_level=None)) as copy:
            self._connection.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")

    def kept(self) -> set[int]:
        """Numbers of the trials whose residual is stored."""
        return {number for (number,) in self._rows("SELECT number FROM residuals")}

    def dense(self) -> set[int]:
        """Numbers of the trials that have a residual, whether it is stored or not."""
        return {number for (number,) in self._rows("SELECT number FROM trials WHERE dense")}

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
            # Not `yield from`: it would touch the cursor when an unfinished generator goes after the journal is closed.
            for row in self._connection.execute(query, values):  # noqa: UP028
                yield row

    def _decoded(self, table: str, rows: Iterable[Any], made: Callable[..., Made]) -> Iterator[Made]:
        """What ``made`` makes of the values of each row after the first, which is its key.

        Raises:
            JournalError: A value is damaged.
        """
        for key, *values in rows:
            try:
                found = made(*values)
            except UNDECODABLE as error:
                place = f"{table}, trial {key}" if isinstance(key, int) else f"{table}, {key}"
                raise damaged(self.path, place, f"a value cannot be read ({_in_short(error)})") from error
            yield found

    def _residual(self, number: int) -> NDArray[np.float32]:
        row = next(iter(self._rows("SELECT residual FROM residuals WHERE number = ?", (number,))), None)
        if row is None:
            raise JournalError(
                f"trial {number}: its weights were not kept (from scratch, only the archive's and the front's are).",
                "Choose a member that `ecotone front` lists.",
            )
        return numbers(row[0], "<f4").astype(np.float32)


def _storable(note: Note) -> tuple[str, str]:
    """A fact's name and text. Half a character of UTF-16, which no file can hold, is a question mark in it."""
    return note.name, note.text.encode("utf-8", "replace").decode()


def _there(file: Path) -> JournalError:
    return JournalError(f"{file}: a run is there already.", f"Use `ecotone resume {file.parent}`, or another --out.")


def _row(
    number: int,
    digest: str,
    parents: str,
    wants: str,
    whole: int,
    scores: str | None,
    failure: str | None,
    seconds: float,
    when: float,
    statistics: str | None,
) -> Row:
    gathered = statistics_of(statistics)
    return Row(
        number,
        digest,
        parents_of(parents),
        scores_of(scores),
        failure_of(failure),
        float(seconds),
        when,
        None if gathered is None else gathered.digest,
        wish_of(wants),
        bool(whole),
    )


def _same(genome: Genome, digest: str) -> Genome:
    """The genome, if its digest is the recorded one.

    Raises:
        ValueError: It is another's.
    """
    if genome.digest != digest:
        raise ValueError(f"its genome has the digest {genome.digest}, and {digest} is recorded")
    return genome


def _in_short(error: BaseException) -> str:
    text = error.message if isinstance(error, EcotoneError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:200].rstrip(".")
