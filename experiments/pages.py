"""One HTML page that compares fronts: self-contained, so that it opens offline and can be sent by mail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from ecotone.experiments.compare import Comparison, Group, Line
from ecotone.experiments.report import comparison_lines, export_command, search_report_text
from ecotone.experiments.runs import Scored, points_of
from ecotone.populations.errors import LONGEST, InputError, shown
from ecotone.populations.files import written_whole
from ecotone.populations.fronts import non_dominated
from ecotone.populations.genome import Floats, Genome
from ecotone.populations.trial import Goal
from ecotone.search.coefficients import Parts

PANELS = 10  # pairwise charts at most, which five objectives have
AXES = 16  # coefficients that are drawn one by one; more are averaged by model
COMPONENTS = 12  # components that are listed one by one when hovering
SEGMENTS = 6  # segments that are listed one by one when hovering
CLOUD = 2000  # dominated points drawn of a run
COLOURS: tuple[str, ...] = (*qualitative.D3, *qualitative.Dark24)

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 0 auto; padding: 1rem 2rem 9rem; max-width: 1240px; }
h1 { font-size: 1.5rem; margin: .4rem 0; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .2rem; }
p { margin: .25rem 0; max-width: 100ch; } .note { color: #9a5b00; } .quiet { color: #666; }
pre { font: 12.5px/1.35 ui-monospace, monospace; overflow-x: auto; margin: .4rem 0; }
table { border-collapse: collapse; font-size: .88rem; margin: .5rem 0; } th { vertical-align: bottom; }
td, th { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4; }
td:first-child, th:first-child, .runs td:nth-child(2), .runs th:nth-child(2) { text-align: left; }
td { white-space: nowrap; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; }
#chosen { position: fixed; bottom: 0; left: 0; right: 0; background: #f6f6f4; border-top: 1px solid #ccc; margin: 0;
  padding: .6rem 2rem; font: 13px/1.4 ui-monospace, monospace; white-space: pre-wrap; max-height: 8.5rem;
  overflow-y: auto; user-select: all; z-index: 5; }
"""
# Clicking a point keeps what hovering shows, where it can be copied from.
_SCRIPT = """
document.querySelectorAll('.plotly-graph-div').forEach(chart => chart.on('plotly_click', event => {
  const found = event.points.map(p => Array.isArray(p.customdata) ? p.customdata[0] : p.customdata).find(Boolean);
  if (found) document.getElementById('chosen').textContent = found.replaceAll('<br>', '\\n').replace(/<[^>]*>/g, '')
    .replaceAll('&lt;', '<').replaceAll('&gt;', '>').replaceAll('&amp;', '&');
}));
"""


def write(comparison: Comparison, path: str | Path) -> Path:
    """Write the page to ``path``.

    Raises:
        InputError: The file cannot be written.
    """
    file = Path(path)
    try:
        written_whole(file, page(comparison))
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror or error}).", "Give another --html.") from error
    return file


def page(comparison: Comparison) -> str:
    """The whole page, with the charts' library inside (about 5 MB)."""
    drawn = _drawn(comparison)
    names = list(dict.fromkeys(line.searched.run.name for line in comparison.lines))
    title = f"{'Front' if len(drawn) == 1 else 'Fronts'} of {', '.join(names)}"
    title = title if len(names) < 4 else f"Fronts of {len(drawn)} runs"
    body = [f"<h1>{_safe(title)}</h1>", _facts(comparison), _table(comparison, drawn), _groups_table(comparison)]
    library: bool = True
    for heading, text, figure in _charts(comparison, drawn):
        body.append(f"<h2>{_safe(heading)}</h2>" + (f'<p class="quiet">{_safe(text)}</p>' if text else ""))
        if figure is not None:
            body.append(figure.to_html(full_html=False, include_plotlyjs=library, config={"displaylogo": False}))
            library = False
    body += _reports(comparison)
    body.append('<div id="chosen">Click a point: its genome and the command that exports it stay here, to copy.</div>')
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_safe(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}<script>{_SCRIPT}</script></body></html>"
    )


@dataclass(frozen=True, eq=False)
class _Drawn:
    """A run as it is drawn: one colour everywhere, seeds of one search in the same.

    Args:
        line: The run.
        colour: The colour of all its marks.
        legend: The legend's entry that shows and hides it.
        first: It stands for its legend entry.
        genomes: The genomes of the front, by trial number.
        hovers: The text that a pointer over each member of the front shows.
    """

    line: Line
    colour: str
    legend: str
    first: bool
    genomes: Mapping[int, Genome | None]
    hovers: tuple[str, ...]

    def style(self, **more: Any) -> dict[str, Any]:
        """Properties of every trace of the run."""
        return {"name": _safe(self.legend), "legendgroup": self.legend, **more}


def _drawn(comparison: Comparison) -> list[_Drawn]:
    group_of = {id(line): group.label for group in comparison.groups for line in group.lines}
    legends = [group_of.get(id(line), line.searched.label) for line in comparison.lines]
    colours = {legend: COLOURS[i % len(COLOURS)] for i, legend in enumerate(dict.fromkeys(legends))}
    seen: set[str] = set()
    found = []
    for line, legend in zip(comparison.lines, legends, strict=True):
        genomes = line.searched.genomes()
        hovers = tuple(_hover(line, member, genomes[int(member.id)]) for member in line.searched.front)
        found.append(_Drawn(line, colours[legend], legend, legend not in seen, genomes, hovers))
        seen.add(legend)
    return found


# -- words -----------------------------------------------------------------------------------------------


def _facts(comparison: Comparison) -> str:
    lines = [*comparison_lines(comparison)]
    return "".join(f'<p class="{"note" if text.startswith("Note") else "quiet"}">{_safe(text)}</p>' for text in lines)


def _table(comparison: Comparison, drawn: Sequence[_Drawn]) -> str:
    heads = ["run", "algorithm", "seed", "evaluations", "seconds", "front", "hypervolume", "share of best", "IGD+"]
    heads += ["epsilon", f"evaluations to {comparison.target:.4g}", f"seconds to {comparison.target:.4g}"]
    rows = "".join(_table_row(one) for one in drawn)
    head = "".join(f"<th>{_safe(name)}</th>" for name in [*heads, "held-out hypervolume"])
    return f'<table class="runs"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _table_row(one: _Drawn) -> str:
    record = one.line.record()
    forms = {"seconds": ".3g", "hypervolume": ".4f", "share_of_best": ".1%", "igd_plus": ".4f", "epsilon": ".4f"}
    forms |= {"seconds_to_reach": ".3g", "held_out_hypervolume": ".4f"}
    keys = ["algorithm", "seed", "evaluations", "seconds", "front_size", "hypervolume", "share_of_best", "igd_plus"]
    keys += ["epsilon", "evaluations_to_reach", "seconds_to_reach", "held_out_hypervolume"]
    cells = ["-" if record[key] is None else format(record[key], forms.get(key, "")) for key in keys]
    dot = f'<span class="dot" style="background:{one.colour}"></span>'
    return f"<tr><td>{dot}{_safe(record['label'])}</td>{''.join(f'<td>{_safe(cell)}</td>' for cell in cells)}</tr>"


def _groups_table(comparison: Comparison) -> str:
    if not comparison.groups:
        return ""
    heads = ["over seeds", "seeds", "median hypervolume", "lowest", "highest", "median held-out hypervolume"]
    heads += ["seeds that got there", "median evaluations", "median seconds"]
    rows = []
    for group in comparison.groups:
        found = group.record()
        volume, held_out = found["hypervolume"], found["held_out_hypervolume"]
        cells = [group.label, str(len(group.lines)), *(f"{volume[key]:.4f}" for key in ("median", "low", "high"))]
        cells += ["-" if held_out is None else f"{held_out:.4f}", f"{found['reached']} of {len(group.lines)}"]
        costs = ((found["evaluations_to_reach"], ".0f"), (found["seconds_to_reach"], ".3g"))
        cells += ["-" if cost is None else format(cost, form) for cost, form in costs]
        rows.append("".join(f"<td>{_safe(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{_safe(name)}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"


def _hover(line: Line, member: Scored, genome: Genome | None) -> str:
    """The text that a pointer over a member shows. The chart's library understands a little HTML in it."""
    searched = line.searched
    parts = [f"<b>{_safe(searched.label)}</b> ({_safe(searched.algorithm)}), member {member.id}"]
    counts = {"search": searched.examples["search"], "held out": searched.examples["held_out"]}
    parts += [f"{kind}: {_scores(scores, counts[kind])}" for kind, scores in _measured(member)]
    parts += _genome_words(searched.models, genome, searched.components)
    return "<br>".join([*parts, _safe(export_command(searched.run.where, member.id))])


def _safe(text: str) -> str:
    """Text for the page and for its charts, which do not understand entities of quotes."""
    return escape(shown(text, LONGEST, lines=True), quote=False)


def _measured(member: Scored) -> Iterator[tuple[str, Mapping[str, float]]]:
    for kind, scores in (("search", member.scores), ("held out", member.held_out)):
        if scores:
            yield kind, scores


def _scores(scores: Mapping[str, float], counts: Mapping[str, int] = MappingProxyType({})) -> str:
    """Each score, with its number of examples where that is known."""
    stands = {name: f" of {count:,}" for name, count in counts.items()}
    return ", ".join(f"{_safe(name)} {value:.4f}{stands.get(name, '')}" for name, value in scores.items())


def _genome_words(models: Sequence[str], genome: Genome | None, components: Parts | None) -> list[str]:
    if genome is None or genome.is_dense:
        return ["dense weights, evolved from scratch: no coefficients"]
    names = _model_names(models, genome.sources)
    if genome.segments == 1:
        return [f"coefficients: {_coefficients_in_words(names, genome.coefficients[0])}"]
    if components is not None and components.fits(genome):
        rows = zip(components.names, components.of(genome), strict=True)
        words = [f"{name}: {_coefficients_in_words(names, row)}" for name, row in rows]
        return words if len(words) <= COMPONENTS else [*words[:COMPONENTS], f"and {len(words) - COMPONENTS} more"]
    if genome.segments > SEGMENTS:
        return [f"{genome.segments} segments; mean coefficients: {_coefficients_in_words(names, _averaged(genome))}"]
    ends = 100 * genome.boundaries / genome.size
    return [
        f"{start:.1f}% to {stop:.1f}% of the parameters: {_coefficients_in_words(names, row)}"
        for start, stop, row in zip(ends, ends[1:], genome.coefficients, strict=False)
    ]


def _coefficients_in_words(names: Sequence[str], values: Floats) -> str:
    return ", ".join(f"{_safe(name)} {value:.3f}" for name, value in zip(names, values, strict=True))


def _model_names(models: Sequence[str], count: int) -> list[str]:
    return list(models) if len(models) == count else [f"source {index}" for index in range(count)]


def _averaged(genome: Genome) -> Floats:
    """(K,) mean coefficient of each source over the parameters."""
    lengths = np.diff(genome.boundaries)
    return np.asarray(lengths @ genome.coefficients / lengths.sum(), np.float64)


def _axis(goal: Goal) -> str:
    return _safe(f"{goal.name} ({'higher' if goal.direction == 'maximize' else 'lower'} is better)")


# -- charts ----------------------------------------------------------------------------------------------


def _charts(comparison: Comparison, drawn: Sequence[_Drawn]) -> Iterator[tuple[str, str, go.Figure | None]]:
    """Heading, sentence and figure of each chart."""
    yield from _fronts(comparison, drawn)
    text = "The dashed line is the hypervolume whose cost the table shows."
    yield "Hypervolume over evaluations", text, _volume_chart(comparison, drawn)
    yield from _coefficients(drawn)


def _reports(comparison: Comparison) -> Iterator[str]:
    """The searches' own reports: surrogates, and nested MAP's tree."""
    for line in comparison.lines:
        text = search_report_text(line.searched.report, comparison.goals)
        if text:
            yield f"<h2>The search of {_safe(line.searched.label)}</h2><pre>{_safe(text)}</pre>"


def _fronts(comparison: Comparison, drawn: Sequence[_Drawn]) -> Iterator[tuple[str, str, go.Figure | None]]:
    goals = comparison.goals
    if len(goals) == 1:
        yield "Fronts", "With one objective a front is its best member: see the table.", None
        return
    text = "Crosses: the models themselves and their average. The legend can show everything evaluated."
    if any(one.line.searched.report.get("members") for one in drawn):
        text += " Open circles: a search's predictions, each tied to its measurement."
    if len(goals) == 2:
        surfaces = " Thick lines: points that most seeds of a search reach." if comparison.groups else ""
        yield "Fronts on search data", text + surfaces, _pairwise(comparison, drawn, [(0, 1)])
        return
    if len(goals) == 3:
        yield "Fronts on search data", "Drag to turn.", _space_chart(comparison, drawn)
    pairs = list(combinations(range(len(goals)), 2))
    if len(pairs) <= PANELS:
        yield "Fronts, two objectives at a time", text, _pairwise(comparison, drawn, pairs)
    if len(goals) > 3:
        span = "Each line is a member; each score as a share of the range of all fronts, 1 the best."
        yield "Scores of the fronts' members", span, _score_lines(comparison, drawn)


def _pairwise(comparison: Comparison, drawn: Sequence[_Drawn], pairs: Sequence[tuple[int, int]]) -> go.Figure:
    across = min(3, len(pairs))
    down = -(-len(pairs) // across)
    figure = make_subplots(rows=down, cols=across, horizontal_spacing=0.08, vertical_spacing=0.28 / down)
    goals = comparison.goals
    for index, (x, y) in enumerate(pairs):
        place = {"row": index // across + 1, "col": index % across + 1}
        for trace in _pair_traces(comparison, drawn, x, y, legend=index == 0):
            figure.add_trace(trace, **place)
        figure.update_xaxes(title_text=_axis(goals[x]), **place)
        figure.update_yaxes(title_text=_axis(goals[y]), **place)
    if len(pairs) > 1:  # panels need the width
        figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    return _laid_out(figure, 620 if len(pairs) == 1 else 400 * down)


def _pair_traces(
    comparison: Comparison, drawn: Sequence[_Drawn], x: int, y: int, legend: bool
) -> Iterator[go.BaseTraceType]:
    goals, flat = comparison.goals, len(comparison.goals) == 2
    for index, one in enumerate(drawn):
        yield _cloud(one, goals, x, y, legend and index == 0)
    for one in drawn:
        points = points_of((member.scores for member in one.line.searched.front), goals)
        order = np.argsort(points[:, x], kind="stable")
        values = _in_units(points[order], goals)
        yield go.Scatter(
            x=values[:, x],
            y=values[:, y],
            mode="lines+markers" if flat else "markers",
            line={"color": one.colour, "width": 1, "shape": "vh"},
            marker={"color": one.colour, "size": 7},
            opacity=0.85,
            customdata=[one.hovers[i] for i in order],
            hovertemplate="%{customdata}<extra></extra>",
            showlegend=legend and one.first,
            **one.style(),
        )
    for one in drawn:
        if one.line.searched.report.get("members"):
            yield _predicted(one, goals, x, y, legend=legend and one.first, shown=len(drawn) == 1)
    if flat:
        colours = {one.legend: one.colour for one in drawn}
        yield from (_surface(group, goals, colours[group.label]) for group in comparison.groups)
    yield _references(comparison, x, y, legend)


def _predicted(one: _Drawn, goals: Sequence[Goal], x: int, y: int, legend: bool, shown: bool) -> go.Scatter:
    """The predictions of a search with surrogates for the members of its front, each tied to its measurement."""
    members = one.line.searched.report["members"]
    told = [member for member in members if member["measured"]]
    words = [
        f"member {m['number']}<br>predicted: {_scores(m['predicted'])}<br>measured: {_scores(m['measured'])}"
        for m in told
    ]

    def along(name: str) -> list[float | None]:
        return [value for m in told for value in (m["predicted"][name], m["measured"][name], None)]

    return go.Scatter(
        x=along(goals[x].name),
        y=along(goals[y].name),
        mode="lines+markers",
        line={"color": one.colour, "width": 1, "dash": "dot"},
        marker={"color": one.colour, "size": [9, 0, 0] * len(told), "symbol": "circle-open"},
        customdata=[word for word in words for _ in range(3)],
        hovertemplate="%{customdata}<extra></extra>",
        name=f"{_safe(one.legend)}: predicted",
        legendgroup=f"{one.legend}: predicted",
        visible=True if shown else "legendonly",
        showlegend=legend,
    )


def _surface(group: Group, goals: Sequence[Goal], colour: str) -> go.Scatter:
    points = group.surface[non_dominated(group.surface)]
    values = _in_units(points[np.argsort(points[:, 0])], goals)
    return go.Scatter(
        x=values[:, 0],
        y=values[:, 1],
        mode="lines",
        line={"color": colour, "width": 4, "shape": "vh"},
        opacity=0.55,
        hoverinfo="skip",
        name=_safe(group.label),
        legendgroup=group.label,
        showlegend=False,
    )


def _cloud(one: _Drawn, goals: Sequence[Goal], x: int, y: int, legend: bool) -> go.Scattergl:
    """Everything a run evaluated, faintly."""
    points = one.line.searched.points
    values = _in_units(points[:: -(-len(points) // CLOUD)], goals)
    return go.Scattergl(
        x=values[:, x],
        y=values[:, y],
        mode="markers",
        marker={"color": "#999999", "size": 4},
        opacity=0.4,
        hoverinfo="skip",
        name="everything evaluated",
        legendgroup="everything evaluated",
        visible="legendonly",
        showlegend=legend,
    )


def _known(comparison: Comparison) -> list[Scored]:
    """The models themselves and their average, each once."""
    found: dict[tuple[Any, ...], Scored] = {}
    for line in comparison.lines:
        for merge in line.searched.references:
            if merge.scores:
                found.setdefault((merge.id, tuple(merge.scores.values())), merge)
    return list(found.values())


def _known_words(merges: Sequence[Scored]) -> list[str]:
    return [f"<b>{_safe(str(merge.id))}</b><br>{_scores(merge.scores or {})}" for merge in merges]


def _references(comparison: Comparison, x: int, y: int, legend: bool) -> go.Scatter:
    merges = _known(comparison)
    values = _in_units(points_of((merge.scores for merge in merges), comparison.goals), comparison.goals)
    return go.Scatter(
        x=values[:, x],
        y=values[:, y],
        mode="markers",
        marker={"color": "#111111", "symbol": "x-thin", "size": 9, "line": {"width": 2, "color": "#111111"}},
        customdata=_known_words(merges),
        hovertemplate="%{customdata}<extra></extra>",
        name="models and average",
        legendgroup="models and average",
        showlegend=legend,
    )


def _space_chart(comparison: Comparison, drawn: Sequence[_Drawn]) -> go.Figure:
    figure, goals = go.Figure(), comparison.goals
    for one in drawn:
        values = _in_units(one.line.searched.front_points, goals)
        figure.add_trace(
            go.Scatter3d(
                **dict(zip("xyz", values.T, strict=True)),
                mode="markers",
                marker={"color": one.colour, "size": 4},
                customdata=one.hovers,
                hovertemplate="%{customdata}<extra></extra>",
                showlegend=one.first,
                **one.style(),
            )
        )
    merges = _known(comparison)
    values = _in_units(points_of((merge.scores for merge in merges), goals), goals)
    figure.add_trace(
        go.Scatter3d(
            **dict(zip("xyz", values.T, strict=True)),
            mode="markers",
            marker={"color": "#111111", "symbol": "diamond", "size": 4},
            customdata=_known_words(merges),
            hovertemplate="%{customdata}<extra></extra>",
            name="models and average",
        )
    )
    titles = {f"{letter}axis": {"title": {"text": _axis(goal)}} for letter, goal in zip("xyz", goals, strict=True)}
    figure.update_layout(scene={**titles, "aspectmode": "cube", "camera": {"eye": {"x": 1.7, "y": 1.7, "z": 1.0}}})
    return _laid_out(figure, 640)


def _score_lines(comparison: Comparison, drawn: Sequence[_Drawn]) -> go.Figure:
    everything = np.concatenate([one.line.searched.front_points for one in drawn])
    low, span = everything.min(axis=0), np.ptp(everything, axis=0)
    span[span == 0] = 1.0
    names = [_axis(goal) for goal in comparison.goals]
    tables = [(one.line.searched.front_points - low) / span for one in drawn]
    return _parallel(names, drawn, tables, "share of the range")


def _volume_chart(comparison: Comparison, drawn: Sequence[_Drawn]) -> go.Figure:
    figure = go.Figure()
    for one in drawn:
        counts, volumes = one.line.searched.counts, one.line.volumes
        keep = np.append(np.diff(volumes, prepend=-1.0)[:-1] > 0, True)
        figure.add_trace(
            go.Scatter(
                x=counts[keep],
                y=volumes[keep],
                mode="lines",
                line={"color": one.colour, "shape": "hv", "width": 2},
                hovertemplate=f"{_safe(one.line.searched.label)}: %{{y:.4f}} after %{{x}}<extra></extra>",
                showlegend=one.first,
                **one.style(),
            )
        )
    figure.add_hline(y=comparison.target, line={"dash": "dash", "color": "#888888", "width": 1})
    early = min(float(one.line.volumes[len(one.line.volumes) // 10]) for one in drawn)
    top = max(line.hypervolume for line in comparison.lines)
    bottom = min(early, comparison.target)  # what came before is a steep rise that would flatten the rest
    ticks = [step * 10**power for power in range(8) for step in (1, 2, 5)]
    figure.update_xaxes(title_text="evaluations", type="log", tickvals=ticks, ticktext=[f"{tick:,}" for tick in ticks])
    figure.update_yaxes(
        title_text="hypervolume of the front so far (higher is better)",
        range=[bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom)],
    )
    return _laid_out(figure, 460)


def _coefficients(drawn: Sequence[_Drawn]) -> Iterator[tuple[str, str, go.Figure | None]]:
    """Parallel coordinates of the fronts' genomes, a chart for each set of models."""
    heading = "Coefficients of the fronts' members"
    for models in dict.fromkeys(one.line.searched.models for one in drawn):
        runs = [one for one in drawn if one.line.searched.models == models]
        mixed = [one for one in runs if not any(_is_dense(genome) for genome in one.genomes.values())]
        text = _dense_words([one for one in runs if one not in mixed])
        if not mixed:
            yield heading, text, None
            continue
        names, tables, averaged = _coefficient_axes(models, mixed)
        words = ["Each line is a member of a front."]
        if averaged:
            words.append("Coefficients differ along the models; shown is each model's mean over the parameters.")
        yield heading, " ".join(filter(None, [*words, text])), _parallel(names, mixed, tables, "coefficient")


def _coefficient_axes(models: Sequence[str], runs: Sequence[_Drawn]) -> tuple[list[str], list[Floats], bool]:
    """Names of the axes, (members, axes) values of each run, and whether they are means over segments."""
    genomes = [[genome for genome in one.genomes.values() if genome is not None] for one in runs]
    first = genomes[0][0]
    names = [_safe(name) for name in _model_names(models, first.sources)]
    components = runs[0].line.searched.components
    few = components is not None and len(components) * first.sources <= AXES
    if components and few and all(components.fits(genome) for found in genomes for genome in found):
        names = [f"{name}<br>{component}" for component in components.names for name in names]
        return names, [np.array([components.of(genome).ravel() for genome in found]) for found in genomes], False
    alike = all(np.array_equal(genome.boundaries, first.boundaries) for found in genomes for genome in found)
    if alike and first.coefficients.size <= AXES:
        if first.segments > 1:
            names = [f"{name}<br>segment {segment + 1}" for segment in range(first.segments) for name in names]
        return names, [np.array([genome.coefficients.ravel() for genome in found]) for found in genomes], False
    return names, [np.array([_averaged(genome) for genome in found]) for found in genomes], True


def _dense_words(runs: Sequence[_Drawn]) -> str:
    if not runs:
        return ""
    labels = ", ".join(one.line.searched.label for one in runs)
    return f"{labels}: evolved from scratch as dense weights, which have no coefficients to show."


def _is_dense(genome: Genome | None) -> bool:
    return genome is None or genome.is_dense


def _parallel(names: Sequence[str], drawn: Sequence[_Drawn], tables: Iterable[Floats], title: str) -> go.Figure:
    """One line a member through its value on each named axis; a run's lines are one trace with gaps."""
    figure = go.Figure()
    positions = [*range(len(names)), None]
    faint = float(np.clip(60 / max(1, sum(len(one.hovers) for one in drawn)), 0.3, 0.6))
    for one, table in zip(drawn, tables, strict=True):
        rows = [[*row, None] for row in table.tolist()]
        figure.add_trace(
            go.Scatter(
                x=positions * len(rows),
                y=[value for row in rows for value in row],
                mode="lines+markers",
                line={"color": one.colour, "width": 1},
                marker={"size": 5},
                opacity=faint,
                customdata=[hover for hover in one.hovers for _ in positions],
                hovertemplate="%{customdata}<extra></extra>",
                showlegend=one.first,
                **one.style(),
            )
        )
    figure.update_xaxes(tickvals=list(range(len(names))), ticktext=list(names), range=[-0.3, len(names) - 0.7])
    figure.update_yaxes(title_text=title)
    return _laid_out(figure, 480)


def _in_units(points: Floats, goals: Sequence[Goal]) -> Floats:
    """Oriented points as the objectives report them."""
    signs: Floats = np.array([goal.sign for goal in goals])
    return points * signs


def _laid_out(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(
        height=height,
        template="plotly_white",
        margin={"l": 70, "r": 20, "t": 45, "b": 60},
        hoverlabel={"align": "left", "bgcolor": "white", "font": {"size": 12}},
        legend_itemsizing="constant",
        hovermode="closest",
    )
    return figure
