"""Seeded schedules of every search through the simulation, and the simulation itself: what it must see it sees."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import simulation
from simulation import MAKERS, TURNS, Disk, Plan, failed, failures

from ecotone.fitness.pools import Batch
from ecotone.populations.journal import Journal
from ecotone.search.manager import Manager


@pytest.mark.parametrize("kind", MAKERS)
def test_however_it_is_disturbed_it_is_the_same_search(kind: str) -> None:
    """A failure says which seed to replay."""
    seeds = [seed for seed, turn in enumerate(TURNS) if turn == kind]
    assert not list(failures(seeds[:3]))


@pytest.mark.slow
def test_ten_thousand_schedules() -> None:
    """Minutes on two cores."""
    assert not list(failures(range(10_000), os.cpu_count() or 1))


def told(seed: int) -> list[str]:
    lines: list[str] = []
    assert failed(seed, lines.append) is None
    return [line for line in lines if "journal.sqlite" not in line]  # the folder's name differs


def test_a_seed_is_one_schedule() -> None:
    lives: Counter[int] = Counter()
    for seed in (0, 1, 2, 3, 6, 7):
        first = told(seed)
        assert first == told(seed)
        lives[sum(line.startswith("life") for line in first)] += 1
    assert max(lives) > 2


def test_the_seeds_have_every_search_order_and_end() -> None:
    plans = [Plan.of(seed) for seed in range(len(TURNS))]
    assert {plan.kind for plan in plans[: len(MAKERS)]} == set(MAKERS)
    assert min(Counter(plan.schedule.order for plan in plans).values()) > 40
    ends = Counter(end for plan in plans for end, _ in plan.ends)
    assert set(ends) == set(simulation.ENDS)
    assert min(ends.values()) > 20


# -- flaws ---------------------------------------------------------------------------------------------------


def learns_as_it_comes(manager: Manager) -> Iterator[Batch]:
    """Strict order forgotten."""
    for number in list(manager._arrived):
        yield manager._flying[number]


@contextlib.contextmanager
def no_transaction(journal: Journal) -> Iterator[None]:
    """Each statement committed for itself."""
    yield


def records_again(manager: Manager, batch: Batch, evaluations: Any, record: Any = Manager._record) -> None:
    """A batch that comes twice is written twice."""
    manager._out.setdefault(batch.number, batch)
    record(manager, batch, evaluations)


def trusts_the_clock(manager: Manager, asked: float = 0.0, most: float = 0.0) -> None:
    """Jumps are counted."""
    now = manager._clock()
    manager.progress.elapsed += now - manager._at
    manager._at = now


def tells_while_it_drains(manager: Manager, results: Any, advance: Any = Manager._advance) -> None:
    """What comes while it drains is learned, without the asking that belongs in between."""
    draining, manager._draining = manager._draining, False
    wanted = manager._wanted
    manager._wanted = lambda: 0 if draining else wanted()  # type: ignore[method-assign]
    try:
        advance(manager, results)
    finally:
        manager._draining, manager._wanted = draining, wanted  # type: ignore[method-assign]


FLAWS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "order": (Manager, "_due", learns_as_it_comes),
    "transaction": (Journal, "transaction", no_transaction),
    "twice": (Manager, "_record", records_again),
    "clock": (Manager, "_count_time", trusts_the_clock),
    "drain": (Manager, "_advance", tells_while_it_drains),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_is_seen(flaw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = [seed for seed, kind in enumerate(TURNS * 6) if kind in ("m2n2", "nsga2")]
    for seed in seeds:
        simulation.undisturbed(Plan.of(seed))  # is known before
    monkeypatch.setattr(*FLAWS[flaw])
    text = next(failures(seeds), "")
    assert "python tests/simulation.py --seed" in text


# -- the disk ------------------------------------------------------------------------------------------------


def written(path: Path) -> sqlite3.Connection:
    """An open database of sixty transactions, of which the first forty are moved out of the log."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA wal_autocheckpoint=100000")
    connection.execute("PRAGMA synchronous=OFF")
    connection.execute("CREATE TABLE numbers (number INTEGER PRIMARY KEY, text TEXT)")
    for number in range(60):
        if number == 40:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        connection.execute("INSERT INTO numbers VALUES (?, ?)", (number, "text" * 300))
    return connection


def numbers(path: Path) -> list[int]:
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    found = [number for (number,) in connection.execute("SELECT number FROM numbers ORDER BY number")]
    connection.close()
    return found


def test_a_kill_loses_nothing_and_a_power_cut_the_last_of_what_was_not_synced(tmp_path: Path) -> None:
    connection = written(tmp_path / "numbers.sqlite")
    assert numbers(Disk().copied(tmp_path / "numbers.sqlite", tmp_path / "kill", None)) == list(range(60))
    counts = set()
    for seed in range(40):
        left = Disk().copied(tmp_path / "numbers.sqlite", tmp_path / str(seed), random.Random(seed))
        found = numbers(left)
        assert found == list(range(len(found)))
        counts.add(len(found))
    connection.close()
    assert min(counts) >= 40
    assert len(counts) > 8
    assert max(counts) == 60  # the pages were half written, and the log is there


def test_what_a_disk_synced_it_keeps_through_the_next_power_cut(tmp_path: Path) -> None:
    for seed in range(40):
        rng, disk = random.Random(seed), Disk()
        folder = tmp_path / str(seed)
        folder.mkdir()
        connection = written(folder / "numbers.sqlite")
        first = disk.copied(folder / "numbers.sqlite", folder / "first", rng)
        connection.close()
        again = sqlite3.connect(first)
        found = [number for (number,) in again.execute("SELECT number FROM numbers ORDER BY number")]
        second = disk.copied(first, folder / "second", rng)
        again.close()
        after = numbers(second)
        assert after == found[: len(after)]
