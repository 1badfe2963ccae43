"""The saved view of an experiment: charts in which the fronts of its searches lie over each other.

MLflow keeps a view that a user shares as a tag of the experiment, so one can be written beforehand and opened by its
address. Each search is one line of one colour: its front in two objectives, the first on the x-axis, the second on
the y-axis. The format is MLflow's own and undocumented; ``tests/test_mlflow_ui.py`` pins what MLflow makes of it, by
looking at the charts in a browser.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from ecotone.experiments.tracking.images import FIRST
from ecotone.experiments.tracking.names import (
    FRONT,
    HELD_OUT_FRONT,
    HYPERVOLUME,
    PICTURE,
    metric_names,
    pair_metrics,
    pairs_of,
)
from ecotone.populations.parsing import json_object
from ecotone.populations.trial import Goal

VIEW_TAG = "ecotone.view"  # a run's: which view shows it
EDITION = 1  # raised when the charts change, so that views written before are written anew
RUNS = 100  # that a chart shows at most
LONGEST = 5000  # characters of an experiment's tag
PAIRS = (28, 15, 6, 3, 1)  # of objectives that have a chart, at most: the first that make a tag which is not too long
_WIDE = "Fronts after so many evaluations"
_PREFIX = "mlflow.sharedViewState."

Names = Sequence[str]


def view_key(goals: Sequence[Goal]) -> str:
    """The key of the view of all searches in an experiment with the same objectives."""
    text = json.dumps(sorted((goal.name, goal.direction) for goal in goals))
    return "ecotone-" + hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def view_tag(goals: Sequence[Goal]) -> str:
    """The experiment tag that holds the view of the objectives."""
    return _PREFIX + view_key(goals)


def view_address(base: str, experiment_id: str, key: str) -> str:
    """The page that shows the view ``key``, on the server at ``base``."""
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs?compareRunsMode=CHART&viewStateShareKey={key}"


def view_value(goals: Sequence[Goal], held_out: Sequence[Goal], present: str | None, now: int) -> str | None:
    """The new value of the tag that holds the view; None when the present value will do.

    Args:
        goals: The objectives of the searches that it is for.
        held_out: The held-out objectives of one of them. Those of others, which the view has already, stay in it.
        present: The tag's value now.
        now: Unix milliseconds.
    """
    groups = _groups(present)
    wanted = [goal.name for goal in held_out]
    if groups is not None and wanted in groups:
        return None
    groups = [*(groups or []), wanted]
    for pairs in PAIRS:
        value = _value(goals, groups, pairs, now)
        if len(value) <= LONGEST:
            return value
    return view_value(goals, held_out, None, now) if len(groups) > 1 else None


def _value(goals: Sequence[Goal], held_out: Sequence[Names], pairs: int, now: int) -> str:
    names = [goal.name for goal in goals]
    state = json.dumps(_state(view_key(goals), names, held_out, pairs)).encode()
    title = f"Fronts: {', '.join(names)}"
    return json.dumps(
        {
            "name": title if len(title) <= 80 else f"Fronts of {len(names)} objectives",
            "createdAt": now,
            "updatedAt": now,
            "state": "deflate;" + base64.b64encode(zlib.compress(state, 9)).decode(),
            "ecotone": {"edition": EDITION, "held_out": held_out},
        }
    )


def _groups(present: str | None) -> list[list[str]] | None:
    """The held-out objectives that a view of this edition has charts for; None when there is none."""
    try:
        ours = json_object(present or "{}", once=False, finite=False)["ecotone"]
        return list(ours["held_out"]) if ours["edition"] == EDITION else None
    except (ValueError, KeyError, TypeError):
        return None


def _state(key: str, names: Names, held_out: Sequence[Names], pairs: int) -> dict[str, Any]:
    """The state that MLflow's page of runs remembers: which runs, and which charts in which sections."""
    charts = list({chart["uuid"]: chart for chart in _charts(names, held_out, pairs)}.values())
    sections = dict.fromkeys(chart["metricSectionId"] for chart in charts)
    return {
        "searchFilter": f"tags.`{VIEW_TAG}` = '{key}'",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": ["tags.`algorithm`", f"metrics.`{HYPERVOLUME}`", "metrics.`evaluations`"],
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "SHOWALL",
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        "compareRunSections": [_section(name) for name in sections],
        "compareRunCharts": charts,
    }


def _charts(names: Names, held_out: Sequence[Names], pairs: int) -> Iterator[dict[str, Any]]:
    metrics = metric_names(names)
    if len(names) > 1:
        section = "Fronts"
        fronts = [pair_metrics(FRONT, x, y, names) for x, y in pairs_of(names)[:pairs]]
        # Side by side: on search data, on held-out data.
        groups = [[pair_metrics(HELD_OUT_FRONT, x, y, group) for x, y in pairs_of(group)[:pairs]] for group in held_out]
        pictures = [_front_chart(section, *pair) for row in zip_longest(fronts, *groups) for pair in row if pair]
        progress = [_line_chart(section, HYPERVOLUME), _line_chart(section, "best/mean")]
        # Of more objectives than two a pair is a side view: the hypervolume says more, and comes first.
        yield from [*pictures, *progress] if len(names) == 2 else [*progress, *pictures]
        yield _image_chart(_WIDE)
    for name in names:
        yield _line_chart("Best so far", f"best/{metrics[name]}")


def _section(name: str) -> dict[str, Any]:
    return {
        "uuid": name,
        "name": name,
        "display": True,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
        "columns": 1 if name == _WIDE else 2,
        "cardHeight": 700 if name == _WIDE else 400,
    }


def _chart(kind: str, section: str, name: str) -> dict[str, Any]:
    return {
        "uuid": f"{section}: {name}",
        "type": kind,
        "runsCountToCompare": RUNS,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
        "displayName": name,
    }


def _line_chart(section: str, metric: str) -> dict[str, Any]:
    return {
        **_chart("LINE", section, metric),
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "lineSmoothness": 0,
        "scaleType": "linear",
        "range": {},
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalLineSmoothing": True,
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "selectedXAxisMetricKey": "",
        "useGlobalXaxisKey": True,
        "displayPoints": False,
    }


def _front_chart(section: str, x: str, y: str) -> dict[str, Any]:
    axes = {"xAxisKey": "metric", "selectedXAxisMetricKey": x, "useGlobalXaxisKey": False, "displayPoints": True}
    return {**_line_chart(section, y), "uuid": f"{section}: {y} over {x}", **axes}


def _image_chart(section: str) -> dict[str, Any]:
    return {**_chart("IMAGE", section, PICTURE), "imageKeys": [PICTURE], "step": FIRST, "showRunParams": False}
