"""The journal's file: opening it for one writer or any number of readers, its lock, and its errors in words."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ecotone.populations.errors import DamagedJournalError, JournalError
from ecotone.populations.folders import opened, private, tighten


def connected(file: Path, write: bool) -> sqlite3.Connection:
    """A connection to ``file``. Several threads may use it, and it begins no transaction by itself."""
    if write:
        private(file)  # and so are the files that SQLite puts beside it
        tighten(file.with_name(f"{file.name}{end}") for end in ("-wal", "-shm"))
        connection = sqlite3.connect(file, isolation_level=None, timeout=30, check_same_thread=False)
        connection.set_authorizer(_of_tables_alone)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        return connection
    # A journal without a log beside it, in a directory that nobody can write to, is read as it is.
    still = not (os.access(file.parent, os.W_OK) or file.with_name(f"{file.name}-wal").exists())
    query = f"{file.resolve().as_uri()}?mode=ro{'&immutable=1' if still else ''}"
    connection = sqlite3.connect(query, uri=True, isolation_level=None, timeout=30, check_same_thread=False)
    connection.set_authorizer(_of_tables_alone)
    connection.execute("PRAGMA query_only=ON")
    return connection


def _of_tables_alone(action: int, _one: str | None, _two: str | None, _database: str | None, within: str | None) -> int:
    """Refuse what journals never have: a stranger's may have a view or a trigger that computes for ever."""
    return sqlite3.SQLITE_DENY if within is not None or action == sqlite3.SQLITE_RECURSIVE else sqlite3.SQLITE_OK


def lock_file(file: Path) -> Path:
    """The file beside ``file`` that its writer locks."""
    return file.with_suffix(".lock")


def locked(file: Path) -> IO[str]:
    """A handle that keeps other writers of ``file`` out until it is closed. It locks a file beside it.

    Raises:
        JournalError: Another process has it.
    """
    while True:
        handle = opened(lock_file(file), "a+")
        if not _taken(handle):
            handle.seek(0)
            owner = handle.read(200).strip() or "another process"
            handle.close()
            raise JournalError(
                f"{file.parent}: the run is being written by {owner}.", "Wait for it, or stop it, then resume."
            )
        if _still_there(handle, lock_file(file)):
            break
        handle.close()  # who had it removed it: no run had begun
    with contextlib.suppress(OSError):  # the lock holds without a name in it
        os.ftruncate(handle.fileno(), 0)
        os.write(handle.fileno(), f"process {os.getpid()}".encode())
    return handle


def _still_there(handle: IO[str], file: Path) -> bool:
    """True while the file has the name that it was opened by."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), file.stat())
    except FileNotFoundError:
        return False


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
    except sqlite3.Error as error:
        raise _in_words(file, error) from error
    except OverflowError as error:  # a number that no row can have
        raise JournalError(f"{file}: {error}.", "Give a smaller number.") from error
    except UnicodeDecodeError as error:
        raise damaged(file, "a text", "it is not UTF-8") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = _when_full(file) if full else "Check the path, the permissions and the space."
        raise JournalError(f"{file}: {error.strerror or error}.", remedy) from error


def damaged(file: Path, place: str, text: str, whole: int | None = None) -> JournalError:
    """The error that tells the user of damage, and what to do.

    Args:
        file: The journal.
        place: The table and the row, or another part of the file.
        text: What is wrong there.
        whole: The number of evaluations before it that are whole; None where that is not known.
    """
    kept = "" if whole is None else f"{whole} evaluations before it are whole. "
    return DamagedJournalError(
        f"{file}: not a journal of Ecotone, or damaged: {place}: {text}.",
        f"{kept}`ecotone check {file.parent}` says what can be saved.",
    )


_DAMAGE = (
    "not authorized",
    "prohibited",
    "not a database",
    "malformed",
    "no such table",
    "no such column",
    "decode",
    "corrupt",
    "encrypted",
)
_BLOCKED = ("readonly", "locked", "busy", "unable to open", "disk I/O", "full", "interrupted", "closed")


def of_content(error: sqlite3.Error) -> bool:
    """True for an error that tells of the file's bytes; False for one of another sort, as of a lock or a full disk."""
    text = str(error)
    return any(word in text for word in _DAMAGE) or not any(word in text for word in _BLOCKED)


def _in_words(file: Path, error: sqlite3.Error) -> JournalError:
    text = " ".join(str(error).split(" with text ")[0].split())  # which quotes the bytes that cannot be read
    if "full" in text or "disk I/O" in text:
        return JournalError(f"{file}: the journal cannot be written ({text}).", _when_full(file))
    if any(word in text for word in _DAMAGE):
        return DamagedJournalError(
            f"{file}: not a journal of Ecotone, or damaged ({text}).",
            f"`ecotone check {file.parent}` says what can be saved.",
        )
    return JournalError(f"{file}: {text}.", "Check that the directory is writable and the file is whole.")


def _when_full(file: Path) -> str:
    """What to do about a full disk. A run without a journal cannot be resumed."""
    with contextlib.suppress(OSError):
        if file.stat().st_size:
            return f"Free some space, then `ecotone resume {file.parent}`: earlier records are safe."
    return "Free some space, then run it again."


def is_locked(file: Path) -> bool:
    """True while some process writes ``file``."""
    with contextlib.suppress(OSError), lock_file(file).open("r") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
