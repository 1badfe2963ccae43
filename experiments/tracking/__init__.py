"""MLflow tracking: the journal of a run, mirrored into one MLflow run by a process of its own.

The journal is the truth; MLflow is a copy of it for looking at and comparing. The search never imports MLflow,
never waits for it and never shares its interpreter: ``python -m experiments.tracking RUN_DIR --follow PID`` reads
the journal about once a second, logs what is new in batches, and ends when the search has ended and all of it is
logged. With the tracking server down it keeps trying; whatever it missed, the next ``mirror`` of the run adds.

Where to go on is asked of MLflow itself: the metric ``evaluations`` is the last row of every batch, and its latest
value says up to where the journal is mirrored. Steps, values and times of all rows follow from the journal alone,
so a mirror that was killed and started again leaves the history an undisturbed one would have left.

Metrics, each with the number of evaluations as its step:

- ``<objective>``: mean over the candidates since the previous step; absent when all of them failed.
- ``best/<objective>``: the best so far in that objective; ``best/mean``: the best mean of the oriented scores
  (those of minimised objectives count negatively).
- ``front_size``, ``failures``, ``evaluations``, ``evaluations_per_second`` (over at least the last 100 and 1 s).
- At the end ``held_out/<objective>`` of the candidate of best mean, ``references/<name>/...`` of the merges to
  compare with, and ``front/<objective>``: one step for each member of the front, sorted by the first objective. A
  line chart of one of these over another (X-axis: Metric) shows the fronts of several searches in one picture.

MLflow is imported only inside the functions that need it, so that ``status`` and ``start`` stay cheap.
"""

from experiments.tracking.following import follow, main, mirror, start, wait
from experiments.tracking.notes import MirrorReport, status
from experiments.tracking.server import serve, ui_address
from experiments.tracking.store import TrackingError, absolute_uri, default_uri, find_run_dir, installed

__all__ = [
    "MirrorReport",
    "TrackingError",
    "absolute_uri",
    "default_uri",
    "find_run_dir",
    "follow",
    "installed",
    "main",
    "mirror",
    "serve",
    "start",
    "status",
    "ui_address",
    "wait",
]
