"""Files that are there whole or not at all, whatever ends the process that writes them.

A file is written under another name in the same folder, synchronised with the disk, and renamed. A reader sees the old
content or the new one, never a part. After a loss of power the same holds, because the folder is synchronised, too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

_UNABLE = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EPERM, errno.EACCES)
"""Errors of file systems that cannot synchronise a folder, or do not let it be opened."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
"""Errors of file systems that have no hard links."""
_TRIES = 100  # names for a draft; each has 64 random bits


def written_whole(
    path: str | Path, content: str | bytes, *, private: bool = False, exclusive: bool = False, mode: int | None = None
) -> None:
    """Write a file whole or not at all.

    A link is followed. What is no regular file, such as ``/dev/stdout``, is written to directly.

    Args:
        path: The file; its folder must exist.
        content: The whole content. Text is written as UTF-8.
        private: Let nobody but this user read it (mode 0600), from its first byte on.
        exclusive: Refuse to replace a file.
        mode: The permissions of a file that replaces none; None leaves them to the umask. A file that replaces another
            one keeps that one's.

    Raises:
        FileExistsError: ``exclusive``, and there is something.
        OSError: It cannot be written. The file is then as it was, and nothing else is left behind.
    """
    target = Path(os.path.realpath(path))
    data = content.encode() if isinstance(content, str) else content
    if exclusive and target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    if target.exists() and not target.is_file() and not target.is_dir():
        target.write_bytes(data)
        return
    draft = target.with_name(f".{_short(target.name)}.{secrets.token_hex(8)}.new")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600 if private else 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            _permit(handle, target, private, mode)
            file.write(data)
            file.flush()
            os.fsync(handle)
        moved(draft, target, exclusive)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    synchronised(target.parent)


def moved(draft: Path, target: Path, exclusive: bool) -> None:
    """Give a finished draft its name.

    Args:
        draft: A file or a folder.
        target: Its name, in the same folder. A folder replaces only an empty one.
        exclusive: Refuse to replace a file. Of two writers at once, one wins.

    Raises:
        FileExistsError: ``exclusive``, and there is a file.
        OSError: The name cannot be given.
    """
    if exclusive and draft.is_file():
        try:
            os.link(draft, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if target.exists():  # the best that can be done without links
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        else:
            draft.unlink()
            return
    draft.replace(target)


def synchronised(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Raises:
        OSError: The disk failed. A file system that cannot synchronise folders is no error.
    """
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not (folder and error.errno in _UNABLE):
            raise


def all_synchronised(path: Path) -> None:
    """Wait until a file, or a folder with everything in it, is on the disk.

    Raises:
        OSError: The disk failed.
    """
    if path.is_dir():
        for folder, _, names in os.walk(path, topdown=False):
            for name in names:
                synchronised(Path(folder, name))
            synchronised(Path(folder))
    else:
        synchronised(path)


# -- drafts that take long ------------------------------------------------------------------------------------


@contextlib.contextmanager
def drafted(target: Path, folder: bool) -> Iterator[Path]:
    """A draft beside ``target`` that is this process's own; it is removed at the end unless it was renamed.

    The draft is there and locked. The lock ends with the process, so ``abandoned`` can tell the drafts of processes
    that are gone.

    Args:
        target: The name that the draft will have.
        folder: Make a folder; otherwise an empty file.

    Raises:
        OSError: It cannot be made.
    """
    draft, lock = _locked(target, folder)
    try:
        yield draft
    finally:
        remove(draft)
        os.close(lock)


def abandoned(parent: Path) -> list[Path]:
    """The drafts in a folder whose makers, on this machine, are gone.

    Drafts of other machines are left out, as locks may not reach that far.
    """
    pattern = re.compile(rf"\..+\.{_machine()}-[0-9a-f]{{16}}\.partial", re.DOTALL)
    found = (path for path in sorted(parent.glob(".*.partial")) if pattern.fullmatch(path.name))
    return [path for path in found if not path.is_symlink() and _ownerless(path)]


def remove(path: Path) -> None:
    """Remove a file or a folder with everything in it, as far as that is possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _locked(target: Path, folder: bool) -> tuple[Path, int]:
    """A new draft, and the open file that holds its lock."""
    for _ in range(_TRIES):
        draft = target.with_name(f".{_short(target.name)}.{_machine()}-{secrets.token_hex(8)}.partial")
        if folder:
            draft.mkdir()
        else:
            draft.touch(exist_ok=False)
        try:
            lock = os.open(draft, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # taken for abandoned before it was locked
        held = _lock(lock)
        if held is not False and draft.exists():
            return draft, lock
        os.close(lock)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(target))


def _ownerless(draft: Path) -> bool:
    """Whether nobody holds the lock of a draft. Where locks do not work, somebody may."""
    try:
        handle = os.open(draft, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _lock(handle) is True
    finally:
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Lock an open file or folder: False when another has it, None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _machine() -> str:
    return blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()


def _short(name: str) -> str:
    """The beginning of a name, so that a longer one fits into the 255 bytes of a file's name."""
    return name.encode()[:160].decode(errors="ignore")


def _permit(handle: int, target: Path, private: bool, mode: int | None) -> None:
    if private:
        os.fchmod(handle, 0o600)
        return
    with contextlib.suppress(FileNotFoundError):
        mode = target.stat().st_mode & 0o777
    if mode is not None:
        with contextlib.suppress(PermissionError):
            os.fchmod(handle, mode)
