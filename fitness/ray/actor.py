"""The worker inside an actor: opening it, scoring trials, and stopping when its process is told to."""

from __future__ import annotations

import os
import pickle
import platform
import signal
import sysconfig
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from ecotone.fitness.ray.models import Opened, own_code
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.worker import Worker
from ecotone.populations.errors import CheckpointError
from ecotone.populations.trial import Trial

_PIECE = 98_000  # bytes; Ray sends arguments below 100 kB with the call, others through its object store
_PIECES = 8  # above it the object store is faster


class _ToldToStop(BaseException):
    """SIGTERM came while a batch was scored. No objective's ``except Exception`` takes it for the candidate's fault."""


class RemoteWorker:
    """A ``Worker`` in an actor. Opening is a call of its own, so that its errors arrive as they were raised.

    After SIGTERM it scores nothing more and says so: its process ends soon, whichever search it works for.
    """

    def __init__(self) -> None:
        self._scoring = False
        self._stopping = False
        self._rays = signal.signal(signal.SIGTERM, self._stop)

    def here(self) -> None:
        """Answers once the process runs."""

    def open(self, spec: WorkerSpec, paths: Sequence[str] = ()) -> Opened:
        """Make the worker; returns the ids of its process and of its node, and the hashes of its models' files.

        Args:
            spec: The models and objectives to open.
            paths: Those that the search's own node has, and this one must have too.

        Raises:
            CheckpointError: This node lacks one of the paths.
            EcotoneError: As for ``Worker``.
        """
        import ray

        _check_paths(paths)
        self._worker = Worker(replace(spec, sys_path=(*spec.sys_path, *_checkout())))
        files, node = self._worker.files, ray.get_runtime_context().get_node_id()
        return Opened(os.getpid(), node, platform.node(), files.contents, files.mapped, own_code())

    def space(self) -> bytes:
        """The pickled ``Space``: arrays that lived in Ray's shared memory would not outlive the cluster."""
        return pickle.dumps(self._worker.space(), protocol=5)

    def check_models(self) -> None:
        """Compare the hashes of the models' files with those that were found first.

        Raises:
            ModelChangedError: A file has changed.
        """
        self._worker.files.check()

    def measure(self, *parts: bytes | Sequence[Trial]) -> bytes | None:
        """The pickled evaluations of the trials that ``packed`` made ``parts`` of; None once told to stop."""
        try:
            self._scoring = True
            answer = None if self._stopping else pickle.dumps(self._worker.measure(unpacked(parts)), protocol=5)
            return None if self._stopping else answer  # an objective may have swallowed what told it to stop
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


def packed(trials: tuple[Trial, ...]) -> list[bytes | tuple[Trial, ...]]:
    """The arguments that carry ``trials``: pieces of their pickle if there are few, else the trials themselves."""
    size = sum(t.genome.residual.nbytes for t in trials if t.genome.residual is not None)
    if size > _PIECE * _PIECES:
        return [trials]
    text = pickle.dumps(trials, protocol=5)
    return [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]


def unpacked(parts: Sequence[bytes | Sequence[Trial]]) -> Sequence[Trial]:
    """The trials that ``packed`` took apart."""
    pieces = [part for part in parts if isinstance(part, bytes)]
    if not pieces:
        return [trial for part in parts if not isinstance(part, bytes) for trial in part]
    trials: tuple[Trial, ...] = pickle.loads(b"".join(pieces))  # noqa: S301 - our own pool's
    return trials


def _checkout() -> list[str]:
    """The folder that this package is in, unless it is where packages are installed.

    Ray puts it at the front of a worker's path. A checkout holds other folders, too, which would hide a user's modules.
    """
    package = find_spec("ecotone")
    assert package is not None
    folder = Path(str(package.origin)).resolve().parents[1]
    installed = {Path(path).resolve() for path in sysconfig.get_paths().values()}
    return [] if folder in installed else [str(folder)]


def paths_here(spec: WorkerSpec) -> list[str]:
    """The paths that a worker opens and that this node has; names of the hub's repositories are none."""
    named = dict.fromkeys(path for path in (*spec.experts, spec.base, spec.tokenizer) if path is not None)
    return [path for path in named if Path(path).expanduser().exists()]


def _check_paths(paths: Sequence[str]) -> None:
    for path in paths:
        if not Path(path).expanduser().exists():
            raise CheckpointError(
                f"{path}: node {platform.node()} has no such file or directory; the search's own node has it.",
                "Keep models on a file system that all nodes share, at the same path, or name those of a hub.",
            )
