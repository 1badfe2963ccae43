"""Searches that the manager carries out on a journal, for tests that stop them and go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ecotone.fitness.pools import Pool
from ecotone.fitness.protocol import pooled_mean
from ecotone.populations.birth import born
from ecotone.populations.journal import Journal
from ecotone.populations.population import Population
from ecotone.populations.trial import Evaluation, Goal, Trial
from ecotone.search.manager import Manager, Schedule, StopReason
from ecotone.search.protocol import Search


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
    journal = Journal.open(path, write=True) if born(path) else Journal.create(path)
    return Manager(search, population, goals, pool, journal, schedule, **others)


def ended(manager: Manager) -> StopReason:
    """Run to the end, and close the journal whatever happens; why it ended."""
    with manager.journal:
        return manager.run()


def of_sample(trial: Trial, whole: Evaluation) -> Evaluation:
    """What a worker says of a trial that is scored on a sample, of whose genome ``whole`` is known; scores are means of
    the examples' scores.
    """
    sample = trial.sample
    if sample is None or not whole.ok:
        return whole
    scores, errors, per_example, items = {}, {}, {}, 0
    for name, values in whole.per_example.items():
        now = values[sample.now(len(values))]
        each = np.concatenate([sample.seen[name], now]) if sample.start else now
        assert np.array_equal(each, values[sample.then(len(values))])
        scores[name], errors[name] = pooled_mean(each, len(values))
        per_example[name] = each if sample.partial else values
        items += len(now)
    return Evaluation(scores, per_example, items=items, errors=errors if sample.partial else {})
