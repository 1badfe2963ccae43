"""A table of JSON lines: one file a search, for programs that read text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from ecotone.experiments.tracking.names import CURSOR
from ecotone.experiments.tracking.protocol import End, Line, Memory, TrackerSettings
from ecotone.experiments.tracking.subject import Subject


class JsonLinesSettings(TrackerSettings):
    """One file of JSON lines a search, and a folder of its files beside it.

    Attributes:
        folder: The folder that holds the files. None means the run directory.
    """

    folder: str | None = None

    title: ClassVar[str] = "JSON lines"
    packages: ClassVar[tuple[str, ...]] = ()
    lacks: ClassVar[tuple[str, ...]] = ("`ecotone ui` serves no pages for it",)

    @classmethod
    def install(cls) -> str:
        """It imports nothing."""
        return "nothing to install"

    def describe(self) -> str:
        """The folder."""
        return f"folder {self.folder or 'of the run'}"

    def place(self, directory: Path) -> str:
        """The folder that holds the run in ``directory``."""
        return str((Path(self.folder) if self.folder else directory / "lines").resolve())

    def open(self, subject: Subject, directory: Path, memory: Memory) -> JsonLines:
        """The file, found or made."""
        folder = Path(self.place(directory))
        folder.mkdir(parents=True, exist_ok=True)
        return JsonLines(subject, folder)


class JsonLines:
    """The file of one search: a first line with the recipe, a line for each step, a line for each end.

    Args:
        subject: The facts of the run as a whole.
        folder: The folder that holds the file.
    """

    experiment_id = "lines"
    colour = "#1f77b4"

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject, self.folder, self.experiment = subject, folder, folder.name
        self.logged = 0
        self._read(subject.identity)

    def _read(self, run_id: str) -> None:
        """Go on with the file of ``run_id`` after its last whole line, or begin it."""
        self.run_id = run_id
        self.path = self.folder / f"{run_id}.jsonl"
        self.page = str(self.path)
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:  # whoever wrote it was killed within a line
            self.path.write_bytes(whole)
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            head = {"name": self.subject.name, "parameters": self.subject.parameters, "stride": self.subject.stride}
            lines = [self._write(**head)]
        ends = [line for line in lines if "mark" in line] or [{"mark": "", "front": "", "evaluations": 0}]
        self.stride = lines[0]["stride"]
        self.cursor = max((line["step"] for line in lines if line.get("axis") == CURSOR), default=0)
        self.pictured = max((line["picture"] for line in lines if "picture" in line), default=0)
        self.end, self.front, self._count = (ends[-1][key] for key in ("mark", "front", "evaluations"))

    def _write(self, **values: Any) -> Mapping[str, Any]:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        return values

    def begin(self) -> None:
        """The file is there."""

    def log(self, lines: Iterable[Line]) -> None:
        """A line a step."""
        for line in lines:
            self._write(step=line.step, time=line.time, axis=line.axis, values=line.values)
            self.cursor = max(self.cursor, line.step)
            self.logged += len(line.values)

    def show(self, image: Any, step: int, time: int) -> None:
        """A picture in the folder beside the file."""
        self._beside().mkdir(exist_ok=True)
        image.save(self._beside() / f"front-{step}.png")
        self._write(picture=step, time=time)
        self.pictured = step

    def finish(self, end: End) -> None:
        """The files, then one line: it is there whole or not at all."""
        self._beside().mkdir(exist_ok=True)
        end.write(self._beside())
        front = [{"step": line.step, "axis": line.axis, "values": line.values} for line in end.lines]
        reasons = {key: text for key, text in end.reasons.items() if text}
        self._write(
            mark=end.mark, state=end.state, evaluations=end.evaluations, metrics=end.metrics, **reasons,
            front=end.front, lines=front, table=end.table,
        )  # fmt: skip
        self.logged += len(end.metrics) + sum(len(line.values) for line in end.lines)
        self.end, self.front, self._count = end.mark, end.front, end.evaluations

    def go_on(self, evaluations: int) -> None:
        """Go on in the same file, or after a front in another."""
        if self.front and evaluations > self._count:
            self._read(f"{self.subject.identity}-{self._count}")
        else:
            self.end = ""

    def memory(self) -> Memory:
        """The file tells all."""
        return {}

    def close(self) -> None:
        """Nothing is open."""

    def _beside(self) -> Path:
        return self.folder / self.run_id
