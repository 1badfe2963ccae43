"""Where candidates are measured: a pool takes batches of trials and gives their evaluations back."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TypeAlias

import torch

from fitness.specs import WorkerSpec
from fitness.worker import Stopped, Worker
from populations.errors import PoolError
from populations.space import Space
from populations.trial import Evaluation, Trial


@dataclass(frozen=True)
class Batch:
    """Trials scored together.

    Args:
        number: Position among the batches of a search, from 0.
        trials: The candidates.
    """

    number: int
    trials: tuple[Trial, ...]


Completed: TypeAlias = list[tuple[Batch, list[Evaluation]]]


class Pool(Protocol):
    """Workers that measure batches. Used as ``with pool: space = pool.start(); submit, completed, submit, ...``.

    Evaluations do not depend on the pool, on how many workers it has or on which of them died: only on the spec.
    """

    slots: int
    """Batches that are worked on at the same time."""

    def start(self) -> Space:
        """Start the workers; returns when one is ready, with what it knows of the models.

        Raises:
            EcotoneError: The worker's own, when a checkpoint, objective or data set cannot be used.
            PoolError: No worker can be started.
        """
        ...

    def submit(self, batch: Batch) -> None:
        """Queue a batch; returns at once."""
        ...

    def completed(self, timeout: float | None = None) -> Completed:
        """Batches that were finished since the last call, each with one evaluation a trial.

        Blocks until there is one or ``timeout`` seconds have passed; an empty list then, and at once when nothing
        is in flight.

        Raises:
            PoolError: There are no workers any more.
        """
        ...

    def close(self) -> None:
        """Stop the workers and forget what is in flight. May be called again."""
        ...

    def __enter__(self) -> Pool: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close."""
        ...


class SerialPool:
    """One worker in this process, on a thread of its own so that the search can breed while torch computes.

    Args:
        spec: What the worker is made of.
        patience: Seconds that ``close`` waits for a trial in progress; after that the thread is left to itself.
    """

    slots = 1

    def __init__(self, spec: WorkerSpec, patience: float = 10.0) -> None:
        self._spec = spec
        self._patience = patience
        self._todo: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Space | tuple[Batch, list[Evaluation]] | BaseException] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._worker: Worker | None = None
        self._in_flight = 0
        self._closed = False
        self._threads_before = torch.get_num_threads()

    def start(self) -> Space:
        """Open the models and objectives; returns the space.

        Raises:
            EcotoneError: A checkpoint, objective or data set cannot be used.
            PoolError: The pool was started before.
        """
        if self._thread is not None or self._closed:
            raise PoolError("pool: expected to be started once, found it started before.", "Make a new pool.")
        self._threads_before = torch.get_num_threads()
        self._thread = threading.Thread(target=self._work, name="ecotone-worker", daemon=True)
        self._thread.start()
        space = self._done.get()
        if isinstance(space, BaseException):
            self.close()
            raise space
        assert isinstance(space, Space)
        return space

    def submit(self, batch: Batch) -> None:
        """Queue a batch; returns at once."""
        if self._thread is None or self._closed:
            raise PoolError("pool: expected to be started before a batch is submitted.", "Call start() first.")
        self._in_flight += 1
        self._todo.put(batch)

    def completed(self, timeout: float | None = None) -> Completed:
        """Finished batches; blocks until there is one or ``timeout`` seconds have passed."""
        finished: Completed = []
        while self._in_flight:
            try:
                item = self._done.get(timeout=0.0 if finished else timeout)
            except queue.Empty:
                break
            if isinstance(item, BaseException):
                self.close()
                raise item
            assert isinstance(item, tuple)
            self._in_flight -= 1
            finished.append(item)
        return finished

    def close(self) -> None:
        """Stop after the trial in progress and give torch its number of threads back."""
        if self._closed:
            return
        self._closed = True
        self._in_flight = 0
        if self._worker is not None:
            self._worker.stopping = True
        self._todo.put(None)
        if self._thread is not None:
            self._thread.join(self._patience)
            torch.set_num_threads(self._threads_before)

    def __enter__(self) -> SerialPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _work(self) -> None:
        try:
            self._worker = worker = Worker(self._spec)
            self._done.put(worker.space())
            while (batch := self._todo.get()) is not None and not self._closed:
                self._done.put((batch, worker.measure(batch.trials)))
        except Stopped:
            return
        except BaseException as error:
            self._done.put(error)
