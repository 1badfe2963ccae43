"""A deterministic simulation of the manager: searches and journal are real; workers, clock, disk and deaths are not.

    python tests/simulation.py --schedules 10000     # seeds 0 to 9999, in minutes; those that fail are printed
    python tests/simulation.py --seed 4711           # that schedule again, told step by step

A schedule is drawn from its seed alone: the search, strict or arrival order, the number of workers, how long each batch
takes (lognormal), which workers are lost (their batches are done again), which results come twice, late or together,
when the clock jumps by hours; and how each life of the driver ends before the next one resumes: killed before or after
any statement of the journal or call of the pool, or the power cut there (then the disk tears what was not synced),
interrupted, drained, refused by a full disk or for a batch that nobody asked for. Lives may end before that, while the
journal is made, and after it, while the best member is exported: at any statement, or call of the file system that
syncs, names or deletes a file. However it went, in the end

- strict order has the digest of the undisturbed search, or its first trials when a budget of seconds came first;
- arrival order has spent the same budget, and its journal replays to the same population, front and best;
- every trial was asked for once, evaluated once and told once, and the database is sound;
- nothing that the journal had when a life began was paid for again, and what it had before a kill it had after it;
- a directory whose journal was not made yet has none at all, and the next life makes it; all checksums fit always;
- an export is there whole or not at all, and is the member that was asked for;
- a drained life submits nothing more and ends within its grace; time never ran back, and jumps are not in it.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import functools
import heapq
import itertools
import logging
import os
import random
import shutil
import sqlite3
import stat
import struct
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeAlias
from unittest import mock

import numpy as np
from managing import begun
from safetensors.numpy import load_file, save_file
from test_searches import MAKERS

from ecotone.fitness.pools import Batch, Completed
from ecotone.merging.export import export_file
from ecotone.merging.sources import Sources
from ecotone.populations import facts
from ecotone.populations.birth import born
from ecotone.populations.errors import EcotoneError, JournalError, PoolError
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal
from ecotone.populations.space import Space
from ecotone.populations.trial import Evaluation, Goal, Trial
from ecotone.search.manager import POLL, Manager, Progress, Schedule, StopReason
from ecotone.testing.searches import SPACE, VECTORS, scored

COSTLY = ("bayesian_map", "map", "nested_map", "optuna-tpe", "optuna-cma_es", "optuna-qmc")
# The first seeds have each search once; of later ones the costly searches, of a few milliseconds a trial, have fewer.
TURNS = (*MAKERS, *[kind for kind in MAKERS if not kind.startswith(COSTLY)] * 5)
WINDOWS = ((1, 1), (1, 5), (2, 6), (3, 9), (4, 8))  # batch and in flight
BUDGETS = {"stages": 50, "adamerging": 12, "expert_merging": 10, "raced": 14}  # by a part of the search's name
End: TypeAlias = Literal["kill", "power cut", "interrupt", "drain", "full disk", "stranger"]
ENDS: tuple[End, ...] = ("kill", "kill", "power cut", "power cut", "interrupt", "drain", "full disk", "stranger")
BRIEF: tuple[End, ...] = ("kill", "kill", "power cut", "power cut", "interrupt", "full disk")  # beside the search


class Killed(BaseException):
    """A kill -9, or a power cut, as far as one process can have it."""


# -- schedules -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One schedule.

    Args:
        seed: What everything is drawn from.
        kind: Name of the search, of ``MAKERS``.
        search_seed: The search's own seed.
        schedule: Budget, batches and order.
        workers: How many there are.
        spread: Standard deviation of the logarithm of a trial's seconds; the median is one.
        late: Probability that a result takes a while to come.
        again: That it comes twice.
        lost: That a worker is lost with its batch.
        jumps: That the clock jumps in a wait.
        checkpoint: Pages after which SQLite moves its log into the database.
        ends: How the driver's lives end, and after how many steps: statements of its journal, before and after, and
            calls of its pool. A last life ends by itself.
        births: As ``ends``: how attempts to make the journal end before one succeeds.
        exports: As ``ends``: how exports of the best member end before one succeeds. None is made where there is none.
    """

    seed: int
    kind: str
    search_seed: int
    schedule: Schedule
    workers: int = 1
    spread: float = 0.0
    late: float = 0.0
    again: float = 0.0
    lost: float = 0.0
    jumps: float = 0.0
    checkpoint: int = 1000
    ends: tuple[tuple[End, int], ...] = ()
    births: tuple[tuple[End, int], ...] = ()
    exports: tuple[tuple[End, int], ...] = ()

    @classmethod
    def of(cls, seed: int) -> Plan:
        """The schedule that the seed says."""
        rng = random.Random(seed)
        kind = TURNS[seed % len(TURNS)]
        evaluations = next((budget for part, budget in BUDGETS.items() if part in kind), 30)
        batch, in_flight = rng.choice(WINDOWS)
        schedule = Schedule(
            evaluations=evaluations,
            seconds=rng.choice([None, None, None, rng.uniform(1.0, 40.0)]),
            batch=batch,
            in_flight=in_flight,
            order=rng.choice(["strict", "strict", "arrival"]),
            grace=rng.choice([0.0, 2.0, 30.0]),
        )
        return cls(
            seed,
            kind,
            rng.randrange(2),
            schedule,
            workers=rng.randint(1, 6),
            spread=rng.choice([0.0, 0.4, 1.5]),
            late=rng.choice([0.0, 0.3]),
            again=rng.choice([0.0, 0.3]),
            lost=rng.choice([0.0, 0.2]),
            jumps=rng.choice([0.0, 0.0, 0.1]),
            checkpoint=rng.choice([8, 60, 1000]),
            ends=tuple((rng.choice(ENDS), int(2 ** rng.uniform(0.0, 9.5))) for _ in range(rng.randint(0, 4))),
            births=tuple((rng.choice(BRIEF), rng.randint(1, 75)) for _ in range(rng.choice([0, 0, 1, 2]))),
            exports=tuple((rng.choice(BRIEF), rng.randint(1, 12)) for _ in range(rng.choice([0, 0, 0, 1, 2]))),
        )


# -- the disk ------------------------------------------------------------------------------------------------


class Disk:
    """What is left of a journal whose driver died.

    SQLite syncs its log before it moves pages into the database, and the database before it begins the log anew. So
    after a power cut the log's frames that were not being moved may be missing from any point on, sector by sector in
    any state; or pages that were being moved may be half written, and then the whole log is there.
    """

    def __init__(self) -> None:
        self._synced = b"", 0  # salt of a log, and how many of its frames were synced

    def copied(self, file: Path, folder: Path, rng: random.Random | None) -> Path:
        """A copy in ``folder`` of what the disk holds; ``rng`` draws what a power cut did to it."""
        folder.mkdir()
        copy = folder / file.name
        shutil.copyfile(file, copy)
        log = file.with_name(f"{file.name}-wal").read_bytes()
        if len(log) > 32:
            log = self._left(copy, log, file.with_name(f"{file.name}-shm").read_bytes(), rng)
        copy.with_name(f"{copy.name}-wal").write_bytes(log)
        return copy

    def _left(self, database: Path, log: bytes, index: bytes, rng: random.Random | None) -> bytes:
        salt = log[16:24]
        (page,), (frames,), (synced,) = (struct.unpack_from(kind, index, at) for kind, at in _INDEX)
        if self._synced[0] == salt:
            synced = max(synced, self._synced[1])
        if rng is not None and synced < frames:
            if rng.random() < 0.8:
                log = cut(log, 32 + synced * (24 + page), rng)
            else:
                synced = frames
                smudge(database, log, frames, page, rng)
        self._synced = salt, synced
        return log


_INDEX = ("<H", 14), ("<I", 16), ("<I", 96)
"""Where the log's index in shared memory has the size of a page, the frames committed and those of them moved."""


def cut(log: bytes, synced: int, rng: random.Random) -> bytes:
    """The log up to some point beyond ``synced``; after it nothing, or sectors of 512 bytes, some of them lost."""
    at = rng.randint(synced, len(log))
    if rng.random() < 0.4:
        return log[:at]
    torn, start = bytearray(log), at
    while start < len(torn):
        stop = min(start - start % 512 + 512, len(torn))
        state = rng.randrange(3)
        if state:
            torn[start:stop] = bytes(stop - start) if state == 1 else rng.randbytes(stop - start)
        start = stop
    return bytes(torn)


def smudge(database: Path, log: bytes, frames: int, page: int, rng: random.Random) -> None:
    """Half-written pages in the database, of those that the log has."""
    numbers = {struct.unpack_from(">I", log, 32 + frame * (24 + page))[0] for frame in range(frames)}
    with database.open("r+b") as file:
        size = database.stat().st_size
        for number in sorted(numbers):
            if number > 1 and number * page <= size and rng.random() < 0.5:
                file.seek((number - 1) * page + rng.randrange(page // 2))
                file.write(rng.randbytes(page // 2))


# -- workers and clock ---------------------------------------------------------------------------------------


@dataclass
class World:
    """What outlives the driver: true time, and what was ever measured.

    ``recorded`` are the trials that the journal is known to hold, ``waited`` is the true time of all waits, ``jumped``
    how often the clock did; ``say`` is told what happens.
    """

    say: Callable[[str], None]
    now: float = 0.0
    waited: float = 0.0
    jumped: int = 0
    disk: Disk = field(default_factory=Disk)
    measured: dict[int, Evaluation] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)


class Trap:
    """Counts the driver's steps and springs once, at the last of ``steps``.

    Args:
        end: What happens then.
        steps: After how many steps; None for never.
    """

    def __init__(self, end: End | None, steps: int | None) -> None:
        self.end, self._left, self._dead = end, steps, False
        self.manager: Manager | None = None
        self.sprung = False

    def step(self, writes: bool = False) -> None:
        """One step, of which the dead can take none."""
        if self._dead:
            raise Killed
        if self._left is None:
            return
        self._left -= 1
        if self._left > 0 or self.sprung or (self.end == "full disk" and not writes):
            return
        self.sprung = True
        if self.end in ("kill", "power cut"):
            self._dead = True
            raise Killed
        if self.end == "interrupt" or (self.end == "drain" and self.manager is None):
            raise KeyboardInterrupt
        if self.end == "full disk":
            raise sqlite3.OperationalError("database or disk is full")
        if self.end == "drain":
            assert self.manager is not None
            self.manager.drain()


class Wire:
    """The journal's connection, with a trap before and after each statement."""

    def __init__(self, connection: sqlite3.Connection, trap: Trap) -> None:
        self._connection, self._trap = connection, trap

    def execute(self, query: str, *values: Any) -> Any:
        self._trap.step(writes=query.startswith(("INSERT", "COMMIT")))
        found = self._connection.execute(query, *values)
        self._trap.step()
        return found

    def executemany(self, query: str, rows: Iterable[Any]) -> Any:
        self._trap.step(writes=True)
        found = self._connection.executemany(query, rows)
        self._trap.step()
        return found

    def set_authorizer(self, function: Callable[..., int]) -> None:
        self._connection.set_authorizer(function)

    def close(self) -> None:
        self._connection.close()


@contextlib.contextmanager
def trapped(trap: Trap) -> Iterator[set[int | str]]:
    """Traps before and after each statement of any journal, and each call that syncs, names or deletes a file.

    Yields what is synced: inodes of files, and names in folders.
    """
    synced: set[int | str] = set()

    def step(writes: bool) -> None:
        try:
            trap.step(writes)
        except sqlite3.OperationalError as error:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*values: Any, **named: Any) -> Any:
            step(writes=name != "unlink")
            found = call(*values, **named)
            if name == "fsync":
                about = os.fstat(values[0])
                names = os.listdir(values[0]) if stat.S_ISDIR(about.st_mode) else []  # noqa: PTH208 - of a descriptor
                synced.update(names or [about.st_ino])
            step(writes=False)
            return found

        return stepped

    with contextlib.ExitStack() as stack:
        for name in ("fsync", "link", "rename", "replace", "unlink"):
            stack.enter_context(mock.patch.object(os, name, wrapped(name, getattr(os, name))))
        connect = sqlite3.connect
        wire = mock.patch.object(sqlite3, "connect", lambda *values, **named: Wire(connect(*values, **named), trap))
        stack.enter_context(wire)
        yield synced


def left(folder: Path, target: Path, synced: set[int | str], rng: random.Random | None) -> None:
    """A copy of a folder's files as ``target``; ``rng`` draws what a power cut did to those that were not synced."""
    target.mkdir()
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        if rng is not None and file.name not in synced and rng.random() < 0.5:
            continue
        if rng is not None and file.stat().st_ino not in synced:
            data = data[: rng.randint(0, len(data))]
        (target / file.name).write_bytes(data)


class Clock:
    """The driver's clock: it begins anywhere, and jumps."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world, self._rng = world, rng
        self._ahead = rng.uniform(0.0, 1e6)

    def __call__(self) -> float:
        return self._world.now + self._ahead

    def jump(self) -> None:
        hours = self._rng.choice([-1, 1]) * self._rng.uniform(1.0, 10.0)
        self._world.say(f"the clock jumps by {hours:.1f} h")
        self._world.jumped += 1
        self._ahead += 3600 * hours


class Workers:
    """A pool whose workers take their time, are lost, and give results late, together, in any order and twice.

    Args:
        plan: The probabilities.
        world: Time passes in it.
        clock: Jumps in a wait.
        trap: Springs at a call.
        rng: What this life's events are drawn from.
        known: Trials that the journal has: nobody may pay for them again.
    """

    def __init__(
        self, plan: Plan, world: World, clock: Clock, trap: Trap, rng: random.Random, known: frozenset[int]
    ) -> None:
        self.slots = plan.workers
        self._plan, self._world, self._clock, self._trap, self._rng = plan, world, clock, trap, rng
        self._known = known
        self._todo: deque[Batch] = deque()
        self._idle = plan.workers
        self._events: list[tuple[float, int, str, Batch]] = []
        self._ticks = itertools.count()
        self._given: set[int] = set()
        self.submitted: list[int] = []
        self.drained: float | None = None  # since when

    def start(self) -> Space:
        return SPACE

    def submit(self, batch: Batch) -> None:
        assert not self._drains(), "a drained driver submits"
        numbers = [trial.number for trial in batch.trials]
        assert not self._known & set(numbers), f"{numbers} are paid for again"
        self._trap.step()
        self._world.say(f"{self._world.now:7.2f} s  asked for {numbers}")
        self.submitted += numbers
        self._todo.append(batch)
        self._begin()

    def completed(self, timeout: float | None = None) -> Completed:
        assert self._events, "the driver waits for nothing"
        assert timeout is not None
        assert 0.0 <= timeout <= POLL
        self._world.recorded |= self._given  # or it would not be back
        self._trap.step()
        if self._trap.sprung and self._trap.end == "stranger":
            return [self._stranger()]
        self._drains()
        if self._rng.random() < self._plan.jumps:
            self._clock.jump()
        before, until = self._world.now, self._world.now + timeout
        ready: list[Batch] = []
        while self._events and self._events[0][0] <= until:
            if ready and self._rng.random() < 0.7:
                break
            self._world.now, _, event, batch = heapq.heappop(self._events)
            self._happen(event, batch, ready)
        if not ready:
            self._world.now = until
        self._world.waited += self._world.now - before
        self._rng.shuffle(ready)
        return [self._measured(batch) for batch in ready]

    def close(self) -> None:
        """Nothing is left of it."""

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drains(self) -> bool:
        if self.drained is None and self._trap.sprung and self._trap.end == "drain":
            self.drained = self._world.now
        return self.drained is not None

    def _begin(self) -> None:
        while self._idle and self._todo:
            self._idle -= 1
            batch = self._todo.popleft()
            seconds = sum(self._rng.lognormvariate(0.0, self._plan.spread) for _ in batch.trials)
            lost = self._rng.random() < self._plan.lost
            self._later(seconds * self._rng.random() if lost else seconds, "lost" if lost else "done", batch)

    def _later(self, seconds: float, event: str, batch: Batch) -> None:
        heapq.heappush(self._events, (self._world.now + seconds, next(self._ticks), event, batch))

    def _happen(self, event: str, batch: Batch, ready: list[Batch]) -> None:
        self._world.say(f"{self._world.now:7.2f} s  batch {batch.number} {event}")
        if event == "lost":
            self._later(self._rng.expovariate(1.0), "found lost", batch)
        elif event == "found lost":
            (self._todo.appendleft if self._rng.random() < 0.5 else self._todo.append)(batch)
        elif event == "done" and self._rng.random() < self._plan.late:
            self._later(self._rng.expovariate(0.5), "late", batch)
        else:
            ready.append(batch)
            if event != "again" and self._rng.random() < self._plan.again:
                self._later(self._rng.expovariate(0.3), "again", batch)
        if event in ("done", "found lost"):
            self._idle += 1
        self._begin()

    def _measured(self, batch: Batch) -> tuple[Batch, list[Evaluation]]:
        found = [replace(scored(trial), seconds=self._rng.random()) for trial in batch.trials]
        for trial, evaluation in zip(batch.trials, found, strict=True):
            self._world.measured.setdefault(trial.number, evaluation)
            self._given.add(trial.number)
        return batch, found

    def _stranger(self) -> tuple[Batch, list[Evaluation]]:
        """A batch of somebody else, or one of ours with another genome in it."""
        trial = Trial(0, Genome.uniform(SPACE.size, [9.0, 9.0, 9.0]))
        number = self._events[0][3].number if self._rng.random() < 0.5 else 10**6
        return Batch(number, (trial,)), [Evaluation({"solved": 1.0, "length": 0.0, "some": 0.0})]


# -- lives ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Life:
    """What is left of a life: why its search ended (None if it did not), its journal, and where the search stood."""

    reason: StopReason | None
    path: Path
    standing: tuple[Any, ...]
    spent: float


def play(plan: Plan, folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
    """Carry a schedule out, and check all that must hold.

    Raises:
        AssertionError: It does not.
    """
    world = World(say)
    path = folder / "0" / "journal.sqlite"
    for number, (end, steps) in enumerate(plan.births):
        path = made(path, Trap(end, steps), random.Random(f"{plan.seed} birth {number}"), say)
    for number, (end, steps) in enumerate([*plan.ends, (None, None)]):
        rng = random.Random(f"{plan.seed} {number}")
        known = evaluated(path)
        assert world.recorded <= known, f"{sorted(world.recorded - known)} were recorded and are gone"
        world.measured = {trial: world.measured[trial] for trial in known}  # others may be proposed anew
        say(f"life {number}: {len(known)} trials are recorded")
        life = lived(plan, world, path, rng, known, Trap(end, steps))
        path = life.path
        if life.reason not in (None, "drained"):
            break
    check(plan, world, life)
    for number, (end, steps) in enumerate([*plan.exports, (None, None)] if plan.exports else []):
        export(life.path, Trap(end, steps), random.Random(f"{plan.seed} export {number}"), say)


def made(path: Path, trap: Trap, rng: random.Random, say: Callable[[str], None]) -> Path:
    """One attempt to make the journal. Returns where it is, or may be made."""
    if born(path):
        return path
    fresh = not path.parent.exists()
    try:
        with trapped(trap) as synced:
            Journal.create(path, [facts.NAME.note("simulated")]).close()
    except Killed:
        say(f"{trap.end} while the journal is made")
        folder = path.parent.with_name(str(int(path.parent.name) + 1))
        if path.parent.exists():
            left(path.parent, folder, synced, rng if trap.end == "power cut" else None)
        path = folder / path.name
    except (JournalError, KeyboardInterrupt) as error:
        say(f"{trap.end} while the journal is made: {error}")
        assert trap.sprung, "it is refused for nothing"
        told = "" if isinstance(error, KeyboardInterrupt) else error.remedy
        assert not told or told.startswith("Free some space, then"), told
        assert not (fresh and path.parent.exists()) or born(path), "something is left of a journal that was not made"
    if born(path):
        with Journal.open(path) as journal:
            assert journal.fact(facts.NAME) == "simulated"
    return path


def export(path: Path, trap: Trap, rng: random.Random, say: Callable[[str], None]) -> None:
    """Export the best member, and check what is there then."""
    with Journal.open(path) as journal:
        gone = journal.dense() - journal.kept()
        number = next((row.number for row in journal.rows() if not (row.failure or row.number in gone)), None)
        if number is None:
            return
        found = journal.trial(number).genome
    genome = Genome(found.boundaries, found.coefficients, residual=found.residual)  # the operator has no parameters
    folder = path.parent / "exports"
    folder.mkdir(exist_ok=True)
    target, models = folder / "member.safetensors", sources()
    try:
        with trapped(trap):
            export_file(models, genome, target, {"member": number})
    except Killed:
        say(f"{trap.end} while member {number} is exported")
    except (EcotoneError, KeyboardInterrupt) as error:
        say(f"{trap.end} while member {number} is exported: {error}")
        assert trap.sprung, "it is refused for nothing"
    if trap.end is None:
        assert target.exists(), "an export that nothing disturbed is not there"
    if target.exists():
        weights = np.concatenate([tensor.ravel() for _, tensor in sorted(load_file(target).items())])
        dense = np.zeros(len(weights), np.float32) if genome.residual is None else genome.residual
        wanted = genome.refined(np.arange(len(weights) + 1)) * VECTORS.T
        np.testing.assert_allclose(weights, wanted.sum(axis=1) + dense, atol=1e-5)
        target.unlink()


@functools.cache
def sources() -> Sources:
    """Models whose weights are those of ``SPACE``."""
    folder = Path(tempfile.mkdtemp(dir=memory()))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, vector in zip(SPACE.sources, VECTORS, strict=True):
        borders = SPACE.tensor_borders
        tensors = {one: vector[a:b] for one, a, b in zip(SPACE.tensors, borders[:-1], borders[1:], strict=True)}
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / f"{name}.safetensors")
    return Sources.open([folder / f"{name}.safetensors" for name in SPACE.sources])


def evaluated(path: Path) -> frozenset[int]:
    """Trials that a journal has results of; none when it is not there yet."""
    if not born(path):
        return frozenset()
    with Journal.open(path) as journal:
        return frozenset(number for number, _ in journal.evaluations())


def lived(plan: Plan, world: World, path: Path, rng: random.Random, known: frozenset[int], trap: Trap) -> Life:
    """One life of the driver."""
    clock = Clock(world, rng)
    pool = Workers(plan, world, clock, trap, rng, known)
    search, population = MAKERS[plan.kind](plan.search_seed)
    goals: Sequence[Goal] = getattr(population, "goals", None) or search.goals  # type: ignore[attr-defined]
    elapsed, waited = [0.0], world.waited

    def observe(progress: Progress) -> None:
        assert progress.elapsed >= elapsed[-1], "time runs back"
        elapsed.append(progress.elapsed)

    manager = begun(path, search, population, goals, pool, plan.schedule, observe=observe, clock=clock)
    journal, connection = manager.journal, manager.journal._connection
    connection.execute("PRAGMA synchronous=OFF")
    connection.execute(f"PRAGMA wal_autocheckpoint={plan.checkpoint}")
    trap.manager, journal._connection = manager, Wire(connection, trap)  # type: ignore[assignment]
    reason: StopReason | None = None
    try:
        reason = manager.run()
        world.say(f"{world.now:7.2f} s  it ended: {reason}")
    except Killed:
        world.say(f"{world.now:7.2f} s  {trap.end}")
        folder = path.parent.with_name(str(int(path.parent.name) + 1))
        path = world.disk.copied(path, folder, rng if trap.end == "power cut" else None)
        if trap.end == "power cut":
            world.recorded.clear()  # what was not synced may be gone
    except (JournalError, PoolError, KeyboardInterrupt) as error:
        world.say(f"{world.now:7.2f} s  {trap.end}: {error}")
        refusals = {"full disk": JournalError, "stranger": PoolError, "interrupt": KeyboardInterrupt}
        if not (trap.sprung and type(error) is refusals.get(trap.end or "")):
            raise
    finally:
        journal._connection = connection
        journal.close()
    if reason is not None:
        since = world.now if pool.drained is None else pool.drained
        assert world.now - since <= plan.schedule.grace + POLL * (2 + world.jumped), "it drains for too long"
        passed, slack = manager.progress.elapsed, POLL * world.jumped + 1e-6
        assert world.waited - waited - slack <= passed <= world.waited + slack, "it miscounts the seconds"
    return Life(reason, path, standing(manager), manager.progress.spent)


def standing(manager: Manager) -> tuple[Any, ...]:
    """Everything later decisions depend on."""
    progress = manager.progress
    members = [member.trial.number for member in manager.population.members]
    counts = progress.evaluations, progress.samples, progress.gradients, progress.failures, progress.spent
    return members, sorted(manager.front.numbers), progress.best, counts


# -- what must hold ------------------------------------------------------------------------------------------

Line: TypeAlias = tuple[int, str, tuple[tuple[str, float], ...], str | None]
"""Of an evaluated trial: its number, its genome's digest, its scores, its kind of failure."""


@dataclass(frozen=True)
class Ended:
    """How an undisturbed search ended."""

    reason: StopReason
    digest: str
    lines: list[Line]
    spent: float


def undisturbed(plan: Plan) -> Ended:
    """What the search of a plan does, in strict order, when nothing happens to it."""
    return _undisturbed(plan.kind, plan.search_seed, replace(plan.schedule, order="strict", seconds=None, grace=0.0))


@functools.cache
def _undisturbed(kind: str, search_seed: int, schedule: Schedule) -> Ended:
    with tempfile.TemporaryDirectory(dir=memory()) as directory:
        path = Path(directory) / "0" / "journal.sqlite"
        world, rng = World(lambda text: None), random.Random(0)
        life = lived(Plan(0, kind, search_seed, schedule), world, path, rng, frozenset(), Trap(None, None))
        assert life.reason is not None
        with Journal.open(path) as journal:
            return Ended(life.reason, journal.digest(), lines(journal), life.spent)


def lines(journal: Journal) -> list[Line]:
    return [
        (row.number, row.digest, tuple(sorted((row.scores or {}).items())), row.failure and row.failure.kind)
        for row in journal.rows(unscored=True)
    ]


def check(plan: Plan, world: World, life: Life) -> None:
    """Everything that must hold when the search has ended."""
    assert life.reason is not None
    schedule = plan.schedule
    sound(life.path)
    with Journal.open(life.path) as journal:
        found, digest = lines(journal), journal.digest()
        told = [event.batch for event in journal.events() if event.kind == "tell"]
    for number, _, scores, failure in found:
        measured = world.measured[number]
        assert dict(scores) == dict(measured.scores), f"trial {number} has the scores of another"
        assert failure == (measured.failure and measured.failure.kind)
    whole = undisturbed(plan)
    if life.reason == "seconds":
        assert schedule.seconds is not None
        assert world.waited + POLL * world.jumped >= schedule.seconds, "it ended before its time"
    elif schedule.order == "arrival":
        assert life.reason == "evaluations" or whole.reason == "converged"
        most = schedule.batch if "raced" in plan.kind else 1e-6
        assert life.reason != "evaluations" or 0 <= life.spent - (schedule.evaluations or 0) + 1e-6 < most + 1e-6
    else:
        assert (life.reason, digest, life.spent) == (whole.reason, whole.digest, whole.spent), "it is another search"
    if schedule.order == "strict":
        assert told == sorted(told)
        assert found == whole.lines[: len(found)], "it is another search"
    replayed = lived(
        replace(plan, jumps=0.0), world, life.path, random.Random(0), frozenset(world.measured), Trap(None, None)
    )
    assert (replayed.reason, replayed.standing) == (life.reason, life.standing), "its journal replays to another"


def sound(path: Path) -> None:
    """The database is whole, and every trial asked for, evaluated and told once."""
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    asked = connection.execute("SELECT number, batch FROM trials ORDER BY number").fetchall()
    answered = [number for (number,) in connection.execute("SELECT number FROM evaluations ORDER BY number")]
    events = connection.execute("SELECT kind, batch FROM events ORDER BY seq").fetchall()
    connection.close()
    assert [number for number, _ in asked] == answered == list(range(len(asked)))
    batches = sorted({batch for _, batch in asked})
    assert [batch for kind, batch in events if kind == "ask"] == batches == list(range(len(batches)))
    assert sorted(batch for kind, batch in events if kind == "tell") == batches
    assert all(events.index(("ask", batch)) < events.index(("tell", batch)) for batch in batches)


# -- the program ---------------------------------------------------------------------------------------------


def memory() -> str | None:
    """A folder in main memory, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def quiet() -> None:
    """Keep the manager's warnings off the screen."""
    logging.getLogger("ecotone").addHandler(logging.NullHandler())


def failed(seed: int, say: Callable[[str], None] = lambda text: None) -> str | None:
    """What went wrong in a schedule, and how to see it again; None if nothing did."""
    plan = Plan.of(seed)
    try:
        with tempfile.TemporaryDirectory(dir=memory()) as folder:
            play(plan, Path(folder), say)
    except Exception:
        return f"{plan}\n{traceback.format_exc()}again: python tests/simulation.py --seed {seed}\n"
    return None


def failures(seeds: Iterable[int], processes: int = 1) -> Iterator[str]:
    """What went wrong in schedules, as soon as it is known."""
    if processes == 1:
        yield from filter(None, map(failed, seeds))
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), quiet) as pool:
        yield from filter(None, pool.map(failed, seeds, chunksize=20))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", type=int, default=10_000, help="how many (default 10,000)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first (default 0)")
    parser.add_argument("--seed", type=int, help="this one alone, told step by step")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="(default: one a core)")
    arguments = parser.parse_args()
    quiet()
    if arguments.seed is not None:
        print(Plan.of(arguments.seed))
        text = failed(arguments.seed, print)
        print(text or "All that must hold holds.")
        return int(text is not None)
    began, count = time.perf_counter(), 0
    for text in failures(range(arguments.first, arguments.first + arguments.schedules), arguments.processes):
        count += 1
        print(text, flush=True)
    print(f"{arguments.schedules} schedules, {count} failed, {time.perf_counter() - began:.0f} s")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
