"""Run directories at URLs: copies, leases, machines that vanish and come back, stores that fail for a while."""

from __future__ import annotations

import importlib.util
import logging
import operator
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from processes import Ecotone, started, wait_until
from test_faults import EVALUATIONS, TRIED, calls, digest, recorded, toy_recipe

from ecotone.experiments import storage
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch, resume
from ecotone.experiments.runs import JOURNAL, Run
from ecotone.experiments.storage import Copier, Lease, LeaseLostError, StorageError, Store, newest_copy, take_lease
from ecotone.experiments.tracking.mlflow import store as tracking_store
from ecotone.experiments.tracking.subject import Subject
from ecotone.populations import migrations
from ecotone.populations.errors import EcotoneError, JournalError
from ecotone.populations.facts import NAME
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal
from ecotone.populations.trial import Evaluation, Trial

HASTY = {"pool": "serial", "mirror_every": 0.1, "lease": 1.0}


class Flaky(LocalFileSystem):
    """Files of this machine behind a network that can be cut, at ``flaky:///path``."""

    protocol = "flaky"
    cachable = False
    down = False
    calls = 0
    exclusive = True

    def _reached(self) -> None:
        Flaky.calls += 1
        if Flaky.down:
            raise TimeoutError("the store does not answer")

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> Any:
        self._reached()
        return super().ls(path, detail)

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._reached()
        return super().cat_file(path, *args, **kwargs)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> Any:
        self._reached()
        return super().pipe_file(path, value, mode if Flaky.exclusive else "overwrite", **kwargs)

    def put_file(self, *args: Any, **kwargs: Any) -> Any:
        self._reached()
        return super().put_file(*args, **kwargs)

    def get_file(self, *args: Any, **kwargs: Any) -> Any:
        self._reached()
        return super().get_file(*args, **kwargs)


class Clock:
    """Seconds that pass when someone sleeps; meanwhile ``others`` act."""

    def __init__(self, others: Callable[[], None] = lambda: None) -> None:
        self.now = 1000.0
        self.others = others

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.others()


@pytest.fixture(autouse=True)
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[Flaky]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(storage, "SETTLE", 0.0)
    for name, value in (("down", False), ("calls", 0), ("exclusive", True)):
        monkeypatch.setattr(Flaky, name, value)
    return Flaky


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Go to another machine: one with a cache folder of its own."""

    def at(name: str) -> None:
        monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / f"cache-{name}"))

    at("first")
    return at


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/store/run"
        return
    yield f"memory://{tmp_path.name}/run"
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = Recipe.from_yaml(toy_recipe(folder, delay=0.0))
    return digest(launch(recipe, folder / "run", folders=(str(folder),)).directory)


def toy(folder: Path, delay: float = 0.0, **runtime: Any) -> Recipe:
    return Recipe.from_yaml(toy_recipe(folder, delay=delay, runtime={**HASTY, **runtime}))


def begun(directory: Path, batches: int = 1) -> Journal:
    """A journal with some batches of one trial each, open for writing."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "recipe.yaml").write_text("name: toy\n")
    journal = Journal.create(directory / JOURNAL, [NAME.note("toy")])
    for _ in range(batches):
        grow(journal)
    return journal


def grow(journal: Journal) -> None:
    number = len(journal.events()) // 2
    trial = Trial(number, Genome.uniform(8, np.array([0.5, number])))
    journal.asked(number, 1, [trial])
    journal.arrived([(trial, Evaluation({"right": number / 7}))])
    journal.told(number)


def lease_of(store: Store, home: str = "here", clock: Clock | None = None) -> Lease:
    clock = clock or Clock()
    return take_lease(store, home, clock=clock, sleep=clock.sleep)


def names(url: str, stem: str) -> list[str]:
    return sorted(name for name in Store(url).names() if name.startswith(stem))


def events(caplog: pytest.LogCaptureFixture, event: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if getattr(record, "event", None) == event]


# -- copies --------------------------------------------------------------------------------------------------


def test_a_copy_is_read_elsewhere_and_the_last_two_are_kept(
    url: str, tmp_path: Path, machine: Callable[[str], None]
) -> None:
    store = Store(url)
    with begun(tmp_path / "work") as journal:
        copier = Copier(store, lease_of(store), tmp_path / "work", every=30.0)
        for _ in range(4):
            grow(journal)
            copier.copy()
            newest = journal.digest()
        copier.close()
    assert [name[-11:-5] for name in names(url, "mirror")] == ["000003", "000004"]
    assert [name[-13:-7] for name in names(url, "journal")] == ["000003", "000004"]
    assert names(url, "recipe") == ["recipe-000001-000001.yaml"]  # unchanged, so sent once
    machine("second")
    view = storage.fetched(url)
    assert {path.name for path in view.iterdir()} == {JOURNAL, "recipe.yaml", storage.HOME}
    with Journal.open(view / JOURNAL) as copied:
        assert copied.digest() == newest
    assert storage.fetched(url) == view
    assert storage.url_of(view) == store.url


def test_old_views_go_unless_they_were_read_just_now(
    url: str, tmp_path: Path, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, made = Store(url), []
    with begun(tmp_path / "work") as journal:
        copier = Copier(store, lease_of(store), tmp_path / "work", every=30.0)
        for spared in (storage.SPARED, 0.0):
            monkeypatch.setattr(storage, "SPARED", spared)
            for _ in range(storage.VIEWS + 2):
                grow(journal)
                copier.copy()
                made.append(storage.fetched(url))
            there = sorted(made[0].parent.iterdir())
            assert there == sorted(made if spared else made[-storage.VIEWS :])
        copier.close()


def test_what_else_is_at_the_url_stays(url: str, tmp_path: Path, ecotone: Ecotone) -> None:
    """Files of the user's, numbered like ours or not."""
    store = Store(url)
    theirs = [
        *("notes.txt", "plots-000001.png", "shard-000000.tar", "step-000000.json", "lease-000001.txt"),
        *("log-000001.jsonl", "journal-000001-000001.json", "mirror-1-1.json"),
    ]
    store.create("first", b"")  # makes the folder
    for name in theirs:
        store.write(name, b"precious")
    run = launch(toy(tmp_path), url, folders=(str(tmp_path),))
    assert run.status()["state"] == "finished"
    assert [store.read(name) for name in theirs] == [b"precious"] * len(theirs)


def test_another_run_at_the_same_url_is_not_taken_for_the_one_before(
    url: str, tmp_path: Path, machine: Callable[[str], None]
) -> None:
    """Epochs and serials begin anew where somebody has deleted everything."""
    store, seen = Store(url), []
    for name, batches in (("old", 3), ("new", 7)):
        for left in store.names():
            store.drop(left)
        with begun(tmp_path / name, batches) as journal:
            copier = Copier(store, lease_of(store, name), tmp_path / name, every=30.0)
            copier.copy()
            copier.close()
            machine("looks")
            with Journal.open(storage.fetched(url) / JOURNAL) as copied:
                seen.append(copied.digest() == journal.digest())
    assert seen == [True, True]


def test_damaged_copies_cost_as_little_as_they_can(tmp_path: Path, machine: Callable[[str], None]) -> None:
    """What people read is left out; of the journal the copy before is taken."""
    folder = tmp_path / "store" / "run"
    url = f"file://{folder}"
    launch(toy(tmp_path), url, folders=(str(tmp_path),))
    newest, older = list(storage.copies(Store(url)))
    assert older["counts"] < newest["counts"]
    (folder / newest["files"]["log.jsonl"]["object"]).write_bytes(b"")
    machine("second")
    assert Run(url).status()["evaluations"] == EVALUATIONS
    assert not (storage.fetched(url) / "log.jsonl").exists()
    (folder / newest["files"][JOURNAL]["object"]).write_bytes(b"")
    for name, look in (("third", Run), ("fourth", resume)):
        machine(name)
        with Run(url).journal() as journal:
            found = journal.counts()  # read before the copy was made, so a copy may have more than its manifest tells
            assert all(map(operator.le, older["counts"], found))
            assert all(map(operator.le, found, newest["counts"]))
        assert look(url).where == url
    assert Run(url).status()["state"] == "finished"


def test_a_torn_manifest_and_a_damaged_snapshot(tmp_path: Path) -> None:
    """The copy before is read; a snapshot that is not what the manifest tells is refused."""
    folder = tmp_path / "store"
    store = Store(f"file://{folder}")
    with begun(tmp_path / "work") as journal:
        copier = Copier(store, lease_of(store), tmp_path / "work", every=30.0)
        for _ in range(2):
            grow(journal)
            copier.copy()
        copier.close()
    newest = folder / "mirror-000001-000002.json"
    newest.write_bytes(newest.read_bytes()[:100])
    manifest = newest_copy(store)
    assert manifest is not None
    assert manifest["serial"] == 1
    snapshot = folder / manifest["files"][JOURNAL]["object"]
    snapshot.write_bytes(snapshot.read_bytes()[:-4096])
    with pytest.raises(StorageError, match="differs from the manifest"):
        storage.fetched(store.url)


def test_a_copy_is_consistent_while_the_journal_is_written(tmp_path: Path) -> None:
    """Another thread commits whole batches all the time: no snapshot has a part of one."""
    with begun(tmp_path / "work") as journal, Journal.open(tmp_path / "work" / JOURNAL) as reader:
        over = threading.Event()

        def write() -> None:
            while not over.is_set():
                with journal.transaction():
                    grow(journal)

        writer = threading.Thread(target=write)
        writer.start()
        found = []
        for number in range(30):
            reader.snapshot(tmp_path / f"{number}.sqlite")
            with Journal.open(tmp_path / f"{number}.sqlite") as copied:
                found.append(copied.counts())
        over.set()
        writer.join()
    assert all(told == 2 * arrived for told, arrived, _ in found)
    assert found == sorted(found)
    assert found[-1] > found[0]
    assert not list(tmp_path.glob("*-wal"))


def test_copies_are_made_when_due_and_when_something_is_new(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(f"flaky://{tmp_path}/store")
    with begun(tmp_path / "work") as journal:
        copier = Copier(store, lease_of(store), tmp_path / "work", every=30.0, clock=clock)
        moments = []
        for _ in range(300):
            before = store.names()
            copier.turn()
            if store.names() != before:
                moments.append(clock.now)
            if clock.now < 1100:
                grow(journal)
            clock.now += 1
        copier.close()
    assert moments == [1000, 1030, 1060, 1090, 1120]  # nothing is new afterwards


def test_slow_copies_are_made_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    put = Flaky.put_file

    def slow(self: Flaky, *arguments: Any, **others: Any) -> None:
        clock.now += 10
        put(self, *arguments, **others)

    monkeypatch.setattr(Flaky, "put_file", slow)
    store = Store(f"flaky://{tmp_path}/store")
    with begun(tmp_path / "work") as journal:
        (tmp_path / "work" / "recipe.yaml").unlink()
        copier = Copier(store, lease_of(store), tmp_path / "work", every=30.0, clock=clock)
        made = []
        while clock.now < 1400:
            copier.turn()
            made.append(len(copier.store.names()))
            grow(journal)
            clock.now += 1
        copier.close()
    assert copier._serial == 4  # at 1000, 1110, 1220 and 1330


def test_a_store_that_fails_for_a_minute(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The search goes on, it is told once, few attempts are made, and then all is there."""
    caplog.set_level(logging.INFO, "ecotone")
    clock = Clock()
    store = Store(f"flaky://{tmp_path}/store")
    with begun(tmp_path / "work") as journal:
        copier = Copier(store, lease_of(store), tmp_path / "work", every=5.0, clock=clock)
        copier.turn()
        for second in range(100):
            Flaky.down = 10 <= second < 70
            if second == 10:
                Flaky.calls = 0
            if second == 69:
                assert Flaky.calls < 12
            grow(journal)
            copier.turn()
            clock.now += 1
        assert len(events(caplog, "mirror_failed")) == 1
        assert "does not answer" in events(caplog, "mirror_failed")[0].getMessage()
        told = [record.getMessage() for record in events(caplog, "mirrored") if record.levelno == logging.WARNING]
        assert told == [f"The run is copied to {store.url} again."]
        assert len(events(caplog, "mirrored")) > 4
        Flaky.down = True
        clock.now += 100
        grow(journal)
        copier.turn()
        assert len(events(caplog, "mirror_failed")) == 2  # another outage is told again
        with pytest.raises(StorageError, match="the end of the run could not be copied"):
            copier.finish(3.0, clock.sleep)
        Flaky.down = False
        copier.finish(3.0, clock.sleep)
        copier.close()
        with Journal.open(storage.fetched(store.url) / JOURNAL) as copied:
            assert copied.digest() == journal.digest()


def test_a_store_that_fails_for_days_and_what_else_may_fail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    store = Store(f"flaky://{tmp_path}/store")
    with begun(tmp_path / "work") as journal:
        copier = Copier(store, lease_of(store), tmp_path / "work", every=5.0, clock=clock)
        Flaky.down = True
        copier.failures = 1000  # 17 hours of them
        for _ in range(100):
            copier.turn()
            clock.now += storage.PATIENCE
        assert copier.failures == 1100
        Flaky.down = False
        copier.turn()
        copier.close()
        manifest = newest_copy(store)
        assert manifest is not None
        assert manifest["counts"] == list(journal.counts())
    monkeypatch.setattr(storage, "PATIENCE", 0.0)
    turns: list[int] = []

    def turn() -> None:
        turns.append(len(turns))
        if len(turns) < 3:
            raise ValueError("a mistake of ours")

    with storage._repeated(turn, 0.001):
        until = time.monotonic() + 30
        while len(turns) < 6 and time.monotonic() < until:
            time.sleep(0.01)
    assert len(turns) >= 6
    assert "is tried again" in caplog.text


# -- leases --------------------------------------------------------------------------------------------------


def test_a_second_manager_is_refused_while_the_first_renews(url: str) -> None:
    store = Store(url)
    clock = Clock()
    first = Lease(store, 1, "here", 60.0, clock)
    assert store.create(first.name, first.record())
    clock.others = first.turn
    said: list[str] = []
    with pytest.raises(
        StorageError, match=r"process \d+ on .* has managed the run since .* and does so now"
    ) as refused:
        take_lease(store, "there", said.append, clock=clock, sleep=clock.sleep)
    assert "at most 60 s later" in refused.value.remedy
    assert clock.now < 1020  # as soon as it is seen to live
    assert said
    assert names(url, "lease") == ["lease-000001.json"]


def test_it_takes_over_when_the_first_is_silent_and_the_first_notices(url: str, tmp_path: Path) -> None:
    store = Store(url)
    first = lease_of(store)
    with begun(tmp_path / "work") as journal:
        copier = Copier(store, first, tmp_path / "work", every=0.0, clock=Clock())
        copier.copy()
        clock = Clock()
        second = lease_of(store, "there", clock)
        assert second.epoch == 2
        assert clock.now >= 1060
        before = store.names()
        grow(journal)
        for act in (first.renew, first.check, first.release, copier.copy, copier.turn, lambda: copier.finish(9.0)):
            with pytest.raises(LeaseLostError, match=r"has taken the run over \(epoch 2, this was 1\)"):
                act()
        copier.close()
    written = set(store.names()) - set(before)
    assert not [name for name in written if name.startswith(("mirror", "lease"))]
    second.check()


def test_nobody_waits_for_a_lease_that_was_released_or_is_of_the_same_working_directory(url: str) -> None:
    store, clock = Store(url), Clock()
    first = lease_of(store, "here", clock)
    first.release()
    assert lease_of(store, "there", clock).epoch == 2  # never released, as if killed
    assert lease_of(store, "there", clock).epoch == 3
    assert clock.now == 1000.0


def test_clocks_that_disagree_and_jump(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day decides nothing: not a year's difference, not a jump in between."""
    store, day = Store(url), 86400.0
    ahead = time.time() + 365 * day
    monkeypatch.setattr(time, "time", lambda: ahead)
    clock = Clock()
    first = lease_of(store, "here", clock)
    monkeypatch.setattr(time, "time", lambda: ahead - 700 * day)

    def others() -> None:
        monkeypatch.setattr(time, "time", lambda: ahead - clock.now * day)
        first.turn()

    clock.others = others
    with pytest.raises(StorageError, match="does so now"):
        take_lease(store, "there", clock=clock, sleep=clock.sleep)
    clock.others = lambda: None
    assert lease_of(store, "there", clock).epoch == 2
    with pytest.raises(LeaseLostError):
        first.check()


def test_a_copied_working_directory_is_not_the_same(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of a machine, or a disk that machines share: the lease is waited for all the same."""
    store, clock = Store(url), Clock()
    first = lease_of(store, "here", clock)
    clock.others = first.turn
    monkeypatch.setattr(storage, "_machine", lambda: "another")
    with pytest.raises(StorageError, match="does so now"):
        lease_of(store, "here", clock)
    folder = storage._folder(store, "runs")
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    assert storage._folder(store, "runs") != folder


def test_leases_that_somebody_deleted(url: str, tmp_path: Path, machine: Callable[[str], None]) -> None:
    """The next epoch is above that of every object, so that what is copied then is what counts."""
    store = Store(url)
    for number in range(3):
        for name in names(url, "lease"):
            store.drop(name)
        with begun(tmp_path / str(number), number + 1) as journal:
            lease = lease_of(store, str(number))
            assert lease.epoch == number + 1
            copier = Copier(store, lease, tmp_path / str(number), every=0.0)
            copier.copy()
            copier.close()
            with Journal.open(storage.fetched(url) / JOURNAL) as copied:
                assert copied.digest() == journal.digest()


def test_a_store_that_fails_takes_no_lease_away(tmp_path: Path) -> None:
    store, clock = Store(f"flaky://{tmp_path}/store"), Clock()
    first = lease_of(store, "here", clock)
    Flaky.down, Flaky.calls = True, 0
    for _ in range(1000):
        clock.now += 0.1
        first.turn()
    assert 10 <= Flaky.calls <= 20
    with pytest.raises(StorageError, match="does not answer"):
        lease_of(store, "there", clock)
    Flaky.down = False
    first.turn()
    first.check()


def test_a_manager_that_slept_between_check_and_write_changes_nothing(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(url)
    with begun(tmp_path / "old") as old, begun(tmp_path / "new", 3) as new:
        sleeper = Copier(store, lease_of(store), tmp_path / "old", every=0.0)
        sleeper.copy()
        heir = Copier(store, lease_of(store, "there"), tmp_path / "new", every=0.0)
        heir.copy()
        right = new.digest()
        monkeypatch.setattr(sleeper.lease, "check", lambda: None)  # it had looked before it fell asleep
        grow(old)
        sleeper.copy()
        with Journal.open(storage.fetched(url) / JOURNAL) as found:
            assert found.digest() == right
        assert "mirror-000001-000002.json" in store.names()
        for _ in range(2):
            grow(new)
            heir.copy()
        assert {name.split("-")[1] for name in store.names() if not name.startswith("lease")} == {"000002"}
        sleeper.close()
        heir.close()


def test_of_many_who_ask_at_once_one_has_the_epoch(url: str) -> None:
    """Fifty times, for a store that looks first and writes then lets two in only now and then."""
    stores, together = [Store(url) for _ in range(8)], threading.Barrier(8)
    won: list[list[bytes]] = [[] for _ in range(50)]

    def ask(number: int) -> None:
        for epoch, winners in enumerate(won):
            together.wait()
            word = str(number).encode()
            if stores[number].create(f"lease-{epoch:06d}.json", word):
                winners.append(word)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [[stores[0].read(f"lease-{epoch:06d}.json")] for epoch in range(len(won))]


def test_where_creating_excludes_nobody_the_lease_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SETTLE", 2.0)
    Flaky.exclusive = False
    store, rivals = Store(f"flaky://{tmp_path}/store"), []

    def rival() -> None:
        if not rivals:  # it, too, had seen no lease
            rivals.append(Lease(store, 1, "there", 60.0))
            store.create(rivals[0].name, rivals[0].record())

    clock = Clock(rival)
    with pytest.raises(LeaseLostError):
        take_lease(store, "here", clock=clock, sleep=clock.sleep)
    rivals[0].check()


# -- runs ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_driver_is_followed_on_another_machine(
    tmp_path: Path, machine: Callable[[str], None], undisturbed: str, ecotone: Ecotone
) -> None:
    """Kill -9, then on a machine that has never seen the run: refused while it lives, resumed from the copy alone."""
    url = f"file://{tmp_path}/store/run"
    recipe = toy_recipe(tmp_path, delay=0.01, runtime={**HASTY, "lease": 5.0})  # a busy machine renews it late

    def copied() -> int:
        manifest = newest_copy(Store(url)) or {"counts": (0, 0, 0)}
        return int(manifest["counts"][1])

    with started("run", recipe, "--out", url) as process:
        wait_until(lambda: copied() >= 40, process)
        machine("second")
        with pytest.raises(StorageError, match=f"process {process.pid} on .* has managed the run"):
            resume(url)
        assert Run(url).status()["state"] == "running"
        process.send_signal(signal.SIGKILL)
        process.wait()
    shutil.rmtree(tmp_path / "cache-first")
    paid, copies = len(calls(tmp_path)), copied()
    assert 40 <= copies <= paid
    seen = ecotone("status", url, "--json").json
    assert (seen["evaluations"], seen["directory"]) == (copies, url)
    assert seen["storage"]["epoch"] == 1
    finished = resume(url)
    assert (finished.where, finished.status()["digest"]) == (url, undisturbed)
    assert len(calls(tmp_path)) - paid == EVALUATIONS - copies + 1  # the rest, and the average of the models
    assert names(url, "lease") == ["lease-000001.json", "lease-000002.json"]
    machine("third")
    assert digest_at(url) == undisturbed
    listed = ecotone("front", url, "--json").json["members"]
    assert ecotone("export", url, "--to", tmp_path / "best", "--member", listed[0]["id"]).code == 0


@pytest.mark.slow
def test_killed_again_and_again_each_time_on_another_machine(
    tmp_path: Path, machine: Callable[[str], None], undisturbed: str
) -> None:
    """At random moments, also while it copies: what a machine finds is whole, and never less than the one before."""
    url, moments, kills = f"file://{tmp_path}/store/run", random.Random("machines"), 0
    runtime = {**HASTY, "mirror_every": 0.01}
    recipe = toy_recipe(tmp_path, delay=0.02, runtime=runtime)
    command: tuple[object, ...] = ("run", recipe, "--out", url)
    before: list[int] = []
    while True:
        machine(str(kills))
        stretch = len(calls(tmp_path))
        with started(*command) as process:
            wait_until(lambda: len(calls(tmp_path)) > stretch or process.poll() is not None, process)  # noqa: B023
            try:
                process.wait(timeout=moments.uniform(0.1, 1.0))
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        kills += 1
        machine(f"look {kills}")
        after = recorded(Run(url).directory)
        assert after[: len(before)] == before
        before, command = after, ("resume", url)
    assert kills >= 5
    assert digest_at(url) == undisturbed
    assert len(names(url, "lease")) == kills + 1
    assert len(names(url, "mirror")) == 2


def digest_at(url: str) -> str:
    return str(Run(url).status()["digest"])


@pytest.mark.slow
def test_sigterm_drains_and_copies_the_rest(tmp_path: Path, machine: Callable[[str], None], undisturbed: str) -> None:
    url = f"file://{tmp_path}/store/run"
    recipe = toy_recipe(tmp_path, delay=0.01, runtime={**HASTY, "mirror_every": 1000.0})
    with started("run", recipe, "--out", url) as process:
        wait_until(lambda: len(calls(tmp_path)) >= 20, process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"ecotone resume {url}" in err
    machine("second")
    paid = len(calls(tmp_path)) - TRIED
    assert Run(url).status()["state"] == "interrupted"
    assert recorded(Run(url).directory) == list(range(paid))  # nothing that was begun is lost
    assert digest(resume(url).directory) == undisturbed
    assert len(calls(tmp_path)) == EVALUATIONS + TRIED + 1


@pytest.mark.slow
def test_a_run_that_is_taken_over_stops_and_says_so(
    tmp_path: Path, machine: Callable[[str], None], undisturbed: str
) -> None:
    url = f"memory://{tmp_path.name}/run"
    store, heirs = Store(url), []

    def observe(progress: Any) -> None:
        if progress.evaluations >= 60 and not heirs:
            heirs.append(Lease(store, 2, "elsewhere", 0.1))
            assert store.create(heirs[0].name, heirs[0].record())

    with pytest.raises(LeaseLostError, match=r"has taken the run over \(epoch 2, this was 1\)"):
        launch(toy(tmp_path, 0.005), url, observe=observe, folders=(str(tmp_path),))
    copied = newest_copy(store)
    assert copied is not None
    assert copied["counts"][1] < EVALUATIONS
    stopped = Run(storage._folder(store, "runs")).status()
    assert (stopped["state"], "taken the run over" in stopped["error"]) == ("failed", True)
    machine("second")
    assert digest(resume(url).directory) == undisturbed
    machine("first")  # what the superseded manager has here is not mistaken for the run
    assert digest_at(url) == undisturbed
    assert resume(url).status()["digest"] == undisturbed


def test_what_the_mirror_lacks_is_not_paid_again_where_it_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The store fails from the middle to the end of a run that is stopped; it goes on there when the store is back."""
    url = f"flaky://{tmp_path}/store/run"
    monkeypatch.setattr(storage, "PATIENCE", 0.0)

    def observe(progress: Any) -> None:
        Flaky.down = progress.evaluations >= 50
        if progress.evaluations >= 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(toy(tmp_path, 0.002), url, observe=observe, folders=(str(tmp_path),))
    assert events(caplog, "mirror_failed")
    Flaky.down = False
    copied, paid = newest_copy(Store(url)), len(calls(tmp_path))
    assert copied is not None
    assert copied["counts"][1] < paid
    here = storage.fetched(url)
    known = len(recorded(here))
    assert paid - known <= 8
    finished = resume(str(here))  # the working directory's own path stands for the URL
    assert finished.where == url
    assert digest(finished.directory) == undisturbed
    assert len(calls(tmp_path)) - paid == EVALUATIONS - known + 1
    manifest = newest_copy(Store(url))
    assert manifest is not None
    assert manifest["counts"][1] == EVALUATIONS


def test_what_another_manager_does_not_have_is_put_aside(
    tmp_path: Path, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, undisturbed: str
) -> None:
    """Cut off, a manager goes on alone; another takes over from the copy; then the first one's machine resumes."""
    url = f"flaky://{tmp_path}/store/run"
    monkeypatch.setattr(storage, "PATIENCE", 0.0)

    def observe(progress: Any) -> None:
        Flaky.down = progress.evaluations >= 50

    with pytest.raises(StorageError, match="the end of the run could not be copied") as cut:
        launch(toy(tmp_path), url, observe=observe, folders=(str(tmp_path),))
    assert "unless another manager has gone on with the run meanwhile" in cut.value.remedy
    Flaky.down = False
    first = storage._folder(Store(url), "runs")
    said: list[str] = []
    machine("second")
    resume(url, {"budget.evaluations": 60})
    machine("first")
    finished = resume(url, {"budget.evaluations": EVALUATIONS}, notify=said.append)
    assert finished.status()["evaluations"] == EVALUATIONS
    (kept,) = first.glob("superseded-*")
    assert digest(kept) == undisturbed
    assert len(recorded(kept)) == EVALUATIONS
    (sentence,) = (one for one in said if str(kept) in one)
    assert f"a journal of {EVALUATIONS} evaluations" in sentence


def test_a_journal_of_another_version_is_refused_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path}/store/run"
    launch(toy(tmp_path), url, folders=(str(tmp_path),))
    here = storage._folder(Store(url), "runs")
    before = {path.name: path.read_bytes() for path in here.iterdir() if path.name.startswith(JOURNAL)}
    monkeypatch.setattr(migrations, "FORMAT", migrations.FORMAT - 1)
    with pytest.raises(JournalError, match="written by a newer Ecotone"):
        resume(url)
    assert {name: (here / name).read_bytes() for name in before} == before


def test_whether_a_run_has_begun_is_known_while_the_store_fails(tmp_path: Path) -> None:
    url = f"flaky://{tmp_path}/store/run"
    assert not storage.begun(url)
    launch(toy(tmp_path), url, folders=(str(tmp_path),))
    Flaky.down = True
    assert storage.begun(url)
    assert not storage.begun(f"flaky://{tmp_path}/store/other")
    assert not storage.begun("bogus://bucket/run")


def test_a_time_of_day_that_jumps_while_it_runs(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: str
) -> None:
    now, jumps = time.time(), iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: now + (-1) ** next(jumps) * 1e7)
    run = launch(toy(tmp_path), url, folders=(str(tmp_path),))
    assert (run.status()["state"], digest(run.directory)) == ("finished", undisturbed)


def test_mlflow_knows_a_run_by_its_url(
    tmp_path: Path, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The id of a run in MLflow leads to it from any machine."""
    url = f"file://{tmp_path}/store/run"
    run = launch(toy(tmp_path), url, folders=(str(tmp_path),))
    with run.journal() as journal:
        tags = Subject.of(journal, run.directory).tags
    machine("second")
    data = SimpleNamespace(data=SimpleNamespace(tags=tags))
    monkeypatch.setattr(tracking_store, "client_of", lambda uri: SimpleNamespace(get_run=lambda run_id: data))
    assert tracking_store.find_run_dir("0" * 32, "http://127.0.0.1:1") == url


# -- refusals ------------------------------------------------------------------------------------------------


def test_a_run_is_there_already(url: str, tmp_path: Path, machine: Callable[[str], None]) -> None:
    launch(toy(tmp_path), url, folders=(str(tmp_path),))
    for name in ("first", "second"):
        machine(name)
        with pytest.raises(StorageError, match="a run is there already") as refused:
            launch(toy(tmp_path), url)
        assert f"ecotone resume {Store(url).url}" in refused.value.remedy
    assert names(url, "lease") == ["lease-000001.json"]


def test_no_run_is_there(url: str) -> None:
    for act in (Run, resume):
        with pytest.raises(JournalError, match="no run there"):
            act(url)


def test_a_store_that_fails_from_the_start(tmp_path: Path) -> None:
    Flaky.down = True
    with pytest.raises(StorageError, match="the store does not answer") as refused:
        launch(toy(tmp_path), f"flaky://{tmp_path}/store/run")
    assert "credentials" in refused.value.remedy
    assert calls(tmp_path) == []


@pytest.mark.parametrize(
    ("where", "said", "remedy"),
    [
        ("bogus://bucket/run", "Protocol not known: bogus", "Check the URL"),
        ("simplecache::s3://bucket/run", "expected one protocol", "Give the plain URL"),
        ("s3://bucket/run", "needs a package that is not installed", "pip install s3fs"),
        ("gs://bucket/run", "needs a package that is not installed", "pip install gcsfs"),
    ],
)
def test_protocols_that_cannot_be_used(where: str, said: str, remedy: str, ecotone: Ecotone, tmp_path: Path) -> None:
    if "pip" in remedy and importlib.util.find_spec(remedy.split()[-1]):
        pytest.skip(f"{remedy.split()[-1]} is installed")
    for command in (("status",), ("run", toy_recipe(tmp_path), "--out")):
        answer = ecotone(*command, where)
        assert answer.code == 1
        assert said in answer.err
        assert remedy in answer.err
        assert "Traceback" not in answer.err


def test_a_url_keeps_its_host_and_loses_its_credentials(tmp_path: Path, ecotone: Ecotone) -> None:
    pytest.importorskip("requests")
    alpha, beta = (Store(f"webhdfs://user:secret@{host}:50070/runs/digits/") for host in ("alpha", "beta"))
    assert alpha.url == "webhdfs://alpha:50070/runs/digits"
    assert storage._folder(alpha, "runs") != storage._folder(beta, "runs")
    assert storage._folder(alpha, "views") != storage._folder(beta, "views")
    assert Store(alpha.url).url == alpha.url
    again = Store(alpha.url)  # whose credentials this process knows
    assert again._fs.user == "user"
    assert storage._folder(again, "runs") == storage._folder(alpha, "runs")
    other = Store("webhdfs://another:secret@alpha:50070/runs/digits")  # may have other files there
    assert storage._folder(other, "runs") != storage._folder(alpha, "runs")
    answer = ecotone("status", "bogus://user:secret@host/run")
    assert answer.code == 1
    assert "secret" not in answer.err


def test_two_processes_of_one_machine(tmp_path: Path) -> None:
    """The working directory's lock refuses at once, without waiting for a lease."""
    url = f"memory://{tmp_path.name}/run"
    with storage.opened(url, new=True), pytest.raises(EcotoneError, match="is being written by process"):
        launch(toy(tmp_path), url)


def test_a_working_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path}/store/run"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="cannot be written") as refused:
        launch(toy(tmp_path), url)
    assert "ECOTONE_CACHE" in refused.value.remedy
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    folder = storage._folder(Store(url), "runs")
    (folder / "storage.lock").mkdir(parents=True)  # so that it cannot be opened, not even by root
    with pytest.raises(StorageError, match="cannot be written"):
        launch(toy(tmp_path), url)
    (folder / "storage.lock").rmdir()
    launch(toy(tmp_path), url, folders=(str(tmp_path),))
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="cannot be written"):
        Run(url)
