"""The files that the models of a merge are read from, and what becomes of them while they are read.

Weights are mapped, not copied: whoever writes into a checkpoint changes every later merge, and whoever cuts it short
ends the process by SIGBUS. So the status of each file of weights is looked at before and after every batch, and the
bytes of all files that results depend on are hashed when the models are opened.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ecotone.merging.models import configs, tokenizers
from ecotone.merging.models.checkpoint import ADAPTER_CONFIG, INDEX, SINGLE, Shard
from ecotone.merging.models.model import Model
from ecotone.populations.contents import SHOWN, Change, Content, Record, Stamp, changes, content, contents, entry
from ecotone.populations.errors import CheckpointError, InputError

MOMENT = 0.25
"""Seconds after a look at the files for which a glance does without another one."""
RESTORE = "Restore the file, then `ecotone resume` goes on; or start a new run."
_SMALL = ("config.json", configs.GENERATION, *configs.PROCESSORS, ADAPTER_CONFIG)
_MANY = 1000  # files of a folder of an unknown format


class ModelChangedError(CheckpointError):
    """A file of a model is not what it was when the model was opened."""


class Files:
    """The files of the models of a merge.

    Args:
        models: The models by the field of the recipe that names them: ``models.base``, ``models.experts[0]``.
        tokenizer: The folder of the tokenizer that objectives read; None where they read none.

    Attributes:
        places: By field and name in the model, the path of each file that results depend on.
    """

    def __init__(self, models: Mapping[str, Model], tokenizer: Path | None = None) -> None:
        self.places: dict[str, dict[str, Path]] = {where: _files(model) for where, model in models.items()}
        known = {path for places in self.places.values() for path in places.values()}
        if tokenizer is not None and tokenizer.is_dir():
            own = {name: tokenizer / name for name in _small(tokenizer) if tokenizer / name not in known}
            self.places |= {"models.tokenizer": own} if own else {}
        self._shards = [shard for model in models.values() for shard in _shards(model)]
        self._stamps: dict[Path, Stamp] = {one.path: one.stamp for one in self._shards if one.stamp is not None}
        self._texts: dict[Path, str] = {path: str(path) for path in self._stamps}
        self._hashes: dict[Path, Content] = {}
        self._looked = -math.inf

    @property
    def mapped(self) -> Mapping[Path, Content]:
        """The files of weights, with what ``contents`` found in them."""
        return {path: self._hashes[path] for path in self._stamps}

    def hash(self) -> None:
        """Find ``contents`` now, so that a file that is only touched later can be told from one that changes.

        Raises:
            ModelChangedError: As for ``contents``.
            InputError: As for ``contents``.
        """
        assert self.contents is not None

    @cached_property
    def contents(self) -> Record:
        """The hash and size of each file. Reads the files once, or takes the hashes that are remembered; maps weights.

        Raises:
            CheckpointError: A file of weights has changed since it was opened.
            InputError: A file cannot be read.
        """
        for shard in self._shards:
            shard.map()
        self._hashes = contents(path for places in self.places.values() for path in places.values())
        for path, opened in self._stamps.items():
            found = self._hashes[path].stamp
            if found[:4] != opened[:4]:  # its status, such as permissions, may have changed
                raise _changed(path, opened, found)
            self._stamps[path] = found
        return _record(self.places, self._hashes)

    @property
    def cached(self) -> tuple[int, int]:
        """Of the bytes that ``contents`` are of: all, and those of files whose hash was remembered."""
        found = self._hashes.values()
        return sum(one.stamp.size for one in found), sum(one.stamp.size for one in found if one.cached)

    def look(self) -> bool:
        """Look at each file of weights; one status call a file.

        Returns:
            Whether one was touched: its times or its inode are others, and its bytes are the same.

        Raises:
            ModelChangedError: One has changed.
        """
        touched, stat = False, os.stat
        for path, known in self._stamps.items():
            try:
                found = stat(self._texts[path])
            except FileNotFoundError:
                raise _changed(path, known, None) from None
            except OSError as error:
                raise ModelChangedError(
                    f"{path}: cannot be read any more ({error.strerror or error}).", RESTORE
                ) from error
            now = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            if now != known:
                self._stamps[path] = self._compared(path, known, Stamp(*now))
                touched = True
        self._looked = time.monotonic()
        return touched

    def glance(self) -> bool:
        """``look``, unless that was done a moment ago.

        Raises:
            ModelChangedError: A file has changed.
        """
        return time.monotonic() - self._looked > MOMENT and self.look()

    def check(self) -> None:
        """Compare the contents of all files with those that were found first.

        Files whose status is the same are not read again, as far as their hashes are remembered.

        Raises:
            ModelChangedError: One has changed.
        """
        before = self.contents
        self.look()
        try:
            after = _record(self.places, contents(self._hashes))
        except InputError as error:
            raise ModelChangedError(error.message, RESTORE) from error
        for change in changes(before, after):
            raise changed(change, self.places)

    def _compared(self, path: Path, known: Stamp, found: Stamp) -> Stamp:
        """The status of a file with other times or another inode, if its bytes are the same.

        Raises:
            ModelChangedError: They are not, or are not known.
        """
        before = self._hashes.get(path)
        if before is None or found.size != known.size:
            raise _changed(path, known, found)
        try:
            after = content(path)
        except InputError as error:
            raise ModelChangedError(error.message, RESTORE) from error
        if after.digest != before.digest:
            raise _changed(path, known, found, before.digest, after.digest)
        return after.stamp


def changed(change: Change, places: Mapping[str, Mapping[str, Path]]) -> ModelChangedError:
    """The error about a file that differs from its record."""
    path = places.get(change.where, {}).get(change.file)
    at = "" if path is None else f" ({path})"
    return ModelChangedError(f"{change}{at}.", RESTORE)


def after_death(mapped: Mapping[Path, Content]) -> str:
    """Words on a file that is not as it was, after a process that had mapped it has died; empty where all are.

    Args:
        mapped: The content of each file as it was.
    """
    return next(filter(None, (_other(path, was) for path, was in mapped.items())), "")


def _other(path: Path, was: Content) -> str:
    try:
        now = Stamp.of(path)
        if now.size != was.stamp.size:
            return f"{path} had {was.stamp.size:,} bytes and has {now.size:,}"
        same = now == was.stamp or content(path).digest == was.digest
        return "" if same else f"{path} has other bytes than before"
    except (OSError, InputError):
        return f"{path} is gone"


def _changed(path: Path, was: Stamp, now: Stamp | None, *digests: str) -> ModelChangedError:
    if now is None:
        what = "it is gone"
    elif now.size != was.size:
        what = f"it had {was.size:,} bytes and has {now.size:,}"
    else:
        other = (now.device, now.inode) != (was.device, was.inode)
        what = "another file was put in its place" if other else "it was written"
        what += f": its hash was {digests[0][:SHOWN]} and is {digests[1][:SHOWN]}" if digests else ""
    return ModelChangedError(
        f"{path}: expected a model's file that stays as it was opened, but {what}. Merges of both would be mixed.",
        RESTORE,
    )


def _record(places: Mapping[str, Mapping[str, Path]], hashes: Mapping[Path, Content]) -> Record:
    return {
        where: {name: entry(hashes[path]) for name, path in sorted(files.items())} for where, files in places.items()
    }


def _files(model: Model) -> dict[str, Path]:
    """By name, the files of a model that results depend on."""
    home = model.path if model.path.is_dir() else model.path.parent
    found = [shard.path for shard in _shards(model)]
    if not found:
        found = [model.path] if model.path.is_file() else list(_all(model.path))
    found += [model.path / name for name in _small(model.path)] if model.path.is_dir() else []
    return {_name(path, home): path for path in found}


def _name(path: Path, home: Path) -> str:
    return path.relative_to(home).as_posix() if path.is_relative_to(home) else "/".join(path.parts[-2:])


def _small(folder: Path) -> list[str]:
    """Names of a folder's configuration, index, tokenizer and processor files."""
    index = () if (folder / SINGLE).is_file() else (INDEX,)  # beside a single file it is not read
    own = [name for name in (*_SMALL, *index) if (folder / name).is_file()]
    return [*own, *tokenizers.files(folder)]


def _all(folder: Path) -> Iterator[Path]:
    """The files of a folder of a format that does not say which it reads."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith("."))
    for file, _ in zip(files, range(_MANY), strict=False):
        yield file


def _shards(model: Any) -> Iterator[Shard]:
    """The safetensors files that a model reads itself, whatever wraps it; those of an adapter's base are the base's."""
    if isinstance(model, Shard):
        yield model
    for name in ("model", "weights", "shards"):  # of a wrapper, of an adapter, of a checkpoint
        part = getattr(model, name, None)
        for one in part if isinstance(part, tuple) else () if part is None else (part,):
            yield from _shards(one)
