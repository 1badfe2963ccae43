"""How many workers the manager keeps busy, and what it costs: evaluations are simulated, all else is real.

    python benchmarks/scale.py                    # all of it: ten minutes of a core, half a gigabyte of disk
    python benchmarks/scale.py --quick            # 8 and 32 workers, 3,000 trials, half a minute
    python benchmarks/scale.py --only utilisation

An evaluation takes lognormal seconds of mean 1 whose 95th percentile is ``--spread`` (4) times the 5th: nine in
ten take 0.46 to 1.83 s, one in a thousand more than 3.4 s. They pass on a clock of their own: it takes in the CPU
seconds that the manager spends, and leaps over its waits. A worker takes the next batch that was submitted as soon as
it is free.

- ``utilisation``: the share of the workers' time in which they evaluate, from the start until the last trial is asked
  for, ``--rounds`` (100) a worker, one trial a batch; by workers, order, and how many trials are in flight a worker.
- ``cost``: with 1,000 workers and 2,000 in flight, CPU milliseconds of the manager a trial over 100,000 trials (what it
  asks, tells and writes; the pool's share is left out), those late in the run (after 70 to 90 % of it), proposals a
  second, how busy that keeps the workers, resident memory and what the run added to it, the journal's megabytes, and
  CPU seconds and memory to replay it. Each in a process of its own; of a model of 32 blocks of 9 tensors and 4
  experts, two objectives of 100 right-or-wrong examples each. ``random`` and ``nsga2`` have a coefficient a block and
  expert, ``m2n2`` splits between tensors (an archive of 20).

Writes ``benchmarks/results/scale.json``.
"""

from __future__ import annotations

import argparse
import heapq
import math
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, TypeAlias

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent))
from materialise import save

from ecotone.fitness.pools import Batch, Completed
from ecotone.populations.gram import GramTable
from ecotone.populations.journal import Journal
from ecotone.populations.niches import NicheArchive
from ecotone.populations.population import ElitistArchive, Population
from ecotone.populations.space import Space
from ecotone.populations.trial import Evaluation, Goal, Trial
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.m2n2 import M2N2, M2N2Settings
from ecotone.search.manager import Manager, Progress, Schedule
from ecotone.search.nsga import Nsga
from ecotone.search.protocol import Search
from ecotone.search.random_search import RandomSearch

BLOCKS, TENSORS, EXPERTS, EXAMPLES = 32, 9, 4, 100
GOALS = (Goal("first"), Goal("second"))
Order: TypeAlias = Literal["strict", "arrival"]
LATE = (0.7, 0.9)  # of the trials: between them costs late in a run are taken
ORDERS: tuple[Order, Order] = ("strict", "arrival")
KINDS = ("random", "m2n2", "nsga2")


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    rows: list[dict[str, Any]] = []
    if arguments.only in (None, "utilisation"):
        rows += utilisation(arguments)
    if arguments.only in (None, "cost"):
        rows += costs(arguments)
    save(f"scale{'-quick' if arguments.quick else ''}", arguments, rows)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["utilisation", "cost"], help="one part of it")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 8, 32, 128], help="(default 2 8 32 128)")
    parser.add_argument("--in-flight", type=float, nargs="+", default=[1, 1.5, 2, 3, 4], help="a worker")
    parser.add_argument("--rounds", type=int, default=100, help="evaluations a worker (default 100)")
    parser.add_argument("--spread", type=float, default=4.0, help="95th percentile over the 5th (default 4)")
    parser.add_argument("--searches", nargs="+", choices=KINDS, default=list(KINDS), help="whose cost is measured")
    parser.add_argument("--many", type=int, default=1000, help="workers when cost is measured (default 1000)")
    parser.add_argument("--trials", type=int, default=100_000, help="then (default 100,000)")
    parser.add_argument("--directory", help="where to write journals (default: the temporary directory)")
    parser.add_argument("--quick", action="store_true", help="8 and 32 workers, 3,000 trials")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.workers, arguments.rounds, arguments.trials, arguments.many = [8, 32], 30, 3000, 100
    return arguments


# -- workers -------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass while the manager computes, and leap when it waits."""

    def __init__(self) -> None:
        self._now, self._mark = 0.0, time.process_time()

    def __call__(self) -> float:
        """Now; what the process has computed since the last call is in it."""
        mark = time.process_time()
        self._now, self._mark = self._now + mark - self._mark, mark
        return self._now

    def leap(self, to: float) -> None:
        """Go on at ``to``, if that is later; what was computed since the last call is not in it."""
        self._now, self._mark = max(self._now, to), time.process_time()


class Simulated:
    """Workers that take lognormal seconds for a trial and give invented scores.

    Args:
        workers: How many.
        spread: 95th percentile of their seconds over the 5th; the mean is 1.
    """

    def __init__(self, workers: int, spread: float) -> None:
        self.slots = workers
        self.clock = Clock()
        self.own = 0.0  # CPU seconds spent here
        self.utilisation = 0.0  # until the last batch was submitted
        self._sigma = math.log(spread) / (2 * NormalDist().inv_cdf(0.95))
        self._rng = np.random.default_rng(0)
        self._todo: deque[Batch] = deque()
        self._working: list[tuple[float, int, Batch]] = []  # a heap by when it is done
        self._ends = self._begun = 0.0  # sum of when they are done, and of all seconds that began
        self._finished: list[Batch] = []

    def start(self) -> Space:
        """The invented space."""
        return SPACE

    def submit(self, batch: Batch) -> None:
        """Queue a batch; it begins now if a worker is free."""
        began, now = time.process_time(), self.clock()
        self._until(now)
        self._todo.append(batch)
        if len(self._working) < self.slots:
            self._begin(now)
        busy = self._begun - (self._ends - len(self._working) * now)
        self.utilisation = busy / (self.slots * now) if now else 0.0
        self._leave(began, now)

    def completed(self, timeout: float | None = None) -> Completed:
        """What is done by now, or else when something is."""
        began, now = time.process_time(), self.clock()
        self._until(now)
        if not self._finished:
            now = min(self._working[0][0], math.inf if timeout is None else now + timeout)
            self._until(now)
        finished, self._finished = self._finished, []
        found = [(batch, [invented(trial) for trial in batch.trials]) for batch in finished]
        self._leave(began, now)
        return found

    def close(self) -> None:
        """Nothing to stop."""

    def __enter__(self) -> Simulated:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to stop."""

    def _until(self, now: float) -> None:
        """Let pass what is done by ``now``; who is done takes the next batch at once."""
        while self._working and self._working[0][0] <= now:
            at, _, batch = heapq.heappop(self._working)
            self._ends -= at
            self._finished.append(batch)
            if self._todo:
                self._begin(at)

    def _begin(self, now: float) -> None:
        batch = self._todo.popleft()
        seconds = float(self._rng.lognormal(-(self._sigma**2) / 2, self._sigma, len(batch.trials)).sum())
        heapq.heappush(self._working, (now + seconds, batch.number, batch))
        self._ends += now + seconds
        self._begun += seconds

    def _leave(self, began: float, now: float) -> None:
        self.own += time.process_time() - began
        self.clock.leap(now)


# -- searches ------------------------------------------------------------------------------------------------


def space() -> Space:
    """Blocks of tensors of different sizes, and experts with invented inner products."""
    rng = np.random.default_rng(0)
    borders = np.concatenate([[0], np.cumsum(rng.integers(1000, 100_000, BLOCKS * TENSORS))])
    roots = rng.standard_normal((BLOCKS * TENSORS, EXPERTS, EXPERTS))
    names = tuple(f"expert {i}" for i in range(EXPERTS))
    return Space(
        names,
        tuple(f"tensor {i}" for i in range(BLOCKS * TENSORS)),
        borders,
        tuple(f"block {i}" for i in range(BLOCKS)),
        borders[::TENSORS],
        GramTable.from_regions(borders, roots @ roots.transpose(0, 2, 1)),
        np.eye(EXPERTS),
        names,
    )


SPACE = space()
PROBES = np.random.default_rng(1).standard_normal((2, EXAMPLES, EXPERTS))


def invented(trial: Trial) -> Evaluation:
    """Examples that are right or wrong by where the experts' mean coefficients lie."""
    genome = trial.genome
    mean = np.diff(genome.boundaries) @ genome.coefficients / genome.size
    right = {goal.name: probes @ mean > 0.4 for goal, probes in zip(GOALS, PROBES, strict=True)}
    return Evaluation(
        {name: float(each.mean()) for name, each in right.items()}, right, seconds=1.0, items=2 * EXAMPLES
    )


def made(kind: str) -> tuple[Search, Population]:
    box = CoefficientBox.of(SPACE, "block", 0.0, 1.0)
    if kind == "random":
        return RandomSearch(box, 0), ElitistArchive(GOALS)
    if kind == "nsga2":
        return Nsga(box, GOALS, 0), ElitistArchive(GOALS)
    archive = NicheArchive(GOALS)
    return M2N2(SPACE, archive, M2N2Settings(granularity="tensor"), 0), archive


# -- utilisation ---------------------------------------------------------------------------------------------


def utilisation(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for workers, order and trials in flight a worker."""
    print(f"{'utilisation':12}{'workers':>8}{'in flight':>10}{'strict':>9}{'arrival':>9}")
    rows = []
    for workers in arguments.workers:
        for share in arguments.in_flight:
            found = {order: used(workers, round(share * workers), order, arguments) for order in ORDERS}
            rows.append({"part": "utilisation", "workers": workers, "in_flight": round(share * workers), **found})
            print(
                f"{'':12}{workers:>8}{round(share * workers):>10}{found['strict']:>9.1%}{found['arrival']:>9.1%}",
                flush=True,
            )
    return rows


def used(workers: int, in_flight: int, order: Order, arguments: argparse.Namespace) -> float:
    pool = Simulated(workers, arguments.spread)
    schedule = Schedule(evaluations=workers * arguments.rounds, in_flight=in_flight, order=order)
    with (
        tempfile.TemporaryDirectory(dir=arguments.directory) as directory,
        Journal.create(Path(directory) / "journal.sqlite") as journal,
    ):
        Manager(*made("random"), GOALS, pool, journal, schedule, clock=pool.clock).run()
    return pool.utilisation


# -- cost ----------------------------------------------------------------------------------------------------


def costs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a search and order."""
    print(
        f"{'cost':12}{'order':>8}{'ms a trial':>11}{'late':>8}{'a second':>10}{'used':>7}{'MB':>6}{'added':>7}"
        f"{'journal':>9}{'replay s':>9}{'MB':>6}"
    )
    rows = []
    for kind in arguments.searches:
        for order in ORDERS:
            with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
                row = {"part": "cost", "search": kind, "order": order}
                for step in (carried_out, replayed):
                    with ProcessPoolExecutor(1, get_context("spawn")) as process:
                        row |= process.submit(step, kind, order, Path(directory), arguments).result()
            rows.append(row)
            print(
                f"{kind:12}{order:>8}{row['ms']:>11.3f}{row['late_ms']:>8.3f}{1000 / row['ms']:>10.0f}"
                f"{row['utilisation']:>7.1%}{row['resident_mb']:>6.0f}{row['added_mb']:>7.0f}{row['journal_mb']:>9.0f}"
                f"{row['replay_seconds']:>9.1f}{row['replay_mb']:>6.0f}",
                flush=True,
            )
    return rows


def carried_out(kind: str, order: Order, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A search from its beginning, in a process of its own."""
    pool, before = Simulated(arguments.many, arguments.spread), resident()
    schedule = Schedule(evaluations=arguments.trials, in_flight=2 * arguments.many, order=order)
    marks: list[tuple[int, float]] = []  # trials told and CPU seconds, at the shares of ``LATE``

    def observe(progress: Progress) -> None:
        if len(marks) < len(LATE) and progress.told >= LATE[len(marks)] * arguments.trials:
            marks.append((progress.told, time.process_time() - pool.own))

    file = directory / "journal.sqlite"
    with Journal.create(file) as journal:
        began = time.process_time()
        Manager(*made(kind), GOALS, pool, journal, schedule, observe, pool.clock).run()
        spent = time.process_time() - pool.own
        after = resident()
    (first, then), (last, at) = marks
    return {
        "ms": 1000 * (spent - began) / arguments.trials,
        "late_ms": 1000 * (at - then) / max(1, last - first),
        "utilisation": pool.utilisation,
        "resident_mb": after,
        "added_mb": after - before,
        "journal_mb": file.stat().st_size / 1e6,
    }


def replayed(kind: str, order: Order, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The finished search resumed, in a process of its own."""
    pool = Simulated(arguments.many, arguments.spread)
    schedule = Schedule(evaluations=arguments.trials, in_flight=2 * arguments.many, order=order)
    with Journal.open(directory / "journal.sqlite", write=True) as journal:
        began = time.process_time()
        manager = Manager(*made(kind), GOALS, pool, journal, schedule)
        manager.run()
        seconds = time.process_time() - began
    if manager.progress.replayed != arguments.trials:
        raise RuntimeError(f"expected {arguments.trials} trials replayed, found {manager.progress.replayed}")
    return {"replay_seconds": seconds, "replay_mb": resident()}


def resident() -> float:
    """Megabytes of main memory that this process holds."""
    return float(psutil.Process().memory_info().rss / 1e6)


if __name__ == "__main__":
    main()
