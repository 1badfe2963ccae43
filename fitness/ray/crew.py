"""The workers of a pool: asked for, replaced when they die, given back, and asked for again after pauses."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Collection
from typing import Any

from ecotone.fitness.ray.cluster import LOOK_EVERY, Clock, Cluster, PlaceWait
from ecotone.fitness.ray.events import event, reason
from ecotone.fitness.ray.jobs import Job, Jobs
from ecotone.fitness.ray.members import Actors, Member
from ecotone.fitness.ray.meters import Meters
from ecotone.populations.trial import Evaluation

_LONGEST_PAUSE = 60.0  # seconds between two attempts to open a worker


class Retries:
    """Workers that are asked for later.

    Args:
        clock: Tells the time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._due: list[float] = []
        self._setbacks = 0

    def __len__(self) -> int:
        return len(self._due)

    def add(self, seconds: float) -> None:
        """One more after so many seconds."""
        self._due.append(self._clock() + seconds)

    def add_after_failure(self) -> None:
        """One more after a pause, the longer the more have failed since one was opened."""
        self._setbacks += 1
        self.add(min(2.0 ** min(self._setbacks, 10), _LONGEST_PAUSE))

    def opened(self) -> None:
        """One was opened: pauses are short again."""
        self._setbacks = 0

    def take_due(self) -> int:
        """How many are to be asked for now; they are forgotten."""
        now, before = self._clock(), len(self._due)
        self._due = [at for at in self._due if at > now]
        return before - len(self._due)

    def clear(self) -> None:
        """Ask for none."""
        self._due.clear()


class Crew:
    """The workers that are running and the workers that are asked for.

    Args:
        size: The number of workers to have.
        actors: Asks for them.
        cluster: The cluster of the workers.
        jobs: Takes what they finished and what they did not.
        meters: Are told how many there are.
        wait: Limits how long none has a place.
        clock: Tells the time.

    Attributes:
        members: All of them, ready or not.
    """

    def __init__(
        self, size: int, actors: Actors, cluster: Cluster, jobs: Jobs, meters: Meters, wait: PlaceWait, clock: Clock
    ) -> None:
        self.members: list[Member] = []
        self.size = size
        self._actors = actors
        self._cluster = cluster
        self._jobs = jobs
        self._meters = meters
        self._wait = wait
        self._retries = Retries(clock)

    @property
    def ready(self) -> list[Member]:
        """The workers that have opened the models."""
        return [member for member in self.members if member.ready]

    # -- asking for workers ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Ask for all."""
        self._meters.make()
        self._actors.prepare()
        self._wait.restart()
        for _ in range(self.size):
            self.ask()

    def ask(self) -> None:
        """Ask for one more."""
        if self._cluster.silent:  # without a head no new actor can be registered, nor killed later
            self._retries.add(LOOK_EVERY)
            return
        self.members.append(self._actors.ask())
        event(logging.DEBUG, "worker_started", "Asked for a worker.")

    def ask_for_those_given_back(self) -> None:
        """Ask again for workers that were given back, as many as there is work for."""
        jobs = len(self._jobs.waiting) + sum(len(member.queue) for member in self.members)
        if not self.members:
            self._wait.restart()
        for _ in range(min(self.size, jobs) - len(self.members) - len(self._retries)):
            self.ask()

    def ask_for_those_put_off(self) -> None:
        """Ask again for workers that could not be opened and whose pause is over."""
        for _ in range(self._retries.take_due()):
            self.ask()

    def opened(self, member: Member, pid: int, node: str, now: float) -> None:
        """A worker has opened the models."""
        member.pid, member.node, member.since = pid, node, now
        self._retries.opened()
        event(logging.INFO, "worker_ready", "A worker is ready.", **member.about)
        self.report()

    def check_places(self) -> None:
        """Wait for a place for as long as the settings allow, and log the reason for waiting.

        Raises:
            PoolError: It has taken too long.
        """
        if self._cluster.silent:
            return  # nobody to ask; how long the head may be silent is checked elsewhere
        self._wait.check(placed=any(self._cluster.arrived(member.placed) for member in self.members))

    # -- doing without a worker --------------------------------------------------------------------------

    def replace(self, member: Member, error: Exception) -> None:
        """Have another in place of a worker that died; its oldest job is the suspect, the others wait again."""
        why = reason(error)
        event(logging.WARNING, "worker_died", f"A worker died ({why}); asking for another.", **member.about)
        lost = self.retire(member)
        self._jobs.put_back(lost[1:])
        if lost:
            self._jobs.died(lost[0], error)
        self.ask()

    def leave(self, member: Member, why: str) -> None:
        """Have another in place of a worker that must go; none of its jobs is to blame."""
        event(logging.INFO, "worker_retired", f"A worker leaves ({why}); asking for another.", **member.about)
        self._jobs.put_back(self.retire(member))
        self.ask()

    def leave_nodes(self, nodes: Collection[str]) -> None:
        """Have others in place of the workers on nodes that are to go."""
        for node in nodes:
            leaving = [member for member in self.members if member.node == node]
            if leaving:
                event(logging.WARNING, "draining", f"Node {node[:8]} is to go.", node=node, workers=len(leaving))
            for member in leaving:
                self.leave(member, "its node is to go")

    def put_off(self, member: Member, error: Exception) -> None:
        """Go on without a worker that could not be opened while others can, and ask for it again later."""
        why = reason(error)
        sentence = f"A worker could not be opened ({why}); the others go on, and it is tried again later."
        event(logging.WARNING, "worker_failed", sentence, error=why)
        self.retire(member)
        self._retries.add_after_failure()

    def give_back(self, member: Member) -> None:
        """Do without a worker that has nothing to do until there is work for it."""
        event(logging.INFO, "worker_retired", "A worker without work is given back.", **member.about)
        self.retire(member)

    def retire(self, member: Member) -> list[Job]:
        """End a worker and take in its finished jobs. Returns its other jobs, oldest first."""
        lost = [job for call, job in list(member.queue) if not self._collected(call, job)]
        self.members.remove(member)
        self._cluster.kill(member.actor)
        self.report()
        if not self.ready:
            self._wait.restart()
        return lost

    def _collected(self, call: Any, job: Job) -> bool:
        """Take in the result of a worker that died later, if it is there."""
        ray = self._cluster.ray
        try:
            answer = ray.get(call, timeout=1.0) if self._cluster.arrived(call) else None
        except ray.exceptions.RayError:
            return False
        return self.take(job, answer)

    def take(self, job: Job, answer: bytes | None) -> bool:
        """Take in a worker's answer; False when it has none, because its process was told to stop."""
        if answer is None:
            return False
        evaluations: list[Evaluation] = pickle.loads(answer)  # noqa: S301 - our own worker's
        self._jobs.settle(job, evaluations)
        return True

    def end(self) -> None:
        """End all workers and ask for none."""
        self._retries.clear()
        try:
            for member in self.members:
                self._cluster.kill(member.actor)
        finally:
            self.members.clear()
            self.report()

    def report(self) -> None:
        """Tell the metrics how many workers there are, how many work, and how many batches wait."""
        ready = self.ready
        busy = sum(bool(member.queue) for member in ready)
        queue = len(self._jobs.waiting) + sum(max(0, len(member.queue) - 1) for member in ready)
        self._meters.state(len(ready), busy / max(1, len(ready)), queue)
