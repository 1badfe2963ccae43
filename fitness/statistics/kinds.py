"""Kinds of statistics, by name, and the declarations that each must make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pydantic import Field, ValidationError
from torch import Tensor, nn

from ecotone.fitness.data import Examples
from ecotone.fitness.heads import Head
from ecotone.populations.errors import InputError, nearest
from ecotone.populations.trial import Statistics
from ecotone.registry import Registry
from ecotone.settings import Part, check_fields


class Gathering(Part):
    """The settings that all kinds of statistics have.

    Attributes:
        batch: Examples in one forward pass; bounds the memory for activations.
        examples: How many of each task's examples are used, from the first on; null takes all.
    """

    batch: int = Field(32, ge=1)
    examples: int | None = Field(None, ge=1)


@dataclass(frozen=True, eq=False)
class Data:
    """The examples of a calibration task that statistics are gathered over.

    Args:
        name: The task's name.
        examples: Inputs on the model's device, as many as the settings ask for. Statistics must not use the labels.
        head: Turns the model's outputs into logits; None where the outputs are the logits.
    """

    name: str
    examples: Examples
    head: Head | None


class Statistic(Protocol):
    """A kind of statistics, with its settings.

    Attributes:
        settings: The class of its settings.
        version: To be raised when the same model, data and settings give other tensors: older ones are in caches.
    """

    settings: ClassVar[type[Gathering]]
    version: ClassVar[int]

    def __init__(self, settings: Any) -> None: ...

    def gather(self, model: nn.Module, tasks: Sequence[Data]) -> Mapping[str, Tensor]:
        """The statistics of ``model``, by the names of its layers.

        Args:
            model: In evaluation mode. Whatever is changed in it must be as before afterwards.
            tasks: The data, all on the model's device.

        Returns:
            Tensors on the CPU. Two calls on one machine give the same bits.
        """
        ...


def _check(name: str, kind: Any) -> None:
    if not isinstance(kind, type):
        raise InputError(f"statistics {name!r}: expected a class, found {kind!r}.")
    settings, version = getattr(kind, "settings", None), getattr(kind, "version", None)
    if not (isinstance(settings, type) and issubclass(settings, Gathering)):
        raise InputError(f"statistics {name!r}: settings: expected a class made from Gathering, found {settings!r}.")
    try:
        check_fields(settings)
    except InputError as error:
        raise InputError(f"statistics {name!r}: {error.message}", error.remedy) from error
    required = [field for field, info in settings.model_fields.items() if info.is_required()]
    if required:
        raise InputError(
            f"statistics {name!r}: {settings.__name__}: expected a default of each field, found none for "
            f"{', '.join(required)}.",
            "Give each a default: a trial may ask for statistics without settings.",
        )
    if type(version) is not int:
        raise InputError(f"statistics {name!r}: version: expected a whole number, found {version!r}.")
    if not callable(getattr(kind, "gather", None)):
        raise InputError(f"statistics {name!r}: expected a method gather(model, tasks), found none.")


_OURS = {
    "magnitude": "ecotone.fitness.statistics.magnitude:Magnitude",
    "inputs": "ecotone.fitness.statistics.moments:InputMoments",
    "slopes": "ecotone.fitness.statistics.moments:SlopeMoments",
    "fisher": "ecotone.fitness.statistics.moments:DiagonalFisher",
}
STATISTICS: Registry[type[Statistic]] = Registry("statistic", "ecotone.statistics", _OURS, _check)


def chosen(wants: Statistics) -> tuple[type[Statistic], Gathering]:
    """The kind that a trial wants, and its settings, defaults included.

    Raises:
        InputError: There is no such kind, or a setting does not fit it.
    """
    kind = STATISTICS.get(wants.kind, "kind")
    try:
        return kind, kind.settings.model_validate(dict(wants.settings))
    except ValidationError as error:
        first, known = error.errors()[0], list(kind.settings.model_fields)
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise InputError(f"statistics {wants.kind}: {where}: unknown key.", nearest(where, known)) from error
        said = f"statistics {wants.kind}: {where}: {first['msg']}, found {first['input']!r}."
        raise InputError(said, f"It has {', '.join(known)}.") from error
