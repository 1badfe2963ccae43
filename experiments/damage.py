"""Checking a run's journal as a whole, and repairing one that is damaged: ``ecotone check``."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecotone.experiments import storage
from ecotone.experiments.storage import JOURNAL
from ecotone.populations import facts
from ecotone.populations.birth import born, missing
from ecotone.populations.checking import forget
from ecotone.populations.database import connected, explained, locked
from ecotone.populations.errors import DamagedJournalError, EcotoneError, InputError, first_line
from ecotone.populations.journal import Journal
from ecotone.populations.migrations import FORMAT
from ecotone.populations.salvage import Saved, replaced, saved

_NEEDED = (facts.NAME, facts.RECIPE, facts.SIGNATURE, facts.MODELS, facts.GEOMETRY, facts.VERSIONS, facts.SYS_PATH)
_OF_SEARCHES = (facts.ALGORITHM, facts.SEED, facts.GOALS, facts.HELD_OUT_GOALS, facts.BUDGET, facts.TRACKING)


@dataclass(frozen=True)
class Checked:
    """What of a journal is whole.

    Args:
        run: The run directory.
        damage: The first damage, in words; None when everything is whole.
        rows: Rows of each table that are there.
        kept: Rows of each table that a repair keeps; all when nothing is damaged.
        lost: Facts that are damaged or missing.
    """

    run: str
    damage: str | None
    rows: Mapping[str, int]
    kept: Mapping[str, int]
    lost: tuple[str, ...] = field(default=())

    @property
    def whole(self) -> bool:
        """True when nothing is damaged."""
        return self.damage is None

    def record(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "run": self.run,
            "whole": self.whole,
            "damage": self.damage,
            "rows": dict(self.rows),
            "kept": dict(self.kept),
            "lost_facts": list(self.lost),
        }


def check(run: str | Path) -> Checked:
    """Check every row of a run's journal: its checksum, its values, and of each genome the digest.

    Args:
        run: The run directory, or its URL, whose newest copy is fetched.

    Raises:
        JournalError: There is no journal, or it cannot be read for another reason than damage.
    """
    directory = storage.fetched(str(run)) if storage.is_url(str(run)) else Path(run)
    file = directory / JOURNAL
    if not born(file):
        raise missing(file)
    forget(file)
    damage = _damage(file)
    if damage is None:
        with Journal.open(file) as journal:
            rows = journal.sizes()
        return Checked(str(run), None, rows, rows)
    with explained(file):
        kept = saved(file)
    return Checked(str(run), damage, kept.found, kept.counts, _lost(kept))


def repair(run: str | Path) -> tuple[Checked, Path]:
    """Put a journal of all rows before the damage in the place of a damaged one.

    Args:
        run: The run directory.

    Returns:
        What was found, and the folder that now has the damaged journal.

    Raises:
        InputError: The run is whole, at a URL, or nothing is left that it could go on from.
        JournalError: There is no journal, a process writes it, or the new one cannot be written.
    """
    directory, file = _here(run), _here(run) / JOURNAL
    if not born(file):
        raise missing(file)
    with explained(file), contextlib.closing(locked(file)):
        found = check(directory)
        if found.whole:
            raise InputError(f"{directory}: expected a damaged journal, found a whole one.", "There is nothing to do.")
        _refuse_older(file)
        kept = saved(file)
        aside = replaced(file, kept, list(_restored(directory, kept)))
    Journal.open(file).close()
    return found, aside


def _here(run: str | Path) -> Path:
    """The directory of a run on this machine.

    Raises:
        InputError: It is at a URL: the journal is written elsewhere.
    """
    if not storage.is_url(str(run)):
        return Path(run)
    raise InputError(
        f"--repair: expected a run directory on this machine, found the URL {run}.",
        f"`ecotone resume {run}` goes on from the newest copy that is whole. The working directory of the machine that "
        "wrote the run, which `ecotone run` named, can be repaired there.",
    )


def _damage(file: Path) -> str | None:
    """The first damage, in words. Every value of every row is read."""
    try:
        with Journal.open(file) as journal:
            gone = journal.dense() - journal.kept()  # weights that were not kept
            for row in journal.rows(unscored=True):
                if row.number not in gone:
                    journal.trial(row.number)
            for _ in journal.evaluations():
                pass
            journal.references()
            journal.statistics()
            for fact in facts.FACTS:
                journal.fact(fact)
    except DamagedJournalError as error:
        return error.message.removeprefix(f"{file}: ").rstrip(".")
    return None


def _lost(kept: Saved) -> tuple[str, ...]:
    """Names of the facts that a run of its sort has, and this one lacks."""
    needed = [*_NEEDED, *(_OF_SEARCHES if kept.chain or facts.GOALS.name in kept.facts else ())]
    return tuple(fact.name for fact in needed if fact.name not in kept.facts)


def _restored(directory: Path, kept: Saved) -> Iterator[facts.Note]:
    """Lost facts that the recipe beside the journal tells. Resuming notes the others, from the models.

    Raises:
        InputError: The journal's recipe is lost, and no other is there.
    """
    from ecotone.experiments.compose import goals_of  # heavy, and seldom needed
    from ecotone.experiments.recipe import Recipe

    lost = _lost(kept)
    if not lost:
        return
    file = directory / "recipe.yaml"
    try:
        recipe = Recipe.from_yaml(file)
        if recipe.signature != kept.facts.get(facts.SIGNATURE.name, recipe.signature):
            raise InputError("it is another run's recipe.")
    except EcotoneError as error:
        if facts.RECIPE.name not in lost:
            return
        raise InputError(
            f"{file}: expected the recipe, which the journal has lost ({first_line(error)})",
            "Put the recipe of the run there, then repair it.",
        ) from error
    objectives = recipe.objectives
    notes = [
        facts.NAME.note(recipe.name),
        facts.RECIPE.note(recipe.record()),
        facts.SIGNATURE.note(recipe.signature),
        facts.ALGORITHM.note(recipe.search.algorithm),
        facts.SEED.note(recipe.seed),
        facts.GOALS.note(goals_of(objectives.search)),
        facts.HELD_OUT_GOALS.note(goals_of(objectives.held_out)),
        facts.BUDGET.note(recipe.budget.model_dump(mode="json")),
        facts.TRACKING.note(recipe.tracking.recorded()),
    ]
    yield from (note for note in notes if note.name in lost)


def _refuse_older(file: Path) -> None:
    """Refuse a journal of a format without checksums: nothing tells which of its rows are whole."""
    version = ""
    with contextlib.suppress(sqlite3.Error, TypeError), contextlib.closing(connected(file, write=False)) as connection:
        version = str(connection.execute("SELECT value FROM facts WHERE key = 'format'").fetchone()[0])
    if version.isdigit() and int(version) < FORMAT:
        raise InputError(
            f"{file}: expected a journal with checksums, found one of format {version}, which has none.",
            "Nothing tells which of its rows are whole: go on from a copy of it, or start a new run.",
        )
