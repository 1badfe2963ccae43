"""The composition root: recipes, the command line, tracking and reports. In Python::

from experiments import Recipe, launch

recipe = Recipe.from_yaml("experiments/recipes/digits-specialists.yaml", {"budget.evaluations": 500})
run = launch(recipe, "runs/first")
for member in run.front():
    print(member.id, member.scores, member.held_out)
run.export("best", "merged")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.recipe import Recipe
    from experiments.running import launch, resume
    from experiments.runs import Run

__all__ = ["Recipe", "Run", "launch", "resume"]

_HOMES = {
    "Recipe": "experiments.recipe",
    "Run": "experiments.runs",
    "launch": "experiments.running",
    "resume": "experiments.running",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `ecotone --help` and `status` need neither torch nor pydantic."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'experiments' has no attribute {name!r}")
