"""Where a run is mirrored to, and as what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ecotone.experiments.compare import algorithm_name
from ecotone.experiments.storage import url_of
from ecotone.experiments.tracking.names import VIEW_TAG, flattened
from ecotone.experiments.tracking.store import absolute_uri, default_uri
from ecotone.experiments.tracking.view import view_key
from ecotone.populations.journal import Journal
from ecotone.populations.trial import Goal

STEPS = 1000  # of a metric, at most about


@dataclass(frozen=True)
class Target:
    """Where a run is mirrored to, and what the journal says of the run as a whole.

    Its name in MLflow begins with what tells searches of one recipe apart: charts cut long names.
    """

    uri: str
    experiment: str
    name: str
    identity: str
    created: float
    goals: tuple[Goal, ...]
    held_out: tuple[Goal, ...]
    models: tuple[str, ...]
    stride: int | None
    parameters: Mapping[str, str]
    tags: Mapping[str, str]

    @classmethod
    def of(cls, journal: Journal, directory: Path, uri: str | None, experiment: str | None) -> Target:
        """What the journal in ``directory`` says; ``uri`` and ``experiment`` replace its own."""
        wanted = _json_fact(journal, "tracking", {})
        created = journal.fact("created") or "0"
        name = journal.fact("name") or directory.name
        signature = journal.fact("signature") or ""
        budget = _json_fact(journal, "budget", {}).get("evaluations")
        goals = tuple(Goal(*goal) for goal in _json_fact(journal, "goals", []))
        models = tuple(map(str, _json_fact(journal, "models", [])))
        return cls(
            uri=absolute_uri(uri or wanted.get("uri") or default_uri(directory.parent)),
            experiment=experiment or wanted.get("experiment") or "ecotone",
            name=f"{algorithm_name(journal)} seed {journal.fact('seed') or 0}, {name}",
            identity=hashlib.blake2b("\n".join((created, name, signature)).encode(), digest_size=16).hexdigest(),
            created=float(created),
            goals=goals,
            held_out=tuple(Goal(*goal) for goal in _json_fact(journal, "held_out_goals", [])),
            models=models,
            stride=None if budget is None else max(1, int(budget) // STEPS),
            parameters=flattened(_json_fact(journal, "recipe", {})),
            tags={
                "algorithm": journal.fact("algorithm") or "",
                "models": ", ".join(models),
                "objectives": ", ".join(goal.name for goal in goals),
                "ecotone.run_dir": url_of(directory) or str(directory),
                VIEW_TAG: view_key(goals),
                "ecotone.signature": signature,
                "ecotone.versions": journal.fact("versions") or "{}",
            },
        )

    @property
    def shown_uri(self) -> str:
        """The URI without user name and password."""
        parts = urlsplit(self.uri)
        if "@" not in parts.netloc:
            return self.uri
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _json_fact(journal: Journal, key: str, otherwise: Any) -> Any:
    text = journal.fact(key)
    return otherwise if text is None else json.loads(text) or otherwise


def state_of(journal: Journal, live: bool) -> str:
    """The journal's state; ``killed`` when it says running but nobody runs it."""
    state = journal.fact("state") or "running"
    if state == "running" and not live and not journal.in_use:
        return "killed"
    return state
