"""Batches that are not finished, and the next tries of batches whose worker died, raised or took too long."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ecotone.fitness.pools import Batch, Completed
from ecotone.fitness.ray.events import cause, reason
from ecotone.fitness.ray.meters import Meters
from ecotone.populations.trial import Evaluation, Trial


@dataclass
class Job:
    """Trials of one batch that are scored together, and how many workers died while they were the oldest there.

    A worker may die of a later job before the result of an earlier one has left it. So a job that a worker died of
    is tried again with the worker to itself; only then is it to blame.

    Args:
        ticket: The number under which its batch was queued.
        places: Positions of its trials in the batch.
        trials: The candidates.
        deaths: Workers that died of it, as far as is known.
        suspect: It is scored with the worker to itself.
    """

    ticket: int
    places: range
    trials: tuple[Trial, ...]
    deaths: int = 0
    suspect: bool = False

    def fits(self, queue: Collection[Job], most: int) -> bool:
        """Whether it may be queued at a worker behind the jobs of ``queue``, ``most`` in all."""
        if self.suspect:
            return not queue
        return len(queue) < most and not any(job.suspect for job in queue)


@dataclass
class _Open:
    """A batch that is not finished, and the evaluations there are, by position."""

    batch: Batch
    evaluations: dict[int, Evaluation] = field(default_factory=dict)


class Jobs:
    """Batches in the order in which they were queued, as jobs that wait for a worker, and the finished batches.

    Args:
        attempts: Workers that may die of a batch before its candidates are tried alone, and of a candidate alone before
            it has failed.
        meters: Count the evaluations.
    """

    def __init__(self, attempts: int, meters: Meters) -> None:
        self.waiting: deque[Job] = deque()
        self._attempts = attempts
        self._meters = meters
        self._open: dict[int, _Open] = {}
        self._finished: Completed = []
        self._tickets = 0

    @property
    def unfinished(self) -> bool:
        """Whether a batch is not finished."""
        return bool(self._open)

    @property
    def finished(self) -> bool:
        """Whether a finished batch has not been taken yet."""
        return bool(self._finished)

    def add(self, batch: Batch) -> None:
        """Queue a batch."""
        self._tickets += 1
        self._open[self._tickets] = _Open(batch)
        self.waiting.append(Job(self._tickets, range(len(batch.trials)), batch.trials))

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Put jobs that a worker did not finish, oldest first, before all others."""
        self.waiting.extendleft(reversed(jobs))

    def take_finished(self) -> Completed:
        """The batches that were finished since the last call, each with its evaluations."""
        finished, self._finished = self._finished, []
        return finished

    def clear(self) -> None:
        """Drop all batches that are not finished."""
        self._open.clear()
        self.waiting.clear()

    def settle(self, job: Job, evaluations: Sequence[Evaluation]) -> None:
        """Take in a job's evaluations, one a trial."""
        there = self._open[job.ticket]
        there.evaluations |= dict(zip(job.places, evaluations, strict=True))
        for evaluation in evaluations:
            self._meters.count(evaluation)
        if len(there.evaluations) == len(there.batch.trials):
            del self._open[job.ticket]
            ordered = [there.evaluations[place] for place in range(len(there.batch.trials))]
            self._finished.append((there.batch, ordered))

    def died(self, job: Job, error: Exception) -> None:
        """A worker died of this job, it seems: try it again, then its candidates alone, then give up."""
        alone, job.suspect = job.suspect, True
        job.deaths += 1
        if not alone or job.deaths < self._attempts:
            self.put_back([job])
        elif len(job.trials) > 1:
            self._split(job)
        else:
            message = f"the worker process died each of {job.deaths} times it scored this candidate"
            self.settle(job, [Evaluation.failed("worker died", f"{message} ({reason(error)}).", str(error))])

    def raised(self, job: Job, error: Exception) -> None:
        """The call itself failed, which no objective can cause: try its candidates alone to find the one that does."""
        if len(job.trials) > 1:
            self._split(job)
        else:
            raised = cause(error)
            message = f"worker: {type(raised).__name__}: {reason(raised)}"
            self.settle(job, [Evaluation.failed("exception", message, str(error))])

    def timed_out(self, job: Job, seconds: float, doubtful: bool) -> None:
        """It took more than ``seconds``: try its candidates alone, or give up a candidate that was alone.

        Args:
            job: The job.
            seconds: The limit for all its trials.
            doubtful: The fault may lie with the node, so a candidate alone is tried once more, too.
        """
        if len(job.trials) > 1 or doubtful:
            self._split(job)
        else:
            message = f"the candidate took more than {seconds:g} s (runtime.time_limit), so its worker was killed."
            self.settle(job, [Evaluation.failed("timed out", message, seconds=seconds)])

    def _split(self, job: Job) -> None:
        self.put_back(
            [
                Job(job.ticket, range(place, place + 1), (trial,), suspect=True)
                for place, trial in zip(job.places, job.trials, strict=True)
            ]
        )
