"""Starting Ray, or connecting to it: once more where that is safe, and without leftovers where it fails.

On a busy machine Ray's processes may take longer than Ray waits for them. It raises a bare ``Exception`` then, and
leaves the processes that did start behind. They are ended here before the next attempt.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ecotone.fitness.ray.events import event, log, reason
from ecotone.fitness.ray.token import own_token
from ecotone.populations import credentials
from ecotone.populations.errors import PoolError, sentence
from ecotone.populations.secrets import clean

PAUSES = (3.0, 10.0)  # seconds before the second and the third attempt

_OBJECT_STORE_BYTES = 256 * 1024**2  # of a local cluster; genomes are small
_OURS = (ImportError, TypeError, ValueError)
"""Errors that do not pass: of the installation, or of what Ray was asked for."""


def start(ray: Any, address: str | None, sleep: Callable[[float], None] = time.sleep) -> None:
    """Start a cluster on this machine, or connect to one.

    A cluster of our own is tried three times. Nobody else has seen the first ones, so that is safe. A connection is
    tried again only where Ray does not say what is wrong.

    Args:
        ray: The module.
        address: The address of a running cluster. None starts one on this machine.
        sleep: Waits for so many seconds.

    Raises:
        PoolError: It does not start, or cannot be reached; nothing of it is left running.
    """
    for pause in PAUSES:
        error = _attempt(ray, address)
        if error is None:
            return
        if not _passes(error, address):
            raise _in_words(error, address) from clean(error)
        text = sentence(f"Ray did not start ({reason(error)}); trying again in {pause:g} s")
        event(logging.WARNING, "start_failed", text, seconds=pause)
        sleep(pause)
    if (error := _attempt(ray, address)) is not None:
        raise _in_words(error, address) from clean(error)


def _attempt(ray: Any, address: str | None) -> Exception | None:
    """One attempt, and the error that ended it, if one did. What it started is ended then, also after Ctrl-C."""
    options: dict[str, Any] = {
        **{"address": address and credentials.whole(address), "log_to_driver": False, "logging_level": logging.ERROR},
        "job_config": _with_own_path(ray),
    }
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        own_token()
    stop = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except BaseException as error:
        _end(ray, error)
        if not isinstance(error, Exception):
            raise
        return error  # Ray raises no narrower one when its processes take too long to start
    finally:
        if stop is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)  # Ray's handler would exit at once
    return None


def _end(ray: Any, error: BaseException) -> None:
    """End what a failed attempt started. Ray itself forgets a node that did not come up."""
    ends = [partial(node.kill_all_processes, check_alive=False, wait=True) for node in _nodes(error)]
    for end in (*ends, ray.shutdown):
        _tried(end)


def _tried(call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as error:
        log.debug("ending a Ray that did not start: %s", error)


def _nodes(error: BaseException | None) -> Iterator[Any]:
    """The nodes that were being made when an error, or one that it came from, was raised."""
    seen: set[int] = set()
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            node = frame.f_locals.get("self")
            if hasattr(node, "kill_all_processes") and id(node) not in seen:
                seen.add(id(node))
                yield node
        error = error.__cause__ or error.__context__


def _passes(error: Exception, address: str | None) -> bool:
    """Whether an error may be gone the next time."""
    if address is not None:
        return type(error) is Exception
    return not isinstance(error, _OURS)


def _in_words(error: Exception, address: str | None) -> PoolError:
    if address is not None:
        return PoolError(
            f"pool: no cluster: {address} ({reason(error)}).", "Check the address and RAY_AUTH_MODE (token)."
        )
    return PoolError(
        f"pool: a local Ray cluster cannot be started ({reason(error)}).",
        "The machine may be too busy, or short of memory or disk. Try again when it is not, or use "
        "--set runtime.pool=serial, which needs no Ray.",
    )


def _with_own_path(ray: Any) -> Any:
    """A job whose workers have this package at the front of their Python path, and not the working directory.

    Ray puts the working directory there, unless a job brings one of its own. A user's `numpy.py` would then hide numpy
    before a worker can put the directory last.
    """

    class Job(ray.job_config.JobConfig):  # type: ignore[misc]
        def _runtime_env_has_working_dir(self) -> bool:
            return True

    job = Job()
    package = find_spec("ecotone")
    assert package is not None
    job._py_driver_sys_path = [str(Path(str(package.origin)).resolve().parents[1])]
    return job
