"""Workers on a Ray cluster, or on this machine's cores. The only file that imports Ray.

Workers are plain ``Worker`` objects, one an actor. An actor that dies is retired and a new one asked for; Ray's own
restarts are not used, because a restart that finds no place fails every call in between. A batch whose worker died
is tried again, and nothing of it depends on who scores it. Readiness is a result that is waited for like any other,
so a worker that cannot be placed or opened holds nobody up while there are others. What a worker has when its node is
drained or its process is told to stop goes to others at once. Batches past their time limit are retired with their
worker.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import pickle
import platform
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from ecotone.fitness.pools import Batch, Completed
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.worker import Worker, WorkerBrokenError
from ecotone.populations.errors import CheckpointError, EcotoneError, InputError, PoolError, first_line
from ecotone.populations.space import Space
from ecotone.populations.trial import Evaluation, Trial

QUEUED = 2  # batches at one worker: the one it scores, and the next so that it never waits for the manager
_PIECE = 98_000  # bytes; Ray sends arguments below 100 kB with the call, others through its object store
_PIECES = 8  # above it the object store is faster
_OBJECT_STORE_BYTES = 256 * 1024**2  # of a local cluster; genomes are small
_EVERY = 1.0  # seconds between looks at the cluster
_PLACED = 120.0  # seconds within which a worker has a place on a cluster of our own
_GROWN = 3600.0  # on another, where machines may have to be started first
_FIRST_WORD, _NEXT_WORD = 10.0, 60.0  # seconds after which it is told that no worker has a place
_UNSEEN = 2.0  # seconds for which nobody looked at the workers that are not held against them
_DECLARED = 30.0  # seconds, with some to spare, after which Ray knows that a node is gone
_PATIENT = 1.0  # seconds that a batch waits behind another before an idle worker gets it
_BACKOFF = 60.0  # the most seconds between two attempts to open a worker
_RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"  # after which Ray ends a process whose head is gone
_FAREWELL = 20.0  # seconds before that in which a search can still say why it ends
_BORDERS = [0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]  # seconds, of histograms

_log = logging.getLogger("ecotone")


class _ToldToStop(BaseException):
    """SIGTERM came while a batch was scored. No objective's ``except Exception`` takes it for the candidate's fault."""


class RemoteWorker:
    """A ``Worker`` in an actor. Opening is a call of its own, so that its errors arrive as they were raised.

    After a SIGTERM it measures nothing any more and says so: the process is to go, whoever it works for.
    """

    def __init__(self) -> None:
        self._scoring = False
        self._stopping = False
        self._rays = signal.signal(signal.SIGTERM, self._stop)

    def here(self) -> None:
        """Answers once the process runs."""

    def open(self, spec: WorkerSpec, paths: Sequence[str] = ()) -> tuple[int, str]:
        """Make the worker; returns the ids of its process and of its node.

        Args:
            spec: What it is made of.
            paths: Those that the driver's node has, and this one must have too.

        Raises:
            CheckpointError: This node lacks one of the paths.
            EcotoneError: As ``Worker``.
        """
        _check_paths(paths)
        self._worker = Worker(spec)
        return os.getpid(), _ray(local=False).get_runtime_context().get_node_id()

    def space(self) -> bytes:
        """The pickled ``Space``: arrays that lived in Ray's shared memory would not outlive the cluster."""
        return pickle.dumps(self._worker.space(), protocol=5)

    def measure(self, *parts: bytes | Sequence[Trial]) -> bytes | None:
        """The pickled evaluations of the trials that ``_parts`` made ``parts`` of; None once told to stop."""
        try:
            self._scoring = True
            packed = None if self._stopping else pickle.dumps(self._worker.measure(_whole(parts)), protocol=5)
            return None if self._stopping else packed  # an objective may have swallowed what told it to stop
        except _ToldToStop:
            return None
        finally:
            self._scoring = False

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._stopping:
            return
        self._stopping = True
        if self._scoring:
            raise _ToldToStop
        if callable(self._rays):
            self._rays(number, frame)


@dataclass
class _Job:
    """Trials of one batch that are scored together, and how many workers died while they were the oldest there.

    A worker may die of a later job before the result of an earlier one has left it. So a job that a worker died of
    is tried again with the worker to itself; only then is it to blame.
    """

    ticket: int
    places: range
    trials: tuple[Trial, ...]
    deaths: int = 0
    suspect: bool = False

    def fits(self, queue: Collection[tuple[Any, _Job]], most: int) -> bool:
        """Whether it may be queued at a worker behind the jobs of ``queue``, ``most`` in all."""
        if self.suspect:
            return not queue
        return len(queue) < most and not any(job.suspect for _, job in queue)


@dataclass
class _Open:
    """A batch that is not finished, and the evaluations there are."""

    batch: Batch
    evaluations: dict[int, Evaluation] = field(default_factory=dict)


@dataclass
class _Hand:
    """An actor: ids of its process and node once it is ready, its queue, oldest first, and since when it has the oldest
    to work on, or nothing. ``place`` is there once its process runs.
    """

    actor: Any
    place: Any
    ready: Any
    pid: int | None = None
    node: str = ""
    queue: deque[tuple[Any, _Job]] = field(default_factory=deque)
    since: float = field(default_factory=time.monotonic)


class RayPool:
    """Workers as Ray actors.

    The pool works with as many workers as the cluster can place, from the first that is ready on; it keeps asking for
    the others, so an autoscaler may add nodes and a node may leave. While others work, one that cannot be opened is
    told of and tried again after growing pauses.

    Args:
        spec: What each worker is made of. A worker without a GPU of its own uses none: ``auto`` means the CPU then.
        workers: How many workers to ask for.
        address: Of a running cluster (``auto``, ``host:port`` or ``ray://...``); None starts one on this machine,
            or uses the one this process is connected to. Only a cluster that the pool started is shut down by it.
        cpus_per_worker: Logical CPUs a worker holds.
        gpus_per_worker: Logical GPUs a worker holds; a fraction lets workers share one.
        resources: Custom resources a worker holds, by name.
        start_timeout: Seconds to wait for a place when no worker has one; opening models takes what it takes. None is
            120 on a cluster that the pool starts and 3600 on another, where machines may have to be started first.
        attempts: How many workers may die of a batch before its candidates are tried alone, and how many of
            a candidate alone before it is given up as failed.
        time_limit: Seconds that a candidate may take at a worker; a batch has them for each of its candidates. Past it
            the worker is killed and replaced; candidates of a batch are then tried alone once, one alone has failed
            (with a limit below half a minute, within which Ray may not know that a node is gone, one at another node is
            tried once more). While nobody looks, because the process is stopped or computes, it stands still. None for
            no limit.
        idle_timeout: Seconds after which a worker that has nothing to do while others work, and all work is handed out,
            is given back to the cluster, until there is work for it again; None keeps it.

    Raises:
        InputError: A number is out of range.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        workers: int,
        address: str | None = None,
        cpus_per_worker: float = 1.0,
        gpus_per_worker: float = 0.0,
        resources: Mapping[str, float] | None = None,
        start_timeout: float | None = None,
        attempts: int = 3,
        time_limit: float | None = None,
        idle_timeout: float | None = None,
    ) -> None:
        _check(spec, workers, cpus_per_worker, gpus_per_worker, attempts)
        _check_times({"start_timeout": start_timeout, "time_limit": time_limit, "idle_timeout": idle_timeout})
        self.slots = workers
        no_gpu = gpus_per_worker == 0 and spec.device == "auto"
        self._spec = dataclasses.replace(spec, device="cpu") if no_gpu else spec
        self._address = address
        self._asked = {"CPU": cpus_per_worker, "GPU": gpus_per_worker, **(resources or {})}
        self._resources = dict(resources or {})
        self._start_timeout = start_timeout
        self._attempts = attempts
        self._time_limit = math.inf if time_limit is None else time_limit
        self._idle_timeout = math.inf if idle_timeout is None else idle_timeout
        self._ray: Any = None
        self._owned = False
        self._started = False
        self._closed = False
        self._hands: list[_Hand] = []
        self._backlog: deque[_Job] = deque()
        self._open: dict[int, _Open] = {}
        self._finished: Completed = []
        self._error: EcotoneError | None = None
        self._tickets = 0
        self._failed_starts = 0
        self._later: list[float] = []  # when to ask for workers that could not be opened
        self._setbacks = 0
        self._alone_since = self._busy_at = self._seen_at = self._looked_at = time.monotonic()
        self._told_alone = -math.inf
        self._silent_since: float | None = None
        self._meters = _Meters()

    # -- the pool's protocol -----------------------------------------------------------------------------

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
            self._connect()
            self._check_place()
            self._spec_ref = self._ray.put(self._spec)
            self._actor = self._ray.remote(RemoteWorker)
            self._paths = [path for path in _paths(self._spec) if Path(path).expanduser().exists()]
            self._meters.make()
            self._home = self._ray.get_runtime_context().get_node_id()
            self._draining = _draining_of(self._ray)
            if self._start_timeout is None:
                self._start_timeout = _PLACED if self._owned and self._address is None else _GROWN
            self._alone_since = self._looked_at = time.monotonic()
            for _ in range(self.slots):
                self._spawn()
            return self._first_space()
        except BaseException:
            self.close()
            raise

    def submit(self, batch: Batch) -> None:
        """Queue a batch; returns at once."""
        if not self._started or self._closed:
            raise PoolError("pool: expected to be started before a batch is submitted.", "Call start() first.")
        ticket = self._tickets = self._tickets + 1
        self._open[ticket] = _Open(batch)
        self._backlog.append(_Job(ticket, range(len(batch.trials)), batch.trials))
        self._busy_at = time.monotonic()
        self._dispatch()
        self._recall()

    def completed(self, timeout: float | None = None) -> Completed:
        """Finished batches; blocks until there is one or ``timeout`` seconds have passed.

        Raises:
            PoolError: No worker has had a place for ``start_timeout`` seconds, new ones keep dying, or the cluster's
                head or this process's node is gone. What was finished before is returned first.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        while self._open and not self._finished and self._error is None:
            left = until - time.monotonic()
            try:
                self._step(max(0.0, min(left, 1.0)))
            except EcotoneError as error:
                self._error = error
            if left <= 0:
                break
        if self._error is not None and not self._finished:
            raise self._error
        finished, self._finished = self._finished, []
        return finished

    def close(self) -> None:
        """Stop the workers, and the cluster if the pool started it."""
        if self._closed:
            return
        self._closed = True
        self._open.clear()
        self._backlog.clear()
        self._later.clear()
        try:
            for hand in self._hands:
                self._kill(hand)
        finally:
            self._hands.clear()
            self._measure()
            if self._owned:
                self._ray.shutdown()

    def pids(self) -> list[int]:
        """Process ids of the workers that are ready."""
        return [hand.pid for hand in self._hands if hand.pid is not None]

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- the cluster -------------------------------------------------------------------------------------

    def _connect(self) -> None:
        self._ray = ray = _ray(local=self._address is None)
        if ray.is_initialized():
            return
        options: dict[str, Any] = {"address": self._address, "log_to_driver": False, "logging_level": logging.ERROR}
        if self._address is None:
            options |= {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        stop = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            where = "a local Ray cluster cannot be started" if self._address is None else f"no cluster: {self._address}"
            raise PoolError(f"pool: {where} ({error}).", "Check the address and RAY_AUTH_MODE (token).") from error
        if stop is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)  # Ray's handler would exit at once
        self._owned = True

    def _look(self) -> None:
        """Ask the head which nodes are to go, and leave these.

        Raises:
            PoolError: The head has not answered for so long that Ray would end this process soon, without a word.
        """
        try:
            draining = self._draining(timeout=1.0)
        except Exception as error:
            self._silent_since = self._silent_since or time.monotonic()
            silent = time.monotonic() - self._silent_since
            limit = float(os.environ.get(_RECONNECT, "60"))
            if silent > max(limit / 2, limit - _FAREWELL):
                raise PoolError(
                    f"pool: the cluster's head has not answered for {silent:.0f} s ({_first_line(error)}).",
                    "Start a cluster, then resume the run there.",
                ) from error
            return
        self._silent_since = None
        for node in draining:
            leaving = [hand for hand in self._hands if hand.node == node]
            if leaving:
                _event(logging.WARNING, "draining", f"Node {node[:8]} is to go.", node=node, workers=len(leaving))
            for hand in leaving:
                self._leave(hand, "its node is to go")

    def _check_home(self) -> None:
        """Refuse to go on without a node of our own: every actor dies with its owner's node."""
        if self._silent_since is not None:
            return  # nobody to ask
        if not any(node["NodeID"] == self._home for node in self._ray.nodes() if node["Alive"]):
            raise PoolError("pool: the Ray node that the search runs on has died.", "Resume the run on another node.")

    def _check_place(self) -> None:
        """Refuse at once what a cluster of our own, which cannot grow, has no place for."""
        if self._owned and self._address is None and not any(self._fits(node) for node in self._nodes()):
            raise PoolError(self._no_place("no worker can be placed"), "Ask for less, or name a larger cluster.")

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _fits(self, node: Mapping[str, float]) -> bool:
        return all(node.get(name, 0.0) >= amount for name, amount in self._asked.items())

    def _no_place(self, what: str) -> str:
        asked = ", ".join(f"{amount:g} {name}" for name, amount in self._asked.items() if amount)
        nodes = [", ".join(f"{n.get(name, 0.0):g} {name}" for name in self._asked) for n in self._nodes()]
        return f"pool: {what}: each asks for {asked or 'nothing'}, and the cluster's nodes have {'; '.join(nodes)}."

    # -- workers -----------------------------------------------------------------------------------------

    def _spawn(self) -> None:
        if self._silent_since is not None:  # whom a head that is gone never knew cannot be killed either
            self._later.append(time.monotonic() + _EVERY)
            return
        actor = self._actor.options(
            num_cpus=self._asked["CPU"],
            num_gpus=self._asked["GPU"],
            resources=self._resources or None,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        ).remote()
        self._hands.append(_Hand(actor, actor.here.remote(), actor.open.remote(self._spec_ref, self._paths)))
        _event(logging.DEBUG, "worker_started", "Asked for a worker.")

    def _spawn_later(self) -> None:
        """Ask for a worker after a pause, the longer the more have failed since the last one was ready."""
        self._setbacks += 1
        self._later.append(time.monotonic() + min(2.0 ** min(self._setbacks, 10), _BACKOFF))

    def _recall(self) -> None:
        """Ask again for workers that were given back, as many as there is work for."""
        jobs = len(self._backlog) + sum(len(hand.queue) for hand in self._hands)
        if not self._hands:
            self._alone_since = time.monotonic()
        for _ in range(min(self.slots, jobs) - len(self._hands) - len(self._later)):
            self._spawn()

    def _first_space(self) -> Space:
        deaths = 0
        while True:
            hand = next((hand for hand in self._hands if hand.pid is not None), None)
            if hand is None:
                self._step(1.0)
                continue
            try:
                space = pickle.loads(self._ray.get(hand.actor.space.remote()))  # noqa: S301 - our own worker's
                assert isinstance(space, Space)
                return space
            except self._ray.exceptions.RayTaskError as error:
                raise _cause(error) from error
            except self._ray.exceptions.RayError as error:
                deaths += 1
                if deaths >= self._attempts:
                    raise PoolError(
                        f"pool: {deaths} workers died while they read the models ({_first_line(error)}).",
                        "Check the memory a worker needs against what it has.",
                    ) from error
                self._replace(hand, error)

    def _replace(self, hand: _Hand, error: Exception) -> None:
        """Have another in place of a worker that died; its oldest batch is the suspect, the others go back in line."""
        reason = _first_line(error)
        _event(logging.WARNING, "worker_died", f"A worker died ({reason}); asking for another.", **_about(hand))
        lost = self._retire(hand)
        self._backlog.extendleft(reversed(lost[1:]))
        if lost:
            self._suspect(lost[0], error)
        self._spawn()

    def _leave(self, hand: _Hand, reason: str) -> None:
        """Have another in place of a worker that must go; none of its batches is to blame."""
        _event(logging.INFO, "worker_retired", f"A worker leaves ({reason}); asking for another.", **_about(hand))
        self._backlog.extendleft(reversed(self._retire(hand)))
        self._spawn()

    def _retire(self, hand: _Hand) -> list[_Job]:
        """Take a worker out; returns what it has not finished, oldest first."""
        lost = [job for ref, job in list(hand.queue) if not self._collect(ref, job)]
        self._hands.remove(hand)
        self._kill(hand)
        self._measure()
        if not self.pids():
            self._alone_since = time.monotonic()
        return lost

    def _kill(self, hand: _Hand) -> None:
        if self._silent_since is not None:
            return  # a head that is gone is waited for; workers end with this process
        try:
            self._ray.kill(hand.actor, no_restart=True)
        except Exception as error:  # the cluster may be gone already
            _log.debug("killing a worker: %s", error)

    # -- the loop ----------------------------------------------------------------------------------------

    def _step(self, timeout: float) -> None:
        """Hand out work, wait for any news, take in all there is, and look after the workers."""
        self._dispatch()
        refs = [hand.ready for hand in self._hands if hand.pid is None]
        refs += [ref for hand in self._hands for ref, _ in hand.queue]
        due = min((hand.since + self._allowed(hand) for hand in self._hands), default=math.inf)
        patience = max(0.0, min(timeout, due - time.monotonic()))
        if refs:
            self._ray.wait(refs, num_returns=1, timeout=patience, fetch_local=False)
        else:
            time.sleep(min(patience, _EVERY))
        self._forgive(patience)
        news, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False) if refs else ([], [])
        if news:
            errors = [error for hand in list(self._hands) if (error := self._attended(hand, set(news)))]
            if errors:
                raise errors[0]
        if not news and not self.pids():
            self._check_alone()
        self._watch()
        self._dispatch()

    def _forgive(self, patience: float) -> None:
        """Do not hold against the workers what passed, beyond ``patience``, since somebody looked at them last."""
        now = time.monotonic()
        unseen = now - self._looked_at - patience
        self._looked_at = now
        if unseen > _UNSEEN:
            for hand in self._hands:
                hand.since += unseen

    def _dispatch(self) -> None:
        """Give the oldest jobs to the workers with the shortest queues."""
        ready = [hand for hand in self._hands if hand.pid is not None]
        # A worker that is asked for again finds work left; one that may never be placed is not waited for.
        most = 1 if len(ready) < len(self._hands) and self._idle_timeout < math.inf else QUEUED
        while self._backlog and ready:
            job = self._backlog[0]
            room = [hand for hand in ready if job.fits(hand.queue, most)]
            if not room:
                return
            hand = min(room, key=lambda hand: len(hand.queue))
            self._backlog.popleft()
            if not hand.queue:
                hand.since = time.monotonic()
            hand.queue.append((hand.actor.measure.remote(*_parts(job.trials)), job))

    def _allowed(self, hand: _Hand) -> float:
        """Seconds that a worker may take for the oldest job it has."""
        return self._time_limit * len(hand.queue[0][1].trials) if hand.queue else math.inf

    def _watch(self) -> None:
        """Retire workers that are past their time or idle; every second look at the cluster and tell the metrics."""
        now = time.monotonic()
        if self._backlog:
            self._busy_at = now
        for hand in list(self._hands):
            if now - hand.since > self._allowed(hand):
                self._overdue(hand)
            elif self._idle(hand, now):
                _event(logging.INFO, "worker_retired", "A worker without work is given back.", **_about(hand))
                self._retire(hand)
        self._level(now)
        if self._backlog:
            self._recall()
        late = [at for at in self._later if at <= now]
        self._later = [at for at in self._later if at > now]
        for _ in late:
            self._spawn()
        if now - self._seen_at >= _EVERY:
            self._seen_at = now
            self._look()
            self._measure()

    def _level(self, now: float) -> None:
        """Have a worker without anything to do take a batch that waits behind another one."""
        if self._backlog or not any(hand.pid is not None and not hand.queue for hand in self._hands):
            return
        for hand in self._hands:
            if len(hand.queue) > 1 and now - hand.since > _PATIENT:
                ref, job = hand.queue.pop()
                self._ray.cancel(ref)  # it is skipped there; if it has just begun, nobody waits for what it gives
                self._backlog.append(job)
                return

    def _idle(self, hand: _Hand, now: float) -> bool:
        """Whether a worker has had nothing to do for so long, while others work, that it is to be given back."""
        if hand.pid is None or hand.queue or not self._open or any(len(other.queue) > 1 for other in self._hands):
            return False
        return now - max(hand.since, self._busy_at) > self._idle_timeout

    def _overdue(self, hand: _Hand) -> None:
        """Have another in place of a worker past its time: split its batch, or give a candidate alone up."""
        job, seconds = hand.queue[0][1], self._allowed(hand)
        lost = self._retire(hand)
        self._spawn()
        if not lost or lost[0] is not job:  # its result came at the last moment
            self._backlog.extendleft(reversed(lost))
            return
        sentence = f"A batch of {len(job.trials)} took more than {seconds:g} s; its worker is replaced."
        about = {"trials": [trial.number for trial in job.trials], "seconds": seconds, **_about(hand)}
        _event(logging.WARNING, "trial_timed_out", sentence, **about)
        self._backlog.extendleft(reversed(lost[1:]))
        doubtful = hand.node != self._home and seconds < _DECLARED and not job.suspect
        if len(job.trials) > 1 or doubtful:
            self._split(job)
        else:
            message = f"the candidate took more than {seconds:g} s (runtime.time_limit), so its worker was killed."
            self._settle(job, [Evaluation.failed("timed out", message, seconds=seconds)])

    def _measure(self) -> None:
        """Tell the metrics how the pool is."""
        ready = [hand for hand in self._hands if hand.pid is not None]
        busy = sum(bool(hand.queue) for hand in ready)
        queue = len(self._backlog) + sum(max(0, len(hand.queue) - 1) for hand in ready)
        self._meters.state(len(ready), busy / max(1, len(ready)), queue)

    def _attended(self, hand: _Hand, news: set[Any]) -> EcotoneError | None:
        """Attend to a worker; returns what ends the run, so that what the others have finished is taken in before."""
        try:
            self._attend(hand, news)
        except EcotoneError as error:
            return error
        return None

    def _attend(self, hand: _Hand, news: set[Any]) -> None:
        """Take in what a worker has finished, or replace it if it died."""
        try:
            if hand.pid is None and hand.ready in news:
                hand.pid, hand.node = self._ray.get(hand.ready)
                hand.since = time.monotonic()
                self._failed_starts = self._setbacks = 0
                _event(logging.INFO, "worker_ready", "A worker is ready.", **_about(hand))
                self._measure()
            while hand.queue and hand.queue[0][0] in news:
                ref, job = hand.queue[0]
                packed = self._ray.get(ref)
                if packed is None:
                    self._leave(hand, "its process was told to stop")
                    return
                self._take(job, packed)
                hand.queue.popleft()
                hand.since = time.monotonic()
        except self._ray.exceptions.RayTaskError as error:
            cause = _cause(error)
            if hand.pid is None and not self.pids():
                raise cause from error
            if hand.pid is None:
                self._put_off(hand, cause)
                return
            if isinstance(cause, WorkerBrokenError):
                self._replace(hand, cause)
                return
            self._raised(hand.queue.popleft()[1], error)
            hand.since = time.monotonic()
            self._attend(hand, news)
        except self._ray.exceptions.RayError as error:
            self._died(hand, error)

    def _here(self, ref: Any) -> bool:
        return bool(self._ray.wait([ref], num_returns=1, timeout=0, fetch_local=False)[0])

    def _died(self, hand: _Hand, error: Exception) -> None:
        self._check_home()
        if getattr(error, "preempted", False):
            self._leave(hand, "its node was preempted")
            return
        if hand.pid is None and self.pids():
            self._put_off(hand, error)
            return
        if hand.pid is None:
            self._failed_starts += 1
            if self._failed_starts >= self._attempts * self.slots:
                raise PoolError(
                    f"pool: {self._failed_starts} workers in a row died while they opened the models "
                    f"({_first_line(error)}).",
                    "Check the memory a worker needs against what it has.",
                ) from error
        self._replace(hand, error)

    def _put_off(self, hand: _Hand, error: Exception) -> None:
        """Go on without a worker that could not be opened while others can, and ask for it again later."""
        reason = _first_line(error)
        sentence = f"A worker could not be opened ({reason}); the others go on, and it is tried again later."
        _event(logging.WARNING, "worker_failed", sentence, error=reason)
        self._retire(hand)
        self._spawn_later()

    def _check_alone(self) -> None:
        """Wait for a place for as long as that may take, and say what is waited for."""
        if self._silent_since is not None:
            return  # nobody to ask; for how long is seen to elsewhere
        assert self._start_timeout is not None
        now = time.monotonic()
        if any(self._here(hand.place) for hand in self._hands):
            self._alone_since = now  # one has a place, and opens the models
        waited = now - self._alone_since
        if waited > self._start_timeout:
            raise PoolError(
                self._no_place(f"no worker had a place within {self._start_timeout:g} s"),
                "Ask for less, add nodes, or raise runtime.start_timeout.",
            )
        if waited >= _FIRST_WORD and now - self._told_alone >= _NEXT_WORD:
            self._told_alone = now
            sentence = self._no_place("no worker has a place yet")
            _event(logging.WARNING, "waiting", f"{sentence} Waiting up to {self._start_timeout:g} s.", seconds=waited)

    # -- jobs --------------------------------------------------------------------------------------------

    def _collect(self, ref: Any, job: _Job) -> bool:
        """Take in the result of a worker that died later, if it is there."""
        try:
            packed = self._ray.get(ref, timeout=1.0) if self._here(ref) else None
        except self._ray.exceptions.RayError:
            return False
        if packed is not None:
            self._take(job, packed)
        return packed is not None

    def _take(self, job: _Job, packed: bytes) -> None:
        evaluations: list[Evaluation] = pickle.loads(packed)  # noqa: S301 - our own worker's
        self._settle(job, evaluations)

    def _settle(self, job: _Job, evaluations: Sequence[Evaluation]) -> None:
        there = self._open[job.ticket]
        there.evaluations |= dict(zip(job.places, evaluations, strict=True))
        for evaluation in evaluations:
            self._meters.count(evaluation)
        if len(there.evaluations) == len(there.batch.trials):
            del self._open[job.ticket]
            ordered = [there.evaluations[place] for place in range(len(there.batch.trials))]
            self._finished.append((there.batch, ordered))

    def _suspect(self, job: _Job, error: Exception) -> None:
        """A worker died of this job, it seems: try it again, then its candidates alone, then give up."""
        alone, job.suspect = job.suspect, True
        job.deaths += 1
        if not alone or job.deaths < self._attempts:
            self._backlog.appendleft(job)
        elif len(job.trials) > 1:
            self._split(job)
        else:
            message = f"the worker process died each of {job.deaths} times it scored this candidate"
            self._settle(job, [Evaluation.failed("worker died", f"{message} ({_first_line(error)}).", str(error))])

    def _raised(self, job: _Job, error: Exception) -> None:
        """The call itself failed, which no objective can cause: find the candidate that does."""
        if len(job.trials) > 1:
            self._split(job)
        else:
            cause = _cause(error)
            message = f"worker: {type(cause).__name__}: {_first_line(cause)}"
            self._settle(job, [Evaluation.failed("exception", message, str(error))])

    def _split(self, job: _Job) -> None:
        alone = [
            _Job(job.ticket, range(place, place + 1), (trial,), suspect=True)
            for place, trial in zip(job.places, job.trials, strict=True)
        ]
        self._backlog.extendleft(reversed(alone))


class _Meters:
    """What Ray's metrics say of a pool: evaluations, failures by kind, workers, utilisation, queue, and seconds.

    A search does not depend on them: where they cannot be made or sent, there are none.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def make(self) -> None:
        """Name them to Ray, which must be initialised."""
        try:
            from ray.util.metrics import Counter, Gauge, Histogram

            self._made = {
                "evaluations": Counter("ecotone_evaluations", "Candidates measured."),
                "failures": Counter("ecotone_failures", "Candidates without scores, by kind.", ("kind",)),
                "workers": Gauge("ecotone_workers", "Workers that are ready."),
                "utilisation": Gauge("ecotone_utilisation", "Share of the ready workers that have work."),
                "queue": Gauge("ecotone_queue", "Batches that wait for a worker."),
            } | {
                name: Histogram(f"ecotone_{name}", text, boundaries=_BORDERS)
                for name, text in (
                    ("evaluation_seconds", "Worker seconds a candidate."),
                    ("merge_seconds", "Of these, to form its weights."),
                    ("forward_seconds", "Of these, the rest: forward passes and scoring."),
                )
            }
        except Exception as error:
            _log.debug("no metrics: %s", error)

    def count(self, evaluation: Evaluation) -> None:
        """Take an evaluation in."""
        self._tell("evaluations", "inc")
        if evaluation.failure is not None:
            self._tell("failures", "inc", 1.0, {"kind": evaluation.failure.kind})
            return
        self._tell("evaluation_seconds", "observe", evaluation.seconds)
        merge = evaluation.details.get("merge_seconds")
        if isinstance(merge, float):
            self._tell("merge_seconds", "observe", merge)
            self._tell("forward_seconds", "observe", evaluation.seconds - merge)

    def state(self, workers: int, utilisation: float, queue: int) -> None:
        """Set the gauges."""
        self._tell("workers", "set", workers)
        self._tell("utilisation", "set", utilisation)
        self._tell("queue", "set", queue)

    def _tell(self, name: str, verb: str, *arguments: Any) -> None:
        if name not in self._made:
            return
        try:
            getattr(self._made[name], verb)(*arguments)
        except Exception as error:
            _log.debug("metric %s: %s", name, error)


def _draining_of(ray: Any) -> Callable[..., Collection[str]]:
    """What asks the head for the ids of the nodes that are to go: spot notices, SIGTERM at a node, `ray drain-node`.

    Ray's libraries find out in the same way; it has no public name.
    """
    try:
        asked: Callable[..., Collection[str]] = ray._private.worker.global_worker.gcs_client.get_draining_nodes
    except AttributeError:
        return lambda timeout: ()
    return asked


def _paths(spec: WorkerSpec) -> list[str]:
    """The paths, or names of the hub's repositories, that a worker opens."""
    return list(dict.fromkeys(path for path in (*spec.experts, spec.base, spec.tokenizer) if path is not None))


def _check_paths(paths: Sequence[str]) -> None:
    for path in paths:
        if not Path(path).expanduser().exists():
            raise CheckpointError(
                f"{path}: node {platform.node()} has no such file or directory; the search's own node has it.",
                "Keep models on a file system that all nodes share, at the same path, or name those of a hub.",
            )


def _about(hand: _Hand) -> dict[str, Any]:
    return {"worker": hand.pid, "node": hand.node}


def _event(level: int, name: str, sentence: str, **fields: Any) -> None:
    _log.log(level, sentence, extra={"event": name, **fields})


def _ray(local: bool) -> Any:
    """Ray, imported with the settings it reads then: no usage reports, tokens, and loopback where the cluster is ours.

    Where somebody has imported it before, their settings hold: half of them changed afterwards would not fit the rest.
    """
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if local:
            # Despite its name it holds on every system: without clusters, Ray listens on the loopback address only.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise PoolError("pool: Ray is not installed.", "pip install 'ecotone[ray]'") from error
    return ray


def _parts(trials: tuple[Trial, ...]) -> list[bytes | tuple[Trial, ...]]:
    """The arguments that carry ``trials``: pieces of their pickle while these are few, else the trials themselves."""
    size = sum(t.genome.residual.nbytes for t in trials if t.genome.residual is not None)
    if size > _PIECE * _PIECES:
        return [trials]
    packed = pickle.dumps(trials, protocol=5)
    return [packed[start : start + _PIECE] for start in range(0, len(packed), _PIECE)]


def _whole(parts: Sequence[bytes | Sequence[Trial]]) -> Sequence[Trial]:
    """The trials that ``_parts`` took apart."""
    pieces = [part for part in parts if isinstance(part, bytes)]
    if not pieces:
        return [trial for part in parts if not isinstance(part, bytes) for trial in part]
    trials: tuple[Trial, ...] = pickle.loads(b"".join(pieces))  # noqa: S301 - our own pool's
    return trials


def _cause(error: Exception) -> Exception:
    """What a worker raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, EcotoneError) else PoolError(f"pool: a worker raised {_last_line(error)}.")


def _first_line(error: Exception) -> str:
    return first_line(error) or type(error).__name__


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _check(spec: WorkerSpec, workers: int, cpus: float, gpus: float, attempts: int) -> None:
    for name, value, least in (
        ("workers", workers, 1),
        ("cpus_per_worker", cpus, 0),
        ("gpus_per_worker", gpus, 0),
        ("attempts", attempts, 1),
    ):
        if value < least:
            raise InputError(f"{name}: expected at least {least}, found {value}.")
    if spec.device == "cuda" and gpus == 0:
        raise InputError("gpus_per_worker: expected more than 0 for device cuda, found 0.", "Give each worker a GPU.")


def _check_times(times: Mapping[str, float | None]) -> None:
    for name, seconds in times.items():
        if seconds is not None and not seconds > 0:
            raise InputError(f"{name}: expected more than 0 seconds, or None, found {seconds}.")
