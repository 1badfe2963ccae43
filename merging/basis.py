"""Bases on disk: the vectors that an operator has prepared, one file of weights for each coefficient.

A basis is a folder in the cache, named by all that it depends on. It has ``v-1.safetensors`` to ``v-K.safetensors``,
differences from the base in the models' own types, and ``prepared.json``. It is written once, whole or not at all, and
then opened like a checkpoint: merges mix its vectors as they mix task vectors. Solves and singular value decompositions
are not the same to the last bit on all machines. So the files are what a run depends on, not the way they were made:
their hashes are journalled with those of the models.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ecotone.merging.models import headers
from ecotone.merging.models.checkpoint import Checkpoint
from ecotone.merging.models.layout import Layout
from ecotone.merging.models.model import Model
from ecotone.merging.placement import apart
from ecotone.populations import files
from ecotone.populations.contents import contents
from ecotone.populations.errors import EcotoneError, InputError
from ecotone.populations.folders import cache_folder
from ecotone.populations.parsing import file_bytes, json_object

RECORD = "prepared.json"
_log = logging.getLogger("ecotone")


@dataclass(frozen=True)
class Basis:
    """A prepared basis.

    Args:
        key: All that it depends on, 32 hexadecimal digits.
        folder: Its folder.
        record: What ``prepared.json`` has: ``operator``, ``settings``, ``columns``, ``files`` with their hashes,
            ``seconds``, ``layers`` with figures, ``warnings``.
    """

    key: str
    folder: Path
    record: Mapping[str, Any]

    @property
    def columns(self) -> tuple[str, ...]:
        """K names of its vectors."""
        return tuple(self.record["columns"])

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.paths)

    @property
    def paths(self) -> tuple[Path, ...]:
        """K files of weights."""
        return tuple(self.folder / f"v-{number}.safetensors" for number in range(1, len(self.columns) + 1))

    def hold(self) -> BinaryIO:
        """A file with a lock: while it is open nobody on this machine removes the basis to make room.

        Raises:
            InputError: It is gone.
        """
        try:
            handle = (self.folder / RECORD).open("rb")
        except OSError as error:
            raise InputError(
                f"{self.folder}: the prepared vectors cannot be read ({error.strerror or error}).",
                "If they were removed meanwhile, do it again: they are made anew.",
            ) from error
        fcntl.flock(handle, fcntl.LOCK_SH)
        return handle

    def models(self) -> tuple[Model, ...]:
        """K models whose tensors are the vectors, memory-mapped."""
        return tuple(Checkpoint.open(path).named(name) for path, name in zip(self.paths, self.columns, strict=True))


@dataclass(frozen=True)
class SideBySide:
    """The bases of several methods, beside each other; each stays where it is.

    Args:
        bases: By the label of its method, each basis.
    """

    bases: Mapping[str, Basis]

    def hold(self) -> contextlib.ExitStack:
        """The locks of all bases; each is as ``Basis.hold`` returns it.

        Raises:
            InputError: One is gone.
        """
        with contextlib.ExitStack() as held:
            for basis in self.bases.values():
                held.enter_context(basis.hold())
            return held.pop_all()

    def models(self) -> tuple[Model, ...]:
        """The vectors of all methods, method by method, called ``label:column``."""
        every = ((label, vector) for label, basis in self.bases.items() for vector in basis.models())
        return tuple(vector.named(f"{label}:{vector.name}") for label, vector in every)


class Bases:
    """The bases in a folder of this machine.

    Args:
        folder: The folder; None is ``bases`` in ``$ECOTONE_CACHE``.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder: Path = cache_folder() / "bases" if folder is None else folder

    def find(self, key: str) -> Basis | None:
        """The basis under a key; None without one. A damaged one is told of and counts as missing.

        Its folder's time becomes that of its latest use.
        """
        folder = self.folder / key
        if not folder.is_dir():
            return None
        try:
            basis = Basis(key, folder, json_object(file_bytes(folder / RECORD)))
            recorded = dict(basis.record["files"])
            found = {path.name: one.digest for path, one in contents(basis.paths).items()}
        except (OSError, EcotoneError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s cannot be read (%s); it is prepared again.", folder, error)
            return None
        if found != recorded:
            _log.warning("%s is damaged: its files are not those that were written; it is prepared again.", folder)
            return None
        with contextlib.suppress(OSError):
            os.utime(folder)
        return basis

    @contextlib.contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Hold the lock of a key: of several processes of this machine, one prepares and the others wait."""
        with contextlib.ExitStack() as held:
            try:
                self._made()
                handle = held.enter_context((self.folder / f".{key}.lock").open("w"))
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:
                if not (self.folder / key / RECORD).is_file():  # of what is there already nobody has to write
                    raise self._unwritable(error) from error
            yield

    def in_use(self, key: str) -> bool:
        """Whether it is being prepared on this machine, or a process there has models open that are mixed with it."""
        return any(map(_locked, (self.folder / f".{key}.lock", self.folder / key / RECORD)))

    @contextlib.contextmanager
    def writer(self, key: str, layout: Layout, columns: Sequence[str]) -> Iterator[Writer]:
        """A writer of a basis that appears under its key when ``Writer.finish`` has been called, and not before.

        Raises:
            InputError: The disk is too full, or cannot be written.
        """
        try:
            self._made()
        except OSError as error:
            raise self._unwritable(error) from error
        nbytes = len(columns) * sum(info.nbytes for info in layout.parameters.values())
        free = shutil.disk_usage(self.folder).free
        if nbytes > free:
            wanted, found = apart(nbytes, free)
            raise InputError(
                f"{self.folder}: the prepared vectors need {wanted} of disk, found {found} free.",
                "Free some space, remove others with `ecotone cache`, or set $ECOTONE_CACHE to another disk.",
            )
        for left in files.abandoned(self.folder):
            files.remove(left)
        target = self.folder / key
        try:
            with files.drafted(target, folder=True) as draft, Writer(draft, target, layout, columns) as writer:
                yield writer
        except OSError as error:
            raise self._unwritable(error) from error

    def all(self) -> list[Basis]:
        """All bases that can be read, the latest used last."""
        found = []
        for folder in self.folder.glob("*") if self.folder.is_dir() else ():
            with contextlib.suppress(OSError, EcotoneError, ValueError, KeyError, TypeError):
                if not folder.name.startswith("."):
                    basis = Basis(folder.name, folder, json_object(file_bytes(folder / RECORD)))
                    found.append((folder.stat().st_mtime, basis.nbytes, basis))
        return [basis for _, _, basis in sorted(found, key=lambda one: one[:2])]

    def leftovers(self) -> list[Path]:
        """What preparations of this machine that were killed have left behind."""
        return files.abandoned(self.folder) if self.folder.is_dir() else []

    def remove(self, key: str) -> None:
        """Remove a basis. Runs that use it make it again when they go on.

        Raises:
            InputError: The folder cannot be written.
        """
        folder = self.folder / key
        if not folder.is_dir():
            return
        away = folder.with_name(f".{key}.removed")
        files.remove(away)  # of a removal that was killed
        try:
            folder.rename(away)
        except OSError as error:
            raise self._unwritable(error) from error
        files.remove(away)

    def prune(self, limit: int, keep: str) -> list[Basis]:
        """Remove the bases that were not used for longest until all take at most ``limit`` bytes.

        Those that are in use stay.

        Args:
            limit: Bytes.
            keep: The key of another one that stays.

        Returns:
            Those that were removed.
        """
        known = [(basis, basis.nbytes) for basis in self.all()]
        total, removed = sum(size for _, size in known), []
        for basis, size in known:
            if total > limit and basis.key != keep and not self.in_use(basis.key):
                self.remove(basis.key)
                total -= size
                removed.append(basis)
        return removed

    def _made(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"{self.folder}: cannot be written ({error.strerror or error}).",
            "Prepared vectors are kept there; $ECOTONE_CACHE names another folder.",
        )


class Writer:
    """Writes the vectors of a basis, tensor by tensor in any order.

    Args:
        draft: The folder that is written.
        target: Its name when it is finished.
        layout: The flat vector.
        columns: K names.
    """

    def __init__(self, draft: Path, target: Path, layout: Layout, columns: Sequence[str]) -> None:
        self._draft, self._target, self._layout, self._columns = draft, target, layout, tuple(columns)
        wide_first = sorted(layout.parameters.items(), key=lambda item: -item[1].dtype.itemsize)
        self._header, self._offsets = headers.written(dict(wide_first), {"ecotone": "prepared vectors"})
        self._reached: dict[str, int] = {}  # elements, by tensor
        self._files: list[BinaryIO] = []

    def __enter__(self) -> Writer:
        for number in range(1, len(self._columns) + 1):
            file = (self._draft / f"v-{number}.safetensors").open("wb")
            self._files.append(file)
            file.write(self._header)
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def put(self, name: str, vectors: Sequence[Tensor], start: int = 0) -> None:
        """Write a tensor of each of the K vectors, or a piece of it, rounded to the models' type.

        Pieces come one after the other: with the last one the tensor is written.

        Args:
            name: The tensor.
            vectors: K tensors of its size, or of the piece's.
            start: The number of the piece's first element.
        """
        info = self._layout.parameters[name]
        if start != self._reached.get(name, 0):
            raise InputError(f"{name}: expected prepared elements from {self._reached.get(name, 0)}, found {start}.")
        for file, vector in zip(self._files, vectors, strict=True):
            values = vector.detach().to(info.dtype).cpu().contiguous().reshape(-1)
            self._reached[name] = start + values.numel()
            if self._reached[name] > info.size:
                raise InputError(f"{name}: expected {info.size} prepared elements, found {self._reached[name]}.")
            file.seek(self._offsets[name] + start * info.dtype.itemsize)
            file.write(values.view(torch.uint8).numpy().data)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Give the folder its name. Everything is on the disk before.

        Args:
            record: What is told of the basis, beside its columns and files.

        Raises:
            InputError: A tensor was not written.
        """
        left = [name for name, info in self._layout.parameters.items() if self._reached.get(name) != info.size]
        if left:
            raise InputError(f"expected vectors of all tensors, found none of {', '.join(sorted(left))}.")
        for file in self._files:
            file.close()
        paths = [Path(file.name) for file in self._files]
        hashes = {path.name: one.digest for path, one in contents(paths).items()}
        text = json.dumps({**record, "columns": self._columns, "files": hashes}, indent=1)
        files.written_whole(self._draft / RECORD, text)
        for path in paths:
            path.chmod(0o444)
        files.all_synchronised(self._draft)
        if self._target.exists():  # a damaged one
            files.remove(self._target)
        files.moved(self._draft, self._target, exclusive=True)
        files.synchronised(self._target.parent)


def _locked(file: Path) -> bool:
    """Whether somebody holds a lock of a file."""
    try:
        with file.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True
