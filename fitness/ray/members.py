"""One worker of a pool: its actor, and the jobs it has."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ecotone.fitness.ray.actor import RemoteWorker, packed, paths_here
from ecotone.fitness.ray.cluster import Clock, Cluster
from ecotone.fitness.ray.jobs import Job
from ecotone.fitness.runtime import Runtime
from ecotone.fitness.specs import WorkerSpec


@dataclass(eq=False)
class Member:
    """An actor, from when it is asked for on, and its jobs, oldest first.

    Args:
        actor: Ray's handle of it.
        placed: The call whose answer is there once its process runs.
        opened: The call whose answer is there once it has opened the models.
        since: The clock's time since when it has the oldest job to work on, or nothing.
        pid: The id of its process, once it is ready.
        node: The id of its node, once it is ready.
        queue: Its jobs, each with the call that scores it.
    """

    actor: Any
    placed: Any
    opened: Any
    since: float
    pid: int | None = None
    node: str = ""
    queue: deque[tuple[Any, Job]] = field(default_factory=deque)

    @property
    def ready(self) -> bool:
        """Whether it has opened the models."""
        return self.pid is not None

    @property
    def jobs(self) -> list[Job]:
        """Its jobs, oldest first."""
        return [job for _, job in self.queue]

    @property
    def about(self) -> dict[str, Any]:
        """The fields of an event that say which worker it is."""
        return {"worker": self.pid, "node": self.node}

    def give(self, job: Job, now: float) -> None:
        """Have the worker score a job after the jobs it has."""
        if not self.queue:
            self.since = now
        self.queue.append((self.actor.measure.remote(*packed(job.trials)), job))

    def drop_oldest(self, now: float) -> Job:
        """Take the oldest job from it, which it has answered; the next is the one it works on."""
        self.since = now
        return self.queue.popleft()[1]


class Actors:
    """Asks the cluster for actors.

    Args:
        cluster: The cluster to start them on.
        spec: The spec from which each worker is made.
        settings: The resources of the cluster that each worker holds.
        clock: Tells the time.
    """

    def __init__(self, cluster: Cluster, spec: WorkerSpec, settings: Runtime, clock: Clock) -> None:
        self._cluster = cluster
        self._spec = spec
        self._settings = settings
        self._clock = clock
        self._kind: Any = None
        self._arguments: tuple[Any, ...] = ()

    def prepare(self) -> None:
        """Put the data that all workers share into the connected cluster."""
        ray, settings = self._cluster.ray, self._settings
        self._arguments = (ray.put(self._spec), paths_here(self._spec))
        self._kind = ray.remote(RemoteWorker).options(
            num_cpus=settings.cpus_per_worker,
            num_gpus=settings.gpus_per_worker,
            resources=dict(settings.resources) or None,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )

    def ask(self) -> Member:
        """One more; returns at once."""
        actor = self._kind.remote()
        return Member(actor, actor.here.remote(), actor.open.remote(*self._arguments), self._clock())
