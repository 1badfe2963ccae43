"""Formats of the journal: today's tables, and the steps that migrate older journals.

Each step is a small function on a connection. It rebuilds the tables that change, so that a migrated journal has the
same tables as a new one. All steps of a journal are one transaction: a killed process leaves the old journal or the new
one. The table ``facts`` stores the format, so it is the same in every format.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ecotone.populations.database import damaged
from ecotone.populations.errors import JournalError
from ecotone.populations.sums import (
    CHAINED,
    EVALUATIONS,
    EVENTS,
    FACTS,
    GRADIENTS,
    REPLACED,
    TRIALS,
    Ledger,
    Table,
    recorded_seals,
)

FORMAT = 6

SCHEMA = """
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL, sum INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE seals (name TEXT PRIMARY KEY, rows INTEGER NOT NULL, sum INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE events (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, batch INTEGER NOT NULL, requested INTEGER,
    sum INTEGER NOT NULL);
CREATE TABLE trials (number INTEGER PRIMARY KEY, link INTEGER NOT NULL, sum INTEGER NOT NULL, batch INTEGER NOT NULL,
    genome TEXT NOT NULL, digest TEXT NOT NULL, parents TEXT NOT NULL, dense INTEGER NOT NULL, wants TEXT NOT NULL,
    scored INTEGER NOT NULL);
CREATE TABLE evaluations (number INTEGER PRIMARY KEY, link INTEGER NOT NULL, sum INTEGER NOT NULL, scores TEXT,
    shapes TEXT, per_example BLOB, failure TEXT, seconds REAL NOT NULL, items INTEGER NOT NULL, details TEXT,
    errors TEXT, time REAL NOT NULL, statistics TEXT);
CREATE TABLE gradients (number INTEGER PRIMARY KEY, link INTEGER NOT NULL, sum INTEGER NOT NULL,
    segments INTEGER NOT NULL, gradient BLOB NOT NULL);
CREATE TABLE residuals (number INTEGER PRIMARY KEY, sum INTEGER NOT NULL, residual BLOB NOT NULL);
CREATE TABLE measurements (digest TEXT NOT NULL, wants TEXT NOT NULL, sum INTEGER NOT NULL, scores TEXT, shapes TEXT,
    per_example BLOB, failure TEXT, seconds REAL NOT NULL, items INTEGER NOT NULL, details TEXT, errors TEXT,
    time REAL NOT NULL, statistics TEXT, PRIMARY KEY (digest, wants)) WITHOUT ROWID;
CREATE TABLE reference_merges (name TEXT PRIMARY KEY, position INTEGER NOT NULL, genome TEXT NOT NULL,
    digest TEXT NOT NULL, sum INTEGER NOT NULL) WITHOUT ROWID;
"""

_TRIALS_4 = """
CREATE TABLE trials (number INTEGER PRIMARY KEY, batch INTEGER NOT NULL, genome TEXT NOT NULL,
    digest TEXT NOT NULL, parents TEXT NOT NULL, dense INTEGER NOT NULL, calibration TEXT, stop REAL)"""


def _several_tasks(connection: sqlite3.Connection) -> None:
    """3 to 4: the gradient of a trial may be of several tasks, each with a weight."""
    connection.execute("DROP INDEX IF EXISTS trials_by_batch")
    connection.execute("ALTER TABLE trials RENAME TO older")
    connection.execute(_TRIALS_4)
    wanted = "CASE WHEN task IS NOT NULL THEN json_array(json_array(task), step, json_array(1.0)) END"
    connection.execute(
        f"INSERT INTO trials SELECT number, batch, genome, digest, parents, dense, {wanted}, stop FROM older"
    )
    connection.execute("DROP TABLE older")


_TRIALS_5 = """
CREATE TABLE trials (number INTEGER PRIMARY KEY, batch INTEGER NOT NULL, genome TEXT NOT NULL,
    digest TEXT NOT NULL, parents TEXT NOT NULL, dense INTEGER NOT NULL, wants TEXT NOT NULL,
    scored INTEGER NOT NULL)"""
_MEASUREMENTS_5 = """
CREATE TABLE measurements (digest TEXT NOT NULL, wants TEXT NOT NULL, scores TEXT, shapes TEXT, per_example BLOB,
    failure TEXT, seconds REAL NOT NULL, items INTEGER NOT NULL, details TEXT, errors TEXT, time REAL NOT NULL,
    statistics TEXT, PRIMARY KEY (digest, wants)) WITHOUT ROWID"""


def _wishes(connection: sqlite3.Connection) -> None:
    """4 to 5: trials and measurements say in ``wants`` what is measured; evaluations may be of statistics."""

    def wants(calibration: str | None, stop: float | None) -> str:
        if calibration is not None:
            tasks, step, weights = json.loads(calibration)
            record = {"sort": "gradient", "tasks": tasks, "step": step, "weights": weights}
        else:
            record = {"sort": "scores"} if stop is None or stop == 1 else {"sort": "scores", "reaches": stop}
        return json.dumps(record, sort_keys=True)

    def wants_on(subset: str) -> str:
        held_out = {} if subset == "search" else {"subset": subset}
        return json.dumps({"sort": "scores", **held_out}, sort_keys=True)

    connection.create_function("wants", 2, wants, deterministic=True)
    connection.create_function("wants_on", 1, wants_on, deterministic=True)
    connection.execute("ALTER TABLE trials RENAME TO older")
    connection.execute(_TRIALS_5)
    connection.execute(
        "INSERT INTO trials SELECT number, batch, genome, digest, parents, dense, wants(calibration, stop), "
        "calibration IS NULL AND ifnull(stop, 1) = 1 FROM older"
    )
    connection.execute("DROP TABLE older")
    connection.execute("ALTER TABLE evaluations ADD COLUMN statistics TEXT")
    connection.execute("ALTER TABLE measurements RENAME TO older")
    connection.execute(_MEASUREMENTS_5)
    connection.execute(
        "INSERT INTO measurements SELECT digest, wants_on(subset), scores, shapes, per_example, failure, seconds, "
        "items, details, errors, time, NULL FROM older"
    )
    connection.execute("DROP TABLE older")


def _sums(connection: sqlite3.Connection) -> None:
    """5 to 6: every row has a checksum. The chain is in the order in which a manager writes."""
    tables = (*CHAINED, *REPLACED)
    for table in tables:
        connection.execute(f"ALTER TABLE {table.name} RENAME TO older_{table.name}")
    create(connection)
    ledger = Ledger()

    def rows(table: Table, condition: str, *values: int) -> list[tuple[Any, ...]]:
        query = f"SELECT {', '.join(table.columns)} FROM older_{table.name} {condition}"
        return connection.execute(query, values).fetchall()

    def came(condition: str, *values: int) -> None:
        for result in rows(EVALUATIONS, condition, *values):
            ledger.append(connection, GRADIENTS, rows(GRADIENTS, "WHERE number = ?", result[0]))
            ledger.append(connection, EVALUATIONS, [result])

    connection.execute("CREATE INDEX trials_of_batch ON older_trials (batch)")
    for _, kind, batch, requested in rows(EVENTS, "ORDER BY seq"):
        if kind == "tell":
            came("WHERE number IN (SELECT number FROM older_trials WHERE batch = ?) ORDER BY time, number", batch)
        ledger.event(connection, kind, batch, requested)
        if kind == "ask":
            ledger.append(connection, TRIALS, rows(TRIALS, "WHERE batch = ? ORDER BY number", batch))
    ledger.append(connection, TRIALS, rows(TRIALS, "WHERE number NOT IN (SELECT number FROM trials) ORDER BY number"))
    came("WHERE number NOT IN (SELECT number FROM evaluations) ORDER BY time, number")
    for table in REPLACED:
        for row in connection.execute(f"SELECT {', '.join(table.columns)} FROM older_{table.name}"):
            ledger.put(connection, table, row)
    ledger.seal(connection)
    for table in tables:
        connection.execute(f"DROP TABLE older_{table.name}")


STEPS: Mapping[int, Callable[[sqlite3.Connection], None]] = {3: _several_tasks, 4: _wishes, 5: _sums}
"""The steps to the next format, by the format that they begin with."""

OLDEST = min(STEPS)


def create(connection: sqlite3.Connection) -> None:
    """Make the tables of today's format, inside a transaction."""
    for statement in SCHEMA.split(";")[:-1]:
        connection.execute(statement)


def begin(connection: sqlite3.Connection, facts: Iterable[tuple[str, str]]) -> None:
    """Make the tables of today's format with the texts of ``facts`` by name, inside a transaction."""
    create(connection)
    ledger = Ledger()
    for name, text in (("format", str(FORMAT)), *facts):
        ledger.put(connection, FACTS, (name, text))
    ledger.seal(connection)


def current(connection: sqlite3.Connection, file: Path, write: bool) -> sqlite3.Connection:
    """A connection to the journal in today's format.

    Args:
        connection: To a journal of any format.
        file: The file that holds it.
        write: Whether it may be changed. If not, an older one is copied to a private temporary database.

    Raises:
        JournalError: The format is a newer one, or one that is too old.
    """
    version = _checked(connection, file)
    if version == FORMAT:
        return connection
    (text,) = connection.execute(
        "PRAGMA quick_check(1)"
    ).fetchone()  # it has no checksums: only its pages can be checked
    if text != "ok":
        raise damaged(file, "pages", " ".join(str(text).split()))
    if write:
        _migrate(connection, version)
        return connection
    with contextlib.closing(connection):
        copy = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # in memory; on disk when large
        connection.backup(copy)
    _migrate(copy, version)
    copy.execute("PRAGMA query_only=ON")
    return copy


def _checked(connection: sqlite3.Connection, file: Path) -> int:
    """The format, if it can be read."""
    row = connection.execute("SELECT value FROM facts WHERE key = 'format'").fetchone()
    if row is None or not str(row[0]).isdigit():
        raise damaged(file, "facts", "it has no format")
    version = int(row[0])
    if version > FORMAT:
        raise JournalError(
            f"{file}: written by a newer Ecotone (format {version}; this one reads up to {FORMAT}).", "Update Ecotone."
        )
    if version < OLDEST:
        raise JournalError(
            f"{file}: written by a much older Ecotone (format {version}; this one reads {OLDEST} to {FORMAT}).",
            "Use the version of Ecotone that wrote it.",
        )
    return version


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        for older in range(version, FORMAT):
            STEPS[older](connection)
        ledger = Ledger(recorded_seals(connection))
        ledger.put(connection, FACTS, ("format", str(FORMAT)))
        ledger.seal(connection)
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
