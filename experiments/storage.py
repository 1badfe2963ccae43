"""Run directories at URLs: the journal is written on this machine and copied, and a lease keeps other managers out.

A run at ``s3://bucket/digits``, or wherever fsspec reaches, is written in a working directory of this machine,
``CACHE/runs/digits-KEY``, with CACHE as for preparation steps and KEY of the URL and the machine. From there it is
copied to the URL as it grows, and any machine can go on from the copy alone. Objects at the URL:

- ``lease-EPOCH.json``: who manages the run in that epoch. Created once, exclusively; then only its owner writes it, to
  count renewals.
- ``journal-EPOCH-SERIAL.sqlite`` and the small files that people read: a consistent snapshot.
- ``mirror-EPOCH-SERIAL.json``: the manifest of a copy. It lists the copy's files with sizes and hashes, and is written
  last. The highest manifest counts. The copy before it is kept too, and everything older is deleted.

No object but a lease is written twice, none by two managers, and the highest epoch counts. So nothing has to be
replaced atomically. A manager that slept may wake between its check and its write, when another has the run. It then
adds an object that nobody reads: two managers can never mix one journal. A machine that is lost takes along what it
recorded after its last copy: `runtime.mirror_every` seconds or, with a slow store, ``SHARE`` times the last copy's
seconds.

A lease ends when its owner releases it, or when nobody renews it for as long as it lasts. The waiting manager measures
that by its own clock: clocks of two machines are never compared. A manager that starts where the last one died, in the
same working directory of the same machine, need not wait: a lock shows there that the other is gone.

If a working directory has anything that the copy lacks, it is not deleted but put aside, in ``superseded-1`` and on.

Whoever creates ``lease-EPOCH.json`` first has the epoch: local files, S3, GCS and Azure refuse to create an object that
exists. In another store two managers that ask in the same moment may both succeed. So both read the lease back
``SETTLE`` seconds later, and again before each copy. The one that finds the other's lease gives up. (fsspec itself
looks whether a local file exists and then writes it, so local files are created here.)

Only the user may read the files on this machine. What is recorded and shown of a URL has neither user info nor query;
``ecotone.populations.credentials`` has the whole URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ecotone.experiments import marks
from ecotone.experiments.stored import fitting, is_count, is_moment, is_text
from ecotone.populations import credentials
from ecotone.populations.birth import born
from ecotone.populations.database import locked
from ecotone.populations.errors import EcotoneError, InputError, JournalError, shown
from ecotone.populations.folders import cache_folder, private, private_folder, tighten, write_private
from ecotone.populations.folders import opened as private_file
from ecotone.populations.journal import Journal
from ecotone.populations.parsing import json_object
from ecotone.populations.secrets import clean, place, take

JOURNAL = "journal.sqlite"
FILES = (JOURNAL, "recipe.yaml", "tracking.json", "log.jsonl")
"""The files of a run directory that are copied."""
HOME = "storage.json"
"""The file that names the URL of a directory, and a working directory's own name."""
_OWN_FILES = (*FILES, HOME, "tracking.log", "ui.log", "wandb")

LASTS = 60.0
"""Seconds that a lease lasts without renewal, until the recipe is known, which may change them. Its owner renews it six
times as often."""
SHARE = 10.0
"""The pause before the next copy, in durations of the last one: copying takes a tenth of the time at most."""
PATIENCE = 60.0
"""The longest pause between two attempts, in seconds. A run that ends tries for so long to make its last copy."""
SETTLE = 2.0
"""Seconds after which a new lease is read back, where creating it may not exclude others."""
VIEWS = 3
"""Fetched copies of a run that are kept for reading."""
SPARED = 600.0
"""Seconds that any such copy is kept: somebody may read it."""

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss"})  # without folders

Notify: TypeAlias = Callable[[str], None]
Manifest: TypeAlias = Mapping[str, Any]
_FIELDS = {
    **dict.fromkeys(("url", "home", "machine", "token", "owner"), is_text),
    **dict.fromkeys(("since", "renewed", "time"), is_moment),
    **dict.fromkeys(("epoch", "serial", "renewals", "bytes"), is_count),
    "lasts": lambda value: is_moment(value) and 0 < value <= 1e7,
    "released": lambda value: isinstance(value, bool),
    "counts": lambda value: isinstance(value, list) and len(value) == 3 and all(map(is_count, value)),
    "files": lambda value: isinstance(value, dict) and all(map(_is_entry, value.values())),
}
"""What the fields of a lease, a manifest and ``storage.json`` may hold."""

_log = logging.getLogger("ecotone")
_CREATING = threading.Lock()  # memory://, which is within one process, looks first and writes then


class StorageError(EcotoneError):
    """A run directory at a URL cannot be read or written, or another manager has it."""


class LeaseLostError(StorageError):
    """Another manager has taken the run over."""


class DamagedCopyError(StorageError):
    """A copy differs from its manifest."""


def is_url(text: str) -> bool:
    """True when ``text`` names a run directory by a URL."""
    return "://" in text


def on_this_machine(path: str | Path, where: str) -> Path:
    """A path that a user gave, where a URL would be taken for a folder called ``s3:``.

    Args:
        path: The path, as it was given.
        where: How messages name it.

    Raises:
        InputError: It is a URL.
    """
    if is_url(str(path)):
        raise InputError(
            f"{where}: expected a path on this machine, found the URL {path}.", "Write it here, then copy it there."
        )
    return Path(path)


def url_of(directory: str | Path) -> str | None:
    """The URL whose working directory, or fetched copy, ``directory`` is; None for any other.

    A file that this user's Ecotone did not write names none: ``claimed_url`` tells what it says.
    """
    found = _home(Path(directory))
    url = found.get("url")
    return take(str(url)) if url is not None and marks.is_marked("storage", url, found.get("mark")) else None


def claimed_url(directory: str | Path) -> str | None:
    """The URL that a directory's ``storage.json`` names without a mark of this user's; None for any other."""
    url = _home(Path(directory)).get("url")
    return None if url is None or url_of(directory) is not None else take(str(url))


def named(url: str) -> str:
    """The name of a run directory at a URL that the user gave, as messages and records have it.

    Raises:
        StorageError: The protocol is not known, or its package is not installed.
    """
    return Store(url).url


def _homes_record(url: str, **more: str) -> bytes:
    """The content of ``storage.json``, with this user's mark."""
    mark = marks.mark_of("storage", url)
    return _json(url=url, **more, **({} if mark is None else {"mark": mark}))


# -- the objects at a URL ------------------------------------------------------------------------------------


class Store:
    """The objects of one run.

    Args:
        url: The run directory, with credentials, or without those that are kept for it.

    Attributes:
        url: The URL without user info and query.

    Raises:
        StorageError: The protocol is not known, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        known = credentials.whole(url.rstrip("/"))
        url = url if known == url.rstrip("/") else known
        protocol, shown = url.partition("://")[0], take(url.rstrip("/"))
        if "::" in url:
            raise StorageError(f"{shown}: expected one protocol, found several ({protocol}).", "Give the plain URL.")
        try:
            self._fs, self._root = url_to_fs(url)
        except ImportError as error:
            raise StorageError(
                f"{shown}: {protocol}:// needs a package that is not installed.", f"`pip install {_package(protocol)}`."
            ) from error
        except Exception as error:
            raise StorageError(
                f"{shown}: {_in_words(error)}.", "Check the URL, as in s3://bucket/runs/name."
            ) from clean(error)
        self._local = protocol in ("file", "local")
        here = self._local or protocol == "memory"
        # Elsewhere it is what was given: fsspec's own form lacks the host, or the account, of some protocols.
        self.url: str = str(self._fs.unstrip_protocol(self._root)) if here else shown
        self.name: str = self.url.rsplit("/", 1)[-1]
        self.user: str = _user_of(url)
        self._remedy = "Check the URL, the credentials, the permissions and the network."
        if not here and shown == url:
            self._remedy += f" Credentials are looked for in {credentials.variables(url)}."
        self.settle: float = 0.0 if here else SETTLE
        self._folders = protocol not in OBJECT_STORES

    def names(self) -> list[str]:
        """Names of all objects now; none when the URL holds nothing."""
        with self._explained():
            self._fs.invalidate_cache()
            try:
                return [path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._root, detail=False)]
            except FileNotFoundError:
                return []

    def read(self, name: str) -> bytes | None:
        """The bytes of an object; None when it is not there."""
        with self._explained():
            try:
                return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def create(self, name: str, data: bytes) -> bool:
        """Write a new object; False when there is one of that name already."""
        with self._explained():
            if self._folders:
                self._fs.makedirs(self._root, exist_ok=True)
            try:
                if self._local:
                    with private_file(self._path(name), "xb") as file:
                        file.write(data)
                else:
                    with _CREATING:
                        self._fs.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
        return True

    def write(self, name: str, data: bytes) -> None:
        """Write an object, new or not."""
        with self._explained():
            self._made_private(name)
            self._fs.pipe_file(self._path(name), data)

    def put(self, file: Path, name: str) -> None:
        """Copy a file of this machine."""
        with self._explained():
            self._made_private(name)
            self._fs.put_file(str(file), self._path(name))

    def get(self, name: str, file: Path) -> None:
        """Copy an object to a file of this machine."""
        with self._explained():
            private(file)
            self._fs.get_file(self._path(name), str(file))

    def drop(self, name: str) -> None:
        """Delete an object if that is allowed. One that stays only takes room."""
        try:
            self._fs.rm_file(self._path(name))
        except Exception as error:
            _log.debug("%s: %s cannot be deleted: %s.", self.url, name, _in_words(error))

    def _made_private(self, name: str) -> None:
        """An object of this machine is its owner's alone from its birth."""
        if self._local:
            private(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Put errors of file systems into words. They may raise anything."""
        try:
            yield
        except (Exception, asyncio.CancelledError) as error:
            raise StorageError(f"{self.url}: {_in_words(error)}.", self._remedy) from clean(error)


_SUFFIXES = {"lease": ".json", "mirror": ".json", **{Path(name).stem: Path(name).suffix for name in FILES}}
_NAME = re.compile(r"(?P<stem>[a-z]+)-(?P<epoch>\d{6,})(-(?P<serial>\d{6,}))?(?P<suffix>\.[a-z]+)")


def _numbered(names: Iterable[str], stems: Collection[str] = _SUFFIXES) -> list[tuple[tuple[int, int], str]]:
    """Epochs, serials and names of our objects with these stems, the highest first. Other objects are the user's."""
    found = [match for name in names if (match := _NAME.fullmatch(name)) and match["stem"] in stems]
    ours = [m for m in found if m["suffix"] == _SUFFIXES[m["stem"]] and (m["serial"] is None) == (m["stem"] == "lease")]
    return sorted((((int(m["epoch"]), int(m["serial"] or 0)), m[0]) for m in ours), reverse=True)


def copies(store: Store) -> Iterator[Manifest]:
    """The copies whose manifests are whole, the newest first."""
    for _, name in _numbered(store.names(), ("mirror",)):
        manifest = _parsed(store.read(name))
        if {"files", "counts", "home"} <= manifest.keys():
            yield manifest


def newest_copy(store: Store) -> Manifest | None:
    """The newest of ``copies``; None where there is none."""
    return next(copies(store), None)


# -- the lease -----------------------------------------------------------------------------------------------


class Lease:
    """The right to write a run at a URL, in an epoch of its own. ``take_lease`` makes it.

    Args:
        store: The objects at the URL.
        epoch: Its number, higher than that of any earlier manager.
        home: The working directory's name.
        lasts: Seconds that it holds without renewal.
        clock: Seconds; a test may give its own.
    """

    def __init__(
        self, store: Store, epoch: int, home: str, lasts: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.store = store
        self.epoch = epoch
        self.home = home
        self.lasts = lasts
        self.name: str = f"lease-{epoch:06d}.json"
        self._clock = clock
        self._token = uuid.uuid4().hex
        self._since = time.time()
        self._renewals = 0
        self._due = clock() + lasts / 6

    def record(self, released: bool = False) -> bytes:
        """The object's bytes. Its times are for people: nothing depends on them."""
        return _json(
            epoch=self.epoch,
            owner=f"process {os.getpid()} on {socket.gethostname()}",
            home=self.home,
            machine=_machine(),
            token=self._token,
            lasts=self.lasts,
            renewals=self._renewals,
            since=self._since,
            renewed=time.time(),
            released=released,
        )

    def check(self) -> None:
        """Make sure that nobody has taken the run over.

        Raises:
            LeaseLostError: Somebody has.
            StorageError: The store does not answer.
        """
        (epoch, _), name = next(iter(_numbered(self.store.names(), ("lease",))), ((0, 0), self.name))
        found = _parsed(self.store.read(name))
        if epoch > self.epoch or found.get("token", self._token) != self._token:
            raise LeaseLostError(
                f"{self.store.url}: {_owner(found)} has taken the run over (epoch {epoch}, this was {self.epoch}).",
                f"Nothing of this run is written there any more. `ecotone status {self.store.url}` shows the other.",
            )

    def renew(self) -> None:
        """Show others that the lease is still held; raises as ``check``."""
        self.check()
        self._renewals += 1
        self.store.write(self.name, self.record())
        self._due = self._clock() + self.lasts / 6

    def turn(self) -> None:
        """Renew the lease if that is due. While the store does not answer, the next call tries again.

        Raises:
            LeaseLostError: Another manager has taken the run over.
        """
        if self._clock() < self._due:
            return
        try:
            self.renew()
        except LeaseLostError:
            raise
        except StorageError as error:
            self._due = self._clock() + self.lasts / 12
            _log.debug("The lease cannot be renewed: %s", error)

    def release(self) -> None:
        """Let the next manager in at once."""
        self.check()
        self.store.write(self.name, self.record(released=True))


def take_lease(
    store: Store,
    home: str,
    notify: Notify = lambda text: None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Lease:
    """Take a run that has no manager, or whose manager has ended. Waits while that manager may live.

    Raises:
        StorageError: Another manager has the run, or the store cannot be written.
    """
    while True:
        names = store.names()
        (epoch, _), _ = next(iter(_numbered(names)), ((0, 0), ""))  # of any object: somebody may have deleted leases
        _, name = next(iter(_numbered(names, ("lease",))), ((0, 0), ""))
        content = store.read(name) if name else None
        _await_end(store, name, content, home, notify, clock, sleep)
        lease = Lease(store, epoch + 1, home, float(_parsed(content).get("lasts", LASTS)), clock)
        if store.create(lease.name, lease.record()):
            sleep(store.settle)
            lease.check()
            _log.info(
                "The run at %s is managed from here (epoch %d).",
                store.url,
                lease.epoch,
                extra={"event": "lease_taken", "url": store.url, "epoch": lease.epoch},
            )
            return lease


def _await_end(
    store: Store,
    name: str,
    content: bytes | None,
    home: str,
    notify: Notify,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> None:
    """Return when the lease is over: released, of this working directory, or unchanged for as long as it lasts."""
    lease = _parsed(content)
    own = (lease.get("home"), lease.get("machine")) == (home, _machine())  # one that is copied is another's
    if content is None or lease.get("released") or own:
        return
    lasts = float(lease.get("lasts", LASTS))
    notify(f"Waiting up to {lasts:.0f} s to see whether {_owner(lease)} still manages the run ...")
    end = clock() + lasts
    while clock() < end:
        sleep(lasts / 12)
        now = store.read(name)
        if now == content:
            continue
        lease = _parsed(now)  # a new one may have been seen before it was written
        if lease.get("released"):
            return
        raise StorageError(
            f"{store.url}: {_owner(lease)} has managed the run since {moment(lease.get('since'))} and does so now.",
            f"Stop it, or wait for its end: at most {lasts:.0f} s later, `ecotone resume {store.url}` takes over.",
        )


def _owner(lease: Mapping[str, Any]) -> str:
    return str(lease.get("owner", "another manager"))


# -- copying -------------------------------------------------------------------------------------------------


class Copier:
    """Copies a working directory to its URL, as its journal grows.

    Args:
        store: The objects at the URL.
        lease: The right to write them.
        directory: The working directory, with a journal.
        every: Seconds between two copies at the least.
        clock: Seconds; a test may give its own.

    Raises:
        JournalError: There is no journal.
    """

    failures: int

    def __init__(
        self,
        store: Store,
        lease: Lease,
        directory: Path,
        every: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.lease = lease
        self.directory = directory
        self.every = every
        self.failures = 0  # since the last copy
        self._clock = clock
        self._journal = Journal.open(directory / JOURNAL)
        self._version = -1  # of the journal in the last copy
        self._serial = 0
        self._files: dict[str, Any] = {}  # by name: what the last copy has of it
        self._due = -math.inf

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    def turn(self) -> None:
        """Copy if that is due. A failure is logged once, and copying is tried again after growing pauses.

        Raises:
            LeaseLostError: Another manager has taken the run over.
        """
        if self._clock() < self._due:
            return
        try:
            if self._journal.version != self._version:
                self.copy()
        except LeaseLostError:
            raise
        except Exception as error:  # whatever it is, the search goes on
            self.failures += 1
            self._due = self._clock() + min(2.0 ** min(self.failures, 10), PATIENCE)
            if self.failures == 1:
                _log.warning(
                    "The run goes on, but cannot be copied. Copying is tried again: %s",
                    error,
                    extra={"event": "mirror_failed", "url": self.store.url, "error": str(error)},
                )

    def finish(self, patience: float, sleep: Callable[[float], None] = time.sleep) -> None:
        """Make the last copy; try for ``patience`` seconds.

        Raises:
            StorageError: It cannot be made.
        """
        end = self._clock() + patience
        pause = 0.5
        while True:
            try:
                return self.copy()
            except LeaseLostError:
                raise
            except EcotoneError as error:
                if self._clock() + pause > end or isinstance(error, JournalError):
                    raise StorageError(
                        f"{self.store.url}: the end of the run could not be copied there: {error.message}",
                        f"It is whole in {self.directory}: `ecotone resume {self.store.url}` on this machine sends it, "
                        "unless another manager has gone on with the run meanwhile.",
                    ) from error
            sleep(pause)
            pause *= 2

    def copy(self) -> None:
        """Copy the journal and other files that are new, then list them in a manifest.

        Raises:
            StorageError: The store cannot be written, or another manager has taken the run over.
            JournalError: The journal cannot be read, or there is no room for a snapshot of it.
        """
        began, version, counts = self._clock(), self._journal.version, self._journal.counts()
        self._serial += 1
        files = {name: self._sent(name) for name in FILES if (self.directory / name).is_file()}
        self.lease.check()
        size = sum(one["bytes"] for one in files.values())
        manifest = _json(
            epoch=self.lease.epoch,
            serial=self._serial,
            home=self.lease.home,
            counts=counts,
            bytes=size,
            time=time.time(),
            files=files,
        )
        self.store.write(f"mirror-{self.lease.epoch:06d}-{self._serial:06d}.json", manifest)
        self._drop_old({one["object"] for one in files.values()})
        took = self._clock() - began
        _log.log(
            logging.WARNING if self.failures else logging.INFO,
            "The run is copied to %s%s.",
            self.store.url,
            " again" if self.failures else "",
            extra={"event": "mirrored", "url": self.store.url, "bytes": size, "seconds": took, "serial": self._serial},
        )
        self._files, self._version, self.failures = files, version, 0
        self._due = self._clock() + max(self.every, SHARE * took)

    def _sent(self, name: str) -> dict[str, Any]:
        """Copy a file under a new name, unless the last copy has the same. Returns the file's entry in the manifest."""
        file = self.directory / name
        target = f"{file.stem}-{self.lease.epoch:06d}-{self._serial:06d}{file.suffix}"
        with self._room() as folder:
            snapshot = folder / name
            if name == JOURNAL:
                self._journal.snapshot(snapshot)
            else:
                shutil.copyfile(file, private(snapshot))  # it may grow meanwhile
            measured = _measured(snapshot)
            before = self._files.get(name, {})
            if measured.items() <= before.items():
                return dict(before)
            self.store.put(snapshot, target)
        return {**measured, "object": target}

    @contextlib.contextmanager
    def _room(self) -> Iterator[Path]:
        """A folder for a snapshot."""
        try:
            with tempfile.TemporaryDirectory(dir=self.directory, prefix="snapshot-") as folder:
                yield Path(folder)
        except OSError as error:
            raise JournalError(
                f"{self.directory}: no snapshot can be made ({error.strerror or error}).", "Check the space."
            ) from error

    def _drop_old(self, needed: set[str]) -> None:
        """Delete all objects but the needed ones and those of the copy before. Later objects are not touched."""
        numbered = _numbered(self.store.names(), _SUFFIXES.keys() - {"lease"})
        own = (self.lease.epoch, self._serial)
        manifests = [name for number, name in numbered if number <= own and name.startswith("mirror-")][:2]
        kept = needed.union(manifests)
        for name in manifests[1:]:
            kept.update(one["object"] for one in _parsed(self.store.read(name)).get("files", {}).values())
        for number, name in numbered:
            if number <= own and name not in kept:
                self.store.drop(name)


# -- places to run in ----------------------------------------------------------------------------------------


class Place:
    """The place that a run is written to: its directory, and its name for the user."""

    def __init__(self, directory: Path, where: str) -> None:
        self.directory = directory
        self.where = where

    def check(self) -> None:
        """Make sure that the run may go on.

        Raises:
            LeaseLostError: Another manager has taken it over.
        """

    @contextlib.contextmanager
    def copied(self, every: float, lasts: float) -> Iterator[None]:
        """Copy the run to its URL meanwhile, and at the end.

        Args:
            every: Seconds between two copies at the least.
            lasts: Seconds that the lease holds without renewal.

        Raises:
            StorageError: The first or the last copy cannot be made, or another manager has taken the run over.
        """
        yield


class _DistantPlace(Place):
    def __init__(self, directory: Path, store: Store, lease: Lease) -> None:
        super().__init__(directory, store.url)
        self._store = store
        self._lease = lease
        self._lost: LeaseLostError | None = None

    def check(self) -> None:
        if self._lost is not None:
            raise self._lost

    def guarded(self, turn: Callable[[], None]) -> None:
        """Take a turn, unless the lease is lost. Notices when it is."""
        if self._lost is not None:
            return
        try:
            turn()
        except LeaseLostError as error:
            self._lost = error
            _log.error("%s", error, extra={"event": "lease_lost", "url": self.where, "epoch": self._lease.epoch})

    @contextlib.contextmanager
    def copied(self, every: float, lasts: float) -> Iterator[None]:
        self._lease.lasts = lasts
        self._lease.renew()
        with contextlib.closing(Copier(self._store, self._lease, self.directory, every)) as copier:
            copier.copy()
            try:
                with _repeated(lambda: self.guarded(copier.turn)):
                    yield
            except BaseException:
                if self._lost is None:
                    self._finish_anyhow(copier)
                raise
            self.check()
            copier.finish(PATIENCE)

    def _finish_anyhow(self, copier: Copier) -> None:
        """Make the last copy of a run that fails or is stopped. An error of copying is only logged."""
        try:
            copier.finish(PATIENCE)
        except EcotoneError as another:
            _log.warning("%s", another, extra={"event": "mirror_failed", "url": self.where, "error": str(another)})


@contextlib.contextmanager
def opened(where: str | Path, *, new: bool, notify: Notify = lambda text: None) -> Iterator[Place]:
    """A place to write a run in. Nobody else can write it meanwhile.

    Args:
        where: The run directory: a path, or a URL. A path that is the working directory of a URL stands for it.
        new: Whether the run begins. A run that goes on is fetched, unless its working directory here is as new.
        notify: Called with a sentence when something takes a while.

    Raises:
        StorageError: The URL cannot be read or written, another manager has the run, or there is (not) a run there.
        JournalError: Another process of this machine has the run.
    """
    url = str(where) if is_url(str(where)) else url_of(where)
    if url is None:
        _close_off(Path(where))
        yield Place(Path(where), str(where))
        return
    store = Store(url)
    if new:
        _refuse_present(store)
    directory = _folder(store, "runs")
    with _writable(directory):
        private_folder(directory)
        lock = locked(directory / HOME)
    with contextlib.closing(lock):
        for left in (*directory.glob("snapshot-*"), *directory.glob("fetched-*")):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        _close_off(directory)
        lease = take_lease(store, _named(directory, store), notify)
        place = _DistantPlace(directory, store, lease)
        try:
            with _repeated(lambda: place.guarded(lease.turn)):
                if new:
                    _refuse_present(store)
                else:
                    _fetch_newer(store, directory, notify)
                notify(f"The run is written in {directory} and copied to {store.url}.")
                yield place
        finally:
            with contextlib.suppress(StorageError):
                lease.release()


def _close_off(directory: Path) -> None:
    """Let nobody else read the files of a run that an older version wrote for all to read."""
    tighten([*directory.glob("*.sqlite*"), *directory.glob("*.lock"), *(directory / name for name in _OWN_FILES)])


def _refuse_present(store: Store) -> None:
    if newest_copy(store) is not None:
        raise StorageError(f"{store.url}: a run is there already.", f"`ecotone resume {store.url}`, or another --out.")


def _fetch_newer(store: Store, directory: Path, notify: Notify) -> None:
    """Replace the working directory's files by the files of the newest whole copy, unless they are its source."""
    damage: DamagedCopyError | None = None
    for manifest in copies(store):
        if _as_new(directory, manifest):
            return
        notify(f"Fetching the run from {store.url} ...")
        try:
            with _writable(directory), tempfile.TemporaryDirectory(dir=directory, prefix="fetched-") as folder:
                _fetch(store, manifest, Path(folder))
                _put_aside(store, directory, manifest, notify)
                for name in reversed(FILES):  # the journal last: without it, it is fetched again
                    if (Path(folder) / name).is_file():
                        (Path(folder) / name).replace(directory / name)
        except DamagedCopyError as error:
            damage = damage or error
            notify(f"Warning: {error.message} The copy before it is tried.")
        else:
            return
    if damage is not None:
        raise damage
    if not (directory / JOURNAL).is_file():
        raise JournalError(f"{store.url}: no run there.", "Give a run directory made by `ecotone run`.")


def _put_aside(store: Store, directory: Path, manifest: Manifest, notify: Notify) -> None:
    """Make room for the copy's journal. A journal that has more is kept, in a run directory of its own."""
    counts = _counts(directory / JOURNAL)
    files = [file for suffix in ("-wal", "-shm", "") if (file := directory / f"{JOURNAL}{suffix}").exists()]
    beyond = counts is None or not _all_of(manifest["counts"], counts)
    if beyond and directory / JOURNAL in files:
        others = (directory / f"superseded-{number}" for number in itertools.count(1))
        aside = next(folder for folder in others if not folder.exists())
        aside.mkdir(mode=0o700)
        for file in files:
            shutil.copyfile(file, private(aside / file.name))
        what = "a journal that cannot be read" if counts is None else f"a journal of {counts[1]} evaluations"
        notify(
            f"Warning: the copy at {store.url} lacks results that this machine has. They are kept in {aside}: {what}."
        )
    for file in files:  # the journal last: without it, its log would be taken for the next one's
        file.unlink()


def _as_new(directory: Path, manifest: Manifest) -> bool:
    """True when the copy was made from this working directory, whose journal still has all that the copy has."""
    if manifest["home"] != _home(directory).get("home"):
        return False
    counts = _counts(directory / JOURNAL)
    return counts is not None and _all_of(counts, manifest["counts"])


def _all_of(more: Sequence[int], less: Sequence[int]) -> bool:
    """True when a journal with the counts ``more`` has, by them, everything of one with ``less``."""
    return all(one >= other for one, other in zip(more, less, strict=True))


def _counts(journal: Path) -> Sequence[int] | None:
    """A journal's counts; None when it is missing or cannot be read."""
    with contextlib.suppress(JournalError), Journal.open(journal) as opened:
        return opened.counts()
    return None


def _fetch(store: Store, manifest: Manifest, folder: Path) -> None:
    """Get a copy's files. A damaged file is left out, unless it is the journal.

    Raises:
        DamagedCopyError: Its journal differs from the manifest.
        JournalError: Its journal is of another version of Ecotone.
        StorageError: The store cannot be read.
    """
    for name in FILES:
        if name not in manifest["files"]:
            continue
        try:
            _get(store, manifest["files"][name], folder / name)
        except DamagedCopyError as error:
            if name == JOURNAL:
                raise
            _log.warning("%s", error)
            (folder / name).unlink(missing_ok=True)
    Journal.open(folder / JOURNAL).close()


def _get(store: Store, wanted: Mapping[str, Any], file: Path) -> None:
    """Get one file of a copy. The manifest's entry of it is ``wanted``: the name of an object at the URL, no path."""
    if not _NAME.fullmatch(str(wanted.get("object"))):
        raise DamagedCopyError(f"{store.url}: its manifest names no object of a copy, so it is damaged.")
    try:
        store.get(wanted["object"], file)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DamagedCopyError(error.message) from error
        raise
    if not _measured(file).items() <= wanted.items():
        raise DamagedCopyError(f"{store.url}/{wanted['object']}: it differs from the manifest, so it is damaged.")


@contextlib.contextmanager
def _repeated(act: Callable[[], None], seconds: float = 0.1) -> Iterator[None]:
    """A thread calls ``act`` every so often meanwhile."""
    over = threading.Event()

    def repeat() -> None:
        pause = seconds
        while not over.wait(pause):
            pause = seconds
            try:
                act()
            except Exception:  # whatever it is, the next time it may work
                _log.exception("Keeping the run's copy up to date failed, and is tried again.")
                pause = PATIENCE

    thread = threading.Thread(target=repeat, name="ecotone-storage", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# -- looking at runs -----------------------------------------------------------------------------------------


def fetched(url: str) -> Path:
    """A directory to read a run from: the working directory if the copy was made from it, or else a fetched copy.

    Raises:
        StorageError: The URL cannot be read.
        JournalError: There is no run.
    """
    store = Store(url)
    directory = _folder(store, "runs")
    damage: DamagedCopyError | None = None
    for _ in range(3):  # a copy may be replaced by the next while it is fetched
        for manifest in copies(store):
            if _as_new(directory, manifest):
                return directory
            try:
                return _view(store, manifest)
            except DamagedCopyError as error:
                damage = damage or error
                _log.debug("%s The copy before it is read.", error)
        if damage is None:
            break
    if damage is not None:
        raise damage
    if born(directory / JOURNAL):
        return directory
    if _numbered(store.names()):
        raise JournalError(
            f"{store.url}: no run there: it was stopped before it began, and has recorded nothing.",
            f"`ecotone run RECIPE --out {store.url}` begins it.",
        )
    raise JournalError(f"{store.url}: no run there.", "Give a run directory made by `ecotone run`.")


def _view(store: Store, manifest: Manifest) -> Path:
    """A directory with a copy's files: the files fetched before, if they are still here."""
    views, content = _folder(store, "views"), manifest["files"].get(JOURNAL, {}).get("hash", "")[:8].replace("/", "_")
    view = views / f"{manifest['epoch']:06d}-{manifest['serial']:06d}-{content}"
    with _writable(views):
        if not view.is_dir():
            private_folder(views)
            draft = Path(tempfile.mkdtemp(dir=views, prefix="fetching-"))
            try:
                _fetch(store, manifest, draft)
                write_private(draft / HOME, _homes_record(store.url))
                with contextlib.suppress(OSError):  # another process was as quick
                    draft.rename(view)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(OSError):  # on a disk that is only read
            if url_of(view) is None:  # an older Ecotone fetched it, or this user had another key
                (view / HOME).write_bytes(_homes_record(store.url))
            os.utime(view)
            _drop_views(views)
    return view


def _drop_views(views: Path) -> None:
    """Delete copies that were used long ago, but for the last few."""
    used = sorted(((view.stat().st_mtime, view) for view in views.glob("[0-9]*")), reverse=True)
    for moment, view in used[VIEWS:]:
        if time.time() - moment > SPARED:
            shutil.rmtree(view, ignore_errors=True)


def begun(where: str) -> bool:
    """True when a directory or URL holds a journal. If the store fails, the working directory here decides."""
    if not is_url(where):
        return born(Path(where) / JOURNAL)
    with contextlib.suppress(EcotoneError):
        try:
            return born(fetched(where) / JOURNAL)
        except StorageError:
            return born(_folder(Store(where), "runs") / JOURNAL)
    return False


def standing(url: str) -> dict[str, Any]:
    """The manager of a run and the age of its copy, as plain values, or an ``error`` that says why they are unknown.

    ``managed`` compares the clocks of two machines: it is only for display.
    """
    try:
        store = Store(url)
        manifest = newest_copy(store) or {}
        name = next((name for _, name in _numbered(store.names(), ("lease",))), None)
        lease = _parsed(None if name is None else store.read(name))
    except StorageError as error:
        return {"url": place(url), "error": error.message, "managed": False}
    late = time.time() - lease.get("renewed", 0.0) > 2 * lease.get("lasts", LASTS)
    return {
        "url": store.url,
        "error": None,
        "managed": bool(lease) and not lease.get("released") and not late,
        "owner": lease.get("owner"),
        "epoch": lease.get("epoch"),
        "since": moment(lease.get("since")),
        "mirrored": moment(manifest.get("time")),
        "serial": manifest.get("serial"),
        "bytes": manifest.get("bytes"),
    }


def not_asked(directory: Path) -> dict[str, Any] | None:
    """The standing of a run whose ``storage.json`` names a URL without this user's mark: nobody is asked there."""
    url = claimed_url(directory)
    why = f"not asked: {HOME} bears no mark of yours. `ecotone status URL` asks, if you trust that place"
    return None if url is None else {"url": url, "error": why, "managed": False}


def moment(seconds: float | None) -> str | None:
    """Seconds since 1970 as a date and time in UTC."""
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


# -- small things --------------------------------------------------------------------------------------------


def _folder(store: Store, kind: Literal["runs", "views"]) -> Path:
    """This machine's folder for a run. Its name holds the machine's: machines may share the cache's disk."""
    url = store.url.replace("://", f"://{store.user}@", 1) if store.user else store.url  # users may have other files
    of = (url, socket.gethostname()) if kind == "runs" else (url,)
    key = hashlib.blake2b("\n".join(of).encode(), digest_size=8).hexdigest()
    return cache_folder() / kind / f"{store.name}-{key}"


@functools.cache
def _machine() -> str:
    """A name that no other running machine has."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}-{uuid.getnode():x}"


def _named(directory: Path, store: Store) -> str:
    """A working directory's own name, which no copy of it elsewhere shares; it is locked."""
    found = _home(directory)
    if "home" not in found or url_of(directory) is None:
        with _writable(directory):
            home = str(found.get("home") or uuid.uuid4().hex)
            write_private(directory / HOME, _homes_record(store.url, home=home))
    return str(_home(directory)["home"])


@contextlib.contextmanager
def _writable(directory: Path) -> Iterator[None]:
    """Explain an error of writing a directory of the cache."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{directory}: cannot be written ({error.strerror or error}).",
            "A run at a URL is written there before it is copied, and read there; $ECOTONE_CACHE names another folder.",
        ) from error


def _home(directory: Path) -> dict[str, Any]:
    try:
        return _parsed((directory / HOME).read_bytes())
    except OSError:
        return {}


def _measured(file: Path) -> dict[str, Any]:
    """Size and hash of a file."""
    hasher, size = hashlib.blake2b(digest_size=16), 0
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            hasher.update(block)
            size += len(block)
    return {"bytes": size, "hash": hasher.hexdigest()}


def _json(**values: Any) -> bytes:
    return json.dumps(values, indent=1).encode()


def _parsed(data: bytes | None) -> dict[str, Any]:
    """The JSON of an object without fields that do not fit; nothing when it is missing, torn or of another kind."""
    try:
        return fitting(json_object(data or b"{}"), _FIELDS)
    except ValueError:
        return {}


def _is_entry(value: Any) -> bool:
    """Whether a value is a manifest's entry of a file: an object beside the manifest, its size and its hash."""
    texts = isinstance(value, dict) and is_text(value.get("object")) and is_text(value.get("hash"))
    return texts and re.fullmatch(r"\w[\w.-]*", value["object"]) is not None and is_count(value.get("bytes"))


def _user_of(url: str) -> str:
    """The user's name in a URL; empty where there is none, or where the place's own URL has it."""
    user, at, _ = url.partition("://")[2].partition("/")[0].rpartition("@")
    return user.partition(":")[0] if at and place(url) != url.partition("?")[0] else ""


def _package(protocol: str) -> str:
    """The package to install for a protocol."""
    packages = {"s3fs": ("s3", "s3a"), "gcsfs": ("gs", "gcs"), "adlfs": ("az", "abfs", "abfss")}
    return next((name for name, known in packages.items() if protocol in known), f"'fsspec[{protocol}]'")


def _in_words(error: BaseException) -> str:
    """One line."""
    return shown(" ".join(str(error).split())).rstrip(".") or type(error).__name__
