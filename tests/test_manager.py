"""The manager's loop with simulated workers that delay and reorder, and crashes at every step."""

from __future__ import annotations

import inspect
import logging
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from managing import begun, ended, of_sample
from numpy.typing import NDArray

from ecotone.fitness.pools import Batch, Completed
from ecotone.populations import facts
from ecotone.populations.errors import JournalError, PoolError, SearchError
from ecotone.populations.genome import Genome
from ecotone.populations.gram import GramTable
from ecotone.populations.journal import Journal
from ecotone.populations.niches import NicheArchive
from ecotone.populations.pareto import ParetoFront
from ecotone.populations.population import ElitistArchive, Population
from ecotone.populations.space import Space
from ecotone.populations.trial import Evaluation, Goal, Scores, Trial, oriented
from ecotone.search.cma_es import CmaEs, CmaEsSettings
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.m2n2 import M2N2, M2N2Settings
from ecotone.search.manager import POLL, Manager, Progress, Schedule, measure
from ecotone.search.nsga import Nsga, NsgaSettings
from ecotone.search.protocol import Search
from ecotone.search.racing import RaceSettings, Racing
from ecotone.search.random_search import RandomSearch
from ecotone.search.stages import Stage, StagedSearch

SIZE = 20
GOALS = (Goal("first"), Goal("second"))
VECTORS = np.random.default_rng(1).standard_normal((2, SIZE)).astype(np.float32)
PROBES = np.random.default_rng(2).standard_normal((12, SIZE))
NAMES = ("a", "b")
SPACE = Space(
    NAMES,
    ("t",),
    np.array([0, SIZE]),
    ("t",),
    np.array([0, SIZE]),
    GramTable.from_vectors(VECTORS),
    np.eye(2),
    NAMES,
    VECTORS,
)
BOX = CoefficientBox.of(SPACE, "model", -1.0, 1.0)
Score = Callable[[Trial], Evaluation]


def expanded(genome: Genome) -> NDArray[np.float64]:
    if genome.residual is not None:
        return genome.residual.astype(np.float64)
    return (np.repeat(genome.coefficients, np.diff(genome.boundaries), axis=0) * VECTORS.T).sum(axis=1)


def scored(trial: Trial) -> Evaluation:
    """Two coarse accuracies, so that ties are common."""
    right = PROBES @ expanded(trial.genome) > 0.5
    halves = {"first": right[:6], "second": right[6:]}
    return of_sample(trial, Evaluation({name: float(half.mean()) for name, half in halves.items()}, halves))


def sometimes(trial: Trial) -> Evaluation:
    """Every fifth candidate fails, in turn as each kind of failure; seeds do not."""
    if trial.number % 5 == 4:
        kind = ("not finite", "exception", "out of memory", "worker died")[trial.number // 5 % 4]
        return Evaluation.failed(kind, "no")
    return scored(trial)


class Crash(BaseException):
    """A kill -9, as far as one process can have it."""


class Simulated:
    """A pool whose batches come back late, several at once and out of order, as ``schedule`` draws it.

    Args:
        schedule: Seed of the delays; None is a pool that answers at once and in order.
        score: What a trial scores.
        crash: Raise ``Crash`` when so many batches have been delivered or submitted.
    """

    slots = 3

    def __init__(self, schedule: int | None = None, score: Score = scored, crash: int | None = None) -> None:
        self._random = None if schedule is None else random.Random(schedule)
        self._score, self._steps = score, crash
        self._flying: list[Batch] = []
        self.submitted: list[int] = []
        self.most = 0

    def start(self) -> Space:
        return SPACE

    def _step(self) -> None:
        if self._steps is not None:
            self._steps -= 1
            if self._steps < 0:
                raise Crash

    def submit(self, batch: Batch) -> None:
        self._step()
        self.submitted += [trial.number for trial in batch.trials]
        self._flying.append(batch)
        self.most = max(self.most, sum(len(b.trials) for b in self._flying))

    def completed(self, timeout: float | None = None) -> Completed:
        self._step()
        if not self._flying:
            return []
        if self._random is None:
            ready = [self._flying.pop(0)]
        else:
            ready = self._random.sample(self._flying, self._random.randint(1, len(self._flying)))
            self._flying = [batch for batch in self._flying if batch not in ready]
        return [(batch, [self._score(trial) for trial in batch.trials]) for batch in ready]

    def close(self) -> None:
        self._flying = []

    def __enter__(self) -> Simulated:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def m2n2(**settings: Any) -> tuple[Search, Population]:
    archive = NicheArchive(GOALS, 5)
    return M2N2(SPACE, archive, M2N2Settings(**settings), 3), archive


def stages() -> tuple[Search, Population]:
    """NSGA-II, then M2N2 from its front, then CMA-ES from the best of that."""

    def first(starts: Sequence[Genome]) -> tuple[Search, Population]:
        return Nsga(BOX, GOALS, 3, NsgaSettings(population=6), np.eye(2)), ElitistArchive(GOALS, 5)

    def second(starts: Sequence[Genome]) -> tuple[Search, Population]:
        archive = NicheArchive(GOALS, 5)
        return M2N2(SPACE, archive, M2N2Settings(), 4, starts), archive

    def third(starts: Sequence[Genome]) -> tuple[Search, Population]:
        box = CoefficientBox(starts[0].boundaries, 2, -1.0, 1.0)
        return CmaEs(box, GOALS, 5, start=box.point(starts[0])), ElitistArchive(GOALS, 5)

    chain = [Stage("nsga2", first, 22), Stage("m2n2", second, 31, "front"), Stage("cma_es", third, None, "best")]
    search = StagedSearch(chain, GOALS)
    return search, search.population


def raced() -> tuple[Search, Population]:
    """M2N2 whose children race in groups of four, on a third and on two thirds of the examples."""
    archive = NicheArchive(GOALS, 5)
    race = RaceSettings(fidelities=(0.34, 0.67), eta=2.0, group=4, slices=1)
    limits = {goal.name: (0.0, 1.0) for goal in GOALS}
    return Racing(M2N2(SPACE, archive, M2N2Settings(), 3), archive, GOALS, 3, race, limits, whole=2), archive


SEARCHES: dict[str, Callable[[], tuple[Search, Population]]] = {
    "m2n2": m2n2,
    "m2n2-dense": lambda: m2n2(mutation=0.1),
    "random": lambda: (RandomSearch(BOX, 3), ElitistArchive(GOALS, 5)),
    "cma_es": lambda: (CmaEs(BOX, GOALS, 3), ElitistArchive(GOALS, 5)),
    "sep_cma_es": lambda: (
        CmaEs(BOX, GOALS, 3, CmaEsSettings(algorithm="sep_cma_es")),
        ElitistArchive(GOALS, 5),
    ),
    "nsga2": lambda: (Nsga(BOX, GOALS, 3, NsgaSettings(population=6), np.eye(2)), ElitistArchive(GOALS, 5)),
    "nsga3": lambda: (
        Nsga(BOX, GOALS, 3, NsgaSettings(algorithm="nsga3", population=6)),
        ElitistArchive(GOALS, 5),
    ),
    "stages": stages,
    "raced": raced,
}
STRICT = Schedule(evaluations=83, batch=3, in_flight=9)
ARRIVAL = Schedule(evaluations=83, batch=3, in_flight=9, order="arrival")


def managed(kind: str, path: Path, pool: Simulated, schedule: Schedule = STRICT, **others: Any) -> Manager:
    """A manager of a new or existing journal; close its journal after use."""
    return begun(path, *SEARCHES[kind](), GOALS, pool, schedule, **others)


def carried_out(kind: str, path: Path, pool: Simulated, schedule: Schedule = STRICT, **others: Any) -> Manager:
    manager = managed(kind, path, pool, schedule, **others)
    ended(manager)
    return manager


def digest(path: Path) -> str:
    with Journal.open(path) as journal:
        return journal.digest()


def standing(manager: Manager) -> tuple[Any, ...]:
    """Everything later decisions depend on."""
    progress = manager.progress
    return (
        [member.trial.number for member in manager.population.members],
        sorted(manager.front.numbers),
        progress.evaluations,
        progress.failures,
        progress.best,
        progress.best_scores,
    )


every_search = pytest.mark.parametrize("kind", SEARCHES)


# -- order ---------------------------------------------------------------------------------------------------


@every_search
def test_strict_order_does_not_depend_on_the_schedule(kind: str, tmp_path: Path) -> None:
    plain = carried_out(kind, tmp_path / "plain" / "j.sqlite", Simulated(score=sometimes))
    for schedule in range(4):
        path = tmp_path / str(schedule) / "j.sqlite"
        manager = carried_out(kind, path, Simulated(schedule, sometimes))
        assert digest(path) == digest(tmp_path / "plain" / "j.sqlite")
        assert standing(manager) == standing(plain)
        with Journal.open(path) as journal:
            told = [event.batch for event in journal.events() if event.kind == "tell"]
            assert told == sorted(told)


@every_search
def test_arrival_order_is_recorded_and_replays_to_the_same_state(kind: str, tmp_path: Path) -> None:
    digests = set()
    for schedule in range(3):
        path = tmp_path / str(schedule) / "j.sqlite"
        first = carried_out(kind, path, Simulated(schedule, sometimes), ARRIVAL)
        digests.add(digest(path))
        with Journal.open(path) as journal:
            told = [event.batch for event in journal.events() if event.kind == "tell"]
        assert sorted(told) == list(range(len(told)))
        assert told != sorted(told)
        idle = Simulated()
        again = carried_out(kind, path, idle, ARRIVAL)
        assert standing(again) == standing(first)
        assert again.progress.replayed == first.progress.told
        assert 83 <= first.progress.spent < 84
        assert idle.submitted == []
    if kind.startswith("m2n2"):
        assert len(digests) > 1  # it did learn in another order


@every_search
@pytest.mark.parametrize("schedule", [STRICT, ARRIVAL], ids=["strict", "arrival"])
def test_the_front_of_the_manager_is_that_of_reports(kind: str, schedule: Schedule, tmp_path: Path) -> None:
    """Reports read the journal by number; every member of that front can be exported."""
    for seed in range(3):
        path = tmp_path / str(seed) / "j.sqlite"
        manager = carried_out(kind, path, Simulated(seed), schedule)
        assert sorted(manager.front.numbers) == exportable_front(path)
        with Journal.open(path) as journal:
            rows = [row for row in journal.rows() if row.scores]
            best = max(rows, key=lambda row: oriented(row.scores or {}, GOALS).mean())
        assert manager.progress.best == best.number


def exportable_front(path: Path) -> list[int]:
    with Journal.open(path) as journal:
        front = ParetoFront(GOALS)
        for row in journal.rows():
            if row.scores:
                front.add(row.number, oriented(row.scores, GOALS))
        for number in front.numbers:
            assert scored(journal.trial(number)) == EqualScores(journal.evaluation(number))
        return sorted(front.numbers)


class EqualScores:
    def __init__(self, evaluation: Evaluation | None) -> None:
        self.scores = None if evaluation is None else evaluation.scores

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Evaluation) and dict(other.scores) == self.scores

    __hash__ = None  # type: ignore[assignment]


# -- budget and flow -----------------------------------------------------------------------------------------


@every_search
@pytest.mark.parametrize("evaluations", [1, 2, 3, 50])
def test_the_budget_is_met_exactly(kind: str, evaluations: int, tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    pool = Simulated(0)
    manager = managed(kind, path, pool, Schedule(evaluations=evaluations, batch=4, in_flight=8))
    with manager.journal:
        assert manager.run() == "evaluations"
    assert sorted(pool.submitted) == list(range(manager.progress.told))
    if kind == "raced":  # what is left of the budget may be less than what the last batch takes
        assert evaluations <= manager.progress.spent + 1e-6 < evaluations + 4
        return
    assert manager.progress.told == manager.progress.evaluations == evaluations
    with Journal.open(path) as journal:
        sizes = [len(batch) for batch in journal.batches()]
        assert sum(sizes) == evaluations
        assert max(sizes) <= 4


@pytest.mark.parametrize("order", ["strict", "arrival"])
@pytest.mark.parametrize(("batch", "window"), [(1, 1), (1, 4), (3, 3), (3, 7), (4, 12)])
def test_no_more_is_in_flight_than_allowed_and_no_less_than_possible(
    order: Any, batch: int, window: int, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    pool = Simulated(1)
    schedule = Schedule(evaluations=60, batch=batch, in_flight=window, order=order)
    carried_out(
        "random", tmp_path / "j.sqlite", pool, schedule, observe=lambda p: seen.append(Progress(in_flight=p.in_flight))
    )
    assert max(p.in_flight for p in seen) == window // batch * batch
    assert pool.most == window // batch * batch
    assert seen[-1].in_flight == 0


def test_a_budget_of_seconds_stops_asking_and_tells_the_rest(tmp_path: Path) -> None:
    now = iter(range(10_000))
    schedule = Schedule(seconds=20.0, batch=2, in_flight=6)
    manager = managed("m2n2", tmp_path / "j.sqlite", Simulated(0), schedule, clock=lambda: float(next(now)))
    with manager.journal:
        assert manager.run() == "seconds"
        told = [event for event in manager.journal.events() if event.kind == "tell"]
        asked = [event for event in manager.journal.events() if event.kind == "ask"]
        assert len(told) == len(asked) > 5
        assert (manager.journal.fact(facts.ELAPSED) or 0) >= 20.0
    # Resumed, the seconds of the first stretch count.
    idle = Simulated()
    later = managed("m2n2", tmp_path / "j.sqlite", idle, schedule, clock=lambda: 0.0)
    with later.journal:
        assert later.run() == "seconds"
    assert idle.submitted == []
    more = Simulated(0)
    longer = managed("m2n2", tmp_path / "j.sqlite", more, Schedule(seconds=40.0, batch=2, in_flight=6))
    longer._clock = lambda: float(next(now))
    with longer.journal:
        longer.run()
    assert more.submitted
    assert min(more.submitted) == 2 * len(asked)


class Ticking(Simulated):
    """Every wait takes the next of ``seconds`` on the clock, 0.5 s when there are no more of them."""

    def __init__(self, *seconds: float) -> None:
        super().__init__()
        self.now, self._seconds = 1000.0, list(seconds)

    def clock(self) -> float:
        return self.now

    def completed(self, timeout: float | None = None) -> Completed:
        self.now += self._seconds.pop(0) if self._seconds else 0.5
        return super().completed(timeout)


@pytest.mark.parametrize(
    ("evaluations", "seconds", "reason", "told"),
    [(20, 100.0, "evaluations", 20), (200, 5.0, "seconds", 12), (20, 4.5, "seconds", 11), (20, 8.6, "evaluations", 20)],
)
def test_of_two_budgets_the_one_that_is_spent_first_ends_it(
    evaluations: int, seconds: float, reason: str, told: int, tmp_path: Path
) -> None:
    """A trial takes half a second; the last two are asked for before the time is up."""
    pool = Ticking()
    schedule = Schedule(evaluations=evaluations, seconds=seconds, in_flight=3)
    manager = managed("random", tmp_path / "j.sqlite", pool, schedule, clock=pool.clock)
    assert ended(manager) == reason
    assert manager.progress.evaluations == told


def test_a_search_that_converges_ends_the_run(tmp_path: Path) -> None:
    manager = managed("cma_es", tmp_path / "j.sqlite", Simulated(), Schedule(evaluations=10**6, batch=50, in_flight=50))
    with manager.journal:
        assert manager.run() == "converged"
    assert manager.progress.evaluations < 10**5


def test_the_observer_is_told_how_things_stand(tmp_path: Path) -> None:
    counts: list[tuple[int, int]] = []
    manager = carried_out(
        "m2n2",
        tmp_path / "j.sqlite",
        Simulated(0, sometimes),
        observe=lambda p: counts.append((p.evaluations, p.failures)),
    )
    assert counts == sorted(counts)
    assert counts[-1] == (83, 16)
    progress = manager.progress
    assert progress.last_failure is not None
    assert progress.front_size == len(manager.front.numbers)
    assert progress.best in manager.front.numbers
    assert progress.quality == pytest.approx(np.mean(list(progress.best_scores.values())))


# -- clocks --------------------------------------------------------------------------------------------------

HOURS = 3600.0


def test_the_clock_is_one_that_nobody_sets() -> None:
    assert inspect.signature(Manager).parameters["clock"].default is time.monotonic


@pytest.mark.parametrize("jumps", [(), (0.5, 9 * HOURS), (9 * HOURS,), (0.5, -9 * HOURS), (-9 * HOURS, 9 * HOURS, 0.5)])
def test_a_clock_that_jumps_neither_ends_a_budget_nor_prolongs_it(jumps: tuple[float, ...], tmp_path: Path) -> None:
    pool, seen = Ticking(*jumps), [0.0]
    manager = managed(
        "random",
        tmp_path / "j.sqlite",
        pool,
        Schedule(seconds=20.0),
        clock=pool.clock,
        observe=lambda progress: seen.append(progress.elapsed),
    )
    assert ended(manager) == "seconds"
    assert seen == sorted(seen)
    assert len(pool.submitted) == pytest.approx(40, abs=len(jumps))


def test_a_pool_that_works_in_the_wait_may_take_its_time(tmp_path: Path) -> None:
    """Hours that its results account for are no jump."""

    def slow(trial: Trial) -> Evaluation:
        return replace(scored(trial), seconds=2 * HOURS)

    pool = Ticking(*[2 * HOURS] * 9)
    pool._score = slow
    manager = managed("random", tmp_path / "j.sqlite", pool, Schedule(seconds=5 * HOURS), clock=pool.clock)
    assert ended(manager) == "seconds"
    assert len(pool.submitted) == 3


class Silent(Simulated):
    """Nothing ever comes back; each wait takes as long as it may."""

    def __init__(self, step: Callable[[int], None] = lambda waits: None) -> None:
        super().__init__()
        self.now, self.waits, self._step_taken = 0.0, 0, step

    def clock(self) -> float:
        return self.now

    def completed(self, timeout: float | None = None) -> Completed:
        assert timeout is not None
        assert timeout <= POLL
        self.now += timeout
        self.waits += 1
        self._step_taken(self.waits)
        return []


def test_time_that_passes_without_results_is_written_down(tmp_path: Path) -> None:
    """A driver that is killed while it waits for hours loses a minute of its budget's seconds."""

    def step(waits: int) -> None:
        if waits == 200:
            raise Crash

    pool = Silent(step)
    manager = managed("random", tmp_path / "j.sqlite", pool, clock=pool.clock)
    with manager.journal, pytest.raises(Crash):
        manager.run()
    with Journal.open(tmp_path / "j.sqlite") as journal:
        assert 120 < (journal.fact(facts.ELAPSED) or 0) <= 200


def test_the_observer_can_end_a_wait(tmp_path: Path) -> None:
    """As it does when the run's lease is lost."""

    def observe(progress: Progress) -> None:
        if progress.elapsed > 7:
            raise JournalError("somebody else writes it")

    pool = Silent()
    manager = managed("random", tmp_path / "j.sqlite", pool, clock=pool.clock, observe=observe)
    with pytest.raises(JournalError, match="somebody else"):
        ended(manager)
    assert pool.waits == 8


# -- draining ------------------------------------------------------------------------------------------------


def drained(kind: str, path: Path, pool: Simulated, after: int, schedule: Schedule = STRICT) -> Manager:
    """A manager that is drained after so many steps, and has ended."""
    steps = 0

    def observe(progress: Progress) -> None:
        nonlocal steps
        steps += 1
        if steps == after:
            manager.drain()

    manager = managed(kind, path, pool, schedule, observe=observe)
    assert ended(manager) == "drained"
    return manager


@every_search
@pytest.mark.parametrize("after", [1, 2, 7])
def test_a_drained_search_goes_on_as_if_nothing_had_been(kind: str, after: int, tmp_path: Path) -> None:
    whole = carried_out(kind, tmp_path / "whole" / "j.sqlite", Simulated(score=sometimes))
    path = tmp_path / "j.sqlite"
    first = Simulated(after, sometimes)
    manager = drained(kind, path, first, after)
    assert manager.progress.told < whole.progress.told
    with Journal.open(path) as journal:
        paid = [number for number, _ in journal.evaluations()]
    assert sorted(first.submitted) == paid == list(range(len(paid)))  # all that was in flight came back
    exportable_after(path)
    second = Simulated(after, sometimes)
    again = carried_out(kind, path, second)
    assert sorted([*paid, *second.submitted]) == list(range(whole.progress.told))
    assert standing(again) == standing(whole)
    assert digest(path) == digest(tmp_path / "whole" / "j.sqlite")


@pytest.mark.parametrize("grace", [0.0, 2.5, 30.0])
def test_draining_waits_for_the_grace_and_no_longer(grace: float, tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    pool = Silent(lambda waits: manager.drain() if waits == 5 else None)
    schedule = replace(STRICT, grace=grace)
    manager = managed("random", path, pool, schedule, clock=pool.clock)
    assert ended(manager) == "drained"
    assert pool.now == pytest.approx(5 + grace)
    with Journal.open(path) as journal:
        asked = [event for event in journal.events() if event.kind == "ask"]
        assert (journal.fact(facts.ELAPSED) or 0) == pytest.approx(5 + grace)
    assert len(asked) == 3
    second = Simulated()
    carried_out("random", path, second)
    assert second.submitted == list(range(83))  # what was in flight is asked for again, first


def test_a_clock_that_goes_back_does_not_prolong_the_grace(tmp_path: Path) -> None:
    def step(waits: int) -> None:
        if waits == 2:
            manager.drain()
        if waits == 4:
            pool.now -= HOURS

    pool = Silent(step)
    manager = managed("random", tmp_path / "j.sqlite", pool, replace(STRICT, grace=6.0), clock=pool.clock)
    assert ended(manager) == "drained"
    assert pool.waits == 2 + 6 + 1


def test_drained_before_it_began_it_asks_for_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "j.sqlite"
    pool = Simulated()
    manager = managed("m2n2", path, pool)
    manager.drain()
    with caplog.at_level(logging.INFO, "ecotone"):
        assert ended(manager) == "drained"
    assert [vars(record)["event"] for record in caplog.records] == ["draining"]  # told also when nothing is in flight
    assert pool.submitted == []
    assert carried_out("m2n2", path, Simulated()).progress.evaluations == 83


def test_drained_when_it_has_ended_it_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    carried_out("m2n2", path, Simulated())
    manager = managed("m2n2", path, Simulated())
    manager.drain()
    assert ended(manager) == "evaluations"


def test_drained_after_a_first_failure_it_does_not_blame_the_candidates(tmp_path: Path) -> None:
    pool = Simulated(score=lambda trial: Evaluation.failed("not finite", "NaN"))
    manager = drained("random", tmp_path / "j.sqlite", pool, 2, Schedule(evaluations=20))
    assert manager.progress.failures == 1


def test_a_signal_drains_while_the_pool_is_waited_for(tmp_path: Path) -> None:
    pool = Silent(lambda waits: os.kill(os.getpid(), signal.SIGUSR1) if waits == 3 else None)
    manager = managed("random", tmp_path / "j.sqlite", pool, replace(STRICT, grace=2.0), clock=pool.clock)
    before = signal.signal(signal.SIGUSR1, lambda *_: manager.drain())
    try:
        assert ended(manager) == "drained"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert pool.now == pytest.approx(5.0)


# -- events --------------------------------------------------------------------------------------------------


def test_events_are_logged_with_their_fields(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "ecotone"):
        carried_out("random", tmp_path / "j.sqlite", Simulated(score=sometimes), Schedule(evaluations=6, batch=3))
    records = [vars(record) for record in caplog.records]
    assert [record["event"] for record in records] == ["asked", "told", "asked", "trial_failed", "told"]
    assert [record["trials"] for record in records if record["event"] == "told"] == [[0, 1, 2], [3, 4, 5]]
    failed = records[3]
    assert (failed["trial"], failed["kind"], failed["levelname"]) == (4, "not finite", "INFO")
    caplog.clear()
    drained("random", tmp_path / "k.sqlite", Simulated(), 1)
    assert caplog.records == []  # nothing at WARNING
    with caplog.at_level(logging.INFO, "ecotone"):
        drained("random", tmp_path / "l.sqlite", Simulated(), 1)
    assert [(vars(one)["event"], vars(one)["batches"], vars(one)["grace"]) for one in caplog.records] == [
        ("draining", 3, 30.0)
    ]


# -- pools that are wrong ------------------------------------------------------------------------------------


class Altered(Simulated):
    """Gives what ``alter`` makes of each batch and its evaluations."""

    def __init__(self, alter: Callable[[Batch, list[Evaluation]], Completed]) -> None:
        super().__init__()
        self._alter = alter

    def completed(self, timeout: float | None = None) -> Completed:
        return [found for batch, evaluations in super().completed(timeout) for found in self._alter(batch, evaluations)]


@pytest.mark.parametrize("order", ["strict", "arrival"])
def test_a_batch_that_comes_twice_counts_once(order: Any, tmp_path: Path) -> None:
    whole = carried_out("m2n2", tmp_path / "whole" / "j.sqlite", Simulated())
    before: list[tuple[Batch, list[Evaluation]]] = []

    def again(batch: Batch, evaluations: list[Evaluation]) -> Completed:
        """This one twice, and all those before once more, with other scores."""
        others = [(old, [Evaluation({"first": 9.0, "second": 9.0}) for _ in found]) for old, found in before]
        before.append((batch, evaluations))
        return [(batch, evaluations), *others, (batch, [Evaluation.failed("exception", "late") for _ in evaluations])]

    path = tmp_path / "j.sqlite"
    manager = carried_out("m2n2", path, Altered(again), replace(STRICT, order=order))
    assert standing(manager) == standing(whole)
    assert digest(path) == digest(tmp_path / "whole" / "j.sqlite")


WRONG: dict[str, tuple[Callable[[Batch, list[Evaluation]], Completed], str]] = {
    "number": (
        lambda batch, found: [(Batch(batch.number + 900, batch.trials), found)],
        "found batch 900, which it was",
    ),
    "trials": (lambda batch, found: [(Batch(batch.number, batch.trials[::-1]), found)], "found batch 0, which it was"),
    "fewer": (lambda batch, found: [(batch, found[1:])], "batch 0: expected 3 evaluations, found 2"),
    "more": (lambda batch, found: [(batch, [*found, found[0]])], "batch 0: expected 3 evaluations, found 4"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_pool_was_not_asked_for_is_refused_and_not_written(wrong: str, tmp_path: Path) -> None:
    alter, text = WRONG[wrong]
    path = tmp_path / "j.sqlite"
    with pytest.raises(PoolError, match=text):
        carried_out("random", path, Altered(alter))
    with Journal.open(path) as journal:
        assert list(journal.evaluations()) == []
    second = Simulated()
    carried_out("random", path, second)
    assert second.submitted == list(range(83))


# -- failures ------------------------------------------------------------------------------------------------


@every_search
def test_first_candidates_that_all_fail_stop_the_search_with_the_cause(kind: str, tmp_path: Path) -> None:
    pool = Simulated(score=lambda trial: Evaluation.failed("exception", "ValueError: bad label", "Traceback ..."))
    match = r"all of the first \d+ candidates failed; the last one: exception: ValueError: bad label\nTraceback"
    with pytest.raises(SearchError, match=match):
        carried_out(kind, tmp_path / "j.sqlite", pool)
    assert len(pool.submitted) <= 8 + STRICT.batch + STRICT.in_flight


def test_a_short_search_that_failed_throughout_says_so(tmp_path: Path) -> None:
    pool = Simulated(score=lambda trial: Evaluation.failed("not finite", "NaN"))
    with pytest.raises(SearchError, match="all of the first 2 candidates failed; the last one: not finite: NaN"):
        carried_out("random", tmp_path / "j.sqlite", pool, Schedule(evaluations=2, batch=1, in_flight=1))


@every_search
def test_failures_are_results_once_something_worked(kind: str, tmp_path: Path) -> None:
    def score(trial: Trial) -> Evaluation:
        return scored(trial) if trial.number < 2 else Evaluation.failed("not finite", "NaN")

    manager = carried_out(kind, tmp_path / "j.sqlite", Simulated(0, score))
    assert manager.progress.failures == manager.progress.told - 2
    assert manager.progress.told == 83 or kind == "raced"
    assert {member.trial.number for member in manager.population.members} <= {0, 1}


def test_a_search_that_miscounts_is_refused(tmp_path: Path) -> None:
    manager = managed("random", tmp_path / "j.sqlite", Simulated())
    manager.search.ask(1)  # trial 0 is gone
    with manager.journal, pytest.raises(SearchError, match="expected trials numbered from 0, found 1"):
        manager.run()


# -- crashes -------------------------------------------------------------------------------------------------


@every_search
@pytest.mark.parametrize("schedule", [None, 5])
def test_crashed_anywhere_and_resumed_it_is_the_same_search(kind: str, schedule: int | None, tmp_path: Path) -> None:
    whole = carried_out(kind, tmp_path / "whole" / "j.sqlite", Simulated(score=sometimes))
    for crash in (0, 1, 3, 4, 9, 22, 33):
        path = tmp_path / f"crash-{crash}" / "j.sqlite"
        first = Simulated(schedule, sometimes, crash)
        with pytest.raises(Crash):
            carried_out(kind, path, first)
        with Journal.open(path) as journal:
            paid = [number for number, _ in journal.evaluations()]
        exportable_after(path)
        second = Simulated(schedule, sometimes)
        manager = carried_out(kind, path, second)
        assert not set(second.submitted) & set(paid)  # what was recorded on arrival is not asked for again
        assert sorted([*paid, *second.submitted]) == list(range(manager.progress.told))
        assert manager.progress.replayed == len(paid)
        assert standing(manager) == standing(whole)
        assert digest(path) == digest(tmp_path / "whole" / "j.sqlite")


def exportable_after(path: Path) -> None:
    """Without resuming: all that `front` and `export` of a killed run show must be there."""
    with Journal.open(path) as journal:
        front = ParetoFront(GOALS)
        for row in journal.rows():
            if row.scores and row.failure is None:
                front.add(row.number, oriented(row.scores, GOALS))
        for number in front.numbers:
            journal.trial(number)


def test_whenever_it_crashes_the_front_has_its_dense_weights(tmp_path: Path) -> None:
    """Also a candidate that has arrived before its turn to be told."""

    def ever_better(trial: Trial) -> Evaluation:
        return Evaluation({"first": float(trial.number), "second": 1.0})

    for crash in range(4, 30):
        path = tmp_path / str(crash) / "j.sqlite"
        with pytest.raises(Crash):
            carried_out("m2n2-dense", path, Simulated(crash, ever_better, crash))
        exportable_after(path)
        carried_out("m2n2-dense", path, Simulated(crash, ever_better))
        exportable_after(path)


def test_many_crashes_in_a_row(tmp_path: Path) -> None:
    path, crashes = tmp_path / "many" / "j.sqlite", 0
    submitted: list[int] = []
    for attempt in range(200):
        pool = Simulated(attempt, sometimes, crash=7)
        try:
            carried_out("m2n2-dense", path, pool)
        except Crash:
            crashes += 1
            continue
        finally:
            submitted += pool.submitted
        break
    carried_out("m2n2-dense", tmp_path / "whole" / "j.sqlite", Simulated(score=sometimes))
    assert crashes > 5
    assert digest(path) == digest(tmp_path / "whole" / "j.sqlite")


def test_a_crash_between_telling_and_committing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j.sqlite"
    manager = managed("m2n2-dense", path, Simulated(2, sometimes))
    told = 0

    def failing(batch: int) -> None:
        nonlocal told
        told += 1
        if told == 12:
            raise Crash
        Journal.told(manager.journal, batch)

    monkeypatch.setattr(manager.journal, "told", failing)
    with manager.journal, pytest.raises(Crash):
        manager.run()
    again = carried_out("m2n2-dense", path, Simulated(4, sometimes))
    whole = carried_out("m2n2-dense", tmp_path / "whole" / "j.sqlite", Simulated(score=sometimes))
    assert standing(again) == standing(whole)


@pytest.mark.parametrize("seed", range(3))
def test_a_crashed_search_in_arrival_order_goes_on(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    with pytest.raises(Crash):
        carried_out("m2n2-dense", path, Simulated(seed, crash=30), ARRIVAL)
    pool = Simulated(seed + 10)
    manager = carried_out("m2n2-dense", path, pool, ARRIVAL)
    assert manager.progress.evaluations == 83
    assert standing(carried_out("m2n2-dense", path, Simulated(), ARRIVAL)) == standing(manager)
    assert sorted(manager.front.numbers) == exportable_front(path)


@every_search
def test_a_raised_budget_goes_on_where_it_ended(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    carried_out(kind, path, Simulated(0), Schedule(evaluations=40, batch=3, in_flight=9))
    with Journal.open(path) as journal:
        before = {row.number: row.digest for row in journal.rows(unscored=True)}
    pool = Simulated(0)
    manager = carried_out(kind, path, pool, Schedule(evaluations=70, batch=3, in_flight=9))
    assert sorted(pool.submitted) == list(range(len(before), manager.progress.told))
    assert 70 <= manager.progress.spent + 1e-6 < 73
    assert manager.progress.evaluations == 70 or kind == "raced"
    with Journal.open(path) as journal:
        after = {row.number: row.digest for row in journal.rows(unscored=True)}
    assert {number: after[number] for number in before} == before
    lower = Simulated()
    assert carried_out(kind, path, lower, Schedule(evaluations=10)).progress.told == manager.progress.told
    assert lower.submitted == []


def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    carried_out("random", path, Simulated(), Schedule(evaluations=9, batch=3, in_flight=9))
    with pytest.raises(JournalError, match=r"replaying does not propose the recorded trials again \(trials 0, 1, 2\)"):
        carried_out("cma_es", path, Simulated())


@pytest.mark.parametrize("damage", ["DELETE FROM evaluations WHERE number = 4", "DELETE FROM events WHERE seq = 4"])
def test_a_damaged_journal_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    carried_out("random", path, Simulated(), Schedule(evaluations=9, batch=3, in_flight=9))
    connection = sqlite3.connect(path)
    connection.execute(damage)
    connection.commit()
    connection.close()
    with pytest.raises(JournalError):
        carried_out("random", path, Simulated())


# -- dense weights -------------------------------------------------------------------------------------------


def test_only_members_and_front_keep_their_dense_weights(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    manager = carried_out("m2n2-dense", path, Simulated(0))
    with Journal.open(path) as journal:
        kept = journal.kept()
        digests = {row.number: row.digest for row in journal.rows()}
        assert all(journal.trial(number).genome.digest == digests[number] for number in kept)
    members = {member.trial.number for member in manager.population.members}
    assert kept == members | set(manager.front.numbers) | {manager.progress.best}
    assert len(kept) < 83


# -- measuring outside the search ----------------------------------------------------------------------------


def test_measuring_pays_for_each_merge_once(tmp_path: Path) -> None:
    genomes = [Genome.uniform(SIZE, [i / 10, 1.0]) for i in range(5)]
    again = [genomes[0].split(3), *genomes[1:3]]
    with Journal.create(tmp_path / "j.sqlite") as journal:
        pool = Simulated(0)
        found = measure(pool, journal, [*genomes, *again], Scores("held_out"), batch=2)
        assert set(found) == {genome.digest for genome in genomes}
        assert len(pool.submitted) == 5
        for genome in genomes:
            assert found[genome.digest].scores == scored(Trial(0, genome)).scores
            stored = journal.measurement(genome.digest, Scores("held_out"))
            assert stored is not None
            assert stored.scores == found[genome.digest].scores
        more = Simulated(0)
        new = Genome.uniform(SIZE, [9.0, 9.0])
        assert set(measure(more, journal, [*genomes, new], Scores("held_out"), batch=2)) == {*found, new.digest}
        assert len(more.submitted) == 1
        other = Simulated(0)
        measure(other, journal, genomes, Scores(), batch=10)
        assert len(other.submitted) == 5  # another subset is another measurement


def test_a_measurement_that_comes_twice_or_is_of_the_search_counts_once(tmp_path: Path) -> None:
    genomes = [Genome.uniform(SIZE, [i / 10, 1.0]) for i in range(5)]
    of_the_search = Batch(1, (Trial(2, Genome.uniform(SIZE, [3.0, 3.0])), Trial(3, genomes[0])))

    def again(batch: Batch, found: list[Evaluation]) -> Completed:
        wrong = [Evaluation.failed("exception", "late") for _ in found]
        return [(of_the_search, wrong), (batch, found), (batch, wrong)]

    with Journal.create(tmp_path / "j.sqlite") as journal:
        found = measure(Altered(again), journal, genomes, Scores("held_out"), batch=2)
    assert [found[genome.digest].scores for genome in genomes] == [scored(Trial(0, one)).scores for one in genomes]


def test_a_batch_of_an_earlier_measurement_that_comes_late_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """It has the same number and the same merges: what was wanted of them tells."""
    genomes = [Genome.uniform(SIZE, [i / 10, 1.0]) for i in range(2)]

    def late(batch: Batch, found: list[Evaluation]) -> Completed:
        trials = tuple(replace(trial, wants=Scores("held_out")) for trial in batch.trials)
        return [(replace(batch, trials=trials), [Evaluation({"acc": -1.0}) for _ in found]), (batch, found)]

    with Journal.create(tmp_path / "j.sqlite") as journal:
        found = measure(Altered(late), journal, genomes, Scores(), batch=2)
    assert [found[genome.digest].scores for genome in genomes] == [scored(Trial(0, one)).scores for one in genomes]


def test_what_the_search_scored_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    carried_out("m2n2", path, Simulated(), Schedule(evaluations=6, batch=3, in_flight=3))
    seeds = [Genome.uniform(SIZE, row) for row in np.eye(2)]
    average = Genome.uniform(SIZE, [0.5, 0.5])
    with Journal.open(path, write=True) as journal:
        pool = Simulated()
        found = measure(pool, journal, [*seeds, average], Scores(), batch=2)
        assert len(pool.submitted) == 1
        for genome in (*seeds, average):
            stored = journal.measurement(genome.digest, Scores())
            assert stored is not None
            assert stored.scores == found[genome.digest].scores == scored(Trial(0, genome)).scores
        held_out = Simulated()
        measure(held_out, journal, seeds, Scores("held_out"), batch=2)
        assert len(held_out.submitted) == 2
