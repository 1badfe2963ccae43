"""Content hashes of files: XXH3 of 128 bits over a file's bytes, at the speed of the disk, remembered between runs.

A hash is remembered with the file's device, inode, size and times. So a file that does not change is hashed once, even
by later runs. A file whose times are as fresh as the hash itself is hashed again next time, as git does with its index:
it may have been written once more within one tick of the clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from xxhash import xxh3_128

from ecotone.populations.errors import InputError
from ecotone.populations.files import written_whole
from ecotone.populations.folders import cache_folder
from ecotone.populations.parsing import file_bytes, json_object

BLOCK = 2**22
"""Bytes read at a time."""

REMEMBERED = 2**20
"""Smaller files are hashed faster than their hash is looked up, so none is kept of them."""

SHOWN = 12
"""Digits of a hash that messages show."""

_FRESH = 2_000_000_000  # nanoseconds: the coarsest clock of a file system
_THREADS = 4


class Stamp(NamedTuple):
    """All that a file's status tells of its content.

    Args:
        device: The device that it lies on.
        inode: Its inode.
        size: Bytes.
        mtime_ns: When it was last written, in nanoseconds since 1970.
        ctime_ns: When its status last changed: it was written, renamed, linked or its permissions were set.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: str | Path | int) -> Stamp:
        """That of the file at a path, links followed, or of an open file by its number.

        Raises:
            OSError: There is none.
        """
        found = os.stat(path)  # noqa: PTH116 - it takes an open file's number as well
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@dataclass(frozen=True)
class Content:
    """The content of a file.

    Args:
        digest: Its hash, 32 hexadecimal digits.
        stamp: Its status when it was hashed.
        cached: Whether the hash was remembered, so that the file was not read.
    """

    digest: str
    stamp: Stamp
    cached: bool = False


def content(path: Path) -> Content:
    """The content of a file.

    Raises:
        InputError: It cannot be read, or is being written.
    """
    try:
        for _ in range(3):
            stamp, began = Stamp.of(path), time.time_ns()
            known = _remembered(stamp)
            if known is not None:
                return Content(known, stamp, cached=True)
            digest = _digest(path)
            if Stamp.of(path) == stamp:
                _remember(stamp, digest, began)
                return Content(digest, stamp)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
    raise InputError(f"{path}: it is being written while it is read.", "Wait until its writer is done.")


def contents(paths: Iterable[Path]) -> dict[Path, Content]:
    """The content of each file; several are read at a time.

    Raises:
        InputError: As for ``content``.
    """
    files = list(dict.fromkeys(paths))
    if len(files) < 2:
        return {file: content(file) for file in files}
    with ThreadPoolExecutor(min(_THREADS, len(files)), "ecotone-hash") as pool:
        return dict(zip(files, pool.map(content, files), strict=True))


def _digest(path: Path) -> str:
    hasher, buffer = xxh3_128(), bytearray(min(BLOCK, path.stat().st_size + 1))
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(view[:count])
    return hasher.hexdigest()


def _note(stamp: Stamp) -> Path:
    return cache_folder() / "contents" / f"{stamp.device:x}-{stamp.inode:x}.json"


def _remembered(stamp: Stamp) -> str | None:
    """The hash of a file of that status, or None."""
    if stamp.size < REMEMBERED:
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json_object(file_bytes(_note(stamp)))
        if known["stamp"] == list(stamp) and known["hashed"] > max(stamp.mtime_ns, stamp.ctime_ns) + _FRESH:
            return str(known["xxh3_128"])
    return None


def _remember(stamp: Stamp, digest: str, began: int) -> None:
    """Keep a hash; without a word where the cache cannot be written, as it only saves time."""
    if stamp.size < REMEMBERED:
        return
    note = _note(stamp)
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        written_whole(note, json.dumps({"stamp": stamp, "hashed": began, "xxh3_128": digest}))


# -- records -------------------------------------------------------------------------------------------------

Record: TypeAlias = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Plain values for the journal: by what reads it and by the file's name, ``xxh3_128`` and ``bytes`` of each file."""


def entry(found: Content) -> dict[str, Any]:
    """The entry of a file in a record."""
    return {"xxh3_128": found.digest, "bytes": found.stamp.size}


def digest_of(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One hash of the entries of several files: that of the file where there is one."""
    hashes = [f"{name} {one['xxh3_128']}" for name, one in sorted(files.items())]
    return hashes[0].rpartition(" ")[2] if len(hashes) == 1 else xxh3_128("\n".join(hashes).encode()).hexdigest()


@dataclass(frozen=True)
class Change:
    """A file that is not as it was recorded.

    Args:
        where: The reader of the file, as a field of the recipe: ``models.base``, ``objectives.search.accuracy``.
        file: Its name.
        was: Its hash as it was recorded; None where it was not read.
        now: Its hash now; None where it is not there, or is not read any more.
    """

    where: str
    file: str
    was: str | None
    now: str | None

    def __str__(self) -> str:
        if self.was is None:
            return f"{self.where}: {self.file} is read now and was not when the run began"
        if self.now is None:
            return f"{self.where}: {self.file} is gone, or is not read any more (it was {self.was[:SHOWN]})"
        return (
            f"{self.where}: {self.file} has changed since the run began (was {self.was[:SHOWN]}, is {self.now[:SHOWN]})"
        )


def changes(recorded: Record, found: Record) -> list[Change]:
    """The differences between two records, in the order of the first."""
    listed = []
    for where in dict.fromkeys([*recorded, *found]):
        before, after = recorded.get(where, {}), found.get(where, {})
        for file in dict.fromkeys([*before, *after]):
            was, now = (one.get(file, {}).get("xxh3_128") for one in (before, after))
            if was != now:
                listed.append(Change(where, file, was, now))
    return listed
