"""Weights & Biases: one W&B run a search, sent as it goes on, or written into a folder for `wandb sync` to send.

Each line of metrics is logged with its number of evaluations as W&B's own step, and the front after it, so every row
has one step whoever logs it: W&B drops a row whose step it has passed. Online, W&B is asked where to go on.

A log that is written offline cannot be asked, and one whose writer was killed has lost its last rows. So an offline log
is never continued: as long as it shows no whole search, the next mirror writes it anew from the journal, under the same
run id, and takes the broken one away. A search is always in one log.

W&B is imported only inside the functions that need it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import ValidationInfo, field_validator

from ecotone.experiments.tracking.names import CURSOR, PICTURE
from ecotone.experiments.tracking.protocol import SILENCE, End, Line, Memory, TrackerSettings, on_record
from ecotone.experiments.tracking.subject import Subject
from ecotone.extras import how_to_install
from ecotone.populations.errors import InputError
from ecotone.populations.folders import private_folder
from ecotone.populations.secrets import place

COLOUR = "#1f77b4"  # of fronts in pictures; W&B gives runs colours of its own
TABLE = "front_table"
PICTURES = f"{PICTURE}_picture"
_OWN = "ecotone"  # the key of the configuration with what is not the recipe's
_MODES = {"online": "online", "offline": "offline", "dryrun": "offline"}
_REFUSED = "/\\#?%:"  # characters of names
_LONGEST = 128  # characters of a project's name
_SERVER = "https://api.wandb.ai"
_SILENT = ("connection refused", "no such host", "timeout", "timed out", "deadline exceeded", "giving up after")
# A server that is down should say so soon; patience is ours, not each call's. The rest of what W&B gathers by itself
# (git, code, the console, the machine's load) is not the search's.
_SETTINGS = {
    "silent": True,
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "disable_job_creation": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "init_timeout": 30.0,
    "finish_timeout": 120.0,
    "finish_timeout_raises": True,
    "x_graphql_retry_max": 1,
    "x_graphql_retry_wait_max_seconds": 1.0,
    "x_graphql_timeout_seconds": 10.0,
}


class WandbSettings(TrackerSettings):
    """Weights & Biases: its server, or a folder for `wandb sync`.

    Attributes:
        project: The W&B project that holds the run.
        entity: The user or team that owns the W&B project. None means the user who logged in with `wandb login`.
        mode: ``online`` sends the run to W&B. ``offline`` writes it into a folder without a network, for `wandb sync`
            to send later. None means $WANDB_MODE, or else online.
        dir: The folder that W&B keeps its files in. None means the run directory.
    """

    project: str = "ecotone"
    entity: str | None = None
    mode: Literal["online", "offline"] | None = None
    dir: str | None = None

    @field_validator("project", "entity")
    @classmethod
    def _accepted(cls, value: str | None, info: ValidationInfo) -> str | None:
        """Refuse what W&B refuses, before anything runs. Of entities it says nothing of the length."""
        if value is None or on_record(value, info, "wandb"):
            return value
        if any(sign in value for sign in _REFUSED):
            raise ValueError(f"expected a name without any of {_REFUSED}, found {value!r}")
        if info.field_name == "project" and not 0 < len(value) <= _LONGEST:
            raise ValueError(f"expected a name of 1 to {_LONGEST} characters, found {value!r}")
        return value

    title: ClassVar[str] = "Weights & Biases"
    packages: ClassVar[tuple[str, ...]] = ("wandb",)
    lacks: ClassVar[tuple[str, ...]] = (
        "`ecotone ui` serves no pages for it",
        "`ecotone export --register` makes no model in it",
        "runs are not named by its run ids",
    )

    @classmethod
    def install(cls) -> str:
        """The extra."""
        return how_to_install("wandb")

    def recorded(self) -> WandbSettings:
        """With the mode that $WANDB_MODE names, and the folder made absolute."""
        folder = None if self.dir is None else str(Path(self.dir).absolute())
        return self.model_copy(update={"mode": self._mode(), "dir": folder})

    def describe(self) -> str:
        """The project, and whether it is online."""
        return f"project {self.project!r}, {self._mode()}"

    def place(self, directory: Path) -> str:
        """The project's address on the server, or the folder."""
        if self._mode() == "offline":
            return str(self.folder(directory) / "wandb")
        server = os.environ.get("WANDB_BASE_URL", _SERVER).rstrip("/")
        return "/".join([place(server), *([self.entity] if self.entity else []), self.project])

    def folder(self, directory: Path) -> Path:
        """The folder in which W&B keeps its files of the run in ``directory``."""
        return directory if self.dir is None else Path(self.dir)

    def open(self, subject: Subject, directory: Path, memory: Memory) -> WandbRecord:
        """The W&B run, which is asked for or made when there is something to say."""
        kind = OfflineRecord if self._mode() == "offline" else WandbRecord
        return kind(subject, self, self.folder(directory), memory)

    def in_words(self, error: BaseException) -> str:
        """One line about an error. For a server that does not answer, it says only that."""
        text = super().in_words(error)
        if any(sign in text.lower() for sign in _SILENT):
            server = os.environ.get("WANDB_BASE_URL", _SERVER)
            return f"the W&B server at {urlsplit(server).hostname or place(server)} {SILENCE}"
        return text

    def _mode(self) -> str:
        if self.mode is not None:
            return self.mode
        wanted = os.environ.get("WANDB_MODE") or "online"
        if wanted not in _MODES:
            raise InputError(
                f"$WANDB_MODE: expected online or offline, found {wanted!r}.",
                "Set tracking.wandb.mode, or tracking.wandb=false.",
            )
        return _MODES[wanted]


class WandbRecord:
    """The W&B run of a search, on a server.

    Args:
        subject: The facts of the run as a whole.
        settings: Project, team and mode of W&B.
        folder: The folder of W&B's files.
        memory: The values kept by the last record. If they hold an end, the server is asked only for more to log.
    """

    logged: int
    run_id: str
    end: str
    cursor: int

    mode: ClassVar[Literal["online", "offline"]] = "online"

    def __init__(self, subject: Subject, settings: WandbSettings, folder: Path, memory: Memory) -> None:
        self.subject = subject
        self.settings = settings
        self.folder = folder
        self.logged = 0
        self.run_id = str(memory.get("run_id") or subject.identity)
        self.page: str | None = memory.get("page")
        self._run: Any = None
        self._forget()
        if memory.get("end"):
            self.end = str(memory["end"])
            self.cursor = int(memory.get("cursor", 0))
            self._marks |= memory.get("marks", {})
        else:
            self._open()

    @property
    def experiment(self) -> str:
        """The project."""
        return self.settings.project

    @property
    def experiment_id(self) -> str:
        """The project, with whose it is."""
        return "/".join([*([self.settings.entity] if self.settings.entity else []), self.settings.project])

    @property
    def colour(self) -> str:
        """One for all: W&B colours runs by itself."""
        return COLOUR

    @property
    def stride(self) -> int | None:
        """The stride the run began with: a budget that is raised before the search's end must not move the steps."""
        stride: int | None = self._marks["stride"]
        return stride

    @property
    def pictured(self) -> int:
        """Evaluations of the latest picture."""
        return int(self._marks["pictured"])

    @property
    def front(self) -> str:
        """The mark of the front that W&B shows."""
        return str(self._marks["front"])

    def memory(self) -> Memory:
        """Values of a complete search, so that the server need not be asked."""
        if not self.end:
            return {}
        return {"end": self.end, "cursor": self.cursor, "marks": self._marks, "page": self.page}

    # -- while the search goes on ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Have the run there, which W&B shows as running."""
        self._open()

    def log(self, lines: Iterable[Line]) -> None:
        """Log line by line."""
        for line in lines:
            self._log(line.step, line.time, {line.axis: line.step, **line.values}, line.axis)
            self.cursor = max(self.cursor, line.step)

    def show(self, image: Any, step: int, time: int) -> None:
        """Log a picture."""
        import wandb

        self._log(step, time, {PICTURES: wandb.Image(image)}, CURSOR)
        self._mark(pictured=step)

    def go_on(self, evaluations: int) -> None:
        """Take more; after a front in another run, whose id says after how many evaluations it took over."""
        if self._is_another(evaluations):
            self.close()
            self.run_id = self._successor
            self._forget()
        self._open()
        self.end = ""

    def _is_another(self, evaluations: int) -> bool:
        """Whether a search of so many evaluations is more than the one whose front W&B shows."""
        return bool(self.front) and evaluations > self._marks["count"]

    @property
    def _successor(self) -> str:
        return f"{self.subject.identity}-{self._marks['count']}"

    # -- the end -----------------------------------------------------------------------------------------------

    def finish(self, end: End) -> None:
        """Log the end: the front, the state, the files; it is there when W&B says that it has sent or written all."""
        import wandb

        run = self._open()
        if end.front:
            # First: a search that goes on must not write where a part of its front lies.
            self._mark(front=end.front, count=end.evaluations)
            step = end.evaluations
            for step, values in enumerate(_rows(end.lines), end.evaluations + 1):
                self._log(step, end.time, values, _axis(values))
            table = wandb.Table(columns=list(end.table["columns"]), data=list(end.table["data"]))
            with self._staging():
                self._log(step + 1, end.time, {TABLE: table}, CURSOR)
        reasons = {key: text for key, text in end.reasons.items() if text}
        run.summary.update({**end.metrics, "state": end.state, **reasons})
        self._artifact(end)
        self._finish(0 if end.state == "finished" else 1)
        self.end = end.mark  # known to us alone, and only now: W&B sends what it has in no order that it tells

    def close(self) -> None:
        """End the connection; the run goes on when it is opened again."""
        if self._run is not None:
            self._finish(0)

    def _artifact(self, end: End) -> None:
        import wandb

        artifact = wandb.Artifact(f"search-{self.run_id}", "search")
        with tempfile.TemporaryDirectory(prefix="ecotone-") as folder, self._staging():
            end.write(Path(folder))
            artifact.add_dir(folder, skip_cache=True)
        self._run.log_artifact(artifact)

    def _finish(self, code: int) -> None:
        run, self._run = self._run, None
        try:
            run.finish(exit_code=code)
        finally:
            _end_process()

    # -- the run -----------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Begin with nothing."""
        self.cursor = 0
        self.end = ""
        self._marks: dict[str, Any] = {"stride": self.subject.stride, "pictured": 0, "front": "", "count": 0}

    def _open(self) -> Any:
        """The run; where it stands is asked of W&B when it is opened."""
        if self._run is None:
            self._run = self._begun()
            self.page = self._run.url
            known = dict(self._run.config.get(_OWN) or {})
            self._marks |= {key: value for key, value in known.items() if key in self._marks}
            self.cursor = max(0, self._run.starting_step - 1)
            if self.front:  # whose rows come after those of the evaluations
                self.cursor = min(self.cursor, self._marks["count"])
            self._run.config.update(self._configuration(), allow_val_change=True)
        return self._run

    def _begun(self) -> Any:
        import wandb

        private_folder(self.folder)
        private_folder(self.folder / "wandb")  # W&B's own folder in it
        self._defined = {CURSOR}
        try:
            return wandb.init(
                project=self.settings.project,
                entity=self.settings.entity,
                id=self.run_id,
                name=self.subject.name,
                group=self.subject.recipe[:128],
                tags=[self.subject.algorithm[:64]] if self.subject.algorithm else None,
                dir=str(self.folder),
                mode=self.mode,
                resume="allow" if self.mode == "online" else None,
                reinit="create_new",
                settings=wandb.Settings(**_SETTINGS),
            )
        except Exception:
            _end_process()
            raise

    def _configuration(self) -> dict[str, Any]:
        """The recipe, flattened; under one key, the tags of the run and the state of mirroring."""
        tags = {key.removeprefix("ecotone."): value for key, value in self.subject.tags.items()}
        return {**self.subject.parameters, _OWN: {**tags, **self._marks}}

    def _mark(self, **marks: Any) -> None:
        self._marks |= marks
        self._run.config.update({_OWN: self._configuration()[_OWN]}, allow_val_change=True)

    def _log(self, step: int, time: int, values: Mapping[str, Any], axis: str) -> None:
        """Log one row under W&B's own ``step``, unless an earlier mirror did."""
        run = self._open()
        if step < run.starting_step:
            return
        for key in values.keys() - self._defined:
            self._defined.add(key)
            run.define_metric(key, **({} if key == axis else {"step_metric": axis}))
        run.log({**values, "_timestamp": time / 1000}, step=step)
        self.logged += len(values)

    @contextlib.contextmanager
    def _staging(self) -> Iterator[None]:
        """Inside, files to be sent are kept with the run's own, not in the user's home."""
        before = os.environ.get("WANDB_DATA_DIR")
        os.environ["WANDB_DATA_DIR"] = before or str(self.folder / "wandb" / "data")
        try:
            yield
        finally:
            if before is None:
                del os.environ["WANDB_DATA_DIR"]


class OfflineRecord(WandbRecord):
    """The W&B run of a search, in a folder: written from the journal's first row on, or shown as it is.

    Args:
        subject: The facts of the run as a whole.
        settings: Project, team and mode of W&B.
        folder: The folder of W&B's files.
        memory: The values kept by the last record. Without an end in it the log is written anew.
    """

    mode: ClassVar[Literal["online", "offline"]] = "offline"

    def begin(self) -> None:
        """Nobody looks at it while it is written."""

    def go_on(self, evaluations: int) -> None:
        """Write anew every run that shows less than the journal has. An earlier end with a front stays as it is."""
        self.close()
        if self._is_another(evaluations):
            self.run_id: str = self._successor
        self._forget()

    def _open(self) -> Any:
        if self._run is None:
            self._run = self._begun()
            self._log_folder = Path(self._run.dir).parent
            self.page: str | None = f"wandb sync {self._log_folder}"
            self._run.config.update(self._configuration(), allow_val_change=True)
        return self._run

    def _finish(self, code: int) -> None:
        """End the log, and take earlier ones of the same run away: this one has all of theirs."""
        super()._finish(code)
        for log in (self.folder / "wandb").glob(f"offline-run-*/run-{self.run_id}.wandb"):
            if log.parent != self._log_folder:
                shutil.rmtree(log.parent)


def _end_process() -> None:
    """End W&B's own process: only then is all written, and the run's id free for the next attempt."""
    import wandb

    if wandb.run is None:  # nobody else's run is in this process
        wandb.teardown()


def _rows(lines: Iterable[Line]) -> list[dict[str, float]]:
    """The rows that are logged, each with all metrics of one step of one axis."""
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for line in lines:
        rows.setdefault((line.axis, line.step), {line.axis: line.step}).update(line.values)
    return list(rows.values())


def _axis(values: Mapping[str, float]) -> str:
    return next(iter(values))
