"""The journal's file: opening it for one writer or any number of readers, its lock, and its errors in words."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ecotone.populations.errors import JournalError
from ecotone.populations.folders import opened, private, tighten


def connected(file: Path, write: bool) -> sqlite3.Connection:
    """A connection to ``file``. Several threads may use it, and it begins no transaction by itself."""
    if write:
        private(file)  # and so are the files that SQLite puts beside it
        tighten(file.with_name(f"{file.name}{end}") for end in ("-wal", "-shm"))
        connection = sqlite3.connect(file, isolation_level=None, timeout=30, check_same_thread=False)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        return connection
    # A journal without a log beside it, in a directory that nobody can write to, is read as it is.
    still = not (os.access(file.parent, os.W_OK) or file.with_name(f"{file.name}-wal").exists())
    query = f"{file.resolve().as_uri()}?mode=ro{'&immutable=1' if still else ''}"
    connection = sqlite3.connect(query, uri=True, isolation_level=None, timeout=30, check_same_thread=False)
    connection.execute("PRAGMA query_only=ON")
    return connection


def lock_file(file: Path) -> Path:
    """The file beside ``file`` that its writer locks."""
    return file.with_suffix(".lock")


def locked(file: Path) -> IO[str]:
    """A handle that keeps other writers of ``file`` out until it is closed. It locks a file beside it.

    Raises:
        JournalError: Another process has it.
    """
    handle = opened(lock_file(file), "a+")
    if not _taken(handle):
        handle.seek(0)
        owner = handle.read().strip() or "another process"
        handle.close()
        raise JournalError(
            f"{file.parent}: the run is being written by {owner}.", "Wait for it, or stop it, then resume."
        )
    handle.truncate(0)
    handle.write(f"process {os.getpid()}")
    handle.flush()
    return handle


def _taken(handle: IO[str], patience: float = 0.5) -> bool:
    """Take the lock. Waits a moment, because a reader that looks for a writer holds it for an instant."""
    give_up = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # noqa: PERF203 - a loop of attempts
            if time.monotonic() >= give_up:
                return False
            time.sleep(0.01)
        else:
            return True


@contextlib.contextmanager
def explained(file: Path) -> Iterator[None]:
    """Turn SQLite's and the file system's errors into words."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        text = str(error)
        if "full" in text or "disk I/O" in text:
            raise JournalError(
                f"{file}: the journal cannot be written ({text}).",
                f"Free some space, then `ecotone resume {file.parent}`: earlier records are safe.",
            ) from error
        if "not a database" in text or "malformed" in text or "no such table" in text:
            raise JournalError(f"{file}: not a journal of Ecotone, or damaged ({text}).") from error
        raise JournalError(f"{file}: {text}.", "Check that the directory is writable and the file is whole.") from error
    except OSError as error:
        raise JournalError(
            f"{file}: {error.strerror or error}.", "Check the path, the permissions and the space."
        ) from error


def is_locked(file: Path) -> bool:
    """True while some process writes ``file``."""
    with contextlib.suppress(OSError), lock_file(file).open("r") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
