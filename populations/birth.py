"""The birth of a journal: made whole beside its place, then linked into it, or not there at all.

A new journal is written under a name of its own, ``journal.sqlite.PID-RANDOM.new``, synced, and linked to its name,
which fails if something has that name. So a killed process leaves a whole journal or none. Whoever makes a journal
holds the run's lock. So drafts that lie there under the lock are of processes that are gone, and are deleted. A
directory where a run was to begin, and has no whole journal, is *unborn*: the next `ecotone run` takes it over.
"""

from __future__ import annotations

import contextlib
import glob
import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from ecotone.populations.database import connected, explained, lock_file, locked
from ecotone.populations.errors import JournalError
from ecotone.populations.files import synchronised
from ecotone.populations.folders import OWN_FILE, private, private_folder
from ecotone.populations.migrations import begin

_BESIDE = ("-wal", "-shm", "-journal")  # files that SQLite makes beside a database


def born(file: Path) -> bool:
    """True when ``file`` holds a journal, or anything else that a new one must not replace.

    False for a file that is missing, or a database without tables: earlier versions left these when they were killed.

    Raises:
        JournalError: Something that is no file has its name: a folder, or a link that leads nowhere.
    """
    if file.is_symlink() and not file.exists():
        raise JournalError(
            f"{file}: expected a journal or nothing, found a link that leads nowhere ({file.readlink()}).",
            "Mount the disk that has the journal, or remove the link.",
        )
    if file.is_dir():
        raise JournalError(f"{file}: expected a journal or nothing, found a folder.", "Choose another --out.")
    log = file.with_name(f"{file.name}-wal")
    if not file.is_file():
        return file.exists()
    if not file.stat().st_size and not (log.exists() and log.stat().st_size):
        return False
    try:
        with contextlib.closing(connected(file, write=False)) as connection:
            return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    except (sqlite3.Error, ValueError):  # of its bytes: they are damaged
        return True


def unborn(file: Path) -> bool:
    """True when a run was to begin there, and never did: its lock, a draft or an empty database is left."""
    return not born(file) and (file.exists() or lock_file(file).exists() or bool(_drafts(file)))


def missing(file: Path) -> JournalError:
    """The error that tells the user that there is no journal, and which command begins the run."""
    if not unborn(file):
        return JournalError(f"{file}: no journal there.", "Give a run directory made by `ecotone run`.")
    recipe = file.with_name("recipe.yaml")
    named = str(recipe) if recipe.is_file() else "RECIPE"
    return JournalError(
        f"{file}: no journal there: the run was stopped before it began, and has recorded nothing.",
        f"`ecotone run {named} --out {file.parent}` begins it.",
    )


@contextlib.contextmanager
def claimed(file: Path) -> Iterator[IO[str]]:
    """The lock of the journal ``file``, which may yet have to be made. Whoever holds it may look whether it is there.

    Folders that this makes, and the lock, are removed at the end if no journal was made.

    Raises:
        JournalError: Another process has it, or the folder cannot be made.
    """
    made = []
    with explained(file):
        for folder in (file.parent, *file.parent.parents):
            if folder.exists():
                break
            made.append(folder)
        private_folder(file.parent)
    with _removed(made):
        with explained(file):
            lock = locked(file)
        try:
            yield lock
        finally:
            with contextlib.suppress(OSError):
                if not lock.closed and not born(file):
                    lock_file(file).unlink(missing_ok=True)
            lock.close()


@contextlib.contextmanager
def _removed(folders: Iterable[Path]) -> Iterator[None]:
    """Remove those of the folders that are empty at the end."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # somebody else has put something there
            for folder in folders:
                folder.rmdir()


def bring_forth(file: Path, facts: Iterable[tuple[str, str]]) -> None:
    """Make a whole journal with the texts of ``facts`` by name. The caller holds the lock.

    Raises:
        FileExistsError: Something has its name.
        sqlite3.Error, OSError: It cannot be written. Nothing of it is left.
    """
    with drafted(file) as draft:
        _write(draft, facts)
        synchronised(draft)
        if not born(file):
            for suffix in (*_BESIDE, ""):  # the file last: without it, the others would be taken for the next one's
                file.with_name(file.name + suffix).unlink(missing_ok=True)
        _place(draft, file)
        synchronised(file.parent)


@contextlib.contextmanager
def drafted(file: Path) -> Iterator[Path]:
    """A new name beside ``file``. At the end nothing is left there, nor of drafts of killed processes.

    The caller holds the lock of ``file``, which all that make drafts hold.
    """
    for left in _drafts(file):
        if f".{os.getpid()}-" not in left.name:
            left.unlink(missing_ok=True)
    draft = file.with_name(f"{file.name}.{os.getpid()}-{uuid.uuid4().hex[:12]}.new")
    try:
        yield draft
    finally:
        for suffix in ("", *_BESIDE):
            with contextlib.suppress(OSError):
                draft.with_name(draft.name + suffix).unlink(missing_ok=True)


def _write(draft: Path, facts: Iterable[tuple[str, str]]) -> None:
    """One plain file, in the mode of SQLite that journals are opened in."""
    with contextlib.closing(sqlite3.connect(private(draft), isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=MEMORY")
        connection.execute("PRAGMA synchronous=OFF")  # it is synced as a whole
        connection.execute("BEGIN IMMEDIATE")
        begin(connection, facts)
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode=WAL")


def _place(draft: Path, file: Path) -> None:
    """Give the draft its name, if nothing has it."""
    try:
        os.link(draft, file)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, OWN_FILE))  # unborn, if it ends here
        draft.replace(file)


def _drafts(file: Path) -> list[Path]:
    """Drafts of the journal ``file``, and what SQLite made beside them."""
    return list(file.parent.glob(f"{glob.escape(file.name)}.*.new*"))
