"""Names of algorithms, metrics and parameters that every tracker accepts and that stay apart (MLflow is strictest)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from ecotone.populations import facts
from ecotone.populations.journal import Journal

CURSOR = "evaluations"
HYPERVOLUME = "hypervolume"
FRONT = "front"
HELD_OUT_FRONT = "front_held_out"
PICTURE = "front"  # the key of the images
OWN_METRICS = {
    *(CURSOR, "evaluations_per_second", "failures", "front_size", "best", "held_out", "references"),
    *(HYPERVOLUME, FRONT, HELD_OUT_FRONT, f"{FRONT}_pairs", f"{HELD_OUT_FRONT}_pairs"),
    *(f"{group}_member" for group in (FRONT, HELD_OUT_FRONT, f"{FRONT}_pairs", f"{HELD_OUT_FRONT}_pairs")),
}
_LONGEST = 250  # characters of a key


def algorithm_name(journal: Journal) -> str:
    """The algorithm of a run, with the sampler where the algorithm is a library of them."""
    search = (journal.fact(facts.RECIPE) or {}).get("search", {})
    sampler = search.get("sampler") if isinstance(search, dict) else None  # a list of stages names its algorithms
    return " ".join(filter(None, [journal.fact(facts.ALGORITHM) or "unknown", str(sampler or "")])).strip()


def metric_names(objectives: Sequence[str]) -> dict[str, str]:
    """The metric of each objective: its name where trackers accept it and no other metric has it."""
    names = {objective: acceptable(objective) for objective in objectives}
    return distinct({o: f"objective/{n}" if n.split("/")[0] in OWN_METRICS else n for o, n in names.items()})


def member_axis(group: str) -> str:
    """The axis of a front's metrics: the position of a member."""
    return f"{group}_member"


def pairs_of(objectives: Sequence[str]) -> list[tuple[str, str]]:
    """Each two of the objectives: x-axis and y-axis.

    Of more than two objectives a pair's metrics are named by it, so it does not depend on the order of the objectives.
    """
    pairs = list(combinations(objectives, 2))
    return pairs if len(pairs) == 1 else [(min(pair), max(pair)) for pair in pairs]


def pair_metrics(group: str, first: str, second: str, objectives: Sequence[str]) -> tuple[str, str]:
    """The metrics, of one step a member, that hold a front in two of the ``objectives``: x-axis and y-axis.

    Of two objectives in all they are those of the front itself, ``front/a`` and ``front/b``; of more they are metrics
    of the members that no other member dominates in these two, ``front_pairs/a under b`` and ``front_pairs/b over a``.

    Args:
        group: ``front`` or ``front_held_out``.
        first: One objective.
        second: Another one.
        objectives: All of that group.
    """
    names = metric_names(objectives)
    x, y = names[first], names[second]
    if len(objectives) == 2:
        return f"{group}/{x}", f"{group}/{y}"
    pair = (f"{group}_pairs/{x} under {y}", f"{group}_pairs/{y} over {x}")
    if max(map(len, pair)) > _LONGEST:
        which = f"{objectives.index(first) + 1}-{objectives.index(second) + 1}"
        pair = (f"{group}_pairs/{which}/{x}", f"{group}_pairs/{which}/{y}")
    return pair


def distinct(names: Mapping[str, str]) -> dict[str, str]:
    """``names`` with underscores added where two are equal."""
    distinct: dict[str, str] = {}
    for key, name in names.items():
        while name in distinct.values():
            name += "_"
        distinct[key] = name
    return distinct


def acceptable(name: str) -> str:
    """``name`` with the characters that a tracker may refuse in keys replaced by underscores, cut to 200 characters."""
    parts = re.sub(r"[^\w.\- /]", "_", name).split("/")
    kept = [part for part in (part.strip() for part in parts) if part.strip(".")]
    return "/".join(kept)[:200].rstrip("/ ") or "unnamed"


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested recipe as parameters: keys joined by dots, lists and other values as JSON, text as it is."""
    flat: dict[str, str] = {}
    for key, item in value.items():
        name = acceptable(f"{prefix}{key}")
        if isinstance(item, Mapping) and item:
            flat.update(flattened(item, f"{name}."))
        else:
            flat[name] = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False, default=str)
    return flat
