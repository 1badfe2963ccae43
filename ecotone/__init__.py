"""Search for the best merges of fine-tuned models.

In Python::

    from ecotone import Recipe, launch

    recipe = Recipe.from_yaml("experiments/recipes/digits-specialists.yaml", {"budget.evaluations": 500})
    run = launch(recipe, "runs/first")
    for member in run.front():
        print(member.id, member.scores, member.held_out)
    run.export("best", "merged")
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if "ECOTONE_SEALED" in os.environ:  # in the processes of a cluster's job
    from ecotone.populations.sealed import unseal

    unseal()

if TYPE_CHECKING:
    from ecotone.experiments.compare import compare
    from ecotone.experiments.recipe import Recipe
    from ecotone.experiments.running import launch, resume
    from ecotone.experiments.runs import Run
    from ecotone.marked import as_objective, objective

__all__ = ["Recipe", "Run", "as_objective", "compare", "launch", "objective", "resume"]

_HOMES = {
    "Recipe": "ecotone.experiments.recipe",
    "Run": "ecotone.experiments.runs",
    "as_objective": "ecotone.marked",
    "compare": "ecotone.experiments.compare",
    "launch": "ecotone.experiments.running",
    "objective": "ecotone.marked",
    "resume": "ecotone.experiments.running",
}


def __getattr__(name: str) -> Any:
    """Import on first use: ``ecotone --help`` and ``ecotone status`` need neither torch nor pydantic."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ecotone' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
