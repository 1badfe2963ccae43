"""What can be saved of a damaged journal, and the journal that is made of it.

Rows are read through SQLite as far as it reads them, from both ends of each table, and straight from the file's pages
(``ecotone.populations.pages``). The chain is then followed from its first row as long as the checksums fit. Everything
before the first row that is missing or damaged is kept: that is the run as it was at that moment. Its last rows are
left out where the search could not go on from them: a batch of which not all trials are known to be there, or not all
results. Facts, measurements, reference merges and residuals are kept if their own checksums fit.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecotone.populations import facts
from ecotone.populations.birth import drafted
from ecotone.populations.database import connected
from ecotone.populations.files import synchronised
from ecotone.populations.folders import OWN_FOLDER, private
from ecotone.populations.genome import Genome
from ecotone.populations.migrations import FORMAT, create
from ecotone.populations.pages import Pages
from ecotone.populations.rows import UNDECODABLE, evaluation_of
from ecotone.populations.sums import (
    CHAIN,
    CHAINED,
    EVALUATIONS,
    EVENTS,
    FACTS,
    GRADIENTS,
    REFERENCES,
    REPLACED,
    RESIDUALS,
    TRIALS,
    Ledger,
    Seal,
    Table,
    chained,
    fingerprint,
    recorded_seals,
    unsigned,
)

Row = tuple[Any, ...]
"""The values of ``Table.columns``."""
_UNREADABLE = (sqlite3.Error, TypeError, ValueError, OverflowError)  # what SQLite and its text may raise


@dataclass(frozen=True)
class Saved:
    """The rows of a journal that are whole and belong together.

    Args:
        chain: Tables and rows of the chain, in its order.
        others: The rows of the other tables.
        found: Rows that were there at all, by table; their checksums may not fit.
        whole: Whether the chain is kept to its end.
    """

    chain: Sequence[tuple[Table, Row]]
    others: Mapping[str, Sequence[Row]]
    found: Mapping[str, int]
    whole: bool

    @property
    def counts(self) -> dict[str, int]:
        """The number of rows kept, by table."""
        kept = Counter(table.name for table, _ in self.chain)
        kept.update({name: len(rows) for name, rows in self.others.items()})
        return {table.name: kept[table.name] for table in (*CHAINED, *REPLACED)}

    @property
    def facts(self) -> dict[str, str]:
        """The facts kept: texts by name."""
        return dict(self.others[FACTS.name])


@dataclass
class _Pile:
    """All rows that could be read, good or not, each as ``Table.stored``."""

    links: dict[int, list[tuple[Table, Row]]] = field(default_factory=dict)
    others: dict[str, dict[Row, list[Row]]] = field(default_factory=lambda: {table.name: {} for table in REPLACED})

    def add(self, table: Table, stored: Row) -> None:
        """One more row. The first one of a key is believed first."""
        if table.link is None:
            rows = self.others[table.name].setdefault(stored[: len(table.key)], [])
            if stored not in rows:
                rows.append(stored)
            return
        link = stored[table.stored.index(table.link)]
        if type(link) is int:
            several = self.links.setdefault(link, [])
            if (table, stored) not in several:
                several.append((table, stored))


def saved(file: Path) -> Saved:
    """Read all of a journal of today's format that can be read.

    Raises:
        OSError: The file cannot be read.
    """
    pile, seals = _Pile(), dict[str, Seal]()
    with contextlib.suppress(*_UNREADABLE), contextlib.closing(connected(file, write=False)) as connection:
        connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
        for table in (*CHAINED, *REPLACED):
            for stored in itertools.chain(_read(connection, table, "ASC"), _read(connection, table, "DESC")):
                pile.add(table, stored)
        seals = recorded_seals(connection)
    for table, stored in _raw(Pages(file)):
        pile.add(table, stored)
    chain, end = _followed(pile.links)
    whole = seals.get(CHAIN) == end
    chain = chain if whole else chain[: _settled(chain)]
    others = {table.name: _standing(table, pile.others[table.name]) for table in REPLACED}
    trials = {row[0] for table, row in chain if table is TRIALS}
    others[RESIDUALS.name] = [row for row in others[RESIDUALS.name] if row[0] in trials]
    if seals and len(others[REFERENCES.name]) != seals.get(REFERENCES.name, Seal()).rows:
        others[REFERENCES.name] = []  # resuming records them all, in their order
    found = Counter(table.name for rows in pile.links.values() for table, _ in rows[:1])
    found.update({name: len(rows) for name, rows in pile.others.items()})
    return Saved(chain, others, {table.name: found[table.name] for table in (*CHAINED, *REPLACED)}, whole)


# -- reading -----------------------------------------------------------------------------------------------------


def _read(connection: sqlite3.Connection, table: Table, direction: str) -> Iterator[Row]:
    """The rows of a table from one of its ends, as far as SQLite reads them."""
    order = ", ".join(f"{name} {direction}" for name in table.key)
    with contextlib.suppress(*_UNREADABLE):
        yield from connection.execute(f"SELECT {', '.join(table.stored)} FROM {table.name} ORDER BY {order}")


def _raw(pages: Pages) -> Iterator[tuple[Table, Row]]:
    """The rows of the file's pages, each as a row of every table that it could be of."""
    forms = _forms()
    for number, values in pages.rows():
        for table, names, reals, numbered in forms:
            if len(values) == len(names) and numbered == (number is not None):
                row = dict(zip(names, values, strict=True))
                if numbered:
                    row[names[0]] = number  # which the record itself lacks
                row |= {name: float(row[name]) for name in reals if type(row[name]) is int}
                yield table, tuple(row[name] for name in table.stored)


def _forms() -> list[tuple[Table, list[str], list[str], bool]]:
    """Of each table: its columns as they are stored, those that are REAL, and whether its rows have numbers."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        create(connection)
        found = []
        for table in (*CHAINED, *REPLACED):
            about = connection.execute(f"PRAGMA table_info({table.name})").fetchall()
            numbered = about[0][2] == "INTEGER"
            found.append((table, [one[1] for one in about], [one[1] for one in about if one[2] == "REAL"], numbered))
    return found


# -- believing ---------------------------------------------------------------------------------------------------


def _followed(links: Mapping[int, Sequence[tuple[Table, Row]]]) -> tuple[list[tuple[Table, Row]], Seal]:
    """The rows of the chain, as long as they fit, and the seal of these."""
    chain: list[tuple[Table, Row]] = []
    last = 0
    for link in itertools.count():
        for table, stored in links.get(link, ()):
            row = stored[: len(table.columns)]
            with contextlib.suppress(*UNDECODABLE):
                own = chained(last, fingerprint(table, row))
                if own == unsigned(stored[-1]) and _sound(table, row):
                    chain.append((table, row))
                    last = own
                    break
        else:
            return chain, Seal(link, last)
    raise AssertionError("unreachable")


def _sound(table: Table, row: Row) -> bool:
    """Whether a row's values can be read, and a genome is the one that its digest says; raises if they cannot."""
    if table is TRIALS:
        _, _, genome, digest, _, dense, _, _ = row
        return bool(dense) or Genome.from_json(genome).digest == digest
    if table is EVALUATIONS:
        values = dict(zip(EVALUATIONS.columns, row, strict=True))
        del values["number"], values["time"]
        evaluation_of(tuple(values.values()))
    return True


def _standing(table: Table, rows: Mapping[Row, Sequence[Row]]) -> list[Row]:
    """The rows of a table whose own checksums fit."""
    kept = []
    for several in rows.values():
        for stored in several:
            row = stored[: len(table.columns)]
            with contextlib.suppress(*UNDECODABLE):
                if fingerprint(table, row) == unsigned(stored[-1]):
                    kept.append(row)
                    break
    return sorted(kept)


def _settled(chain: Sequence[tuple[Table, Row]]) -> int:
    """The number of first rows after which a search can go on, if what came after them is lost."""
    batch_of: dict[int, int] = {}
    size, left = Counter[int](), Counter[int]()
    partial: set[int] = set()
    settled, gradients = 0, 0
    for place, (table, row) in enumerate(chain):
        if table is not TRIALS and not partial and not gradients:
            settled = place
        if table is TRIALS:
            batch_of[row[0]] = row[1]
            size[row[1]] += 1
            left[row[1]] += 1
        elif table is GRADIENTS:
            gradients += 1
        elif table is EVALUATIONS:
            gradients = 0
            batch = batch_of.get(row[0], -1)
            left[batch] -= 1
            (partial.add if 0 < left[batch] < size[batch] else partial.discard)(batch)
    ended = bool(chain) and chain[-1][0] in (EVENTS, EVALUATIONS) and not partial
    return len(chain) if ended and not _asks(chain[-1]) else settled


def _asks(last: tuple[Table, Row]) -> bool:
    table, row = last
    return table is EVENTS and row[1] == "ask"


# -- writing -----------------------------------------------------------------------------------------------------


def replaced(file: Path, kept: Saved, notes: Iterable[facts.Note] = ()) -> Path:
    """Put a journal of the saved rows in the place of a damaged one. The caller holds the lock.

    Args:
        file: The damaged journal.
        kept: Its rows.
        notes: Facts to set anew.

    Returns:
        The folder that the damaged journal, with its log, is kept in.

    Raises:
        OSError, sqlite3.Error: It cannot be written. The damaged journal is still there.
    """
    with drafted(file) as draft, drafted(file) as folded:
        _write(draft, kept, notes)
        synchronised(draft)
        aside = _put_aside(file)
        # A log beside the new journal would be taken for its own. So it is moved into the damaged one before.
        folded.write_bytes(Pages(file).image())
        synchronised(folded)
        folded.replace(file)
        for suffix in ("-wal", "-shm", "-journal"):
            file.with_name(file.name + suffix).unlink(missing_ok=True)
        draft.replace(file)
        synchronised(file.parent)
    return aside


def _write(draft: Path, kept: Saved, notes: Iterable[facts.Note]) -> None:
    own = {**kept.facts, facts.FORMAT_OF.name: str(FORMAT), **{note.name: note.text for note in notes}}
    if not kept.whole:
        for fact in (facts.STOP_REASON, facts.REPORT):
            own.pop(fact.name, None)
        own[facts.STATE.name] = "interrupted"
    with contextlib.closing(sqlite3.connect(private(draft), isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=MEMORY")
        connection.execute("PRAGMA synchronous=OFF")  # it is synced as a whole
        connection.execute("BEGIN IMMEDIATE")
        create(connection)
        ledger = Ledger()
        for table, row in kept.chain:
            if table is EVENTS:
                ledger.event(connection, *row[1:])
            else:
                ledger.append(connection, table, [row])
        for table in REPLACED:
            for row in own.items() if table is FACTS else kept.others[table.name]:
                ledger.put(connection, table, row)
        ledger.seal(connection)
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode=WAL")


def _put_aside(file: Path) -> Path:
    """Copy a journal and its log into a folder of their own."""
    folders = (file.with_name(f"damaged-{number}") for number in itertools.count(1))
    aside = next(folder for folder in folders if not folder.exists())
    aside.mkdir(OWN_FOLDER)
    for suffix in ("", "-wal"):
        if (one := file.with_name(file.name + suffix)).exists():
            shutil.copyfile(one, aside / one.name)
            synchronised(aside / one.name)
    for folder in (aside, file.parent):
        synchronised(folder)
    return aside
