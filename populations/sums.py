"""Checksums of the journal's rows: their computation, and a writer that keeps them right.

Every row has a column ``sum`` of 64 bits, and a *fingerprint*: xxh3 over its table and all its other values. Rows are
of two sorts.

- Rows that are written once (events, trials, evaluations, gradients) form one chain over all these tables. The column
  ``link`` (``seq`` of events) numbers them in the order in which they were written, from 0:
  ``sum[i] = PRIME * sum[i - 1] + fingerprint[i]``, modulo 2^64. A row that is altered, removed, swapped or moved breaks
  the chain at its link, and no row before it.
- Rows that are replaced or dropped (facts, measurements, reference merges, residuals) have their fingerprint as sum.

The table ``seals`` has one row for the chain and one for each table of the second sort: the number of its rows, and the
last sum of the chain, or the total of the table's sums modulo 2^64. So a row that is missing, or that is an older one,
shows too. Each transaction writes the seals that it changed. Checksums find damage; they do not stop a forger.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

PRIME = 0x9E3779B97F4A7C15
"""An odd number, so that the step of the chain can be undone: no two chains become one."""
_MODULUS = 2**64
CHAIN = "chain"
"""The name of the chain's seal."""

_RESULT = (
    *("scores", "shapes", "per_example", "failure", "seconds"),
    *("items", "details", "errors", "time", "statistics"),
)


@dataclass(frozen=True)
class Table:
    """A table whose rows have sums.

    Args:
        name: Its name.
        number: Seeds its fingerprints, so that no row of one table passes for a row of another.
        key: Names of the columns of its primary key.
        columns: The names of all columns that are summed, the key first.
        link: The column of the place in the chain; None where rows are replaced or dropped.
        blob: The position in ``columns`` of the one that may be bytes; None where there is none.
    """

    name: str
    number: int
    key: tuple[str, ...]
    columns: tuple[str, ...]
    link: str | None = None
    blob: int | None = None

    @property
    def stored(self) -> tuple[str, ...]:
        """The names of all columns as they are read and written: those summed, the link if it is another, the sum."""
        own = () if self.link is None or self.link in self.columns else (self.link,)
        return (*self.columns, *own, "sum")

    def insert(self, verb: str = "INSERT") -> str:
        """The statement that writes a row of ``stored``."""
        names = self.stored
        return f"{verb} INTO {self.name} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"

    @property
    def select(self) -> str:
        """The query of all rows as ``stored``, in the order of the key."""
        return f"SELECT {', '.join(self.stored)} FROM {self.name} ORDER BY {', '.join(self.key)}"

    def place(self, key: Sequence[Any]) -> str:
        """A row in words."""
        if self.key == ("number",):
            return f"{self.name}, trial {key[0]}"
        return f"{self.name}, {', '.join(f'{name} {one}' for name, one in zip(self.key, key, strict=False))}"


EVENTS = Table("events", 1, ("seq",), ("seq", "kind", "batch", "requested"), "seq")
TRIALS = Table(
    *("trials", 2, ("number",)),
    ("number", "batch", "genome", "digest", "parents", "dense", "wants", "scored"),
    "link",
)
EVALUATIONS = Table("evaluations", 3, ("number",), ("number", *_RESULT), "link", 3)
GRADIENTS = Table("gradients", 4, ("number",), ("number", "segments", "gradient"), "link", 2)
FACTS = Table("facts", 5, ("key",), ("key", "value"))
RESIDUALS = Table("residuals", 6, ("number",), ("number", "residual"), None, 1)
MEASUREMENTS = Table("measurements", 7, ("digest", "wants"), ("digest", "wants", *_RESULT), None, 4)
REFERENCES = Table("reference_merges", 8, ("name",), ("name", "position", "genome", "digest"))

CHAINED = (EVENTS, TRIALS, GRADIENTS, EVALUATIONS)
REPLACED = (FACTS, RESIDUALS, MEASUREMENTS, REFERENCES)
TABLES: Mapping[str, Table] = {table.name: table for table in (*CHAINED, *REPLACED)}


def fingerprint(table: Table, row: tuple[Any, ...]) -> int:
    """64 bits over the values of ``table.columns``. The text of Python's ``ascii`` tells types and all bits apart."""
    at = table.blob
    if at is None or type(blob := row[at]) is not bytes:
        return xxh3_64_intdigest(ascii(row).encode(), table.number)
    return xxh3_64_intdigest(blob, xxh3_64_intdigest(ascii((*row[:at], *row[at + 1 :])).encode(), table.number + 100))


def chained(before: int, own: int) -> int:
    """The sum of a row of the chain: ``before`` is the sum of the row before it, ``own`` its fingerprint."""
    return (PRIME * before + own) % _MODULUS


def signed(value: int) -> int:
    """64 bits as SQLite stores them."""
    return value - _MODULUS if value >= _MODULUS // 2 else value


def unsigned(value: Any) -> int:
    """64 bits from SQLite.

    Raises:
        TypeError: It is no integer.
    """
    if type(value) is not int:
        raise TypeError(f"expected a whole number, found {value!r}")
    return value % _MODULUS


class Seal(NamedTuple):
    """Number of rows, and the last sum of the chain or the total of a table's sums."""

    rows: int = 0
    sum: int = 0


EMPTY: Mapping[str, Seal] = {name: Seal() for name in (CHAIN, *(table.name for table in REPLACED))}


def recorded_seals(connection: sqlite3.Connection) -> dict[str, Seal]:
    """The seals that the journal has.

    Raises:
        TypeError: One is damaged.
    """
    rows = connection.execute("SELECT name, rows, sum FROM seals").fetchall()
    return {name: Seal(unsigned(count), unsigned(total)) for name, count, total in rows}


class Ledger:
    """Writes rows with their sums. It stands where the journal's last transaction left the seals.

    Args:
        seals: The seals that the journal has; none of a new one.
    """

    def __init__(self, seals: Mapping[str, Seal] = MappingProxyType({})) -> None:
        self._seals = {**EMPTY, **seals}
        self._written = dict(seals)

    def append(self, connection: sqlite3.Connection, table: Table, rows: Iterable[tuple[Any, ...]]) -> None:
        """Write new rows of a table of the chain, in this order."""
        count, last = self._seals[CHAIN]
        stored = []
        for row in rows:
            last = chained(last, fingerprint(table, row))
            stored.append((*row, count, signed(last)))
            count += 1
        connection.executemany(table.insert(), stored)
        self._seals[CHAIN] = Seal(count, last)

    def event(self, connection: sqlite3.Connection, kind: str, batch: int, requested: int | None) -> None:
        """Write a row of ``events``, whose key is its place in the chain."""
        count, last = self._seals[CHAIN]
        row = (count, kind, batch, requested)
        last = chained(last, fingerprint(EVENTS, row))
        connection.execute(EVENTS.insert(), (*row, signed(last)))
        self._seals[CHAIN] = Seal(count + 1, last)

    def put(self, connection: sqlite3.Connection, table: Table, row: tuple[Any, ...], *, replace: bool = True) -> None:
        """Write a row of another table, in the place of the one with its key; if not ``replace``, that one stays."""
        key = row[: len(table.key)]
        old = self._sum(connection, table, key)
        if old is not None and not replace:
            return
        own, (count, total) = fingerprint(table, row), self._seals[table.name]
        connection.execute(table.insert("INSERT OR REPLACE"), (*row, signed(own)))
        self._seals[table.name] = Seal(count + (old is None), (total + own - (old or 0)) % _MODULUS)

    def drop(self, connection: sqlite3.Connection, table: Table, key: tuple[Any, ...]) -> None:
        """Delete the row with that key, if there is one."""
        old = self._sum(connection, table, key)
        if old is not None:
            connection.execute(f"DELETE FROM {table.name} WHERE {_matching(table)}", key)
            count, total = self._seals[table.name]
            self._seals[table.name] = Seal(count - 1, (total - old) % _MODULUS)

    def seal(self, connection: sqlite3.Connection) -> None:
        """Write the seals that have changed. The last thing of a transaction."""
        for name, seal in self._seals.items():
            if seal != self._written.get(name):
                connection.execute("INSERT OR REPLACE INTO seals VALUES (?, ?, ?)", (name, seal.rows, signed(seal.sum)))
        self._written = dict(self._seals)

    @staticmethod
    def _sum(connection: sqlite3.Connection, table: Table, key: tuple[Any, ...]) -> int | None:
        row = connection.execute(f"SELECT sum FROM {table.name} WHERE {_matching(table)}", key).fetchone()
        return None if row is None else unsigned(row[0])


def _matching(table: Table) -> str:
    return " AND ".join(f"{name} = ?" for name in table.key)
