"""Rows straight from the pages of an SQLite file, where SQLite cannot read them: trees or lists of tables are damaged.

Every page that looks like a leaf is taken for one, whatever points to it. So rows that SQLite no longer has may come
too, and the journal's checksums tell which to believe. The format: https://www.sqlite.org/fileformat2.html, sections
1.6, 2 and 4.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TABLE_LEAF, INDEX_LEAF, INDEX_INTERIOR = 0x0D, 0x0A, 0x02
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}  # bytes, by serial type
_LONGEST_VARINT = 9
_USUAL = 4096  # bytes of a page


class Pages:
    """The pages of a database, with those that its write-ahead log has committed in their places.

    Args:
        file: The database.

    Raises:
        OSError: It cannot be read.
    """

    def __init__(self, file: Path) -> None:
        data = file.read_bytes()
        log = file.with_name(f"{file.name}-wal")
        logged = log.read_bytes() if log.is_file() else b""
        sizes = [int.from_bytes(data[16:18], "big") & 0xFFFF or _USUAL, int.from_bytes(logged[8:12], "big")]
        known = [size for size in reversed(sizes) if 512 <= size <= 32768 and size & (size - 1) == 0]
        self.size: int = known[0] if known and not len(data) % known[0] else _USUAL
        self._pages = {1 + at // self.size: data[at : at + self.size] for at in range(0, len(data), self.size)}
        self._pages |= _committed(logged, self.size)

    def image(self) -> bytes:
        """The whole file, with the log in it."""
        return b"".join(
            self._pages.get(number, bytes(self.size)) for number in range(1, max(self._pages, default=0) + 1)
        )

    def rows(self) -> Iterator[tuple[int | None, tuple[Any, ...]]]:
        """The records of all leaves: the row's number, None in tables without numbers, and its values."""
        for number, page in self._pages.items():
            start = 100 if number == 1 else 0
            if len(page) < self.size or page[start] not in (TABLE_LEAF, INDEX_LEAF, INDEX_INTERIOR):
                continue
            at = start + (12 if page[start] == INDEX_INTERIOR else 8)
            (count,) = struct.unpack_from(">H", page, start + 3)
            for cell in range(min(count, (self.size - at) // 2)):
                (place,) = struct.unpack_from(">H", page, at + 2 * cell)
                try:
                    yield self._row(page, place, page[start])
                except (IndexError, ValueError, struct.error):
                    continue

    def _row(self, page: bytes, at: int, kind: int) -> tuple[int | None, tuple[Any, ...]]:
        """The record of the cell at ``at``.

        Raises:
            IndexError, ValueError, struct.error: It is none.
        """
        if kind == INDEX_INTERIOR:
            at += 4
        length, at = _varint(page, at)
        number = None
        if kind == TABLE_LEAF:
            number, at = _varint(page, at)
            number = number - 2**64 if number >= 2**63 else number
        return number, _values(self._payload(page, at, length, kind))

    def _payload(self, page: bytes, at: int, length: int, kind: int) -> bytes:
        """The bytes of a record, of which a long one has the rest in other pages."""
        if length > self.size * len(self._pages):
            raise ValueError("longer than the file")
        most = self.size - 35 if kind == TABLE_LEAF else (self.size - 12) * 64 // 255 - 23
        if length <= most:
            return page[at : at + length]
        least = (self.size - 12) * 32 // 255 - 23
        local = least + (length - least) % (self.size - 4)
        local = local if local <= most else least
        parts, left = [page[at : at + local]], length - local
        (following,) = struct.unpack_from(">I", page, at + local)
        while left > 0:
            other = self._pages.get(following, b"")
            (following,) = struct.unpack_from(">I", other)
            parts.append(other[4 : 4 + left])
            left -= self.size - 4
        return b"".join(parts)


def _committed(log: bytes, size: int) -> dict[int, bytes]:
    """The pages of a write-ahead log, up to its last whole transaction."""
    found: dict[int, bytes] = {}
    pending: dict[int, bytes] = {}
    for at in range(32, len(log) - 24 - size + 1, 24 + size):
        number, commits = struct.unpack_from(">II", log, at)
        if log[at + 8 : at + 16] != log[16:24]:
            break
        pending[number] = log[at + 24 : at + 24 + size]
        if commits:
            found |= pending
            pending.clear()
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of SQLite's variable length, and the place after it."""
    value = 0
    for step in range(_LONGEST_VARINT):
        byte = data[at + step]
        if step == _LONGEST_VARINT - 1:
            return value << 8 | byte, at + step + 1
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + step + 1
    raise AssertionError("unreachable")


def _values(record: bytes) -> tuple[Any, ...]:
    length, at = _varint(record, 0)
    sorts, place, found = [], length, []
    while at < length:
        sort, at = _varint(record, at)
        sorts.append(sort)
    for sort in sorts:
        value, place = _value(record, place, sort)
        found.append(value)
    if place != len(record):
        raise ValueError("its values do not fill it")
    return tuple(found)


def _value(record: bytes, at: int, sort: int) -> tuple[Any, int]:
    """One value of the serial type ``sort``, and the place after it."""
    if sort in (0, 8, 9):
        return {0: None, 8: 0, 9: 1}[sort], at
    if sort == 7:
        return struct.unpack_from(">d", record, at)[0], at + 8
    length = _INTEGERS[sort] if sort in _INTEGERS else (sort - 12) // 2
    data = record[at : at + length]
    if sort in (10, 11) or len(data) < length:
        raise ValueError("no such value")
    if sort in _INTEGERS:
        return int.from_bytes(data, "big", signed=True), at + length
    return (data.decode() if sort % 2 else data), at + length
