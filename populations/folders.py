"""Folders for files of more than one run, and files that nobody but the user may read."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

OWN_FILE, OWN_FOLDER = 0o600, 0o700
"""Modes of what only the user may read."""


def cache_folder() -> Path:
    """The folder for files of more than one run: ``$ECOTONE_CACHE``, or ``ecotone`` in the user's cache folder."""
    named = os.environ.get("ECOTONE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ecotone"


def settings_folder() -> Path:
    """The folder for what is this user's own: ``$ECOTONE_CONFIG``, or ``ecotone`` in the user's configuration folder.

    Raises:
        RuntimeError: The user has no home folder.
    """
    named = os.environ.get("ECOTONE_CONFIG")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "ecotone"


# -- what nobody else may read -------------------------------------------------------------------------------


def opened(path: str | Path, mode: str = "r", **options: Any) -> IO[Any]:
    """``open``, but the file is the user's alone: from its birth if it is new, and from now on if it is not.

    Args:
        path: The file.
        mode: As for ``open``.
        options: As for ``open``.
    """
    return open(path, mode, opener=opener, **options)


def opener(path: str, flags: int) -> int:
    """The opener behind ``opened``. A new file has mode 0600 at once; what is stored in an old one is closed off."""
    descriptor = os.open(path, flags, OWN_FILE)
    if flags & (os.O_WRONLY | os.O_RDWR):
        with contextlib.suppress(OSError):  # of another user, or on a file system without modes
            if (mode := os.fstat(descriptor).st_mode) and stat.S_ISREG(mode) and stat.S_IMODE(mode) != OWN_FILE:
                os.fchmod(descriptor, OWN_FILE)
    return descriptor


def private(path: str | Path) -> Path:
    """The file, made empty if it is not there, that only the user may read from now on.

    SQLite gives the files beside a database the database's mode.
    """
    file = Path(path)
    opened(file, "ab").close()
    return file


def private_folder(path: str | Path) -> Path:
    """The folder, made for the user alone if it is not there. A folder that is there keeps its mode."""
    folder = Path(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=OWN_FOLDER)
        folder.chmod(OWN_FOLDER)  # whatever the umask
    if not folder.is_dir():
        raise NotADirectoryError(20, "Not a directory", str(folder))
    return folder


def write_private(path: str | Path, data: bytes) -> None:
    """Write a file of the user's alone, whole or not at all. A killed process leaves ``PATH.new``."""
    file = Path(path)
    draft = file.with_name(f"{file.name}.new")
    try:
        with opened(draft, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def tighten(paths: Iterable[Path]) -> None:
    """Close files and folders of this user's off from others; what is missing, or another user's, is left."""
    for path in paths:
        with contextlib.suppress(OSError):
            mode = path.lstat().st_mode
            wanted = OWN_FOLDER if stat.S_ISDIR(mode) else OWN_FILE
            if not stat.S_ISLNK(mode) and stat.S_IMODE(mode) & 0o077:
                path.chmod(wanted)
