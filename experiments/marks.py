"""The user's own key, and the marks that it leaves in records: only this user can have made a record with such a mark.

A record is a journal, an export's ``ecotone.json``, or a small file beside a journal that says where requests go. Its
mark is an HMAC-SHA256 by the key over what Ecotone would act on: the recipe, the trackers, the folders, a URL. When one
of them is changed, the record bears no mark any more. Rows and scores are not covered.

The key is 32 random bytes in ``$ECOTONE_KEY_FILE``, else in ``key`` of ``settings_folder()``. It is
made when the first record is. It never leaves the machine: no record, log, message or job holds it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import json
import logging
import os
import secrets
import stat
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ecotone.populations import facts
from ecotone.populations.facts import Fact, Note
from ecotone.populations.folders import settings_folder
from ecotone.populations.journal import Journal

Sort: TypeAlias = Literal["journal", "export", "storage", "tracking", "mlflow", "job"]
"""Sorts of records. A mark of one sort is none of another."""

BYTES = 32
_FACTS: tuple[Fact[Any], ...] = (facts.RECIPE, facts.TRACKING, facts.SYS_PATH)  # of a journal: what is acted on

_log = logging.getLogger("ecotone")


def key_file() -> Path:
    """The file of the key: ``$ECOTONE_KEY_FILE``, or ``key`` in the user's configuration folder.

    Raises:
        RuntimeError: This user has no home folder.
    """
    named = os.environ.get("ECOTONE_KEY_FILE")
    if named:
        return Path(named)
    return settings_folder() / "key"


def mark_of(sort: Sort, value: Any) -> str | None:
    """The mark of a record; None where this user has no key and none can be made, which is told once.

    Args:
        sort: The sort of record.
        value: What Ecotone would act on, as plain values.
    """
    key = _key(make=True)
    return None if key is None else _signed(key, sort, value)


def is_marked(sort: Sort, value: Any, mark: Any) -> bool:
    """Whether ``mark`` is the mark that this user's key gives a record. Makes no key."""
    if not isinstance(mark, str) or not mark.isascii():
        return False
    key = _key(make=False)
    try:
        return key is not None and hmac.compare_digest(_signed(key, sort, value), mark)
    except (ValueError, TypeError, RecursionError):  # no plain values
        return False


def with_mark(notes: list[Note]) -> list[Note]:
    """The facts that open a journal, and their mark."""
    texts = dict(notes)
    mark = mark_of("journal", {fact.name: _plain(texts.get(fact.name)) for fact in _FACTS})
    return [*notes, *([] if mark is None else [facts.MARK.note(mark)])]


def mark_journal(journal: Journal) -> None:
    """Mark a journal, which is open for writing, as this user's own. Belongs into the transaction that changed it."""
    journal.note(facts.MARK, mark_of("journal", _acted_on(journal)) or "")


def has_mark(journal: Journal) -> bool:
    """Whether a journal bears this user's mark."""
    mark = journal.fact(facts.MARK)
    return bool(mark) and is_marked("journal", _acted_on(journal), mark)


def within(folder: Path) -> list[str]:
    """The key's place in a folder that travels, as a pattern of what stays behind; empty where it lies elsewhere."""
    with contextlib.suppress(RuntimeError, ValueError, OSError):
        return [f"/{key_file().resolve().relative_to(folder.resolve()).as_posix()}"]
    return []


def _acted_on(journal: Journal) -> dict[str, Any]:
    values = ((fact, journal.fact(fact)) for fact in _FACTS)
    return {fact.name: None if value is None else _plain(fact.write(value)) for fact, value in values}


def _plain(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _signed(key: bytes, sort: Sort, value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, f"ecotone 1 {sort}\n{text}".encode(), hashlib.sha256).hexdigest()


# -- the key -------------------------------------------------------------------------------------------------


def _key(make: bool) -> bytes | None:
    """The key; None where there is none, and none can be made or is to be made. A reason is told once."""
    try:
        file = key_file()
        if not file.exists():
            if not make:
                return None
            _make(file)
        return _read(file)
    except (OSError, RuntimeError) as error:
        _tell(f"{getattr(error, 'filename', None) or 'the key'}: {getattr(error, 'strerror', None) or error}")
        return None


def _make(file: Path) -> None:
    """Write a new key, whole or not at all. Of two processes that make it at once, the first one's stays."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(secrets.token_bytes(BYTES))
            opened.flush()
            os.fsync(opened.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, file)
    finally:
        draft.unlink()


def _read(file: Path) -> bytes:
    """The key of a file, which no other user may read: its permissions are mended where they are wider."""
    with file.open("rb") as opened:
        found = os.fstat(opened.fileno())
        key = opened.read(BYTES + 1)
        if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) & 0o077:
            with contextlib.suppress(OSError):
                os.fchmod(opened.fileno(), 0o600)
    if len(key) != BYTES:
        raise RuntimeError(f"{file}: expected a key of {BYTES} bytes, found another file; remove it")
    return key


@functools.cache
def _tell(reason: str) -> None:
    """Say that there is no key, once for each reason."""
    _log.warning(
        "This user's key cannot be used (%s). So records bear no mark of yours, and to act on them takes --trust; "
        "$ECOTONE_KEY_FILE names another file.",
        reason,
    )
