"""The mirrors of a run that goes on: started, looked after, and waited for at its end.

A mirror is a process of its own, and may be killed, or run out of memory, like any other. Then it is started once more.
If it ends again, the user is told at once, and at the end: the journal has everything, and ``ecotone sync`` sends the
rest.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecotone.experiments import tracking  # which imports its parts when they are used
from ecotone.experiments.tracking.notes import status, statuses
from ecotone.experiments.tracking.protocol import TrackerSettings
from ecotone.populations.errors import sentence

LOOK_EVERY = 2.0  # seconds
_OVER = ("finished", "failed", "interrupted", "killed")
_YOUNG = 30.0  # seconds of a run within which its mirrors may yet have to start


@dataclass
class _Follower:
    """One mirror: its process, and how often it was started."""

    title: str
    process: subprocess.Popen[bytes]
    starts: int = 1
    told: bool = False

    @property
    def died(self) -> bool:
        """Whether it ended other than by itself with everything done."""
        return bool(self.process.poll())

    def killed(self, directory: Path, name: str) -> bool:
        """Whether it died, and not because its tracker failed to the last."""
        return self.died and (self.process.returncode < 0 or status(directory, name)["error"] is None)

    @property
    def end(self) -> str:
        """How it ended, in words."""
        code = self.process.returncode
        if code < 0:
            return f"was killed ({_signal(-code)})"
        return f"ended with exit code {code}, and tracking.log says why"


class Followers:
    """The mirrors of a run.

    Args:
        directory: The run directory.
        where: The name that the user knows it by.
        trackers: Settings of the trackers by name.
        notify: Is told sentences.
    """

    def __init__(
        self, directory: Path, where: str, trackers: Mapping[str, TrackerSettings], notify: Callable[[str], None]
    ) -> None:
        self._directory = directory
        self._sync = f"`ecotone sync {where}` sends the rest."
        self._notify = notify
        self._looked_at = time.monotonic()
        self._followers: dict[str, _Follower] = {}
        for name, settings in trackers.items():
            if settings.installed():
                self._followers[name] = _Follower(settings.title, self._started(name))
            else:
                remedy = f"`{settings.install()}`, then `ecotone sync`"
                notify(f"Warning: {settings.title} is not installed, so it does not get the run: {remedy}.")

    def look(self) -> None:
        """Start mirrors again that have died, each once. Looks every two seconds at most."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_EVERY:
            return
        self._looked_at = now
        for name, follower in self._followers.items():
            if follower.died:
                self._mend(name, follower)

    def wait(self, seconds: float) -> None:
        """Wait for all of them to have everything, and tell what is missing."""
        end = time.monotonic() + seconds
        for name, follower in self._followers.items():
            self._notify(f"Waiting for {follower.title} to have everything ...")
            ended = self._waited(name, follower, end)
            if ended and follower.killed(self._directory, name) and self._mend(name, follower):
                ended = self._waited(name, follower, end)
            known = status(self._directory, name)
            if ended and known["complete"]:
                continue
            crashed = f"its mirror {follower.end}" if ended and follower.killed(self._directory, name) else ""
            why = crashed or known["error"]
            after = f": {sentence(why)} When that is mended, {self._sync}" if why else f"; {self._sync}"
            self._notify(f"Warning: {follower.title} does not have everything yet{after}")

    def leave(self) -> None:
        """Tell which have died of a run that ends with an error. The others go on until they have everything."""
        for follower in self._followers.values():
            if follower.died:
                self._tell(follower)

    def _waited(self, name: str, follower: _Follower, end: float) -> bool:
        """Whether a mirror has ended by the moment ``end``; one whose tracker fails is not waited for."""
        return tracking.wait(follower.process, max(0.0, end - time.monotonic()), self._directory, name)

    def _mend(self, name: str, follower: _Follower) -> bool:
        """Start a mirror that has died once more; False where it was started before."""
        if follower.starts > 1:
            self._tell(follower)
            return False
        self._notify(f"Warning: the mirror to {follower.title} {follower.end}. It is started once more.")
        follower.process, follower.starts = self._started(name), follower.starts + 1
        return True

    def _tell(self, follower: _Follower) -> None:
        if not follower.told:
            follower.told = True
            title = follower.title
            self._notify(f"Warning: the mirror to {title} {follower.end}. {title} lacks what comes now: {self._sync}")

    def _started(self, name: str) -> subprocess.Popen[bytes]:
        return tracking.start(self._directory, os.getpid(), name)


def shown(directory: Path, where: str, run: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The state of each mirror of a run, for ``ecotone status``; ``lacks`` says what nobody is sending.

    Args:
        directory: The run directory.
        where: The name that the user knows it by.
        run: The run's own status.
    """
    keys = ("uri", "run_id", "page", "mirrored", "error")
    found = {}
    for name, known in statuses(directory).items():
        missing = lacking(known, run)
        more = {"lacks": f"{missing}; `ecotone sync {where}` sends them"} if missing else {}
        found[name] = {key: known[key] for key in keys} | more
    return found


def lacking(known: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """The rows that a tracker lacks and no mirror is sending, in words; empty where there are none.

    Args:
        known: The state of its mirror.
        run: The run's own status.
    """
    over = run["state"] in _OVER
    if known["complete"] or known["mirroring"] or (not over and run["seconds"] < _YOUNG):
        return ""
    missing = run["evaluations"] - known["mirrored"]
    if missing > 0:
        return f"{missing} of {run['evaluations']} evaluations"
    return "the results at the end" if over else ""


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
