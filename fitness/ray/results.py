"""Answers of the workers: that they are ready, what they measured, what they raised, that they died."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from ecotone.fitness.failures import WorkerBrokenError
from ecotone.fitness.ray.cluster import LOOK_EVERY, Clock, Cluster
from ecotone.fitness.ray.crew import Crew
from ecotone.fitness.ray.events import cause, reason
from ecotone.fitness.ray.jobs import Jobs
from ecotone.fitness.ray.members import Member
from ecotone.fitness.ray.models import SameModels
from ecotone.merging.models.files import ModelChangedError
from ecotone.populations.errors import EcotoneError, PoolError


class Results:
    """Waits for the workers' answers and takes them in.

    Args:
        crew: The workers.
        cluster: The cluster of the workers.
        jobs: Takes what they measured.
        attempts: So many of each worker's attempts to open may die in a row.
        clock: Tells the time.
    """

    def __init__(self, crew: Crew, cluster: Cluster, jobs: Jobs, attempts: int, clock: Clock) -> None:
        self._crew = crew
        self._cluster = cluster
        self._jobs = jobs
        self._attempts = attempts
        self._clock = clock
        self._failed_starts = 0
        self.models: SameModels = SameModels()

    def wait(self, seconds: float) -> set[Any]:
        """The calls that are answered; returns at the first answer or after ``seconds``."""
        calls = [member.opened for member in self._crew.members if not member.ready]
        calls += [call for member in self._crew.members for call, _ in member.queue]
        if not calls:
            time.sleep(min(seconds, LOOK_EVERY))
            return set()
        ray = self._cluster.ray
        ray.wait(calls, num_returns=1, timeout=seconds, fetch_local=False)
        answered, _ = ray.wait(calls, num_returns=len(calls), timeout=0, fetch_local=False)
        return set(answered)

    def take(self, answered: Collection[Any]) -> None:
        """Take in the answers of all workers. Then raise the error that ends the search, if any.

        Raises:
            EcotoneError: The only worker could not open the models; raised by the worker.
            PoolError: Workers keep dying while they open the models, or this process's node is gone.
        """
        errors = [error for member in list(self._crew.members) if (error := self._error_of(member, answered))]
        if errors:
            raise errors[0]

    def _error_of(self, member: Member, answered: Collection[Any]) -> EcotoneError | None:
        """Take in one worker's answers. Returns an error that ends the search, so that other answers come in first."""
        try:
            self._take_from(member, answered)
        except EcotoneError as error:
            return error
        return None

    def _take_from(self, member: Member, answered: Collection[Any]) -> None:
        ray = self._cluster.ray
        try:
            if not member.ready and member.opened in answered:
                opened = ray.get(member.opened)
                if refused := self.models.refusal(opened):
                    self._not_opened(member, refused)
                    return
                self._crew.opened(member, opened.pid, opened.node, self._clock())
                self._failed_starts = 0
            while member.queue and member.queue[0][0] in answered:
                call, job = member.queue[0]
                if not self._crew.take(job, ray.get(call)):
                    self._crew.leave(member, "its process was told to stop")
                    return
                member.drop_oldest(self._clock())
        except ray.exceptions.RayTaskError as error:
            self._raised(member, error, answered)
        except ray.exceptions.RayError as error:
            self._died(member, error)

    def _raised(self, member: Member, error: Exception, answered: Collection[Any]) -> None:
        """A worker raised while it opened the models or scored a job."""
        raised = cause(error)
        if isinstance(raised, ModelChangedError) and member.ready:
            raise raised from error
        if not member.ready:
            self._not_opened(member, raised)
        elif isinstance(raised, WorkerBrokenError):
            self._crew.replace(member, raised)
        else:
            self._jobs.raised(member.drop_oldest(self._clock()), error)
            self._take_from(member, answered)

    def _not_opened(self, member: Member, error: Exception) -> None:
        """Go on without a worker that cannot be used, if there are others.

        Raises:
            EcotoneError: There are none.
        """
        if not self._crew.ready:
            raise error
        self._crew.put_off(member, error)

    def _died(self, member: Member, error: Exception) -> None:
        self._cluster.check_home()
        self.models.check_after_death(error)
        if getattr(error, "preempted", False):
            self._crew.leave(member, "its node was preempted")
        elif not member.ready and self._crew.ready:
            self._crew.put_off(member, error)
        else:
            if not member.ready:
                self._count_failed_start(error)
            self._crew.replace(member, error)

    def _count_failed_start(self, error: Exception) -> None:
        self._failed_starts += 1
        if self._failed_starts >= self._attempts * self._crew.size:
            raise PoolError(
                f"pool: {self._failed_starts} workers in a row died while they opened the models ({reason(error)}).",
                "Check the memory a worker needs against what it has.",
            ) from error
