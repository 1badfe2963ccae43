"""Searches that the manager carries out on a journal, for tests that stop them and go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fitness.pools import Pool
from populations.journal import Journal
from populations.population import Population
from populations.trial import Goal
from search.manager import Manager, Schedule, StopReason
from search.protocol import Search


def begun(
    path: Path,
    search: Search,
    population: Population,
    goals: Sequence[Goal],
    pool: Pool,
    schedule: Schedule,
    **others: Any,
) -> Manager:
    """A manager of the journal ``path``, new or to go on with; close its journal after use."""
    journal = Journal.open(path, write=True) if path.exists() else Journal.create(path, {})
    return Manager(search, population, goals, pool, journal, schedule, **others)


def ended(manager: Manager) -> StopReason:
    """Run to the end, and close the journal whatever happens; why it ended."""
    with manager.journal:
        return manager.run()
