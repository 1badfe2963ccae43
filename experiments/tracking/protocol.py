"""The protocol of trackers: the settings of a kind, and the record of one run that they open.

To add a tracker, write its file and one line of the registry (``ecotone.experiments.tracking.registry``), or an entry
point of the group ``ecotone.trackers`` in a package of your own. The file holds two things:

- A subclass of ``TrackerSettings``: its part of a recipe, and its declarations.
- A class with the methods of ``Record``: the run of the tracker that one search is mirrored into.

``Mirror`` computes everything that is logged (metrics, steps, fronts, pictures, files) once for all trackers. The
conformance suite is ``ecotone.testing.trackers``.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

from pydantic import ValidationInfo

from ecotone.experiments.tracking.names import CURSOR
from ecotone.experiments.tracking.subject import Subject
from ecotone.populations.errors import EcotoneError, InputError, first_line, shown
from ecotone.settings import Part, check_fields

Memory: TypeAlias = Mapping[str, Any]
"""Plain values that a record keeps in the run directory, for trackers that do not report how much they have."""

SILENCE = "does not answer"
"""How the words of an error end of which nobody wants to see more."""


TAKEN = ("uri", "experiment")
"""Names that no tracker can have: fields of ``tracking`` that are no trackers."""


class TrackingError(EcotoneError):
    """A tracker cannot be reached, started or understood."""


@dataclass(frozen=True)
class Line:
    """The metrics of one step.

    Args:
        step: Evaluations so far or, of a front, the position of the member.
        time: Unix milliseconds.
        values: By metric.
        axis: The metric that the steps count.
    """

    step: int
    time: int
    values: Mapping[str, float]
    axis: str = CURSOR


@dataclass(frozen=True)
class End:
    """One end of a search, and its results until then. A search that is resumed has several ends.

    Args:
        mark: A text that differs between the ends of a run.
        state: ``finished``, ``failed``, ``interrupted`` or ``killed``.
        ended: When the run ended (unix seconds).
        evaluations: The number of evaluations.
        time: When the last of them came (unix milliseconds).
        reasons: ``stop_reason`` and ``error``, in words; empty where there is none.
        metrics: Metrics of the whole run: held-out scores of the best candidate, scores of the merges to compare with.
        front: A text that differs between the fronts of a run; empty unless the search has finished.
        lines: The front, one step for each member, and values of earlier steps that are known only now; empty unless
            the search has finished.
        table: The front: ``columns`` and ``data``, a list a row.
        write: Writes the files of the search into a folder.
    """

    mark: str
    state: str
    ended: float
    evaluations: int
    time: int
    reasons: Mapping[str, str]
    metrics: Mapping[str, float]
    front: str
    lines: Sequence[Line]
    table: Mapping[str, Any]
    write: Callable[[Path], None]


class Record(Protocol):
    """The run of a tracker that one search is mirrored into. Only one process writes it at a time.

    ``TrackerSettings.open`` makes it. While the search goes on, ``begin`` and then ``log`` and ``show`` are called
    again and again, at each end of the search ``finish``, and ``close`` at last; ``go_on`` when there is more after an
    end. Any error makes a record useless: it is closed, and the next attempt opens another one, which goes on from
    where the tracker stands.
    """

    @property
    def run_id(self) -> str:
        """The tracker's name of the run."""

    @property
    def experiment(self) -> str:
        """The experiment or project that the run is in, by name."""

    @property
    def experiment_id(self) -> str:
        """The tracker's own name of that experiment."""

    @property
    def page(self) -> str | None:
        """The address or the command with which people see the run; None where it has to be served first."""

    @property
    def colour(self) -> str:
        """The colour of the search's front, as ``#rrggbb``."""

    @property
    def cursor(self) -> int:
        """Evaluations that the tracker shows: lines of steps up to it are not logged again."""

    @property
    def logged(self) -> int:
        """Metric values that this record has logged."""

    @property
    def stride(self) -> int | None:
        """A line every so many evaluations, as the run began; None when the stride grows."""

    @property
    def pictured(self) -> int:
        """Evaluations of the latest picture."""

    @property
    def end(self) -> str:
        """The mark of the end that the tracker shows; empty when it shows none."""

    @property
    def front(self) -> str:
        """The mark of the front that the tracker shows; empty when it shows none."""

    def begin(self) -> None:
        """Show that the search goes on."""

    def log(self, lines: Iterable[Line]) -> None:
        """Log lines, in order. Each is taken from ``lines`` only when the tracker has all lines before it."""

    def show(self, image: Any, step: int, time: int) -> None:
        """Log a picture of the front (a Pillow image) after ``step`` evaluations, at ``time`` (unix milliseconds)."""

    def finish(self, end: End) -> None:
        """Log the end of the search. A second call with the same end adds nothing, wherever the first one stopped."""

    def go_on(self, evaluations: int) -> None:
        """Make ready to take more than the end that the tracker shows; ``cursor``, ``end`` and ``front`` say anew.

        A front that was logged cannot be taken back. So where there is one, and the search has more ``evaluations``
        than the tracker shows, another run of the tracker is begun, with nothing in it, and the run so far stays what
        it is: an earlier end.
        """

    def memory(self) -> Memory:
        """The values that the next call of ``open`` must be given."""

    def close(self) -> None:
        """Release the tracker. All logged values are with it, or on their way."""


class TrackerSettings(Part):
    """The settings of a tracker: its part of a recipe, and its declarations.

    A subclass has an entry for each field in the ``Attributes`` section of its docstring, and all of ``DECLARED``. The
    registry refuses one that lacks any.
    """

    DECLARED: ClassVar[tuple[str, ...]] = ("title", "packages", "install", "lacks", "describe", "place", "open")

    title: ClassVar[str]
    """Its name, for people."""
    packages: ClassVar[tuple[str, ...]]
    """The Python packages that it imports."""
    lacks: ClassVar[tuple[str, ...]]
    """The abilities of other trackers that it lacks, one clause for each."""

    @classmethod
    def install(cls) -> str:
        """The command that installs its packages."""
        raise NotImplementedError

    def recorded(self) -> TrackerSettings:
        """The settings that the journal keeps. Values from this process's environment are written out."""
        return self

    def describe(self) -> str:
        """A clause that names the place of a run."""
        raise NotImplementedError

    def place(self, directory: Path) -> str:
        """The place of the run in ``directory``, without credentials. Two places of one run are two copies of it."""
        raise NotImplementedError

    def open(self, subject: Subject, directory: Path, memory: Memory) -> Record:
        """The record of a run, found or made.

        Args:
            subject: The facts of the run as a whole.
            directory: The run directory.
            memory: The values kept by the last record of this run; empty when unknown.

        Raises:
            Exception: The tracker cannot be reached, or refuses.
        """
        raise NotImplementedError

    def in_words(self, error: BaseException) -> str:
        """One line about an error, for the user."""
        if isinstance(error, ImportError):
            return f"{self.title} cannot be imported ({first_line(error)}): `{self.install()}`"
        text = shown(" ".join(str(error).split())) or type(error).__name__
        return text if len(text) <= 300 else f"{text[:297]}..."

    @classmethod
    def installed(cls) -> bool:
        """Whether all that it imports is there."""
        return all(importlib.util.find_spec(name) is not None for name in cls.packages)

    @classmethod
    def require(cls) -> None:
        """Raise an error with the command to install missing packages.

        Raises:
            TrackingError: Something is.
        """
        if not cls.installed():
            raise TrackingError(f"{cls.title} is not installed.", f"`{cls.install()}`, or switch it off.")


def on_record(value: Any, info: ValidationInfo, *place: str) -> bool:
    """Whether the run's own recipe, which is read back, has this value on record: no rule stops it then.

    Args:
        value: The value of a field.
        info: Given by pydantic. In its context, ``recorded`` is what the recipe says of trackers.
        place: Keys that lead to the field's part.
    """
    known: Any = (info.context or {}).get("recorded")
    for step in (*place, info.field_name or ""):
        known = known.get(step) if isinstance(known, Mapping) else None
    return known is not None and bool(known == value)


def check_declared(name: str, kind: Any) -> None:
    """Refuse a tracker that lacks a declaration.

    Raises:
        InputError: It is named like a field of ``tracking``, it is no subclass of ``TrackerSettings``, or lacks one of
            ``TrackerSettings.DECLARED``, a default or the text of a field.
    """
    if name in TAKEN:
        raise InputError(f"tracker {name!r}: `tracking` has a field of that name.", "Give the tracker another name.")
    if not (isinstance(kind, type) and issubclass(kind, TrackerSettings)):
        raise InputError(f"tracker {name!r}: expected a subclass of TrackerSettings, found {kind!r}.")
    missing = [
        declaration
        for declaration in TrackerSettings.DECLARED
        if _found(kind, declaration) is _found(TrackerSettings, declaration)
    ]
    silent = [field for field, text in kind.texts().items() if not text]
    needed = [field for field, known in kind.model_fields.items() if known.is_required()]
    for what, found in (("lacks", missing), ("says nothing of its fields", silent), ("has no default for", needed)):
        if found:
            raise InputError(f"tracker {name!r}: it {what} {', '.join(found)}.", "See TrackerSettings.")
    check_fields(kind)


def _found(kind: type, name: str) -> Any:
    return inspect.getattr_static(kind, name, None)
