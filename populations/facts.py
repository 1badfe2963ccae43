"""Facts: the journal's records of its run as a whole. Each is declared once, with its type and its stored text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from ecotone.populations.parsing import MalformedError, json_object, json_value
from ecotone.populations.secrets import stripped
from ecotone.populations.trial import Goal

Value = TypeVar("Value")


class Note(NamedTuple):
    """A fact as the journal stores it: its name and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Fact(Generic[Value]):
    """One record of a run as a whole.

    Args:
        name: Its key in the journal.
        about: Its meaning, in words.
        read: Makes the value from the stored text.
        write: Makes the stored text from the value.
    """

    name: str
    about: str
    read: Callable[[str], Value]
    write: Callable[[Value], str]

    def note(self, value: Value) -> Note:
        """The fact with a value, for the journal."""
        return Note(self.name, self.write(value))


def _text(name: str, about: str) -> Fact[str]:
    return Fact(name, about, str, str)


def _number(name: str, about: str) -> Fact[float]:
    return Fact(name, about, float, repr)


def _object(name: str, about: str) -> Fact[Mapping[str, Any]]:
    return Fact(name, about, _read_object, _json)


def _read_object(text: str) -> Mapping[str, Any]:
    return json_object(text, finite=False)  # a user's own numbers may be others


def _json(value: Any) -> str:
    return json.dumps(value, default=np.ndarray.tolist)


def _strings(text: str) -> tuple[str, ...]:
    return tuple(map(str, json_value(text)))


def _goals(text: str) -> tuple[Goal, ...]:
    goals = tuple(Goal(name, direction) for name, direction in json_value(text))
    for goal in goals:
        if not isinstance(goal.name, str) or goal.direction not in ("maximize", "minimize"):
            raise MalformedError("names of objectives, each with maximize or minimize", str(goal))
    return goals


def _matrix(text: str) -> list[list[float]]:
    """A square matrix."""
    rows: list[list[float]] = json_value(text, finite=False)
    if np.asarray(rows, np.float64).shape != (len(rows), len(rows)):
        raise MalformedError("a square matrix", f"{len(rows)} rows of other lengths")
    return rows


def _hashes(text: str) -> Mapping[str, Any]:
    """Hashes of files, by what reads them and by name."""
    found = json_object(text)
    for files in found.values():
        for entry in files.values():
            if not isinstance(entry["xxh3_128"], str):
                raise MalformedError("the hash of a file", str(entry))
    return found


def _goals_text(goals: Iterable[Goal]) -> str:
    return json.dumps([[goal.name, goal.direction] for goal in goals])


FORMAT_OF: Fact[int] = Fact("format", "The format of the journal's tables.", int, str)
CREATED = _number("created", "When the journal was made, in seconds since 1970.")
NAME = _text("name", "The name of the recipe.")
RECIPE = _object("recipe", "The recipe, resolved.")
SIGNATURE = _text("signature", "A hash of the recipe's fields that change results, 16 hexadecimal digits.")
ALGORITHM = _text("algorithm", "The search's algorithm; of stages, all of them.")
SEED: Fact[int] = Fact("seed", "The seed of the search.", int, str)
GOALS: Fact[tuple[Goal, ...]] = Fact("goals", "The objectives that guide the search.", _goals, _goals_text)
HELD_OUT_GOALS: Fact[tuple[Goal, ...]] = Fact(
    "held_out_goals", "The objectives that are held out from it.", _goals, _goals_text
)
MODELS: Fact[tuple[str, ...]] = Fact("models", "The names of the seed models, in order.", _strings, _json)
GEOMETRY: Fact[list[list[float]]] = Fact(
    "geometry", "(J, J) inner products of the sources, which identify the weights.", _matrix, _json
)
COMPONENTS = _object(
    "components",
    "Of a search by components: borders in the flat vector, the component of each segment, and the components' names.",
)
STARTS: Fact[list[dict[str, Any]]] = Fact(
    "starts",
    "Of a search that begins with solved merges: the solver, how fine, and each source's mean coefficient.",
    json_value,
    _json,
)
BUDGET = _object("budget", "Evaluations and seconds after which the search ends; null for no limit.")
TRACKING = _object("tracking", "The trackers that the run is mirrored to, by name, each with its settings.")
CONTENTS: Fact[Mapping[str, Any]] = Fact(
    "contents",
    "The hashes of the models' files (xxh3_128), by the field that names the model and by the file.",
    *(_hashes, _json),
)
FINGERPRINTS: Fact[Mapping[str, Any]] = Fact(
    "fingerprints",
    "The hashes of the code and data that scores depend on, by the field that reads them and by file.",
    *(_hashes, _json),
)
ACCEPTED: Fact[list[dict[str, Any]]] = Fact(
    "accepted_changes",
    "Changes of files that the user has accepted since the run began: what, when, and after how many evaluations.",
    json_value,
    _json,
)
CREDENTIALS: Fact[tuple[str, ...]] = Fact(
    "credentials", "URLs that need credentials, without them; this user's own file has those.", _strings, _json
)
VERSIONS = _object("versions", "Versions of the packages that results depend on.")
SYS_PATH: Fact[tuple[str, ...]] = Fact(
    "sys_path", "Folders of the user's own modules; the last is the working directory.", _strings, _json
)
MARK = _text("mark", "The mark of the user who made the run, over recipe, trackers and folders.")
STATE = _text("state", "running, finished, interrupted or failed. A killed run stays at running.")
ERROR: Fact[str] = Fact("error", "Why the run failed, without secrets; empty when it did not.", stripped, stripped)
STOP_REASON = _text("stop_reason", "Why the search ended: evaluations, seconds or converged.")
ELAPSED = _number("elapsed", "Seconds of searching, of all resumed stretches together.")
REPORT = _object("report", "The search's own report at its end.")

FACTS: tuple[Fact[Any], ...] = (
    *(FORMAT_OF, CREATED, NAME, RECIPE, SIGNATURE, ALGORITHM, SEED, GOALS, HELD_OUT_GOALS, MODELS, GEOMETRY),
    *(CONTENTS, FINGERPRINTS, ACCEPTED),
    *(COMPONENTS, STARTS, BUDGET, TRACKING, CREDENTIALS, VERSIONS, SYS_PATH, MARK),
    *(STATE, ERROR, STOP_REASON, ELAPSED, REPORT),
)
"""All facts, in the order of reports."""
