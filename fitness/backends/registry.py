"""Scoring backends, by name: one line each."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from ecotone.fitness.backends.base import ScoringSettings, check_declared
from ecotone.registry import Registry
from ecotone.settings import Chosen

BACKENDS: Registry[type[ScoringSettings]] = Registry(
    "scoring backend",
    "ecotone.backends",
    {"resident": "ecotone.fitness.backends.resident:ResidentSettings"},
    check_declared,
)
USUAL = "resident"
"""The backend of a recipe that names none."""

AnyScoring: TypeAlias = Annotated[ScoringSettings, Chosen(BACKENDS, "backend", USUAL)]
"""Of a recipe's field: the settings of the backend that it names."""
