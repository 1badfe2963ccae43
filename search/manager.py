"""The population manager: the one loop that asks, scores, keeps and tells, and writes the journal.

    search.ask -> journal -> pool -> journal -> population.add -> search.tell -> journal

With ``order: strict`` the search learns from results in the order in which it asked, with a fixed number in flight. So
a search depends on its recipe alone, not on slow or dead workers. With ``order: arrival`` it learns from results as
they come, and the journal records their order. Either way, replaying the journal through the same calls rebuilds search
and population exactly. Trials that were in flight are then issued again.

Seconds are counted by a clock that nobody sets, wait by wait: no time server moves ``time.monotonic``, and it stands
still while the machine sleeps. A clock that goes back adds nothing. A wait far longer than its timeout and its results
account for adds only the timeout: a clock jumped, or the process was stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from threadpoolctl import threadpool_limits

from ecotone.fitness.pools import Batch, Completed, Pool
from ecotone.populations.errors import JournalError, PoolError, SearchError
from ecotone.populations.facts import ELAPSED
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Event, Journal
from ecotone.populations.pareto import ParetoFront
from ecotone.populations.population import Population
from ecotone.populations.ranking import Leader
from ecotone.populations.trial import Evaluation, Failure, Goal, Outcome, Scores, Trial, Wish, oriented
from ecotone.search.fitting import Fitting
from ecotone.search.protocol import SLACK, Search, numbered

StopReason: TypeAlias = Literal["evaluations", "seconds", "converged", "drained"]

POLL = 1.0
"""The longest wait for results, in seconds, so that ``drain`` is noticed."""
STALL = 60.0
"""Seconds by which a wait may exceed its timeout and its results' seconds before it counts as a jump."""
NOTE = 60.0
"""Seconds after which the journal records the time spent, even without results: a kill loses no more."""

_log = logging.getLogger("ecotone")


@dataclass(frozen=True)
class Schedule:
    """The number of trials to ask for, and the end of the search.

    Args:
        evaluations: Stop after so many scored trials. One scored on a sample counts for its share of the examples. None
            for no limit.
        seconds: Stop asking after so many seconds of searching (all resumed stretches together); None for no limit.
        batch: Trials asked for and scored together.
        in_flight: The most trials asked and not yet told, at least ``batch``. In strict order the oldest batch holds up
            those after it: 128 workers need three batches each to stay busy, up to 32 need two. Arrival order needs
            one for each worker, and a few on their way. With more in flight, proposals are made on fewer results.
        order: ``strict`` or ``arrival``.
        patience: Give up when so many first trials have all failed.
        grace: Seconds that a draining run waits for trials in flight.
    """

    evaluations: int | None = None
    seconds: float | None = None
    batch: int = 1
    in_flight: int = 1
    order: Literal["strict", "arrival"] = "strict"
    patience: int = 8
    grace: float = 30.0


@dataclass
class Progress:
    """The state of the search, given to the observer after every step.

    ``evaluations`` counts told trials that were scored on all examples, ``samples`` those scored on some, ``gradients``
    and ``statistics`` those that wanted these, ``failures`` all kinds; ``spent`` is what they took of the budget of
    evaluations; ``best`` is the number of the best one so far, and ``quality`` the mean of its scores
    (``ecotone.populations.ranking``).
    """

    evaluations: int = 0
    samples: int = 0
    gradients: int = 0
    statistics: int = 0
    spent: float = 0.0
    failures: int = 0
    replayed: int = 0
    elapsed: float = 0.0
    best: int | None = None
    quality: float = -math.inf
    best_scores: dict[str, float] = field(default_factory=dict)
    last_failure: Failure | None = None
    in_flight: int = 0
    front_size: int = 0

    @property
    def told(self) -> int:
        """Trials of all kinds."""
        return self.evaluations + self.samples + self.gradients + self.statistics

    def count(self, wants: Wish) -> None:
        """Count a trial that was told; its wish says among which."""
        setattr(self, wants.tally, getattr(self, wants.tally) + 1)
        self.spent += wants.cost


Observer: TypeAlias = Callable[[Progress], None]


class Manager:
    """Runs a search to its budget, and keeps population, front and journal.

    Args:
        search: The algorithm.
        population: The members that it breeds from.
        goals: The objectives.
        pool: Workers that score batches.
        journal: The run's journal, open for writing; one with events in it is replayed first.
        schedule: Budget, batches and order.
        observe: Called with the progress after every step, and every second of a wait; what it raises ends the run.
        clock: Seconds since some moment; a test may give its own.
    """

    def __init__(
        self,
        search: Search,
        population: Population,
        goals: Sequence[Goal],
        pool: Pool,
        journal: Journal,
        schedule: Schedule,
        observe: Observer = lambda progress: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.search = search
        self.population = population
        self.goals: tuple[Goal, ...] = tuple(goals)
        self.pool = pool
        self.journal = journal
        self.schedule = schedule
        self.front: ParetoFront = ParetoFront(goals)
        self.progress: Progress = Progress()
        self._leader = Leader(goals)
        self._fitting = Fitting(goals)
        self._observe = observe
        self._clock = clock
        self._asked = 0  # trials
        self._spent = 0.0  # evaluations asked for; a sample counts for its share
        self._batches = 0
        self._flying: dict[int, Batch] = {}  # by number: asked and not yet told, oldest first
        self._waiting = 0  # trials of these
        self._arrived: dict[int, list[Evaluation]] = {}  # by batch number, not yet told
        self._unsubmitted: deque[Batch] = deque()
        self._out: dict[int, Batch] = {}  # by number: at the pool
        self._any_dense = False  # some trial has a residual
        self._dense: dict[int, Trial] = {}  # members, front and best that have one
        self._stored: set[int] = set()  # numbers whose residual the journal stores
        self._draining = False
        self._drains_until: float | None = None  # of the seconds in all
        self._at = 0.0  # the clock when time was last counted
        self._noted = 0.0  # seconds in all that the journal knows of

    def run(self) -> StopReason:
        """Replay the journal, then search until the budget is spent and every trial is told.

        Raises:
            SearchError: The first candidates all failed, or nothing can be proposed.
            PoolError: The pool returned a batch that it was not given, or has no workers left.
            JournalError: The journal cannot be written, or does not fit the search.
        """
        with threadpool_limits(limits=1, user_api="blas"):  # small products; the cores belong to the workers
            self._replay()
            self._at = self._clock()
            self._advance([])
            while self._patient() and self._out:
                results = self._wait()
                if results or self.progress.elapsed >= self._noted + NOTE:
                    self._advance(results)
                else:
                    self._observe(self.progress)
            self.journal.note(ELAPSED, self.progress.elapsed)
            return self._finished()

    def drain(self) -> None:
        """Make ``run`` ask for nothing more, wait ``Schedule.grace`` seconds for trials in flight, and return.

        Safe in a signal handler. Results that come meanwhile are journalled. They are told when the run is resumed,
        with the questions in between. So a drained search in strict order equals an undisturbed one.
        """
        self._draining = True

    def _advance(self, results: Completed) -> None:
        """Record results, tell the due results and ask after each, commit, and only then submit the new batches."""
        with self.journal.transaction():
            for batch, evaluations in results:
                self._record(batch, evaluations)
            if not self._draining:
                self._ask_more()
                for batch in self._due():
                    self._tell(batch)
                    self.journal.told(batch.number)
                    _log_batch("told", batch)
                    self._ask_more()
            self._keep_residuals()
            self.journal.note(ELAPSED, self.progress.elapsed)
        self._noted = self.progress.elapsed
        self._submit()
        self.progress.in_flight = self._waiting
        self._observe(self.progress)
        self._check_failures()

    def _submit(self) -> None:
        while self._unsubmitted and not self._draining:
            batch = self._unsubmitted.popleft()
            self._out[batch.number] = batch
            self.pool.submit(batch)
            _log_batch("asked", batch)

    # -- results -----------------------------------------------------------------------------------------

    def _wait(self) -> Completed:
        """The batches that the pool has finished; none when it finishes none within a moment."""
        left = math.inf if self._drains_until is None else self._drains_until - self.progress.elapsed
        results = self.pool.completed(timeout=(timeout := min(POLL, left)))
        spent = sum(evaluation.seconds for _, evaluations in results for evaluation in evaluations)
        self._count_time(timeout, timeout + spent + STALL)
        return results

    def _patient(self) -> bool:
        """False when the grace of a draining run is over."""
        self._count_time()
        if self._draining and self._drains_until is None:
            self._drains_until = self.progress.elapsed + self.schedule.grace
            fields = {"event": "draining", "batches": len(self._out), "grace": self.schedule.grace}
            _log.info("Draining: waiting for what is in flight.", extra=fields)
        return self._drains_until is None or self.progress.elapsed < self._drains_until

    def _count_time(self, asked: float = 0.0, most: float = math.inf) -> None:
        """Add the seconds since the last call: ``asked`` if there are more than ``most``, 0 if the clock went back."""
        now = self._clock()
        passed = max(0.0, now - self._at)
        self._at = now
        if passed > most:
            fields = {"event": "clock_jumped", "seconds": passed}
            _log.warning("The clock jumped by %.0f s, or the process was stopped: not counted.", passed, extra=fields)
            passed = asked
        self.progress.elapsed += passed

    def _record(self, batch: Batch, evaluations: Sequence[Evaluation]) -> None:
        """Journal a batch's results, once. A batch may come twice when its worker was given up too early.

        Raises:
            PoolError: The batch was never given to the pool, or it lacks one evaluation for each trial.
        """
        own = self._out.get(batch.number)
        if own is None and batch.number < self._batches:
            _log.debug("Batch %d came again.", batch.number)
            return
        if own is None or not _same(own, batch):
            raise PoolError(
                f"pool: expected a batch that it was given, found batch {batch.number}, which it was not given."
            )
        if len(evaluations) != len(own.trials):
            raise PoolError(
                f"pool: batch {batch.number}: expected {len(own.trials)} evaluations, found {len(evaluations)}."
            )
        del self._out[batch.number]
        evaluations = [self._fitting.fitted(*pair) for pair in zip(own.trials, evaluations, strict=True)]
        self.journal.arrived(zip(own.trials, evaluations, strict=True))
        self._arrived[batch.number] = evaluations
        for trial, evaluation in zip(own.trials, evaluations, strict=True):
            if (failure := evaluation.failure) is not None:
                fields = {"event": "trial_failed", "trial": trial.number, "kind": failure.kind}
                _log.info("Trial %d failed: %s: %s", trial.number, failure.kind, failure.message, extra=fields)

    # -- asking ------------------------------------------------------------------------------------------

    def _ask_more(self) -> None:
        """Ask while there is budget and room in flight. The questions depend on the told results, on nothing else."""
        while (wanted := self._wanted()) > 0:
            batch = self._ask(wanted)
            if batch is None:
                return
            self.journal.asked(batch.number, wanted, batch.trials)
            self._unsubmitted.append(batch)

    def _wanted(self) -> int:
        """The number of trials to ask for now: a batch, the rest of the budget, or none."""
        schedule = self.schedule
        if schedule.seconds is not None and self.progress.elapsed >= schedule.seconds:
            return 0
        left = schedule.batch if schedule.evaluations is None else math.ceil(schedule.evaluations - self._spent - SLACK)
        wanted = min(schedule.batch, left)
        return wanted if self._waiting == 0 or self._waiting + wanted <= schedule.in_flight else 0

    def _ask(self, wanted: int) -> Batch | None:
        trials = [] if self.search.done else self.search.ask(wanted)
        if not trials:
            return None
        if not numbered(self._asked, trials):
            raise SearchError(f"search: expected trials numbered from {self._asked}, found {trials[0].number}.")
        batch = Batch(self._batches, tuple(trials))
        self._batches += 1
        self._asked += len(trials)
        self._spent += sum(trial.cost for trial in trials)
        self._flying[batch.number] = batch
        self._waiting += len(trials)
        self._any_dense = self._any_dense or any(trial.genome.residual is not None for trial in trials)
        return batch

    # -- telling -----------------------------------------------------------------------------------------

    def _due(self) -> Iterator[Batch]:
        """Batches with results that may be told: the oldest in strict order, any in arrival order."""
        if self.schedule.order == "strict":
            while (oldest := next(iter(self._flying), -1)) in self._arrived:
                yield self._flying[oldest]
        else:
            for number in list(self._arrived):
                yield self._flying[number]

    def _tell(self, batch: Batch) -> None:
        """Population first, then the search."""
        del self._flying[batch.number]
        self._waiting -= len(batch.trials)
        for trial, evaluation in zip(batch.trials, self._arrived.pop(batch.number), strict=True):
            outcome = self.population.add(trial, evaluation) if trial.scored else Outcome(False)
            self.search.tell(trial, evaluation, outcome)
            on_front = self._count(trial, evaluation)
            if trial.genome.residual is not None and (outcome.accepted or on_front):
                self._dense[trial.number] = trial

    def _count(self, trial: Trial, evaluation: Evaluation) -> bool:
        """Count the trial; True when it is on the front now."""
        progress = self.progress
        progress.count(trial.wants)
        if not evaluation.ok:
            progress.failures += 1
            progress.last_failure = evaluation.failure
        if not (evaluation.ok and trial.scored and self.goals):
            return False
        point = oriented(evaluation.scores, self.goals)
        on_front = self.front.add(trial.number, point)
        leader = self._leader
        if leader.take(trial.number, point, self.front):
            progress.best = leader.number
            pairs = zip(self.goals, leader.point.tolist(), strict=True)
            progress.best_scores = {goal.name: goal.sign * value for goal, value in pairs}
        progress.quality = leader.mean
        progress.front_size = len(self.front.numbers)
        return on_front

    def _keep_residuals(self) -> None:
        """Store the dense weights of members, front and best in the journal, and of no other trial."""
        kept = self._early() if self._any_dense else {}
        if self._dense:
            alive = {*self.front.numbers, self.progress.best, *(m.trial.number for m in self.population.members)}
            self._dense = {number: trial for number, trial in self._dense.items() if number in alive}
            kept |= self._dense
        if kept.keys() == self._stored:
            return
        self.journal.keep(
            [trial for number, trial in kept.items() if number not in self._stored],
            self._stored - kept.keys(),
        )
        self._stored = set(kept)

    def _early(self) -> dict[int, Trial]:
        """Dense trials whose results came early and belong on the front: reports of a killed run list them."""
        return {
            trial.number: trial
            for number, evaluations in self._arrived.items()
            for trial, evaluation in zip(self._flying[number].trials, evaluations, strict=True)
            if trial.genome.residual is not None
            and trial.scored
            and evaluation.ok
            and self.front.takes(trial.number, oriented(evaluation.scores, self.goals))
        }

    def _check_failures(self) -> None:
        progress = self.progress
        if progress.failures == progress.told and progress.failures >= self.schedule.patience:
            raise _all_failed(progress)

    def _finished(self) -> StopReason:
        """The reason for the end of the search."""
        schedule, progress = self.schedule, self.progress
        if self._flying:
            return "drained"
        if progress.told and progress.failures == progress.told and not self._draining:
            raise _all_failed(progress)
        if schedule.evaluations is not None and self._spent >= schedule.evaluations - SLACK:
            return "evaluations"
        if schedule.seconds is not None and progress.elapsed >= schedule.seconds:
            return "seconds"
        if self.search.done:
            return "converged"
        if self._draining:
            return "drained"
        raise SearchError("search: it proposes nothing, although nothing is in flight.")

    # -- resuming ----------------------------------------------------------------------------------------

    def _replay(self) -> None:
        """Bring search, population and front to the state at the journal's end."""
        events = self.journal.events()
        if not events:
            return
        self.progress.elapsed = self._noted = self.journal.fact(ELAPSED) or 0.0
        self._stored = self.journal.kept()
        ahead: dict[int, Evaluation] = {}  # read and not told: as many as were in flight, not the whole journal
        with closing(self.journal.batches()) as asked, closing(self.journal.evaluations()) as stored:
            for event in events:
                if event.kind == "ask":
                    self._replay_ask(event, next(asked, []))
                else:
                    self._replay_tell(event, ahead, stored)
            ahead.update(stored)
        for batch in self._flying.values():
            if all(trial.number in ahead for trial in batch.trials):
                self._arrived[batch.number] = [ahead[trial.number] for trial in batch.trials]
                self._learn(batch)
            else:
                self._unsubmitted.append(batch)
        self.progress.replayed = self.progress.told + sum(map(len, self._arrived.values()))

    def _learn(self, batch: Batch) -> None:
        """Know what recorded evaluations say of those to come."""
        for trial, evaluation in zip(batch.trials, self._arrived[batch.number], strict=True):
            self._fitting.learn(trial, evaluation)

    def _replay_ask(self, event: Event, recorded: list[tuple[int, str]]) -> None:
        batch = self._ask(event.requested)
        proposed = [] if batch is None else [(trial.number, trial.genome.digest) for trial in batch.trials]
        if proposed != recorded:
            numbers = ", ".join(str(number) for number, _ in recorded)
            raise JournalError(
                f"{self.journal.path}: replaying does not propose the recorded trials again (trials {numbers}).",
                "Resume with the versions of Ecotone and numpy, and the kind of processor, that the run began with: "
                "see `versions` in `ecotone status --json`.",
            )

    def _replay_tell(
        self, event: Event, ahead: dict[int, Evaluation], stored: Iterator[tuple[int, Evaluation]]
    ) -> None:
        batch = self._flying.get(event.batch)
        numbers = [] if batch is None else [trial.number for trial in batch.trials]
        while not all(number in ahead for number in numbers) and (result := next(stored, None)) is not None:
            ahead[result[0]] = result[1]
        if batch is None or not all(number in ahead for number in numbers):
            raise JournalError(
                f"{self.journal.path}: batch {event.batch} was told, but was never asked or evaluated.",
                "The journal is damaged: go on from a copy of it.",
            )
        self._arrived[batch.number] = [ahead.pop(number) for number in numbers]
        self._learn(batch)
        self._tell(batch)


def _log_batch(event: Literal["asked", "told"], batch: Batch) -> None:
    if _log.isEnabledFor(logging.DEBUG):
        fields = {"event": event, "batch": batch.number, "trials": [trial.number for trial in batch.trials]}
        _log.debug("Batch %d was %s.", batch.number, event, extra=fields)


def _same(a: Batch, b: Batch) -> bool:
    """True for two batches of the same trials."""
    return a is b or _key(a) == _key(b)


def _key(batch: Batch) -> list[tuple[int, str, Wish]]:
    return [(trial.number, trial.genome.digest, trial.wants) for trial in batch.trials]


def _all_failed(progress: Progress) -> SearchError:
    failure = progress.last_failure
    assert failure is not None
    return SearchError(
        f"all of the first {progress.told} candidates failed; the last one: {failure.kind}: {failure.text}",
        "Repair the cause, then begin a new run: this one has recorded the failures.",
    )


def measure(
    pool: Pool,
    journal: Journal,
    genomes: Iterable[Genome],
    wants: Wish,
    batch: int,
    keep: Callable[[Evaluation], bool] = lambda evaluation: True,
) -> dict[str, Evaluation]:
    """Measure genomes outside the search, each once. Scores in the journal or from the search are not computed again.

    Args:
        pool: Idle workers.
        journal: Open for writing.
        genomes: The merges; equal ones are measured once.
        wants: Scores on the search's objectives or on the held-out ones, or statistics.
        batch: Genomes measured together.
        keep: Which of the evaluations in the journal are kept; the others are measured again.

    Returns:
        Evaluations by genome digest.
    """
    wanted = {genome.digest: genome for genome in genomes}
    known = {digest: journal.measurement(digest, wants) for digest in wanted}
    done = {digest: found for digest, found in known.items() if found is not None and keep(found)}
    if wants == Scores():
        done |= _scored_already(journal, [genome for digest, genome in wanted.items() if digest not in done])
    missing = [Trial(i, wanted[digest], wants=wants) for i, digest in enumerate(d for d in wanted if d not in done)]
    chunks = [tuple(missing[i : i + batch]) for i in range(0, len(missing), batch)]
    out, fitting = {number: Batch(number, trials) for number, trials in enumerate(chunks)}, Fitting()
    for chunk in out.values():
        pool.submit(chunk)
    while out:
        for finished, evaluations in pool.completed(timeout=None):
            own = out.get(finished.number)
            if own is None or not _same(own, finished):
                continue  # it came before, or is of the search
            del out[own.number]
            with journal.transaction():
                for trial, returned in zip(own.trials, evaluations, strict=True):
                    evaluation = fitting.fitted(trial, returned)
                    journal.measured(trial.genome, wants, evaluation)
                    done[trial.genome.digest] = evaluation
    return done


def _scored_already(journal: Journal, genomes: Iterable[Genome]) -> dict[str, Evaluation]:
    """Evaluations, by digest, of genomes that were trials of the search, such as the seed models. Records them."""
    evaluations = {}
    with journal.transaction():
        for genome in genomes:
            evaluation = journal.evaluation_of(genome.digest)
            if evaluation is not None:
                journal.measured(genome, Scores(), evaluation)
                evaluations[genome.digest] = evaluation
    return evaluations
