"""Every registry of kinds, and where each kind comes from."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ecotone.registry import Origin, Registry

REGISTRIES = {
    "searches": "ecotone.search.registry:SEARCHES",
    "starts": "ecotone.search.starts.registry:SOLVERS",
    "operators": "ecotone.merging.operators:OPERATORS",
    "objectives": "ecotone.fitness.registry:OBJECTIVES",
    "losses": "ecotone.fitness.registry:LOSSES",
    "backends": "ecotone.fitness.backends.registry:BACKENDS",
    "statistics": "ecotone.fitness.statistics.kinds:STATISTICS",
    "trackers": "ecotone.experiments.tracking.registry:TRACKERS",
    "formats": "ecotone.merging.models.formats:FORMATS",
}


def registries() -> dict[str, Registry[Any]]:
    """The registries, by the sort of kind that they hold."""
    found = {}
    for name, place in REGISTRIES.items():
        module, _, attribute = place.partition(":")
        found[name] = getattr(import_module(module), attribute)
    return found


def origins() -> list[Origin]:
    """The origin of each kind, and the reason where a kind cannot be used."""
    return [origin for registry in registries().values() for origin in registry.origins()]
