"""Where candidates are measured: a pool takes batches of trials and gives their evaluations back."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Protocol, TypeAlias, runtime_checkable

import torch

from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.worker import Worker
from ecotone.populations.errors import PoolError
from ecotone.populations.space import Space
from ecotone.populations.trial import Evaluation, Trial


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
        """Start the workers. Returns when a worker is ready, with its view of the models.

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
        is in flight. A pool without workers of its own does the work in this call and may take longer.

        Raises:
            PoolError: There are no workers any more.
        """
        ...

    def close(self) -> None:
        """Stop the workers and drop the batches in flight. May be called again."""
        ...

    def __enter__(self) -> Pool: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close."""
        ...


@runtime_checkable
class ReadsModels(Protocol):
    """A pool that can tell whether the models' files are as they were when its workers opened them."""

    def check_models(self) -> None:
        """Compare the hashes of all files with the first ones.

        Raises:
            ModelChangedError: A file has changed.
        """


QUICK = 0.02
"""Seconds for which the serial pool may keep results back to score several batches in one go."""


class SerialPool:
    """One worker in this process. A batch is scored when its result is asked for.

    It has no thread of its own: on a CPU the search and the worker would take turns at the interpreter many times a
    candidate, which costs more than scoring in the meantime saves (measured on the digits recipes).

    Args:
        spec: The spec from which the worker is made.
    """

    slots = 1

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._todo: deque[Batch] = deque()
        self._pace = math.inf  # seconds a trial, of the last call
        self._worker: Worker | None = None
        self._closed = False
        self._threads_before = torch.get_num_threads()

    def start(self) -> Space:
        """Open the models and objectives; returns the space.

        Raises:
            EcotoneError: A checkpoint, objective or data set cannot be used.
            PoolError: The pool was started before.
        """
        if self._worker is not None or self._closed:
            raise PoolError("pool: expected to be started once, found it started before.", "Make a new pool.")
        self._threads_before = torch.get_num_threads()
        try:
            self._worker = Worker(self._spec)
            return self._worker.space()
        except BaseException:
            self.close()
            raise

    def submit(self, batch: Batch) -> None:
        """Queue a batch; returns at once."""
        if self._worker is None or self._closed:
            raise PoolError("pool: expected to be started before a batch is submitted.", "Call start() first.")
        self._todo.append(batch)

    def completed(self, timeout: float | None = None) -> Completed:
        """Score the oldest batch, however long it takes, or several that are quick; none when nothing is in flight."""
        if not self._todo or self._worker is None:
            return []
        batches = [self._todo.popleft()]
        count = len(batches[0].trials)
        while self._todo and (count := count + len(self._todo[0].trials)) * self._pace < QUICK:
            batches.append(self._todo.popleft())
        began = time.perf_counter()
        evaluations = iter(self._worker.measure([trial for batch in batches for trial in batch.trials]))
        self._pace = (time.perf_counter() - began) / max(1, sum(len(batch.trials) for batch in batches))
        return [(batch, list(islice(evaluations, len(batch.trials)))) for batch in batches]

    def check_models(self) -> None:
        """Compare the hashes of the models' files with those that were found first.

        Raises:
            ModelChangedError: A file has changed.
        """
        if self._worker is not None:
            self._worker.files.check()

    def close(self) -> None:
        """Drop the batches in flight and restore torch's number of threads."""
        if not self._closed:
            self._closed = True
            self._todo.clear()
            torch.set_num_threads(self._threads_before)

    def __enter__(self) -> SerialPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
