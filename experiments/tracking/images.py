"""The front as a picture, for a search that is going on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ecotone.populations.genome import Floats
from ecotone.populations.trial import Goal

FIRST = 15  # evaluations of the first picture
PANELS = 6  # pairs of objectives that are drawn at most


def is_due(count: int) -> bool:
    """True after 15, 30, 60, 120, ... evaluations: pictures of two searches have the same steps."""
    return count % FIRST == 0 and (count // FIRST).bit_count() == 1


def front_image(goals: Sequence[Goal], cloud: Floats, front: Floats, title: str, colour: str) -> Any:
    """A front over the candidates that were scored lately, one panel for each pair of objectives.

    Args:
        goals: The M objectives, two at least.
        cloud: (N, M) scores of candidates, as the objectives report them.
        front: (F, M) those of the front.
        title: Written above.
        colour: The colour of the front.

    Returns:
        A Pillow image.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    pairs = list(combinations(range(len(goals)), 2))[:PANELS]
    columns = math.ceil(math.sqrt(len(pairs)))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(4.8 * columns, 4.0 * rows + 0.3), dpi=100, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel, (x, y) in zip(panels.flat, pairs, strict=False):
        _draw(panel, goals, cloud[:, [x, y]], front[:, [x, y]], (x, y), colour)
    for panel in panels.flat[len(pairs) :]:
        panel.set_axis_off()
    figure.suptitle(title, fontsize=11)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _draw(panel: Any, goals: Sequence[Goal], cloud: Floats, front: Floats, pair: tuple[int, int], colour: str) -> None:
    line = front[np.argsort(front[:, 0], kind="stable")]
    panel.plot(cloud[:, 0], cloud[:, 1], ".", color="0.75", markersize=4, zorder=1)
    panel.plot(line[:, 0], line[:, 1], "o-" if len(goals) == 2 else "o", color=colour, markersize=4, zorder=2)
    panel.set_xlabel(_label(goals[pair[0]]))
    panel.set_ylabel(_label(goals[pair[1]]))
    panel.grid(alpha=0.3)


def _label(goal: Goal) -> str:
    arrow = "→" if goal.sign > 0 else "←"
    name = goal.name if len(goal.name) <= 40 else f"{goal.name[:37]}..."
    return f"{name.replace('$', chr(92) + '$')}  {arrow} better"
