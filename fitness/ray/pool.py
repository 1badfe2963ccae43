"""Workers on a Ray cluster, or on this machine's cores, behind the protocol of all pools.

Workers are plain ``Worker`` objects, one an actor. An actor that dies is retired and a new one asked for; Ray's own
restarts are not used, because a restart that finds no place fails every call in between. A batch whose worker died
is tried again, and its results do not depend on who scores it. Readiness is an answer that is waited for like any
other, so a worker that cannot be placed or opened delays nothing while there are others. What a worker has when its
node is drained or its process is told to stop goes to others at once. Batches past their time limit are retired with
their worker.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import time
from types import TracebackType

from ecotone.fitness.pools import Batch, Completed
from ecotone.fitness.ray.cluster import LOOK_EVERY, Clock, Cluster, PlaceWait
from ecotone.fitness.ray.crew import Crew
from ecotone.fitness.ray.events import cause, log, reason
from ecotone.fitness.ray.jobs import Jobs
from ecotone.fitness.ray.members import Actors, Member
from ecotone.fitness.ray.meters import Meters
from ecotone.fitness.ray.results import Results
from ecotone.fitness.ray.schedule import Schedule
from ecotone.fitness.runtime import Runtime
from ecotone.fitness.specs import WorkerSpec
from ecotone.populations.errors import EcotoneError, InputError, PoolError
from ecotone.populations.space import Space


class RayPool:
    """Workers as Ray actors.

    The pool works with as many workers as the cluster can place, from the first that is ready on; it keeps asking for
    the others, so an autoscaler may add nodes and a node may leave. While others work, a worker that cannot be opened
    is reported and tried again after growing pauses.

    Args:
        spec: The models and objectives that each worker opens. A worker without a GPU of its own uses none: the device
            ``auto`` means the CPU then.
        settings: Number, place and resources of workers, and the limits of time.
        clock: Tells the time by which workers are late, idle or tried again.

    Raises:
        InputError: The device is ``cuda`` and no worker gets a GPU.
    """

    def __init__(self, spec: WorkerSpec, settings: Runtime, clock: Clock = time.monotonic) -> None:
        self.slots: int = settings.workers
        self._attempts = settings.attempts
        self._clock = clock
        meters = Meters()
        self._jobs = Jobs(settings.attempts, meters)
        asked = {"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker, **settings.resources}
        self._cluster = cluster = Cluster(settings.address, asked, clock)
        actors = Actors(cluster, _placed(spec, settings), settings, clock)
        wait = PlaceWait(cluster, settings.start_timeout, clock)
        self._crew = Crew(self.slots, actors, cluster, self._jobs, meters, wait, clock)
        self._results = Results(self._crew, cluster, self._jobs, settings.attempts, clock)
        self._schedule = Schedule(self._crew, self._jobs, cluster, settings, clock)
        self._started = self._closed = False
        self._error: EcotoneError | None = None
        self._looked_at = clock()

    def start(self) -> Space:
        """Connect, ask for the workers, and wait for the first.

        Raises:
            EcotoneError: A checkpoint, objective or data set cannot be used; raised by the worker.
            PoolError: The cluster cannot be reached, or has no place for a worker.
        """
        if self._started or self._closed:
            raise PoolError("pool: expected to be started once, found it started before.", "Make a new pool.")
        self._started = True
        try:
            self._cluster.connect()
            self._cluster.check_place()
            self._schedule.begin()
            self._crew.begin()
            return self._first_space()
        except BaseException as error:
            try:
                self.close()
            except Exception as other:  # the first error is the one to tell
                log.debug("closing a pool that did not start: %s", other)
            if isinstance(error, EcotoneError) or not isinstance(error, Exception):
                raise
            raise PoolError(
                f"pool: the workers could not be started: Ray raised {type(error).__name__} ({reason(error)}).",
                "Try again. If it persists, see Ray's logs in /tmp/ray/session_latest/logs, or use "
                "--set runtime.pool=serial.",
            ) from error

    def submit(self, batch: Batch) -> None:
        """Queue a batch; returns at once."""
        if not self._started or self._closed:
            raise PoolError("pool: expected to be started before a batch is submitted.", "Call start() first.")
        self._jobs.add(batch)
        self._schedule.note_work()
        self._schedule.hand_out()
        self._crew.ask_for_those_given_back()

    def completed(self, timeout: float | None = None) -> Completed:
        """Finished batches; blocks until there is one or ``timeout`` seconds have passed.

        Raises:
            PoolError: No worker has had a place for ``start_timeout`` seconds, new ones keep dying, or the cluster's
                head or this process's node is gone. What was finished before is returned first.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        while self._jobs.unfinished and not self._jobs.finished and self._error is None:
            left = until - time.monotonic()
            try:
                self._step(max(0.0, min(left, 1.0)))
            except EcotoneError as error:
                self._error = error
            if left <= 0:
                break
        if self._error is not None and not self._jobs.finished:
            raise self._error
        return self._jobs.take_finished()

    def close(self) -> None:
        """Stop the workers, and the cluster if the pool started it."""
        if self._closed:
            return
        self._closed = True
        self._jobs.clear()
        try:
            self._crew.end()
        finally:
            self._cluster.shut_down()

    def check_models(self) -> None:
        """Have a worker compare the hashes of the models' files with those that were found first.

        Raises:
            ModelChangedError: A file has changed.
        """
        errors, member = self._cluster.ray.exceptions, next(iter(self._crew.ready), None)
        if member is None:
            return
        try:
            self._cluster.ray.get(member.actor.check_models.remote())
        except errors.RayTaskError as error:
            raise cause(error) from error
        except errors.RayError as error:  # it has died, and another would have to read all of the files again
            self._results.models.check_after_death(error)

    def pids(self) -> list[int]:
        """Process ids of the workers that are ready."""
        return [member.pid for member in self._crew.members if member.pid is not None]

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _first_space(self) -> Space:
        """The space, from the first worker that lives long enough to answer."""
        deaths, errors = 0, self._cluster.ray.exceptions
        while True:
            while not self._crew.ready:
                self._step(1.0)
            member = self._crew.ready[0]
            try:
                return self._space_of(member)
            except errors.RayTaskError as error:
                raise cause(error) from error
            except errors.RayError as error:
                self._results.models.check_after_death(error)
                deaths += 1
                if deaths >= self._attempts:
                    raise PoolError(
                        f"pool: {deaths} workers died while they read the models ({reason(error)}).",
                        "Check the memory a worker needs against what it has.",
                    ) from error
                self._crew.replace(member, error)

    def _space_of(self, member: Member) -> Space:
        space = pickle.loads(self._cluster.ray.get(member.actor.space.remote()))  # noqa: S301 - our own worker's
        assert isinstance(space, Space)
        return space

    def _step(self, timeout: float) -> None:
        """Hand out work, wait for any answer, take in all there are, and look after the workers."""
        self._schedule.hand_out()
        patience = max(0.0, min(timeout, self._schedule.seconds_left()))
        answered = self._results.wait(patience)
        self._schedule.looked(patience)
        if answered:
            self._results.take(answered)
        elif not self._crew.ready:
            self._crew.check_places()
        self._watch()
        self._schedule.hand_out()

    def _watch(self) -> None:
        """Retire workers that are late or idle, ask for more, and every second look at the cluster."""
        self._schedule.enforce()
        if self._jobs.waiting:
            self._crew.ask_for_those_given_back()
        self._crew.ask_for_those_put_off()
        now = self._clock()
        if now - self._looked_at >= LOOK_EVERY:
            self._looked_at = now
            self._crew.leave_nodes(self._cluster.leaving())
            self._crew.report()


def _placed(spec: WorkerSpec, settings: Runtime) -> WorkerSpec:
    """The spec with a device that fits the resources of each worker."""
    if settings.gpus_per_worker:
        return spec
    if spec.device == "cuda":
        raise InputError("gpus_per_worker: expected more than 0 for device cuda, found 0.", "Give each worker a GPU.")
    return dataclasses.replace(spec, device="cpu") if spec.device == "auto" else spec
