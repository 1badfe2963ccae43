"""Registries of kinds: searches, operators, objectives, losses, backends, trackers and checkpoint formats, by name.

Ours are named with the place they lie in and are imported when they are asked for. Those of other installed packages
are entry points (``ecotone.searches``, ``ecotone.operators``, ``ecotone.objectives``, ``ecotone.backends``,
``ecotone.trackers`` and so on): recipes name them like ours. A kind that does not declare all that its sort must say of
itself is refused when it is registered, in words that name what is missing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, distributions, entry_points
from typing import Any, Generic, TypeVar

from ecotone.populations.errors import EcotoneError, InputError, closest, first_line, told

Kind = TypeVar("Kind")
TELL = "Tell the authors of that package."
_MEND = "Mend or uninstall that package."
_GONE = "If another package has it, install that package. `ecotone plugins` lists all kinds."


@dataclass(frozen=True)
class Origin:
    """The origin of a kind: Ecotone, ``register``, or an entry point of a package.

    Args:
        sort: The sort of kind: ``search``, ``operator`` and so on.
        name: Its name in recipes.
        package: The distribution that has it, with its version; ``ecotone`` for ours.
        place: ``module:attribute``.
        error: Why it cannot be used; empty when it can.
    """

    sort: str
    name: str
    package: str
    place: str
    error: str = ""


class Registry(Generic[Kind]):
    """Kinds of one sort.

    Args:
        sort: The name of the sort, for messages: ``search``, ``operator``, ``objective`` and so on.
        group: The entry points of other packages, as ``ecotone.searches``.
        ours: Places of our own kinds, ``module:attribute``, by name.
        check: Raises ``InputError``, naming what is missing, unless a kind declares all that its sort must. It is
            called with the name and the kind.
    """

    def __init__(
        self,
        sort: str,
        group: str,
        ours: Mapping[str, str],
        check: Callable[[str, Any], None] = lambda name, kind: None,
    ) -> None:
        self.sort = sort
        self.group = group
        self._ours = dict(ours)
        self._check = check
        self._found: dict[str, Kind | InputError] = {}
        self._given: dict[str, Kind] = {}

    def get(self, name: Any, field: str) -> Kind:
        """The kind of that name.

        Args:
            name: Its name in recipes.
            field: The recipe's field that names it, for messages.

        Raises:
            InputError: There is none (the nearest name is given), two packages have one of that name, its package
                cannot be imported, or it does not declare all that it must.
        """
        if not isinstance(name, str) or name not in self:
            known = self.names()
            remedy = ""
            if isinstance(name, str) and name:
                close = closest(name, known)
                remedy = _GONE if close is None else f"Did you mean {close!r}?"
            raise InputError(f"{field}: expected one of {', '.join(known)}, found {name!r}.", remedy)
        kind = self._loaded(name)
        if isinstance(kind, InputError):
            raise InputError(f"{field}: {kind.message}", kind.remedy) from kind
        return kind

    def register(self, name: str, kind: Kind) -> None:
        """Add a kind for this process, as a notebook or a test does; workers in other processes do not have it.

        Raises:
            InputError: The name is taken, or the kind does not declare all that it must.
        """
        if name in self:
            raise InputError(f"{self.sort} {name!r}: there is one of that name already.", "Choose another name.")
        self._check(name, kind)
        self._given[name] = kind

    def forget(self, name: str) -> None:
        """Remove a kind that ``register`` added."""
        self._given.pop(name, None)

    def owns(self, name: object) -> bool:
        """Whether a name is that of one of Ecotone's own kinds, which then is the one that it means."""
        return isinstance(name, str) and name in self._ours

    def names(self) -> tuple[str, ...]:
        """The names that may be used: Ecotone's first, then those of other packages."""
        return (*self._ours, *sorted({*self._given, *self._others} - self._ours.keys()))

    def __contains__(self, name: object) -> bool:
        return name in self._ours or name in self._given or name in self._others

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def usable(self) -> dict[str, Kind]:
        """Every usable kind, by name. ``origins`` says why other kinds cannot be used."""
        return {name: self.get(name, self.sort) for name in self.names() if not self._trouble(name)}

    def origins(self) -> list[Origin]:
        """The origin of each kind, Ecotone's first, and the reason where a kind cannot be used."""
        ours = [Origin(self.sort, name, "ecotone", place, self._trouble(name)) for name, place in self._ours.items()]
        given = [Origin(self.sort, name, "this process", "") for name in self._given]
        others = [
            Origin(self.sort, name, _package(point), point.value, self._trouble_of(name))
            for name, points in sorted(self._others.items())
            for point in points
        ]
        return [*ours, *given, *others]

    @cached_property
    def _others(self) -> dict[str, list[EntryPoint]]:
        """Entry points of installed packages, by name."""
        found: dict[str, list[EntryPoint]] = defaultdict(list)
        for point in entry_points(group=self.group):
            if point not in found[point.name]:
                found[point.name].append(point)
        return dict(found)

    def _loaded(self, name: str) -> Kind | InputError:
        """The kind of that name, or why it cannot be used; it is imported and checked once."""
        if name in self._given:
            return self._given[name]
        if name not in self._found:
            try:
                self._found[name] = self._own(name) if name in self._ours else self._plugged(name, self._others[name])
            except InputError as error:
                self._found[name] = error
        return self._found[name]

    def _own(self, name: str) -> Kind:
        module, _, attribute = self._ours[name].partition(":")
        kind = getattr(import_module(module), attribute)
        self._check(name, kind)
        return kind  # type: ignore[no-any-return]

    def _plugged(self, name: str, points: Sequence[EntryPoint]) -> Kind:
        if len(points) > 1:
            packages = " and ".join(f"{_package(point)} ({point.value})" for point in points)
            raise InputError(
                f"two installed packages have a {self.sort} {name!r}: {packages}.", "Uninstall one of them."
            )
        point = points[0]
        whose = f"the {self.sort} {name!r} of the package {_package(point)}"
        form = EntryPoint.pattern.match(point.value)
        if form is None or not form["attr"]:
            raise InputError(
                f"{whose} cannot be imported: expected an entry point of the form module:attribute, found "
                f"{point.value!r}.",
                _MEND,
            )
        try:
            kind = point.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise InputError(f"{whose} cannot be imported: {told(error)} ({point.value}).", _MEND) from error
        self._found[name] = kind  # the check may ask for all kinds of the sort, and so for this one
        try:
            self._check(name, kind)
        except InputError as error:
            raise InputError(f"{whose} cannot be used: {error.message}", error.remedy) from error
        except Exception as error:
            raise InputError(f"{whose} cannot be used: {told(error)}.", _MEND) from error
        return kind  # type: ignore[no-any-return]

    def _trouble(self, name: str) -> str:
        try:
            kind = self._loaded(name)
        except ImportError as error:  # of ours, where a package of Ecotone's is missing
            return first_line(error)
        return first_line(kind) if isinstance(kind, InputError) else ""

    def _trouble_of(self, name: str) -> str:
        """Why a kind of another package cannot be used."""
        if name in self._ours:
            return f"ecotone itself has this {self.sort} {name!r}, which is used."
        return self._trouble(name)


def is_ours(kind: Any) -> bool:
    """Whether a class, or a function, lies in Ecotone itself."""
    return str(kind.__module__).partition(".")[0] == "ecotone"


@contextmanager
def blamed(subject: str, kind: Any, method: str, *passes: type[Exception]) -> Iterator[None]:
    """Have what a method of an installed package's kind raises name the package. Ecotone's own errors stay.

    Args:
        subject: The recipe's field and the kind: ``search.algorithm: the search 'mine'``.
        kind: The kind's class. Nothing changes for those that lie in no package with kinds.
        method: The name of the method.
        passes: Other exceptions that the method may raise.

    Raises:
        InputError: In place of any other exception.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, (EcotoneError, *passes)) or not package_of(kind):
            raise
        raise InputError(f"{whose(subject, kind)}: {method}() raised {told(error)}.", TELL) from error


def whose(subject: str, kind: Any) -> str:
    """``subject``, and the installed package of its kind, where it lies in one."""
    package = package_of(kind)
    return f"{subject} of the package {package}" if package else subject


def package_of(kind: Any) -> str:
    """The installed package with kinds that a class, or a function, lies in, with its version; empty for others."""
    top = str(getattr(kind, "__module__", "")).partition(".")[0]
    points = (point for found in distributions() for point in found.entry_points if point.group.startswith("ecotone."))
    return next((_package(point) for point in points if re.split(r"[.:]", point.value)[0].strip() == top), "")


def _package(point: EntryPoint) -> str:
    found = point.dist
    return "an unknown package" if found is None else f"{found.name} {found.version}"
