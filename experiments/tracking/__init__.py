"""MLflow tracking: the journal of a run, mirrored into one MLflow run by a process of its own.

The journal is the truth; MLflow is a copy of it for looking at and comparing. The search never imports MLflow,
never waits for it and never shares its interpreter: ``python -m ecotone.experiments.tracking RUN_DIR --follow PID``
reads the journal about once a second, logs what is new in batches, and ends when the search has ended and all of it is
logged. With the tracking server down it keeps trying; whatever it missed, the next ``mirror`` of the run adds.

Where to go on is asked of MLflow itself: the metric ``evaluations`` is the last row of every batch, and its latest
value says up to where the journal is mirrored. Steps, values and times of all rows follow from the journal alone,
so a mirror that was killed and started again leaves the history an undisturbed one would have left.

Metrics, each with the number of evaluations as its step:

- ``<objective>``: mean over the candidates since the previous step; absent when all of them failed.
- ``best/<objective>``: the best so far in that objective; ``best/mean``: the best mean of the oriented scores
  (those of minimised objectives count negatively).
- ``loss/<task>`` of a gradient search: the mean over the steps since the previous evaluations.
- ``front_size``, ``failures``, ``evaluations``, ``evaluations_per_second`` (over at least the last 100 and 1 s).
- ``hypervolume`` of the front, while the search goes on when its reference point is known to be 0 and at the end
  otherwise.
- At the end ``held_out/<objective>`` of the candidate of best mean, and ``references/<name>/...`` of the merges to
  compare with.

Metrics whose steps are the members of the front, logged once, at the end: ``front/<objective>``, sorted by the first
objective, and ``front_held_out/<objective>``, what the same members score on held-out data. A line chart of one over
another (X-axis: Metric) shows the fronts of several searches in one picture; a view of such charts, one for each pair
of objectives, is saved with the experiment, and `ecotone ui` opens it. With more than two objectives each pair has
metrics of its own (``front_pairs/...``): the members that none dominates in these two.

Images ``front`` show the front after 15, 30, 60, 120, ... evaluations and at the end. Artifacts: a report, the recipe,
the environment, the front as a table, its genomes, and all candidates.

An MLflow run holds one search to its end. A search that goes on after it, with a larger budget, is written anew into
another one, which takes its place in the view: metrics cannot be taken back.

MLflow is imported only inside the functions that need it, so that ``status`` and ``start`` stay cheap.
"""

from ecotone.experiments.tracking.following import follow, main, mirror, start, wait
from ecotone.experiments.tracking.notes import MirrorReport, status
from ecotone.experiments.tracking.server import Pages, serve, ui_pages
from ecotone.experiments.tracking.store import TrackingError, absolute_uri, default_uri, find_run_dir, installed

__all__ = [
    "MirrorReport",
    "Pages",
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
    "ui_pages",
    "wait",
]
