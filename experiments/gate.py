"""Before a record is acted on: who made it, what it names, and whether the user trusts that.

Every command that runs, reads or asks what a record names comes through here; ``ecotone.experiments.trust`` lists and
decides. Commands that only read a record show it whoever made it, and go to no place that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ecotone.experiments import marks, storage
from ecotone.experiments.storage import JOURNAL
from ecotone.experiments.tracking.notes import noted, own_notes
from ecotone.experiments.tracking.subject import trackers_of
from ecotone.experiments.trust import (
    Standing,
    UntrustedError,
    admit,
    inner,
    links,
    mapping,
    not_given,
    of_recipe,
    of_trackers,
    recorded_trackers,
)
from ecotone.populations import facts
from ecotone.populations.errors import shown
from ecotone.populations.journal import Journal

Notify: TypeAlias = Callable[[str], None]


def check_claim(where: str | Path) -> None:
    """Refuse a directory that says it stands for a URL, but not with this user's mark.

    What would go on is the run at that URL, which nobody has looked at. So the user is to give the URL, and no
    ``--trust`` takes its place.

    Args:
        where: A run directory, or a URL, which is the user's own word.

    Raises:
        UntrustedError: It names a URL without a mark.
    """
    url = None if storage.is_url(str(where)) else storage.claimed_url(where)
    if url is not None:
        raise UntrustedError(
            f"{where}: it was made elsewhere, as its {storage.HOME} bears no mark of yours, and it says that it stands "
            f"for {shown(url)}. Nothing was asked there.",
            f"If you trust that place, give the URL itself. To go on with the files here, remove {storage.HOME}.",
        )


def resumable(
    journal: Journal, where: str, settings: Mapping[str, Any], trust: bool, notify: Notify = lambda text: None
) -> Standing:
    """Whether a run may go on: it is this user's own, trusted now, or names nothing that could harm.

    Args:
        journal: The run's journal.
        where: How messages name the run.
        settings: Fields of the recipe that the user gives anew, by dotted name.
        trust: Whether the user trusts what the run names.
        notify: Gets a line for each thing that is trusted.

    Raises:
        UntrustedError: None of them.
    """
    if marks.has_mark(journal):
        return "own"
    record, folder = journal.fact(facts.RECIPE) or {}, journal.path.parent
    named = [
        *of_recipe(record, folder, runtime="runtime.address" not in settings),
        *of_trackers(not_given({**recorded_trackers(record), **mapping(trackers_of(journal))}, settings), folder),
        *links(folder),
    ]
    return admit(where, named, trust, notify, _older(where))


def exportable(journal: Journal, where: str, trust: bool, notify: Notify = lambda text: None) -> Standing:
    """Whether the models of a run may be merged and scored: as for ``resumable``, without trackers and clusters."""
    if marks.has_mark(journal):
        return "own"
    folder = journal.path.parent
    named = [*of_recipe(journal.fact(facts.RECIPE) or {}, folder), *links(folder)]
    return admit(where, named, trust, notify, _older(where))


def verifiable(target: Path, record: Mapping[str, Any], trust: bool, notify: Notify = lambda text: None) -> Standing:
    """Whether an export may be scored: as for ``exportable``.

    Args:
        target: The export.
        record: Its record.
        trust: Whether the user trusts what the record names.
        notify: Gets a line for each thing that is trusted.

    Raises:
        UntrustedError: It may not.
    """
    if marks.is_marked("export", record["recipe"], record.get("mark")):
        return "own"
    return admit(str(target), [*of_recipe(record["recipe"], target), *links(target)], trust, notify)


def sendable(
    directory: Path, where: str, trust: bool, notify: Notify = lambda text: None, given: Collection[str] = ()
) -> Standing:
    """Whether requests may go where a run's trackers are: it is this user's own, trusted, or names no such place.

    Args:
        directory: The run directory.
        where: How messages name the run.
        trust: Whether the user trusts the places.
        notify: Gets a line for each of them.
        given: Fields of the recipe that the user gives anew, by dotted name.

    Raises:
        UntrustedError: None of them.
    """
    with Journal.open(directory / JOURNAL) as journal:
        if marks.has_mark(journal):
            return "own"
        record, chosen = mapping(journal.fact(facts.RECIPE)), mapping(trackers_of(journal))
    recorded = recorded_trackers({**record, "tracking": {**inner(record, "tracking"), "mlflow": True}})
    return admit(
        where,
        [
            *of_trackers(not_given(recorded, given), directory),
            *of_trackers(not_given(chosen, given), directory),
            *links(directory),
        ],
        trust,
        notify,
        _older(where),
    )


def check_notes(directory: Path, where: str, place: str, trust: bool, notify: Notify = lambda text: None) -> None:
    """Refuse notes on MLflow beside a journal that this user's mirror did not write.

    Args:
        directory: The run directory.
        where: How messages name the run.
        place: The store that the journal's settings name, which notes may name without a mark; empty allows none.
        trust: Whether the user trusts the store that they name.
        notify: Gets a line about it.

    Raises:
        UntrustedError: They name a store of another's choice, and are not trusted.
    """
    known = noted(directory, "mlflow")
    uri = known.get("uri")
    if uri is not None and not own_notes(directory, "mlflow") and uri != (place or None):
        named = [f"tracking.json has the MLflow run {shown(str(known.get('run_id')))} at {shown(str(uri))}"]
        admit(where, named, trust, notify, "`ecotone sync` writes that file anew.")


def python_paths(standing: Standing, given: Sequence[str], recorded: Sequence[str] = ()) -> tuple[str, ...]:
    """Put folders of the user's own modules, and the working directory, last on the Python path; returns them.

    Recorded folders are used for this user's own records alone. For a record made elsewhere that names none of the
    user's functions, not even the working directory is searched.

    Args:
        standing: Why the record may be acted on.
        given: Folders that the user names now.
        recorded: Folders that the record names.
    """
    from ecotone.experiments import compose  # imports torch, which what mirrors a run does without

    if standing == "harmless" and not given:
        return ()
    return compose.python_paths((*given, *(recorded if standing == "own" else ())))


def _older(where: str) -> str:
    return f"`ecotone resume {where} --trust` marks a run of yours that an older Ecotone, or another machine, made."
