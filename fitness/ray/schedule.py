"""Which worker gets which job, and which worker is past its time or has nothing to do."""

from __future__ import annotations

import logging
import math

from ecotone.fitness.ray.cluster import Clock, Cluster
from ecotone.fitness.ray.crew import Crew
from ecotone.fitness.ray.events import event
from ecotone.fitness.ray.jobs import Jobs
from ecotone.fitness.ray.members import Member
from ecotone.fitness.runtime import Runtime

QUEUED = 2  # jobs at one worker: the one it scores, and the next so that it never waits for the manager
_UNSEEN = 2.0  # seconds for which nobody looked at the workers that are not held against them
_DECLARED = 30.0  # seconds, with some to spare, after which Ray knows that a node is gone
_PATIENT = 1.0  # seconds that a job waits behind another before an idle worker gets it


class Schedule:
    """Hands jobs out, and ends workers that have had one, or none, for too long.

    Args:
        crew: The workers.
        jobs: The jobs to do.
        cluster: The cluster of the workers.
        settings: ``time_limit`` and ``idle_timeout``.
        clock: Tells the time.
    """

    def __init__(self, crew: Crew, jobs: Jobs, cluster: Cluster, settings: Runtime, clock: Clock) -> None:
        self._crew = crew
        self._jobs = jobs
        self._cluster = cluster
        self._time_limit = math.inf if settings.time_limit is None else settings.time_limit
        self._idle_timeout = math.inf if settings.idle_timeout is None else settings.idle_timeout
        self._clock = clock
        self._looked_at = self._busy_at = clock()

    def begin(self) -> None:
        """Somebody looks at the workers from now on."""
        self._looked_at = self._clock()

    def note_work(self) -> None:
        """There are jobs that no worker has."""
        self._busy_at = self._clock()

    def hand_out(self) -> None:
        """Give the oldest jobs to the workers with the shortest queues."""
        ready, waiting = self._crew.ready, self._jobs.waiting
        # A worker that is asked for again finds work left; one that may never be placed is not waited for.
        most = 1 if len(ready) < len(self._crew.members) and self._idle_timeout < math.inf else QUEUED
        while waiting and ready:
            room = [member for member in ready if waiting[0].fits(member.jobs, most)]
            if not room:
                return
            least = min(room, key=lambda member: len(member.queue))
            least.give(waiting.popleft(), self._clock())

    def seconds_left(self) -> float:
        """Until the first worker is past its time; infinite without a limit, negative when one is past it."""
        due = min((member.since + self._allowed(member) for member in self._crew.members), default=math.inf)
        return due - self._clock()

    def looked(self, waited: float) -> None:
        """Somebody looks now, after having waited for ``waited`` seconds at most.

        What passed beyond that, because the process was stopped or computed, is not held against the workers.
        """
        now = self._clock()
        unseen = now - self._looked_at - waited
        self._looked_at = now
        if unseen > _UNSEEN:
            for member in self._crew.members:
                member.since += unseen

    def enforce(self) -> None:
        """Replace workers that are past their time, give idle ones back, and level the queues."""
        now = self._clock()
        if self._jobs.waiting:
            self._busy_at = now
        for member in list(self._crew.members):
            if now - member.since > self._allowed(member):
                self._overdue(member)
            elif self._idle(member, now):
                self._crew.give_back(member)
        self._level(now)

    def _allowed(self, member: Member) -> float:
        """Seconds that a worker may take for the oldest job it has."""
        return self._time_limit * len(member.queue[0][1].trials) if member.queue else math.inf

    def _overdue(self, member: Member) -> None:
        """Have another in place of a worker past its time: split its oldest job, or give a candidate alone up."""
        job, seconds = member.queue[0][1], self._allowed(member)
        lost = self._crew.retire(member)
        self._crew.ask()
        if not lost or lost[0] is not job:  # its result came at the last moment
            self._jobs.put_back(lost)
            return
        sentence = f"A batch of {len(job.trials)} took more than {seconds:g} s; its worker is replaced."
        about = {"trials": [trial.number for trial in job.trials], "seconds": seconds, **member.about}
        event(logging.WARNING, "trial_timed_out", sentence, **about)
        self._jobs.put_back(lost[1:])
        doubtful = member.node != self._cluster.home and seconds < _DECLARED and not job.suspect
        self._jobs.timed_out(job, seconds, doubtful)

    def _idle(self, member: Member, now: float) -> bool:
        """Whether a worker has had nothing to do for so long, while others work, that it is to be given back."""
        if not member.ready or member.queue or not self._jobs.unfinished:
            return False
        if any(len(other.queue) > 1 for other in self._crew.members):
            return False
        return now - max(member.since, self._busy_at) > self._idle_timeout

    def _level(self, now: float) -> None:
        """Have a worker without anything to do take a job that waits behind another one."""
        if self._jobs.waiting or all(member.queue for member in self._crew.ready):
            return
        for member in self._crew.members:
            if len(member.queue) > 1 and now - member.since > _PATIENT:
                call, job = member.queue.pop()
                self._cluster.ray.cancel(call)  # it is skipped there; if it has just begun, nobody waits for its answer
                self._jobs.waiting.append(job)
                return
