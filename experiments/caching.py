"""What lies in the cache of this machine (``$ECOTONE_CACHE``) and can be made again: list it, remove it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ecotone.merging.basis import RECORD, Bases
from ecotone.merging.placement import readable
from ecotone.populations import files
from ecotone.populations.errors import EcotoneError, InputError, nearest
from ecotone.populations.folders import cache_folder
from ecotone.populations.parsing import file_bytes, json_object

Sort: TypeAlias = Literal["vectors", "models", "statistics", "hashes"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", re.IGNORECASE)
_FEWEST = 4  # characters of a key


@dataclass(frozen=True)
class Entry:
    """Something in the cache.

    Args:
        sort: ``vectors`` that an operator has prepared, ``models`` and data of a recipe's preparation step, all
            ``statistics``, or all remembered ``hashes`` of files.
        key: Its name: that of its folder.
        text: What it is, in words.
        nbytes: Bytes on disk.
        used: When it was last used (``vectors``) or written, in seconds since 1970.
        in_use: Whether a process of this machine uses it now, as far as that is known.
    """

    sort: Sort
    key: str
    text: str
    nbytes: int
    used: float
    in_use: bool = False

    def record(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


def entries(folder: Path | None = None) -> list[Entry]:
    """All that can be made again: vectors first, those that were not used for longest first.

    Args:
        folder: The cache; None is ``cache_folder()``.
    """
    folder = cache_folder() if folder is None else folder
    found = sorted(_bases(folder / "bases"), key=lambda one: one.used)
    found += sorted(_prepared(folder / "prepared"), key=lambda one: one.used)
    for sort, name, what in (("statistics", "statistics", "statistics"), ("hashes", "contents", "remembered hashes")):
        inside = [file for file in _visible(folder / name) if file.is_file()]
        if inside:
            used = max(file.stat().st_mtime for file in inside)
            text = f"{len(inside)} {what}" if sort == "hashes" else f"{what}, {len(inside)} files"
            found.append(Entry("hashes" if sort == "hashes" else "statistics", name, text, _size(inside), used))
    return found


def free(wanted: int, folder: Path | None = None) -> list[Entry]:
    """Remove prepared vectors, those that were not used for longest first, until so many bytes are freed.

    Vectors that a process of this machine uses stay. So less may be freed than was wanted.

    Args:
        wanted: Bytes.
        folder: As for ``entries``.

    Returns:
        What was removed.
    """
    folder = cache_folder() if folder is None else folder
    bases, freed, removed = Bases(folder / "bases"), 0, list[Entry]()
    for one in entries(folder):
        if one.sort == "vectors" and freed < wanted and not one.in_use:
            bases.remove(one.key)
            freed += one.nbytes
            removed.append(one)
    return removed


def remove(keys: Sequence[str], folder: Path | None = None) -> list[Entry]:
    """Remove entries by their keys, or by the beginnings of their keys.

    Args:
        keys: The keys.
        folder: As for ``entries``.

    Returns:
        What was removed.

    Raises:
        InputError: There is none of that key, there are several, or a process of this machine uses it. Then nothing is
            removed.
    """
    folder = cache_folder() if folder is None else folder
    chosen = list(dict.fromkeys(_chosen(key, entries(folder)) for key in keys))
    for one in chosen:
        if one.sort == "vectors":
            Bases(folder / "bases").remove(one.key)
        else:
            files.remove(folder / "prepared" / one.key if one.sort == "models" else folder / one.key)
    return chosen


def _chosen(key: str, known: Sequence[Entry]) -> Entry:
    found = [one for one in known if one.key == key]
    found = found or [one for one in known if len(key) >= _FEWEST and one.key.startswith(key)]
    if not found:
        remedy = nearest(key, [one.key for one in known]) if known else "The cache is empty."
        raise InputError(f"--remove: expected a key that `ecotone cache` lists, found {key!r}.", remedy)
    if len(found) > 1:
        raise InputError(f"--remove: expected one key, found {len(found)} that begin with {key!r}.", "Give more of it.")
    if found[0].in_use:
        raise InputError(f"--remove: {found[0].key} is used by a process of this machine.", "Wait until it has ended.")
    return found[0]


def size(text: str) -> int:
    """``10GB``, ``1.5 TB`` or ``500MiB`` in bytes.

    Raises:
        InputError: It is no size.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].upper() == "I":
        raise InputError(f"--free: expected a size such as 10GB or 500MB, found {text!r}.")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def _bases(folder: Path) -> Iterator[Entry]:
    bases = Bases(folder)
    for one in _visible(folder):
        try:
            record = json_object(file_bytes(one / RECORD))
            count = f"{len(record['columns'])} vectors"
            text = f"{record['operator']} of {', '.join(map(str, record['experts']))}; {count}"
        except (OSError, EcotoneError, ValueError, KeyError, TypeError):
            text = "damaged: made again when it is used"
        yield Entry("vectors", one.name, text, _size(one.rglob("*")), one.stat().st_mtime, bases.in_use(one.name))


def _prepared(folder: Path) -> Iterator[Entry]:
    for one in _visible(folder):
        if one.is_dir():
            name = one.name.rpartition("-")[0]
            yield Entry("models", one.name, f"preparation step of {name}", _size(one.rglob("*")), one.stat().st_mtime)


def _visible(folder: Path) -> list[Path]:
    return sorted(one for one in folder.glob("*") if not one.name.startswith(".")) if folder.is_dir() else []


def _size(paths: Any) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def total(found: Sequence[Entry]) -> str:
    """The bytes of several entries, for people."""
    return readable(sum(one.nbytes for one in found))
