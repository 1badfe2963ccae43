"""The population manager: the one loop that asks, scores, keeps and tells, and writes the journal.

    search.ask -> journal -> pool -> journal -> population.add -> search.tell -> journal

With ``order: strict`` results are learned in the order they were asked for, with a fixed number in flight, so
that a search depends on its recipe alone, not on which worker was slow or died. With ``order: arrival`` they are
learned as they come, and the journal records the order it saw. Either way replaying the journal through the
same calls rebuilds search and population exactly; trials that were in flight are then issued again.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from threadpoolctl import threadpool_limits

from fitness.pools import Batch, Pool
from populations.errors import JournalError, SearchError
from populations.genome import Genome
from populations.journal import Event, Journal
from populations.pareto import ParetoFront
from populations.population import Population, quality
from populations.trial import Evaluation, Failure, Goal, Outcome, Subset, Trial, oriented
from search.protocol import SLACK, Search, numbered

StopReason: TypeAlias = Literal["evaluations", "seconds", "converged"]


@dataclass(frozen=True)
class Schedule:
    """How much is asked for, and when.

    Args:
        evaluations: Stop after so many trials that are scored, one scored on a sample counted for its share of the
            examples; None for no limit.
        seconds: Stop asking after so many seconds of searching (all resumed stretches together); None for no limit.
        batch: Trials asked for and scored together.
        in_flight: The most trials asked for and not yet told, at least ``batch``.
        order: ``strict`` or ``arrival``.
        patience: Give up when so many first trials have all failed.
    """

    evaluations: int | None = None
    seconds: float | None = None
    batch: int = 1
    in_flight: int = 1
    order: Literal["strict", "arrival"] = "strict"
    patience: int = 8


@dataclass
class Progress:
    """Where the search stands; given to the observer after every step.

    ``evaluations`` counts told trials that were scored on all examples, ``samples`` those scored on some and
    ``gradients`` those whose gradient was wanted, ``failures`` all kinds; ``spent`` is what they took of the budget of
    evaluations; ``best`` is the number of the best one so far, by mean oriented score ``quality``.
    """

    evaluations: int = 0
    samples: int = 0
    gradients: int = 0
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
        return self.evaluations + self.samples + self.gradients


Observer: TypeAlias = Callable[[Progress], None]


class Manager:
    """Runs a search to its budget, and keeps population, front and journal.

    Args:
        search: The algorithm.
        population: What it breeds from.
        goals: The objectives.
        pool: Workers that score batches.
        journal: The run's journal, open for writing; one with events in it is replayed first.
        schedule: Budget, batches and order.
        observe: Called with the progress after every step.
        clock: Seconds; a test may give its own.
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
        self.goals = tuple(goals)
        self.pool = pool
        self.journal = journal
        self.schedule = schedule
        self.front = ParetoFront(goals)
        self.progress = Progress()
        self._observe = observe
        self._clock = clock
        self._asked = 0  # trials
        self._spent = 0.0  # evaluations asked for; a sample counts for its share
        self._batches = 0
        self._flying: deque[Batch] = deque()  # asked and not yet told, oldest first
        self._arrived: dict[int, list[Evaluation]] = {}  # by batch number, not yet told
        self._unsubmitted: deque[Batch] = deque()
        self._dense: dict[int, Trial] = {}  # members, front and best that have a residual
        self._stored: set[int] = set()  # numbers whose residual the journal stores
        self._began = 0.0

    def run(self) -> StopReason:
        """Replay what the journal holds, then search until the budget is spent and everything is told.

        Raises:
            SearchError: The first candidates all failed, or nothing can be proposed.
            JournalError: The journal cannot be written, or does not fit the search.
        """
        with threadpool_limits(limits=1, user_api="blas"):  # small products; the cores belong to the workers
            self._replay()
            self._began = self._clock() - self.progress.elapsed
            self._advance([])
            while self._flying:
                self._advance(self.pool.completed(timeout=None))
            return self._finished()

    def _advance(self, results: Iterable[tuple[Batch, list[Evaluation]]]) -> None:
        """Take results in; tell what is due, asking again after each; commit; only then submit what was asked."""
        with self.journal.transaction():
            for batch, evaluations in results:
                self.journal.arrived(zip(batch.trials, evaluations, strict=True))
                self._arrived[batch.number] = evaluations
            self.progress.elapsed = self._clock() - self._began
            self._ask_more()
            for batch in self._due():
                self._tell(batch)
                self.journal.told(batch.number)
                self._ask_more()
            self._keep_residuals()
            self.journal.note("elapsed", repr(self.progress.elapsed))
        while self._unsubmitted:
            self.pool.submit(self._unsubmitted.popleft())
        self.progress.in_flight = sum(len(batch.trials) for batch in self._flying)
        self._observe(self.progress)
        self._check_failures()

    # -- asking ------------------------------------------------------------------------------------------

    def _ask_more(self) -> None:
        """Ask while there is budget and room in flight. What is asked depends on what was told, on nothing else."""
        while (wanted := self._wanted()) > 0:
            batch = self._ask(wanted)
            if batch is None:
                return
            self.journal.asked(batch.number, wanted, batch.trials)
            self._unsubmitted.append(batch)

    def _wanted(self) -> int:
        """How many trials to ask for now: a batch, what is left of the budget, or nothing."""
        schedule = self.schedule
        if schedule.seconds is not None and self.progress.elapsed >= schedule.seconds:
            return 0
        left = schedule.batch if schedule.evaluations is None else math.ceil(schedule.evaluations - self._spent - SLACK)
        flying = sum(len(batch.trials) for batch in self._flying)
        wanted = min(schedule.batch, left)
        return wanted if flying == 0 or flying + wanted <= schedule.in_flight else 0

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
        self._flying.append(batch)
        return batch

    # -- telling -----------------------------------------------------------------------------------------

    def _due(self) -> Iterator[Batch]:
        """Batches whose results are here and may be told: the oldest under strict order, any under arrival."""
        if self.schedule.order == "strict":
            while self._flying and self._flying[0].number in self._arrived:
                yield self._flying.popleft()
        else:
            for number in list(self._arrived):
                yield self._landed(number)

    def _landed(self, number: int) -> Batch:
        batch = next(b for b in self._flying if b.number == number)
        self._flying.remove(batch)
        return batch

    def _tell(self, batch: Batch) -> None:
        """Population first, then the search."""
        for trial, evaluation in zip(batch.trials, self._arrived.pop(batch.number), strict=True):
            outcome = self.population.add(trial, evaluation) if trial.scored else Outcome(False)
            self.search.tell(trial, evaluation, outcome)
            on_front = self._count(trial, evaluation)
            if trial.genome.residual is not None and (outcome.accepted or on_front):
                self._dense[trial.number] = trial

    def _count(self, trial: Trial, evaluation: Evaluation) -> bool:
        """Keep the books; True when the trial is on the front now."""
        progress = self.progress
        progress.evaluations += trial.scored
        progress.gradients += trial.calibration is not None
        progress.samples += trial.sample is not None and trial.sample.partial
        progress.spent += trial.cost
        if not evaluation.ok:
            progress.failures += 1
            progress.last_failure = evaluation.failure
        if not (evaluation.ok and trial.scored):
            return False
        value = quality(evaluation, self.goals)
        older = progress.best is not None and trial.number < progress.best
        if value > progress.quality or (value == progress.quality and older):
            progress.best, progress.quality = trial.number, value
            progress.best_scores = dict(evaluation.scores)
        on_front = self.front.add(trial.number, oriented(evaluation.scores, self.goals))
        progress.front_size = len(self.front.numbers)
        return on_front

    def _keep_residuals(self) -> None:
        """Have the journal store the dense weights of members, front and best, and of no other trial."""
        kept = self._early()
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
        """Dense trials that came before their turn and belong on the front: reports of a killed run list them."""
        return {
            trial.number: trial
            for batch in (self._flying if self._arrived else ())
            for trial, evaluation in zip(batch.trials, self._arrived.get(batch.number, ()), strict=False)
            if trial.genome.residual is not None
            and trial.scored
            and evaluation.ok
            and self.front.takes(trial.number, oriented(evaluation.scores, self.goals))
        }

    def _check_failures(self) -> None:
        progress = self.progress
        if progress.failures == progress.told and progress.failures >= self.schedule.patience:
            raise SearchError(_all_failed(progress))

    def _finished(self) -> StopReason:
        """Why nothing is in flight and nothing more is asked."""
        schedule, progress = self.schedule, self.progress
        if progress.told and progress.failures == progress.told:
            raise SearchError(_all_failed(progress))
        if schedule.evaluations is not None and self._spent >= schedule.evaluations - SLACK:
            return "evaluations"
        if schedule.seconds is not None and progress.elapsed >= schedule.seconds:
            return "seconds"
        if self.search.done:
            return "converged"
        raise SearchError("search: nothing is in flight and it proposes nothing.")

    # -- resuming ----------------------------------------------------------------------------------------

    def _replay(self) -> None:
        """Bring search, population and front to where the journal ends."""
        events = self.journal.events()
        if not events:
            return
        stored = dict(self.journal.evaluations())
        self.progress.elapsed = float(self.journal.fact("elapsed") or 0.0)
        self.progress.replayed = len(stored)
        self._stored = self.journal.kept()
        for event in events:
            if event.kind == "ask":
                self._replay_ask(event)
            else:
                batch = self._landed(event.batch)
                self._arrived[batch.number] = [stored[trial.number] for trial in batch.trials]
                self._tell(batch)
        for batch in self._flying:
            if all(trial.number in stored for trial in batch.trials):
                self._arrived[batch.number] = [stored[trial.number] for trial in batch.trials]
            else:
                self._unsubmitted.append(batch)

    def _replay_ask(self, event: Event) -> None:
        batch = self._ask(event.requested)
        recorded = self.journal.batch(event.batch)
        found = [] if batch is None else [(trial.number, trial.genome.digest) for trial in batch.trials]
        if found != recorded:
            numbers = ", ".join(str(number) for number, _ in recorded)
            raise JournalError(
                f"{self.journal.path}: replaying does not propose the recorded trials again (trials {numbers}).",
                "Resume with the versions of Ecotone and numpy, and the kind of processor, that the run began with: "
                "see `versions` in `ecotone status --json`.",
            )


def _all_failed(progress: Progress) -> str:
    failure = progress.last_failure
    assert failure is not None
    text = f"all of the first {progress.told} candidates failed; the last one: {failure.kind}: {failure.message}"
    return f"{text}\n{failure.details}".rstrip()


def measure(
    pool: Pool, journal: Journal, genomes: Iterable[Genome], subset: Subset, batch: int
) -> dict[str, Evaluation]:
    """Score genomes outside the search, each once: what the journal has measured, or the search scored, is not paid
    again.

    Args:
        pool: Idle workers.
        journal: Open for writing.
        genomes: The merges; equal ones are scored once.
        subset: Score on the search's objectives or on the held-out ones.
        batch: Genomes scored together.

    Returns:
        Evaluations by genome digest.
    """
    wanted = {genome.digest: genome for genome in genomes}
    known = {digest: journal.measurement(digest, subset) for digest in wanted}
    done = {digest: evaluation for digest, evaluation in known.items() if evaluation is not None}
    if subset == "search":
        done |= _scored_already(journal, [genome for digest, genome in wanted.items() if digest not in done])
    missing = [Trial(i, wanted[digest], subset=subset) for i, digest in enumerate(d for d in wanted if d not in done)]
    chunks = [tuple(missing[i : i + batch]) for i in range(0, len(missing), batch)]
    for number, trials in enumerate(chunks):
        pool.submit(Batch(number, trials))
    pending = len(chunks)
    while pending:
        for finished, evaluations in pool.completed(timeout=None):
            pending -= 1
            with journal.transaction():
                for trial, evaluation in zip(finished.trials, evaluations, strict=True):
                    journal.measured(trial.genome, subset, evaluation)
                    done[trial.genome.digest] = evaluation
    return done


def _scored_already(journal: Journal, genomes: Iterable[Genome]) -> dict[str, Evaluation]:
    """Evaluations by digest of the genomes that were trials of the search, as the seed models are; recorded as such."""
    found = {}
    with journal.transaction():
        for genome in genomes:
            evaluation = journal.evaluation_of(genome.digest)
            if evaluation is not None:
                journal.measured(genome, "search", evaluation)
                found[genome.digest] = evaluation
    return found
