"""The settings of objectives and of calibration losses, and the declarations that every kind must make.

A kind is a class of settings in the file of its objective or loss. It is a part of the recipe, checks the values, and
builds the objective or the task. ``ecotone.fitness.registry`` has all kinds by name. Other packages add kinds by entry
points (``ecotone.objectives``, ``ecotone.losses``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from typing_extensions import Self

from ecotone.fitness.protocol import Objective
from ecotone.populations.errors import InputError
from ecotone.populations.trial import Goal
from ecotone.settings import ANYTHING, TEXT, Answers, Call, Kind, Located, Name, Part, check_kind, expanded

if TYPE_CHECKING:
    import torch

    from ecotone.fitness.protocol import CalibrationTask


@dataclass(frozen=True)
class ObjectiveContext:
    """The place of the model that objectives and calibration tasks are built for.

    Args:
        device: The device of the model.
        dtype: The type that floating-point inputs are converted to; None leaves them as they are.
        tokenizer: A local folder with the tokenizer and the model's ``config.json``; None where no kind needs one.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    tokenizer: str | None = None

    def tokenizer_for(self, where: str) -> str:
        """The tokenizer's folder.

        Args:
            where: Who needs it, for the message.

        Raises:
            InputError: There is none.
        """
        if self.tokenizer is None:
            raise InputError(f"{where}: tokenizer: expected a directory, found nothing.", "Give models.tokenizer.")
        return self.tokenizer


@dataclass(frozen=True)
class NamedCall:
    """A Python function that settings name.

    Args:
        field: Its field in the settings; empty where the settings themselves are the call.
        call: The function and its keyword arguments.
        given: The number of positional arguments that come before its own.
    """

    field: str
    call: Call
    given: int = 0


_CALLS: tuple[Callable[[Any], bool], str] = (
    lambda answer: isinstance(answer, Sequence) and all(isinstance(one, NamedCall) for one in answer),
    "a sequence of NamedCall",
)
_PATHS: tuple[Callable[[Any], bool], str] = (
    lambda answer: isinstance(answer, Sequence) and all(isinstance(one, Path) for one in answer),
    "a sequence of paths",
)


class ObjectiveSettings(Kind):
    """Base of the settings of every objective, which scores models.

    Attributes:
        name: The name of the objective's scores in results, tables and trackers.
        type: The kind of objective, such as ``accuracy`` or ``perplexity``.
        direction: Whether a higher score is better (``maximize``) or a lower score (``minimize``).
    """

    name: Name
    type: str
    direction: Literal["maximize", "minimize"]

    limits: ClassVar[tuple[float, float] | None]
    """The least and the most that an example can score, where a score is the mean over examples; else None."""

    by_example: ClassVar[bool | None]
    """Whether it gives a score for each example; None where only a model's first score tells."""

    needs_tokenizer: ClassVar[bool]
    """Whether it is built with the models' tokenizer."""

    paths: ClassVar[tuple[str, ...]]
    """The fields that name files or folders."""

    _answers: ClassVar[Answers] = {
        "build": (lambda answer: isinstance(answer, Objective), "an object with goal and score"),
        "calls": _CALLS,
        "describe": TEXT,
        "examine": (lambda answer: isinstance(answer, Iterator), "an iterator of facts"),
        "reads": _PATHS,
        "with_paths": ANYTHING,
    }

    @property
    def _subject(self) -> str:
        return f"{self.where}: the objective {self.type!r}"

    @abstractmethod
    def build(self, context: ObjectiveContext) -> Objective:
        """The objective, with its data where the model is.

        Raises:
            InputError: Its functions, files or data cannot be used.
        """

    @property
    def goal(self) -> Goal:
        """Name and direction."""
        return Goal(self.name, self.direction)

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"objective {self.name!r}"

    def imports(self) -> Mapping[str, tuple[str, ...]]:
        """The packages that it imports which come with an extra of Ecotone, by the extra."""
        return {"hf": ("transformers",)} if self.needs_tokenizer else {}

    def calls(self) -> Sequence[NamedCall]:
        """The Python functions that it names."""
        return _calls(self)

    def describe(self) -> str:
        """The objective in words, as ``ecotone validate`` tells it before anything is loaded."""
        return f"{_titled(self.type, self.calls())}, {self.direction}"

    def examine(self) -> Iterator[tuple[str, str]]:
        """Facts about the objective's data that need no model, as pairs of a subject and a sentence about it.

        Raises:
            InputError: The settings do not fit the data.
        """
        return iter(())

    def reads(self) -> Sequence[Path]:
        """The files and folders that scores depend on, beside those of its functions and their arguments.

        Their bytes are recorded when a run begins. A run does not go on with others without the user's word.
        """
        named = [getattr(self, field) for field in self.paths]
        return [Path(name).expanduser() for one in named for name in ([one] if isinstance(one, str) else one or ())]

    def with_paths(self, resolve: Located) -> Self:
        """The same settings with the paths of their files put through ``resolve``."""
        changed = {name: expanded(getattr(self, name), resolve) for name in self.paths}
        return self.model_validate({**dict(self), **changed})


class CalibrationSettings(Kind):
    """A task that a gradient search learns coefficients on: a stream of batches, and the loss that is differentiated.

    Attributes:
        name: The name of the calibration task.
        data: A call that returns the inputs, or (inputs, labels). Inputs are a tensor or an array (N, ...), or a
            mapping of tensors by name. Labels are (N,) class numbers from 0.
        loss: The loss that is differentiated, such as ``entropy`` or ``cross_entropy``.
        head: A call that returns the task's classification head, where the merged model is only the encoder. The head
            is a callable from (outputs, inputs) to logits. It is never merged.
        batch: Examples in one batch of the task.
    """

    name: Name
    data: Call
    loss: str
    head: Call | None = None
    batch: int = Field(default=16, ge=1)

    needs_labels: ClassVar[bool]
    """Whether ``data`` must return labels."""

    needs_expert: ClassVar[bool]
    """Whether merges are compared with an expert: ``expert``, where the kind has such a field, or the task's name."""

    _answers: ClassVar[Answers] = {
        "build": (lambda answer: hasattr(answer, "loss"), "a calibration task"),
        "calls": _CALLS,
        "describe": TEXT,
        "reads": _PATHS,
    }

    @property
    def _subject(self) -> str:
        return f"{self.where}: the calibration loss {self.loss!r}"

    @abstractmethod
    def build(self, context: ObjectiveContext, seed: int) -> CalibrationTask:
        """The task, with its data where the model is.

        Args:
            context: The context it is built for.
            seed: The seed of the order in which examples come.

        Raises:
            InputError: Its functions or data cannot be used.
        """

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"calibration {self.name!r}"

    @property
    def teacher(self) -> str | None:
        """The name of the expert that merges are compared with; None where there is none."""
        return (getattr(self, "expert", None) or self.name) if self.needs_expert else None

    def calls(self) -> Sequence[NamedCall]:
        """The Python functions that it names."""
        return _calls(self)

    def reads(self) -> Sequence[Path]:
        """The files and folders that gradients depend on, beside those of its functions and their arguments."""
        return ()

    def describe(self) -> str:
        """The task in words, as ``ecotone validate`` tells it."""
        loss = self.loss if self.teacher is None else f"{self.loss} from {self.teacher}"
        return f"{_titled(f'{loss} of', self.calls())}, {self.batch} examples a step"


def check_objective(name: str, kind: Any) -> None:
    """Refuse a kind of objective that lacks a declaration.

    Raises:
        InputError: As for ``ecotone.settings.check_kind``.
    """
    check_kind(name, kind, ObjectiveSettings, "type")


def check_loss(name: str, kind: Any) -> None:
    """Refuse a calibration loss that lacks a declaration.

    Raises:
        InputError: As for ``ecotone.settings.check_kind``.
    """
    check_kind(name, kind, CalibrationSettings, "loss")


def _calls(settings: Part) -> list[NamedCall]:
    """The calls in the fields of a settings object. Each gets only its keyword arguments."""
    return [NamedCall(name, value) for name, value in settings if isinstance(value, Call)]


def _titled(kind: str, calls: Sequence[NamedCall]) -> str:
    return f"{kind} {' with '.join(named.call.call for named in calls)}".rstrip()
