"""What the journal says of a run as a whole, for trackers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecotone.experiments.compare import algorithm_name
from ecotone.experiments.storage import url_of
from ecotone.experiments.tracking.names import flattened
from ecotone.populations.journal import Journal
from ecotone.populations.trial import Goal

STEPS = 1000  # of a metric, at most about
DEFAULT = "mlflow"  # the tracker of runs that were made when there was no other


@dataclass(frozen=True)
class Subject:
    """What the journal says of a run as a whole.

    Args:
        name: For people. It begins with what tells searches of one recipe apart: charts cut long names.
        recipe: The recipe's name.
        algorithm: As recipes name it.
        identity: 32 hexadecimal digits that tell the run from any other, wherever its directory is moved.
        created: When it began (unix seconds).
        goals: The objectives.
        held_out: The held-out objectives.
        models: Names of the experts.
        stride: A line every so many evaluations; None for a search whose budget is no number of evaluations.
        parameters: The recipe, flattened.
        tags: What runs are looked up by.
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
        """What the journal in ``directory`` says."""
        created = journal.fact("created") or "0"
        name = journal.fact("name") or directory.name
        signature = journal.fact("signature") or ""
        algorithm = journal.fact("algorithm") or ""
        budget = _json_fact(journal, "budget", {}).get("evaluations")
        goals = tuple(Goal(*goal) for goal in _json_fact(journal, "goals", []))
        models = tuple(map(str, _json_fact(journal, "models", [])))
        return cls(
            name=f"{algorithm_name(journal)} seed {journal.fact('seed') or 0}, {name}",
            recipe=name,
            algorithm=algorithm,
            identity=hashlib.blake2b("\n".join((created, name, signature)).encode(), digest_size=16).hexdigest(),
            created=float(created),
            goals=goals,
            held_out=tuple(Goal(*goal) for goal in _json_fact(journal, "held_out_goals", [])),
            models=models,
            stride=None if budget is None else max(1, int(budget) // STEPS),
            parameters=flattened(_json_fact(journal, "recipe", {})),
            tags={
                "algorithm": algorithm,
                "models": ", ".join(models),
                "objectives": ", ".join(goal.name for goal in goals),
                "ecotone.run_dir": url_of(directory) or str(directory),
                "ecotone.signature": signature,
                "ecotone.versions": journal.fact("versions") or "{}",
            },
        )


def trackers_of(journal: Journal) -> dict[str, Mapping[str, Any]]:
    """The trackers that a run is mirrored to: the settings of each, as the journal has them, by name."""
    fact: dict[str, Any] = _json_fact(journal, "tracking", {})
    return {DEFAULT: fact} if "experiment" in fact or "uri" in fact else fact  # as it was before there were several


def _json_fact(journal: Journal, key: str, otherwise: Any) -> Any:
    text = journal.fact(key)
    return otherwise if text is None else json.loads(text) or otherwise


def state_of(journal: Journal, live: bool) -> str:
    """The journal's state; ``killed`` when it says running but nobody runs it."""
    state = journal.fact("state") or "running"
    if state == "running" and not live and not journal.in_use:
        return "killed"
    return state
