"""The surroundings of user code: signals, forks, the working directory, output, threads, paths.

A ``KeyboardInterrupt`` that an objective raises is a failure of its candidate; one of the user's Ctrl-C ends the
search. Only the signal's handler can tell them apart: ``Signals`` records that a signal came. What user code leaves
behind in the process is put back where that is cheap (working directory, signal handlers, timers, stdout and stderr),
and told of once for each kind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

from ecotone.fitness.guards import User

_signal: Any = import_module("_signal")  # ``signal`` looks handlers up among its enumerations, which takes long
_HANDLED = (signal.SIGINT, signal.SIGTERM)
_KEPT = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGCHLD", "SIGHUP") if hasattr(signal, name)
)

_REAL = getattr(signal, "ITIMER_REAL", None)
_PATIENCE = 0.1  # seconds in which a thread that is left behind may end: then it counts as a part of its call
_SLACK = 0.05  # seconds by which a timer that nobody touched may seem to be due earlier or later


class Signals:
    """Records that SIGINT or SIGTERM has really come, and what its handler raised. Used as ``with signals:``.

    The handlers do what they did before. Only the main thread has signals: in others nothing is recorded, and a
    ``KeyboardInterrupt`` there can only be raised by code.
    """

    def __init__(self) -> None:
        self.came: bool = False
        self._raised: BaseException | None = None
        self._depth = 0
        self._before: dict[int, tuple[Any, Any]] = {}

    def __enter__(self) -> Signals:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self.came, self._raised = False, None
            for number in _HANDLED:
                before = _signal.getsignal(number)
                if callable(before):
                    recorder = partial(self._received, before)
                    self._before[number] = recorder, before
                    _signal.signal(number, recorder)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, (recorder, before) in self._before.items():
                if _signal.getsignal(number) is recorder:  # a handler may have set another one
                    _signal.signal(number, before)
            self._before.clear()

    def pass_on(self, error: BaseException | None = None) -> None:
        """Raise what must not become a candidate's failure.

        Args:
            error: What user code raised; None if it returned. It may have swallowed what a handler raised.
        """
        if self._raised is not None:
            raise self._raised
        if error is not None and self.came and not isinstance(error, Exception):
            raise error

    def _received(self, before: Callable[[int, FrameType | None], Any], number: int, frame: FrameType | None) -> None:
        self.came = True
        try:
            before(number, frame)
        except BaseException as error:
            self._raised = error
            raise


class Surroundings:
    """The process around user code, as it is when the code begins.

    Args:
        signals: Tells whether a signal came meanwhile: then its handler may have changed the handlers.
    """

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._pid = 0
        self.here()
        self._strays: list[tuple[threading.Thread, User]] = []
        self._ended: set[threading.Thread] = set()
        self._patience = 10 * _PATIENCE
        self.begin()

    def here(self) -> None:
        """This process is the one that measures: it may have been forked by its owner."""
        self._pid = os.getpid()

    def begin(self) -> None:
        """Whatever is so now is the caller's own."""
        self._folder = _folder()
        self._streams = sys.stdout, sys.stderr
        self._path = list(sys.path)
        self._variables = dict(_variables())
        self._known = set(threading.enumerate())
        self._due = _due()
        self._children = _children()
        main = threading.current_thread() is threading.main_thread()
        self._handlers = {number: _signal.getsignal(number) for number in _KEPT} if main else {}

    @property
    def strays(self) -> User | None:
        """Whose code has left threads behind that live, or lived until now."""
        return self._strays[0][1] if self._strays else None

    def mark(self) -> None:
        """Weights are merged from now on: threads that have ended write into none of them."""
        self._ended = {thread for thread, _ in self._strays if not thread.is_alive()}

    def forget(self) -> None:
        """What the threads did that had ended at the last ``mark`` has been put back: they count no more."""
        self._strays = [(thread, user) for thread, user in self._strays if thread not in self._ended]

    def end_fork(self) -> None:
        """End this process at once if user code has forked it and come back: it has no part in the search."""
        if os.getpid() != self._pid:
            os._exit(0)

    def before(self) -> None:
        """User code is about to be called: threads that our own code has started since are not its."""
        if not self._strays:  # those may have started others
            self._known.update(threading.enumerate())

    def after(self, user: User) -> None:
        """User code has been called: put back what it changed, and tell of it."""
        self._put_back_streams(user)
        if (folder := _folder()) != self._folder and self._folder is not None:
            with contextlib.suppress(OSError):
                os.chdir(self._folder)
            _tell(user, "the working directory", f"to {folder}", "It is set back after each call")
        if not self._signals.came:
            self._put_back_handlers(user)
            self._put_back_timer(user)
        if not self._known.issuperset(threads := threading.enumerate()):
            self._note_threads(user, threads)
        if user.calls & (user.calls - 1) == 0 and _children() - self._children:
            user.warn("child processes", f"{user.subject} left child processes behind. Have it wait for them.")
        if sys.path != self._path:
            added = [entry for entry in sys.path if entry not in self._path]
            _tell(user, "sys.path", f"({', '.join(map(str, added)) or 'its order'})", "Later imports may find others")
            self._path = list(sys.path)
        if (variables := _variables()) != self._variables:
            self._note_variables(user, dict(variables))

    def _put_back_streams(self, user: User) -> None:
        for number, name in enumerate(("stdout", "stderr"), 1):
            if not _open(number):  # the next file that is opened would get its number, and all that is printed
                with contextlib.suppress(OSError):
                    _take_number(number)
                _tell(user, name, "by closing its file", "What is written there is lost")
            stream = getattr(sys, name)
            if stream is self._streams[number - 1] and not getattr(stream, "closed", False):
                continue
            before = self._streams[number - 1]
            setattr(sys, name, _reopened(number) if getattr(before, "closed", False) else before)
            _tell(user, f"sys.{name}", "by closing or replacing it", "It is set back after each call")
        self._streams = sys.stdout, sys.stderr

    def _put_back_handlers(self, user: User) -> None:
        for number, before in self._handlers.items():
            if _signal.getsignal(number) is not before and before is not None:
                _signal.signal(number, before)
                _tell(user, "the handler of", signal.Signals(number).name, "It is set back after each call")

    def _put_back_timer(self, user: User) -> None:
        before, now = self._due, _due()
        if now != before and abs(now - before) > _SLACK and not 0 < before < time.monotonic():
            _signal.setitimer(_REAL, max(before - time.monotonic(), _SLACK) if before else 0)
            _tell(user, "the timer", "of SIGALRM", "It is set back after each call")

    def _note_threads(self, user: User, threads: list[threading.Thread]) -> None:
        left = [thread for thread in threads if thread not in self._known and type(thread).__name__ != "TMonitor"]
        if left:  # TMonitor is tqdm's own
            names = ", ".join(thread.name for thread in left[:3])
            ends = "Have it end them: a candidate fails if the model changes while they live."
            user.warn("threads", f"{user.subject} left threads behind ({names}). {ends}")
            began = time.monotonic()
            for thread in left:
                thread.join(min(_PATIENCE, self._patience))
            self._patience = max(self._patience + began - time.monotonic(), 0)
            self._strays += [(thread, user) for thread in left if thread.is_alive()]
        self._known = set(threads)

    def _note_variables(self, user: User, now: dict[Any, Any]) -> None:
        changed = [key for key in {**self._variables, **now} if self._variables.get(key) != now.get(key)]
        names = ", ".join(sorted(os.fsdecode(key) for key in changed))
        _tell(user, "environment variables", f"({names})", "They stay so")
        self._variables = now


def _tell(user: User, what: str, how: str, then: str) -> None:
    user.warn(what, f"{user.subject} changed {what} {how}. {then}. Have it undo what it sets, with try and finally.")


def _due() -> float:
    """When SIGALRM comes, by ``time.monotonic``; 0 if no timer is armed."""
    left: float = 0.0 if _REAL is None else _signal.getitimer(_REAL)[0]
    return time.monotonic() + left if left else 0.0


def _folder() -> str | None:
    try:
        return str(Path.cwd())
    except OSError:  # it was deleted
        return None


def _variables() -> Any:
    """The environment, as the process keeps it: decoding it each time takes long."""
    return getattr(os.environ, "_data", {})


def _open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _take_number(number: int) -> None:
    """Have an open file of that number, which swallows what is written."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != number:
        os.dup2(null, number)
        os.close(null)


def _reopened(number: int) -> TextIO:
    return open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


def _children() -> set[str]:
    """The ids of the calling thread's child processes (Linux; elsewhere they are not known)."""
    try:
        return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text("ascii").split())
    except OSError:
        return set()
