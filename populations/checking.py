"""The check of a journal: are all rows as they were written, and are all there?

``verified`` reads every row once, in one transaction. It compares the tables' declarations, each row's checksum, the
chain and the seals (``ecotone.populations.sums``). It lets SQLite check the tree of its pages too: a damaged page above
the rows leaves a scan right and a look-up wrong. ``Journal.open`` calls ``known``, which remembers for this process
what was verified. A file that has not changed is not read again, and of one that somebody writes only new rows are.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ecotone.populations.database import damaged, of_content
from ecotone.populations.migrations import SCHEMA
from ecotone.populations.sums import (
    CHAIN,
    CHAINED,
    EMPTY,
    PRIME,
    REPLACED,
    Seal,
    Table,
    fingerprint,
    recorded_seals,
    unsigned,
)

Seals: TypeAlias = Mapping[str, Seal]
Stamp: TypeAlias = tuple[tuple[int, int], ...]

_SETTLED = 1.0  # seconds after which a file's time of change tells a change apart: clocks of file systems are coarse
_SHARE = 20.0  # a file that grows is read again after so many times the seconds that reading it took
_REMEMBERED = 64  # files


class DamageError(Exception):
    """Something is not as it was written.

    Args:
        place: The table and the row, or another part of the file.
        text: What is wrong there.
        whole: The number of evaluations before it that are whole; None where that is not known.
    """

    def __init__(self, place: str, text: str, whole: int | None = None) -> None:
        self.place = place
        self.text: str = text.split(" with text ")[0]  # SQLite's messages quote the bytes that they cannot read
        self.whole = whole
        super().__init__(f"{place}: {text}")


# -- everything --------------------------------------------------------------------------------------------------


def verified(connection: sqlite3.Connection, after: Seal = EMPTY[CHAIN]) -> Seals:
    """Check a journal of today's format, inside a transaction of its own.

    Args:
        connection: To the journal.
        after: The part of the chain that is known to be whole. With it, pages are not checked.

    Returns:
        The seals of what is there.

    Raises:
        DamageError: The first damage that shows.
        sqlite3.Error: The file cannot be read.
    """
    connection.execute("BEGIN")
    try:
        _check_tables(connection)
        recorded = _recorded(connection)
        found = {CHAIN: _check_chain(connection, after, recorded.get(CHAIN, Seal()))}
        for table in REPLACED:
            found[table.name] = _check_replaced(connection, table, recorded.get(table.name, Seal()))
        if after == EMPTY[CHAIN]:
            _check_pages(connection)
        if recorded.keys() - found.keys():
            raise DamageError("seals", "a row is there that does not belong there")
        return found
    finally:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("COMMIT")


def declared() -> list[tuple[str, str, str, str]]:
    """The tables of today's format, as SQLite lists them: type, name, table, declaration."""
    statements = [statement.strip() for statement in SCHEMA.split(";")[:-1]]
    names = [statement.split()[2] for statement in statements]
    return [("table", name, name, statement) for name, statement in zip(names, statements, strict=True)]


def _check_tables(connection: sqlite3.Connection) -> None:
    with _located("the list of tables"):
        rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall()
    if sorted(rows, key=repr) != sorted(declared(), key=repr):
        raise DamageError("the list of tables", "it differs from that of this format")


def _recorded(connection: sqlite3.Connection) -> dict[str, Seal]:
    with _located("seals"):
        return recorded_seals(connection)


def _check_pages(connection: sqlite3.Connection) -> None:
    with _located("pages"):
        (text,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if text != "ok":
        raise DamageError("pages", " ".join(str(text).split()))


@contextlib.contextmanager
def _located(place: str) -> Iterator[None]:
    """Turn what reading may raise into damage at a place."""
    try:
        yield
    except sqlite3.Error as error:
        if not of_content(error):
            raise
        raise DamageError(place, str(error)) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise DamageError(place, str(error)) from error


# -- the chain ---------------------------------------------------------------------------------------------------


class _Links:
    """What a scan of the chained tables finds of each row: its link, sum, fingerprint, table and key."""

    def __init__(self) -> None:
        self.links, self.keys = array("q"), array("q")
        self.sums, self.prints = array("Q"), array("Q")
        self.tables = array("B")

    def scan(self, connection: sqlite3.Connection, position: int, after: int) -> None:
        """Add the rows of a table from the link ``after`` on."""
        table, key = CHAINED[position], None
        query = table.select.replace(" ORDER BY", f" WHERE {table.link} >= {after} ORDER BY") if after else table.select
        at = len(table.columns)
        try:
            for row in connection.execute(query):
                key, link = row[0], row[0] if table.link == "seq" else row[at]
                self.links.append(link)
                self.keys.append(key)
                self.sums.append(unsigned(row[-1]))
                self.prints.append(fingerprint(table, row[:at]))
                self.tables.append(position)
        except (TypeError, ValueError, OverflowError) as error:
            raise DamageError(table.place((key,)), f"a value is damaged ({error})") from error
        except sqlite3.Error as error:
            if not of_content(error):
                raise
            raise DamageError(_after(table, key), str(error)) from error


def _after(table: Table, key: Any) -> str:
    return f"{table.name}, at the beginning" if key is None else f"{table.place((key,))}, or the row after it"


def _check_chain(connection: sqlite3.Connection, after: Seal, recorded: Seal) -> Seal:
    found = _Links()
    for position in range(len(CHAINED)):
        found.scan(connection, position, after.rows)
    links = np.frombuffer(found.links, np.int64) if found.links else np.zeros(0, np.int64)
    sums = np.frombuffer(found.sums, np.uint64) if found.sums else np.zeros(0, np.uint64)
    prints = np.frombuffer(found.prints, np.uint64) if found.prints else np.zeros(0, np.uint64)
    order = np.argsort(links, kind="stable")
    before = np.concatenate([np.array([after.sum], np.uint64), sums[order[:-1]]])[: len(order)]
    fits = sums[order] == np.uint64(PRIME) * before + prints[order]
    placed = links[order] == np.arange(after.rows, after.rows + len(order))
    wrong = np.flatnonzero(~(fits & placed))
    if len(wrong):
        first = int(wrong[0])
        row = int(order[first])
        why = "its checksum does not fit" if placed[first] else "a row before it is missing, or its place is damaged"
        table = CHAINED[found.tables[row]]
        raise DamageError(table.place((found.keys[row],)), why, _evaluations(found, order[:first], after))
    end = Seal(after.rows + len(order), int(sums[order[-1]]) if len(order) else after.sum)
    if end != recorded:
        text = f"its seal tells of {recorded.rows} rows and their sum, and {end.rows} rows are there"
        raise DamageError("the end of the chain", text, _evaluations(found, order, after))
    return end


def _evaluations(found: _Links, rows: Any, after: Seal) -> int | None:
    """How many of the rows are evaluations, if all of the chain was read."""
    names = np.array([table.name == "evaluations" for table in CHAINED])
    return None if after.rows else int(names[np.frombuffer(found.tables, np.uint8)[rows]].sum()) if len(rows) else 0


# -- the other tables --------------------------------------------------------------------------------------------


def _check_replaced(connection: sqlite3.Connection, table: Table, recorded: Seal) -> Seal:
    count, total, key = 0, 0, None
    width, at = len(table.key), len(table.columns)
    with _located(table.name):
        for row in connection.execute(table.select):
            if key is not None and not key < row[:width]:
                raise DamageError(table.place(row[:width]), "it is not in its place")
            key = row[:width]
            own = fingerprint(table, row[:at])
            if own != unsigned(row[-1]):
                raise DamageError(table.place(key), "its checksum does not fit")
            count, total = count + 1, total + own
    found = Seal(count, total % 2**64)
    if found != recorded:
        raise DamageError(
            table.name, f"its seal tells of {recorded.rows} rows and their sums, and {count} rows are there"
        )
    return found


# -- what this process knows -------------------------------------------------------------------------------------


class _Known(NamedTuple):
    """What was verified of a file, when, and how long it took."""

    stamp: Stamp
    seals: Seals
    moment: float
    took: float


_KNOWN: OrderedDict[tuple[int, int], _Known] = OrderedDict()


def known(connection: sqlite3.Connection, file: Path, *, growing: bool) -> Seals:
    """As ``verified``, and no more of it than is needed.

    Args:
        connection: To the journal.
        file: The journal.
        growing: Whether some process writes it now: then rows that were verified are not read again.

    Raises:
        JournalError: It is damaged.
        sqlite3.Error: The file cannot be read.
    """
    about = file.stat()
    place, stamp, began = (about.st_dev, about.st_ino), _stamp(file), time.monotonic()
    before = _KNOWN.get(place)
    if before is not None and (before.stamp == stamp or (growing and began < before.moment + _SHARE * before.took)):
        return before.seals
    try:
        seals = _grown(connection, before.seals[CHAIN]) if before is not None and growing else None
        seals = verified(connection) if seals is None else seals
    except DamageError as error:
        _KNOWN.pop(place, None)
        raise damaged(file, error.place, error.text, error.whole) from error
    settled = time.time_ns() - max((changed for _, changed in stamp), default=0) > _SETTLED * 1e9
    now = time.monotonic()
    _KNOWN[place] = _Known(stamp if settled else (), seals, now, now - began)
    _KNOWN.move_to_end(place)
    while len(_KNOWN) > _REMEMBERED:
        _KNOWN.popitem(last=False)
    return seals


def forget(file: Path) -> None:
    """Have the next ``known`` read all of a file."""
    about = file.stat()
    _KNOWN.pop((about.st_dev, about.st_ino), None)


def _grown(connection: sqlite3.Connection, after: Seal) -> Seals | None:
    """The seals, if new rows go on with the chain that was verified. Another file may have got this one's number."""
    try:
        return verified(connection, after)
    except DamageError:
        return None


def _stamp(file: Path) -> Stamp:
    """Sizes and times of the last change of the journal and its log."""
    found = []
    for one in (file, file.with_name(f"{file.name}-wal")):
        with contextlib.suppress(FileNotFoundError):
            about = one.stat()
            found.append((about.st_size, about.st_mtime_ns))
    return tuple(found)
