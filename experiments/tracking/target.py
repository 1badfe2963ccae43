"""Where a run is mirrored to, and as what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from ecotone.experiments.compare import algorithm_name
from ecotone.experiments.storage import url_of
from ecotone.experiments.tracking.names import VIEW_TAG, flattened
from ecotone.experiments.tracking.store import absolute_uri, default_uri
from ecotone.experiments.tracking.view import view_key
from ecotone.populations import facts
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
        wanted = journal.fact(facts.TRACKING) or {}
        created = journal.fact(facts.CREATED) or 0.0
        name = journal.fact(facts.NAME) or directory.name
        signature = journal.fact(facts.SIGNATURE) or ""
        seed = journal.fact(facts.SEED)
        budget = (journal.fact(facts.BUDGET) or {}).get("evaluations")
        goals = journal.fact(facts.GOALS) or ()
        models = journal.fact(facts.MODELS) or ()
        return cls(
            uri=absolute_uri(uri or wanted.get("uri") or default_uri(directory.parent)),
            experiment=experiment or wanted.get("experiment") or "ecotone",
            name=f"{algorithm_name(journal)} seed {seed or 0}, {name}",
            identity=hashlib.blake2b("\n".join((repr(created), name, signature)).encode(), digest_size=16).hexdigest(),
            created=created,
            goals=goals,
            held_out=journal.fact(facts.HELD_OUT_GOALS) or (),
            models=models,
            stride=None if budget is None else max(1, int(budget) // STEPS),
            parameters=flattened(journal.fact(facts.RECIPE) or {}),
            tags={
                "algorithm": journal.fact(facts.ALGORITHM) or "",
                "models": ", ".join(models),
                "objectives": ", ".join(goal.name for goal in goals),
                "ecotone.run_dir": url_of(directory) or str(directory),
                VIEW_TAG: view_key(goals),
                "ecotone.signature": signature,
                "ecotone.versions": json.dumps(journal.fact(facts.VERSIONS) or {}),
            },
        )

    @property
    def shown_uri(self) -> str:
        """The URI without user name and password."""
        parts = urlsplit(self.uri)
        if "@" not in parts.netloc:
            return self.uri
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def state_of(journal: Journal, live: bool) -> str:
    """The journal's state; ``killed`` when it says running but nobody runs it."""
    state = journal.fact(facts.STATE) or "running"
    if state == "running" and not live and not journal.in_use:
        return "killed"
    return state
