"""The facts of a run as a whole, for trackers. They are read from its journal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecotone.experiments import marks
from ecotone.experiments.accepted import accepted_texts
from ecotone.experiments.storage import url_of
from ecotone.experiments.tracking.names import algorithm_name, flattened
from ecotone.populations import facts
from ecotone.populations.journal import Journal
from ecotone.populations.secrets import plain
from ecotone.populations.trial import Goal

STEPS = 1000  # of a metric, at most about
DEFAULT = "mlflow"  # the tracker of runs that were made when there was no other


@dataclass(frozen=True)
class Subject:
    """The facts of a run as a whole.

    Args:
        name: For people. Its first words tell searches of one recipe apart, because charts cut long names.
        recipe: The recipe's name.
        algorithm: The algorithm's name in recipes.
        identity: 32 hexadecimal digits that tell the run from any other, wherever its directory is moved.
        created: When it began (unix seconds).
        goals: The objectives.
        held_out: The held-out objectives.
        models: Names of the experts.
        stride: Evaluations between two lines; None for a search whose budget is not a number of evaluations.
        parameters: The recipe, flattened.
        tags: Keys and values by which people look runs up.
    """

    name: str
    recipe: str
    algorithm: str
    identity: str
    created: float
    goals: tuple[Goal, ...]
    held_out: tuple[Goal, ...]
    models: tuple[str, ...]
    stride: int | None
    parameters: Mapping[str, str]
    tags: Mapping[str, str]

    @classmethod
    def of(cls, journal: Journal, directory: Path) -> Subject:
        """The facts of the run whose journal is in ``directory``."""
        created = journal.fact(facts.CREATED) or 0.0
        name = journal.fact(facts.NAME) or directory.name
        signature = journal.fact(facts.SIGNATURE) or ""
        algorithm = journal.fact(facts.ALGORITHM) or ""
        seed = journal.fact(facts.SEED)
        budget = (journal.fact(facts.BUDGET) or {}).get("evaluations")
        goals = journal.fact(facts.GOALS) or ()
        models = journal.fact(facts.MODELS) or ()
        place = url_of(directory) or str(directory)
        mark = marks.mark_of("mlflow", place)
        return cls(
            name=f"{algorithm_name(journal)} seed {seed or 0}, {name}",
            recipe=name,
            algorithm=algorithm,
            identity=hashlib.blake2b("\n".join((repr(created), name, signature)).encode(), digest_size=16).hexdigest(),
            created=created,
            goals=goals,
            held_out=journal.fact(facts.HELD_OUT_GOALS) or (),
            models=models,
            stride=None if budget is None else max(1, int(budget) // STEPS),
            parameters=flattened(plain(journal.fact(facts.RECIPE) or {})),
            tags={
                **({"ecotone.accepted_changes": "\n".join(accepted)} if (accepted := accepted_texts(journal)) else {}),
                "algorithm": algorithm,
                "models": ", ".join(models),
                "objectives": ", ".join(goal.name for goal in goals),
                "ecotone.run_dir": place,
                **({} if mark is None else {"ecotone.mark": mark}),
                "ecotone.signature": signature,
                "ecotone.versions": json.dumps(journal.fact(facts.VERSIONS) or {}),
            },
        )


def trackers_of(journal: Journal) -> Mapping[str, Mapping[str, Any]]:
    """The trackers that a run is mirrored to: the settings of each, as the journal has them, by name."""
    settings = journal.fact(facts.TRACKING) or {}
    if "experiment" in settings or "uri" in settings:  # as journals had it before there were several trackers
        return {DEFAULT: settings}
    return settings


def state_of(journal: Journal, live: bool) -> str:
    """The journal's state; ``killed`` when it says running but nobody runs it."""
    state = journal.fact(facts.STATE) or "running"
    if state == "running" and not live and not journal.in_use:
        return "killed"
    return state
