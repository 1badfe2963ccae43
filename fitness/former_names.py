"""Names of modules before everything was imported as ``ecotone.*``; recipes and journals may say them until 0.3.

With 0.3 this file goes, and the branch in ``ecotone.fitness.callables`` that asks it.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

ENDS = "0.3"
"""The version that does not know the former names any more."""

_FOLDERS = ("experiments", "search", "fitness", "merging", "populations")
_MOVED = {
    "experiments.digit_questions": "ecotone.experiments.examples.digit_questions",
    "experiments.digits": "ecotone.experiments.examples.digits",
    "experiments.heads": "ecotone.experiments.examples.linear_heads",
    "experiments.smollm": "ecotone.experiments.examples.smollm",
    "experiments.text": "ecotone.experiments.examples.text",
}

_log = logging.getLogger("ecotone")


def present_name(name: str) -> str | None:
    """The present name of the module that Ecotone once called ``name``; None when there was no such module."""
    if name.split(".")[0] not in _FOLDERS:
        return None
    present = _MOVED.get(name, f"ecotone.{name}")
    try:
        return None if find_spec(present) is None else present
    except ModuleNotFoundError:  # of a package that it would be in
        return None


@cache
def tell(name: str, present: str) -> None:
    """Log a note, once a process, that a recipe says a former name."""
    _log.warning(
        "A function is named as one of %s, which is now %s. The former name works until Ecotone %s: write the new one.",
        name,
        present,
        ENDS,
    )
