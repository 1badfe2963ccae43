"""Runs on a Ray cluster, from another machine: the search is a job on the head, which goes on when that machine leaves.

What travels is a folder, the checkout that holds the recipe or the recipe's own folder, so that the recipe finds the
functions and small files that it names. A run keeps its name; each of its stretches, the first one and every resumed
one, is a job of its own. What was searched is in the run directory, not in the job: a new head resumes from that alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit
from urllib.request import urlopen

import ecotone
from ecotone.experiments import marks
from ecotone.experiments.keeping import texts_in
from ecotone.experiments.recipe import parse_settings
from ecotone.extras import how_to_install
from ecotone.populations import credentials
from ecotone.populations.errors import EcotoneError, InputError, PoolError, nearest, shown
from ecotone.populations.sealed import sealed
from ecotone.populations.secrets import clean, take, take_all, take_places

State: TypeAlias = Literal["pending", "running", "stopped", "succeeded", "failed"]

HOME_RUNS = "~/ecotone-runs"  # on the head
PACKAGES = ("ecotone", "experiments", "search", "fitness", "merging", "populations")  # of a checkout
LEFT_BEHIND = [  # as in a .gitignore
    *(".git", ".venv*", "venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info"),
    *("/build", "/dist", "/runs", "/mlruns", "/mlflow.db"),
]
STOPPING = 120  # seconds that a stopped run has beyond ``runtime.grace``, to write down what it has; then it is killed
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_POLL = 0.5  # seconds
_STARTING = 60.0  # seconds for which a head that was just started may take no jobs yet
_OURS = "ecotone"  # the key of the run's name in a job's metadata


@dataclass(frozen=True)
class Job:
    """A stretch of a run on a cluster.

    Args:
        id: The job's, unique on the cluster: the run's name, numbered on when it was resumed.
        run: The run's name.
        state: Ray's state of the job: ``pending``, ``running``, ``stopped``, ``succeeded`` or ``failed``.
        out: The run directory: a path on the head, or a URL.
        folder: The folder that was sent, on the machine that sent it.
        grace: Seconds for which it waits for what is in flight when it is stopped.
        started: When, in seconds of the epoch; None while it is pending.
        ended: When, or None.
        message: Ray's message about its end.
        own: Whether this user submitted it, with the key that this machine has.
    """

    id: str
    run: str
    state: State
    out: str
    folder: str
    grace: float = 30.0
    started: float | None = None
    ended: float | None = None
    message: str = ""
    own: bool = True

    @property
    def live(self) -> bool:
        """True until the job has ended."""
        return self.state in ("pending", "running")

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        times = {name: _iso(getattr(self, name)) for name in ("started", "ended")}
        return {"run": self.run, "job": self.id, "state": self.state, "out": self.out, **times, "message": self.message}


@dataclass(frozen=True)
class Parcel:
    """The things that a job is given beside the run.

    Args:
        settings: ``KEY=VALUE`` as for ``--set``.
        folder: The folder that travels. None is the checkout that holds the recipe, or the recipe's folder. For a
            resumed run it is the folder of the last job if this machine has it, else the checkout that holds the
            working directory, or that directory.
        environment: Variables of the job and of its workers. Those that may be secret are sealed with the cluster's
            token, and so are credentials in the URLs of the run directory and of the settings.
        grace: Seconds that a stopped run waits for candidates in flight; None for as many as before, or 30.
        accept_changes: Whether a resumed run goes on although models, code or data have changed since it began.
        trust: Of a run that is resumed: trust what it names, and the folder that its last job names.
        urls: URLs of the recipe, as it is recorded. The job is given the credentials that are known of them here.
    """

    settings: Sequence[str] = ()
    folder: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    grace: float | None = None
    accept_changes: bool = False
    trust: bool = False
    urls: Sequence[str] = ()


class JobServer:
    """Submits, lists and stops the jobs of a cluster that are runs of ours.

    Args:
        address: The address of the head's dashboard, ``http://HOST:PORT``.

    Attributes:
        address: The same, without credentials.

    Raises:
        InputError: The address is no such URL.
        PoolError: Nobody answers there, Ray's client is not installed, or the token is missing or wrong.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"--address: expected http://HOST:PORT of a Ray dashboard, found {address!r}.", _tunnel())
        self.address: str = take(address.rstrip("/"))
        with self._explained():
            self._client = _client(credentials.whole(self.address))

    def unguarded(self) -> bool:
        """True when the server takes jobs from anybody who reaches it, even without a token."""
        try:
            with urlopen(f"{self.address}/api/jobs/", timeout=5):  # noqa: S310 - http or https, as checked
                return True
        except OSError:  # that the token is missing is one, too
            return False

    def jobs(self) -> list[Job]:
        """All jobs that are runs of ours, oldest first."""
        with self._explained():
            found = self._client.list_jobs()
        ours = [_job(one) for one in found if one.submission_id and _OURS in (one.metadata or {})]
        return sorted(ours, key=lambda job: job.started or float("inf"))

    def job(self, name: str) -> Job:
        """The newest job of the run of that name, or the job of that id.

        Raises:
            InputError: There is none.
        """
        jobs = self.jobs()
        for job in reversed(jobs):
            if name == job.run:
                return job
        for job in jobs:
            if name == job.id:
                return job
        known = sorted({job.run for job in jobs})
        hint = nearest(name, known) if known else "It has no runs: a head that was restarted has forgotten its jobs."
        raise InputError(f"{name}: {self.address} knows no run of that name.", hint)

    def submit(self, recipe: Path, name: str, out: str | None = None, parcel: Parcel = Parcel()) -> Job:
        """Start a run as a job; returns once the cluster has it.

        Args:
            recipe: The recipe's file, in the folder that travels.
            name: The run's name.
            out: The run directory: a URL, or a path on the head; None for one in ``~/ecotone-runs``.
            parcel: The other things that the job is given.

        Raises:
            InputError: A value does not fit, or the name is taken.
            PoolError: The cluster does not take the job.
        """
        _check_name(name)
        taken = [job for job in self.jobs() if name in (job.run, job.id)]
        if taken:
            raise InputError(
                f"--name: {self.address} has a run {name!r} already ({taken[-1].state}).",
                f"Choose another, or go on with it: ecotone resume {name} --address {self.address}",
            )
        folder = _checked_folder(parcel.folder or travelling(recipe.resolve().parent))
        if not recipe.resolve().is_relative_to(folder):
            raise InputError(f"--folder: expected one that holds {recipe}, found {folder}.")
        target = take(out) if out else f"{HOME_RUNS}/{name}"
        command = ["run", str(recipe.resolve().relative_to(folder)), "--out", _checked(target)]
        return self._start(Job(name, name, "pending", target, str(folder)), command, parcel)

    def resume(self, named: str, parcel: Parcel = Parcel()) -> Job:
        """Go on with a run, as another job.

        Args:
            named: A run's name, or its directory: a URL, or a path on the head.
            parcel: The other things that the job is given.

        Raises:
            InputError: The run is not known, or has not ended.
            PoolError: The cluster does not take the job.
        """
        named = take(named)
        jobs = self.jobs()
        runs = [job.run for job in jobs if named in (job.run, job.id, job.out)]
        if not runs and not _is_place(named):
            self.job(named)  # says what is known
        before = [job for job in jobs if job.run in runs[-1:]]
        live = [job for job in before if job.live]
        if live:
            raise InputError(f"{live[-1].run}: it is {live[-1].state}, as job {live[-1].id}.", "Nothing to do.")
        last = before[-1] if before else Job("", _name_of(named), "pending", named, "")
        folder = parcel.folder or _former(last, parcel.trust) or travelling(Path.cwd())
        taken = {job.id for job in jobs}
        names = (last.run if number == 1 else f"{last.run}-{number}" for number in range(1, len(taken) + 2))
        free = next(name for name in names if name not in taken)
        job = Job(free, last.run, "pending", last.out, str(_checked_folder(folder)), last.grace)
        flags = {"--accept-changes": parcel.accept_changes, "--trust": parcel.trust}
        return self._start(job, ["resume", _checked(last.out), *(flag for flag, on in flags.items() if on)], parcel)

    def logs(self, job: Job) -> str:
        """The log of a job so far."""
        with self._explained():
            return str(self._client.get_job_logs(job.id))

    def follow(self, job: Job, write: Callable[[str], None]) -> None:
        """Give the log of a job to ``write``, line by line, until the job ends."""

        async def tail() -> None:
            rest = ""
            async for text in self._client.tail_job_logs(job.id):
                *lines, rest = (rest + text).split("\n")
                for line in lines:
                    write(line)
            if rest:
                write(rest)

        with self._explained(), _hushed():
            asyncio.run(tail())

    def stop(self, job: Job) -> bool:
        """Ask a job to drain and end. Returns at once: True when it was running."""
        with self._explained():
            return bool(self._client.stop_job(job.id))

    def ended(self, job: Job, seconds: float) -> Job:
        """The job after its end, or after ``seconds``."""
        until = time.monotonic() + seconds
        while True:
            with self._explained():
                now = _job(self._client.get_job_info(job.id))
            if not now.live or time.monotonic() > until:
                return now
            time.sleep(_POLL)

    def _start(self, job: Job, command: Sequence[str], parcel: Parcel) -> Job:
        grace = job.grace if parcel.grace is None else parcel.grace
        # The job is given its cluster; what the user sets comes after it, and wins.
        settings, urls = _plain_settings(parcel.settings)
        changes = [f"--set={text}" for text in ("runtime.pool=ray", "runtime.address=auto", *settings)]
        credentials.load()
        words = [
            "exec python -m ecotone.experiments.cli",
            *map(_quoted, command),
            "--log json",
            *map(shlex.quote, changes),
        ]
        variables = {
            "RAY_JOB_STOP_WAIT_TIME_S": str(round(grace) + STOPPING),  # 3 otherwise
            "ECOTONE_JOB": job.run,  # a resumed run finds in what travelled what its paths name: see running.resume
        }
        environment: dict[str, Any] = {
            "working_dir": job.folder,
            "excludes": [*LEFT_BEHIND, *marks.within(Path(job.folder))],
            "env_vars": {
                **sealed({**parcel.environment, **credentials.passed([job.out, *urls, *parcel.urls])}),
                **variables,
            },
        }
        if not is_checkout(Path(job.folder)):
            environment["py_modules"] = [str(Path(str(ecotone.__file__)).parent)]
        with self._explained(), _hushed():
            self._send(
                entrypoint=" ".join(words),
                submission_id=job.id,
                runtime_env=environment,
                metadata=_metadata(job, grace),
                entrypoint_num_cpus=0,
            )
        return job

    def _send(self, **request: Any) -> None:
        """Submit a job as soon as the head takes jobs."""
        until = time.monotonic() + _STARTING
        while True:
            try:
                self._client.submit_job(**request)
                break
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(_POLL)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Put errors on the way to the cluster into words."""
        try:
            yield
        except EcotoneError:
            raise
        except ImportError as error:
            raise PoolError(f"Ray's job client is not installed ({error}).", f"`{how_to_install('ray')}`.") from error
        except Exception as error:
            raise _in_words(error, self.address) from clean(error)


def travelling(folder: Path) -> Path:
    """The folder that travels with a job: the checkout of Ecotone that holds ``folder``, or ``folder`` itself."""
    return next((one for one in (folder, *folder.parents) if is_checkout(one)), folder)


def is_checkout(folder: Path) -> bool:
    """True for a checkout of Ecotone. A job then runs the checkout's packages, not the cluster's."""
    return all((folder / name).exists() for name in ("pyproject.toml", *(f"{one}/__init__.py" for one in PACKAGES)))


def environment_of(names: Iterable[str]) -> dict[str, str]:
    """This process's environment variables with the given names.

    Raises:
        InputError: One is not set.
    """
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise InputError(f"--env: {missing[0]} is not set here.", "Export it first, or leave it out.")
    return {name: os.environ[name] for name in names}


def _plain_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings as the job's command has them, without secrets, and the texts in them."""
    plain: list[str] = []
    urls: list[str] = []
    for text in settings:
        ((key, value),) = parse_settings([text]).items()
        shown = take_places(value) if key.partition(".")[0] in ("tracking", "runtime") else take_all(value)
        plain.append(text if shown == value else f"{key}={json.dumps(shown)}")
        urls += texts_in(shown)
    return plain, urls


def _client(address: str) -> Any:
    """Ray's client of a job server; with token authentication, unless the user has turned it off."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray takes this one over the argument
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Silence Ray's lines about files that stay behind and connections that end."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _job(details: Any) -> Job:
    """Ray's ``JobDetails`` as a job of ours; its times are in milliseconds."""
    known = details.metadata
    started, ended = (None if at is None else at / 1000 for at in (details.start_time, details.end_time))
    state: Any = str(details.status).lower()
    out, folder, grace = take(known.get("out", "")), known.get("folder", ""), float(known.get("grace", 30.0))
    own = marks.is_marked("job", [known[_OURS], folder], known.get("mark"))
    message = details.message or ""
    return Job(details.submission_id, known[_OURS], state, out, folder, grace, started, ended, message, own)


def _metadata(job: Job, grace: float) -> dict[str, str]:
    """What the cluster keeps about a job, for later commands."""
    mark = marks.mark_of("job", [job.run, job.folder])
    known = {_OURS: job.run, "out": job.out, "folder": job.folder, "grace": str(grace)}
    return known if mark is None else {**known, "mark": mark}


def _former(job: Job, trust: bool) -> Path | None:
    """The folder that a run's last job was sent from, if this machine has it.

    Raises:
        UntrustedError: Somebody else, or this user on another machine, named it; so it may be any folder of this one.
    """
    folder = Path(job.folder)
    if not job.folder or not folder.is_dir():
        return None
    if not job.own and folder.resolve() != travelling(Path.cwd()).resolve():
        from ecotone.experiments.trust import admit  # imports the recipe's classes

        named = [f"folder is sent to the cluster: {shown(str(folder))}"]
        admit(f"the cluster's job {job.id}", named, trust, remedy="Or name the folder to send: --folder DIR.")
    return folder


def _in_words(error: Exception, address: str) -> EcotoneError:
    """An error of Ray's client as one of ours."""
    text, kind = str(error).strip(), type(error).__name__
    if kind == "AuthenticationError":
        if "403" in text or "Authentication failed" in text:
            return PoolError(f"{address}: the token here is not the cluster's (403).", _token())
        return PoolError(f"{address}: its jobs need the cluster's token, and this machine has none (401).", _token())
    if "Connect" in kind:
        return PoolError(f"{address}: no Ray cluster answers.", _tunnel(address))
    first = (text.splitlines() or [kind])[0]
    # Ray's client has a limit, and the dashboard, through which it sends, a lower one: 100 MiB, zipped.
    if "exceeds the maximum size" in text or "Maximum request body size" in text:
        return InputError(
            f"--folder: the folder is too large to send ({first.rstrip('.')}).",
            "Keep models on the hub or on a disk that all nodes share; a .rayignore lists what stays.",
        )
    return PoolError(f"{address}: {first}", "Is it the dashboard of a Ray cluster? `ecotone jobs` lists its runs.")


def _token() -> str:
    return (
        "Copy the head's ~/.ray/auth_token to this machine, or set RAY_AUTH_TOKEN_PATH to a file that holds it; "
        "docs/operations.md says where each kind of cluster keeps it."
    )


def _tunnel(address: str = "") -> str:
    return f"The dashboard listens on the head's loopback address. Open a tunnel: {tunnel(address)}"


def tunnel(address: str) -> str:
    """The command that brings the dashboard of ``address`` to this machine."""
    parts = urlsplit(address)
    near = parts.hostname in (None, "127.0.0.1", "localhost", "::1")
    port = parts.port or 8265
    return f"ssh -N -L {port}:127.0.0.1:{port} {'HEAD' if near else parts.hostname}"


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(f"--name: expected letters, digits, '.', '_' and '-', found {name!r}.")


def _is_place(text: str) -> bool:
    """True when ``text`` is a path on the head or a URL, not the name of a run."""
    return "://" in text or text.startswith(("/", "~/"))


def _checked(out: str) -> str:
    if not _is_place(out):
        raise InputError(
            f"--out: expected a URL, or a path on the head that begins with / or ~/, found {out!r}.",
            "A job's working directory is gone when it ends.",
        )
    return out


def _checked_folder(folder: Path) -> Path:
    resolved = folder.resolve()
    if not resolved.is_dir():
        raise InputError(f"--folder: expected a folder of this machine, found {folder}.")
    if Path.home().resolve().is_relative_to(resolved):
        raise InputError(
            f"--folder: {resolved} holds your home: too much to send.", "Give the recipe a folder of its own."
        )
    return resolved


def _name_of(place: str) -> str:
    """A name for the run of a directory that the cluster knows nothing of."""
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", place.rstrip("/").rpartition("/")[2]).strip("-._")
    return last or "run"


def _quoted(word: str) -> str:
    """``word`` for the head's shell, which expands ``~``."""
    return '"$HOME"/' + shlex.quote(word[2:]) if word.startswith("~/") else shlex.quote(word)


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
