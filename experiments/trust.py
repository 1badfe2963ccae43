"""Whose record it is, and what a record that is not this user's would have Ecotone do.

A record with a mark of this user's key (``ecotone.experiments.marks``) is acted on as it is. Any other record is data:
every function, plug-in, path, URL and server that it names is listed, and refused unless the user says ``--trust``. It
may name what cannot harm: Ecotone's own kinds, the functions of the digits examples with plain arguments, and files in
its own folder that are not code.

``of_recipe`` and ``of_trackers`` list what a recorded recipe names. They import no plug-in, run nothing and look at no
file's content. They take any value: what is listed is not checked yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ecotone.experiments.reading import check_plain
from ecotone.experiments.tracking.registry import TRACKERS
from ecotone.fitness.backends.registry import BACKENDS
from ecotone.fitness.registry import LOSSES, OBJECTIVES
from ecotone.merging.models.hub import is_repository
from ecotone.populations.errors import InputError, shown
from ecotone.populations.secrets import place
from ecotone.registry import Registry
from ecotone.search.registry import SEARCHES
from ecotone.settings import PREPARED

Standing: TypeAlias = Literal["own", "trusted", "harmless"]
"""A record that may be acted on: with this user's mark, trusted by this user now, or naming nothing that could harm."""

Field: TypeAlias = tuple[str | int, ...]

_EXAMPLES = "ecotone.experiments.examples"
_HARMLESS = frozenset(
    [
        *(f"{_EXAMPLES}.digits:{name}" for name in ("mlp", "sequential", "shuffled", "random_models", "specialists")),
        *(f"{_EXAMPLES}.digit_questions:{name}" for name in ("encoder", "answered", "images", "head", "experts")),
    ]
)
"""Functions that compute from packages on this machine, and read and write only in the preparation step's folder."""
_PLACES = ("/", "\\", "~", "..", ":")  # what a text holds that could be a path or a URL
_LONGEST = 400  # characters of arguments that are shown


class UntrustedError(InputError):
    """A record was made elsewhere, and names what Ecotone does not run, read or ask without the user's word."""


def admit(
    where: str,
    named: Iterable[str],
    trust: bool,
    notify: Callable[[str], None] = lambda text: None,
    remedy: str = "",
) -> Standing:
    """The one gate: whether a record that bears no mark of this user's may be acted on.

    Args:
        where: How messages name the record.
        named: The things that would be run, read or asked, a line each.
        trust: Whether the user trusts them.
        notify: Gets a line for each thing that is trusted.
        remedy: Another way, in a sentence; empty where there is none.

    Raises:
        UntrustedError: It names something, and the user did not say that it is trusted.
    """
    listed = list(dict.fromkeys(named))
    if not listed:
        return "harmless"
    if not trust:
        raise UntrustedError(
            "\n".join(
                [
                    f"{where}: it was made elsewhere, as it bears no mark of yours, and it names:",
                    *(f"  {line}" for line in listed),
                    "Nothing of this was run, read or asked.",
                ]
            ),
            f"If you trust all of it, add --trust (in Python trust=True). {remedy}".rstrip(),
        )
    for line in listed:
        notify(f"Trusted: {line}")
    return "trusted"


# -- recipes -------------------------------------------------------------------------------------------------


def of_recipe(record: Any, folder: Path, *, runtime: bool = False) -> list[str]:
    """The functions, plug-ins, paths and servers that a recorded recipe names, a line each, without its trackers.

    Args:
        record: The recipe as it is recorded, unchecked.
        folder: The record's own folder: files in it are part of the record.
        runtime: Also the Ray cluster of ``runtime.address``.

    Raises:
        InputError: It is nested too deep to be a recipe.
    """
    if not isinstance(record, Mapping):  # what reads it says so
        return []
    check_plain(record, "recipe")
    parts = {key: value for key, value in record.items() if key not in ("tracking", "runtime")}
    lines = [f"{_told(field)} {text}" for field, text in _calls(parts, ())]
    lines += [f"{_told(field)} {text}" for field, text in _kinds(parts)]
    lines += [f"{_told(field)} {text}" for field, text in _paths(parts, folder)]
    address = inner(record, "runtime").get("address")
    if runtime and address not in (None, "auto", "local"):
        lines.append(f"runtime.address connects to {_shown(address)}")
    return lines


def of_trackers(trackers: Mapping[str, Any], folder: Path) -> list[str]:
    """The servers, folders and plug-ins that trackers' settings name, a line each.

    Args:
        trackers: Settings by tracker, as the journal has them.
        folder: The record's own folder.
    """
    lines = []
    for name, value in trackers.items():
        settings = value if isinstance(value, Mapping) else {}
        if not value and name != "mlflow":
            continue
        if not TRACKERS.owns(name):
            lines.append(f"tracking.{shown(str(name))} is run by another package's tracker")
        elif name == "wandb":
            project, entity = settings.get("project", "ecotone"), settings.get("entity")
            whose = f" of {_shown(entity)}" if entity else ""
            lines.append(f"tracking.wandb sends the run to project {_shown(project)}{whose} of Weights & Biases")
            if settings.get("dir") is not None and not _inside(settings["dir"], folder):
                lines.append(f"tracking.wandb.dir writes to {_shown(settings['dir'])}")
        elif settings.get("uri") is not None:
            lines.append(f"tracking.uri sends the run to {_address(settings['uri'])}")
    return lines


def recorded_trackers(record: Any) -> dict[str, Any]:
    """The trackers that are on in a recorded recipe, each with its settings, as the journal has them."""
    tracking = inner(record, "tracking")
    others = {name: value for name, value in tracking.items() if name not in ("mlflow", "uri", "experiment") and value}
    if not tracking.get("mlflow", True):
        return others
    return {"mlflow": {"uri": tracking.get("uri")}, **others}


def links(folder: Path) -> list[str]:
    """The links in a record's own folder, at any depth, that lead out of it, a line each.

    Files would be read there, and logs and notes written.
    """
    if not folder.is_dir():
        return []
    within = (Path(place, name) for place, folders, files in os.walk(folder) for name in (*folders, *files))
    found = sorted(one for one in within if one.is_symlink() and not _inside(str(one), folder))
    return [f"{shown(str(link.relative_to(folder)))} is a link to {shown(os.path.realpath(link))}" for link in found]


def not_given(trackers: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Trackers without the settings that the user gives now, by dotted name: those are the user's own act.

    Args:
        trackers: Settings by tracker.
        given: Names of fields of the recipe, as ``--set`` takes them.
    """
    found = dict(trackers)
    if "tracking.uri" in given and isinstance(found.get("mlflow"), Mapping):
        found["mlflow"] = {**found["mlflow"], "uri": None}
    return {name: value for name, value in found.items() if f"tracking.{name}" not in given}


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping of a record; an empty one in place of anything else."""
    return value if isinstance(value, Mapping) else {}


def inner(record: Any, key: str) -> Mapping[str, Any]:
    """A mapping in a mapping of a record; an empty one in place of anything else."""
    return mapping(mapping(record).get(key))


def _calls(value: Any, field: Field) -> Iterator[tuple[Field, str]]:
    """The functions that are named at any depth."""
    if isinstance(value, Mapping):
        if isinstance(value.get("call"), str) and not _is_harmless(value):
            yield field, f"calls {_call(value)}"
        for key, one in value.items():
            if key != "arguments":
                yield from _calls(one, (*field, str(key)))
    elif isinstance(value, list | tuple):
        for position, one in enumerate(value):
            yield from _calls(one, (*field, _item(one, position)))


def _item(value: Any, position: int) -> str | int:
    """The name of an item in a list, or else its position."""
    name = value.get("name") if isinstance(value, Mapping) else None
    return name if isinstance(name, str) else position


def _is_harmless(call: Mapping[str, Any]) -> bool:
    """Whether a call reads and writes nothing outside the preparation step's folder, which that step is given."""
    arguments = call.get("arguments") or {}
    if call["call"] not in _HARMLESS or not isinstance(arguments, Mapping) or "directory" in arguments:
        return False
    return str(arguments.get("file", PREPARED)).startswith(PREPARED) and _has_no_place(arguments)


def _has_no_place(value: Any) -> bool:
    """Whether a value holds no text that could be a path or a URL, but for files of the preparation step."""
    if isinstance(value, Mapping):
        return all(_has_no_place(one) for one in (*value.keys(), *value.values()))
    if isinstance(value, list | tuple):
        return all(map(_has_no_place, value))
    if isinstance(value, str):
        return not any(sign in value.removeprefix(PREPARED) for sign in _PLACES)
    return value is None or isinstance(value, bool | int | float)


def _call(call: Mapping[str, Any]) -> str:
    arguments = call.get("arguments") or {}
    pairs = arguments.items() if isinstance(arguments, Mapping) else ()
    text = ", ".join(f"{shown(str(name))}={value!r}" for name, value in pairs)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} and {len(text) - _LONGEST} more characters"
    return f"{shown(call['call'])}({text})"


def _kinds(record: Mapping[str, Any]) -> Iterator[tuple[Field, str]]:
    """The kinds of other packages that are named."""
    from ecotone.merging.operators import OPERATORS

    searches = record.get("search")
    for position, one in enumerate(searches) if isinstance(searches, list | tuple) else [("", searches)]:
        field: Field = ("search",) if position == "" else ("search", position)
        yield from _foreign(one, "algorithm", SEARCHES, field)
    yield from _foreign(record.get("merge"), "operator", OPERATORS, ("merge",))
    yield from _foreign(record.get("scoring"), "backend", BACKENDS, ("scoring",))
    for field, one in _objectives(record):
        yield from _foreign(one, "type", OBJECTIVES, field)
    tasks = record.get("calibration")
    for position, one in enumerate(tasks if isinstance(tasks, list | tuple) else ()):
        yield from _foreign(one, "loss", LOSSES, ("calibration", _item(one, position)))


def _foreign(part: Any, key: str, registry: Registry[Any], field: Field) -> Iterator[tuple[Field, str]]:
    name = part.get(key) if isinstance(part, Mapping) else None
    if name is not None and not registry.owns(name):
        yield (*field, key), f"is {_shown(name)}, a {registry.sort} of another package"


def _objectives(record: Mapping[str, Any]) -> Iterator[tuple[Field, Any]]:
    for group, listed in inner(record, "objectives").items():
        for position, one in enumerate(listed if isinstance(listed, list | tuple) else ()):
            yield ("objectives", str(group), _item(one, position)), one


# -- paths ---------------------------------------------------------------------------------------------------


def _paths(record: Mapping[str, Any], folder: Path) -> Iterator[tuple[Field, str]]:
    """The files, folders and repositories outside ``folder`` that are named."""
    models = inner(record, "models")
    experts = models.get("experts")
    named: list[tuple[Field, Any]] = [
        (("models", "experts", position), one)
        for position, one in enumerate(experts if isinstance(experts, list | tuple) else ())
    ]
    named += [(("models", key), models.get(key)) for key in ("base", "tokenizer")]
    for field, one in _objectives(record):
        kind = one.get("type") if isinstance(one, Mapping) else None
        if kind == "lm_eval":
            yield field, f"loads the task {_shown(one.get('task'))} of lm-eval, and its data"
            if one.get("allow_code"):
                yield (*field, "allow_code"), "runs Python of the task's folder, and the models' answers as code"
        if OBJECTIVES.owns(kind):
            named += [((*field, key), one.get(key)) for key in OBJECTIVES.get(kind, "type").paths]
    for field, value in named:
        for path in value if isinstance(value, list | tuple) else [value]:
            yield from _read(field, path, folder)
    yield from _other_places(record, (), folder, {field for field, _ in named})


def _read(field: Field, path: Any, folder: Path) -> Iterator[tuple[Field, str]]:
    if not isinstance(path, str) or _is_prepared(path):
        return
    if is_repository(path):
        yield field, f"reads {path} of the Hugging Face hub"
    elif not _inside(path, folder):
        yield field, f"reads {_shown(path)}"


def _other_places(value: Any, field: Field, folder: Path, known: Set[Field]) -> Iterator[tuple[Field, str]]:
    """Texts in any other field, at any depth, that look like a place. Arguments of calls are told with the calls."""
    if field in known:
        return
    if isinstance(value, Mapping):
        for key, one in value.items():
            if key not in ("arguments", "call"):
                yield from _other_places(one, (*field, str(key)), folder, known)
    elif isinstance(value, list | tuple):
        for position, one in enumerate(value):
            yield from _other_places(one, (*field, _item(one, position)), folder, known)
    elif isinstance(value, str) and _is_place(value) and not _inside(value, folder):
        yield field, f"names {_shown(value)}"


def _is_place(text: str) -> bool:
    if text.startswith(PREPARED):
        return not _is_prepared(text)
    return (len(text) > 1 and text.startswith(("/", "~", "./", "..", "\\"))) or "://" in text


def _is_prepared(path: str) -> bool:
    """Whether a path lies in the folder that the preparation step wrote."""
    return path.startswith(PREPARED) and _leaves_not(path.removeprefix(PREPARED))


def _leaves_not(path: str) -> bool:
    return not path.startswith(("/", "~")) and ".." not in path.split("/") and "\\" not in path


def _inside(path: Any, folder: Path) -> bool:
    """Whether a path lies in a folder, links followed."""
    if not isinstance(path, str) or "://" in path or "\0" in path or path.startswith("~"):
        return False
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except (OSError, ValueError):
        return False


# -- words ---------------------------------------------------------------------------------------------------


def _told(field: Field) -> str:
    """A field as users write it, with items of lists by name."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{shown(step)}" for step in field)
    return "".join(steps).lstrip(".") or "recipe"


def _shown(value: Any) -> str:
    return shown(value) if isinstance(value, str) else repr(value)[:_LONGEST]


def _address(uri: Any) -> str:
    """A URI without user name, password and query."""
    return shown(place(str(uri)))
