"""Tracking: the journal of a run, mirrored into the trackers that its recipe names, by a process of its own for each.

The journal is the truth; what a tracker has is a copy of it for looking at and comparing. The search never imports a
tracker, never waits for one and never shares its interpreter:
``python -m ecotone.experiments.tracking RUN_DIR --tracker NAME --follow PID`` reads the journal about once a second,
logs what is new in batches, and ends when the search has ended and all of it is logged. With the tracker down it keeps
trying; whatever it missed, the next ``mirror`` of the run adds.

Where to go on is asked of the tracker itself where it can be asked. Steps, values and times of all rows follow from the
journal alone, so a mirror that was killed and started again leaves the history an undisturbed one would have left.

Metrics, each with the number of evaluations as its step:

- ``<objective>``: mean over the candidates since the previous step; absent when all of them failed.
- ``best/<objective>``: the best so far in that objective; ``best/mean``: the best mean so far, as
  ``ecotone.populations.ranking`` has it. Where it is a mean of ranges, it is logged at the end, when they are known.
- ``loss/<task>`` of a gradient search: the mean over the steps since the previous evaluations.
- ``front_size``, ``failures``, ``evaluations``, ``evaluations_per_second`` (over at least the last 100 and 1 s).
- ``hypervolume`` of the front, while the search goes on when its reference point is known to be 0 and at the end
  otherwise.
- At the end ``held_out/<objective>`` of the best candidate, and ``references/<name>/...`` of the merges to
  compare with.

Metrics whose steps are the members of the front, logged once, at the end: ``front/<objective>``, sorted by the first
objective, and ``front_held_out/<objective>``, what the same members score on held-out data. A line chart of one over
another shows the fronts of several searches in one picture. With more than two objectives each pair has metrics of its
own (``front_pairs/...``): the members that none dominates in these two.

Images ``front`` show the front after 15, 30, 60, 120, ... evaluations and at the end. Files: a report, the recipe, the
environment, the front as a table, its genomes, and all candidates.

A tracker's run holds one search to its end. A search that goes on after it, with a larger budget, is written anew into
another one, which takes its place: metrics cannot be taken back.

``protocol.py`` says what a tracker is, ``registry.py`` which there are, ``mirroring.py`` works out what each lacks.
Trackers are imported only inside the functions that need them, so that ``status`` and ``start`` stay cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecotone.experiments.tracking.following import follow, main, mirror, mirror_all, start, wait
    from ecotone.experiments.tracking.mlflow.server import Pages, serve, ui_pages
    from ecotone.experiments.tracking.mlflow.store import absolute_uri, default_uri, find_run_dir
    from ecotone.experiments.tracking.notes import MirrorReport, status, statuses
    from ecotone.experiments.tracking.protocol import TrackingError
    from ecotone.experiments.tracking.registry import TRACKERS

__all__ = [
    "TRACKERS",
    "MirrorReport",
    "Pages",
    "TrackingError",
    "absolute_uri",
    "default_uri",
    "find_run_dir",
    "follow",
    "main",
    "mirror",
    "mirror_all",
    "serve",
    "start",
    "status",
    "statuses",
    "ui_pages",
    "wait",
]

_HOMES = {
    **dict.fromkeys(("follow", "main", "mirror", "mirror_all", "start", "wait"), "following"),
    **dict.fromkeys(("Pages", "serve", "ui_pages"), "mlflow.server"),
    **dict.fromkeys(("absolute_uri", "default_uri", "find_run_dir"), "mlflow.store"),
    **dict.fromkeys(("MirrorReport", "status", "statuses"), "notes"),
    "TrackingError": "protocol",
    "TRACKERS": "registry",
}


def __getattr__(name: str) -> Any:
    """Import on first use, because a recipe needs only the settings of trackers."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
