"""Reports for people: the live progress line and the tables."""

from __future__ import annotations

import io
import math
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from ecotone.experiments.accepted import accepted_texts
from ecotone.experiments.consoles import PlainConsole
from ecotone.experiments.runs import Run, Scored, points_of
from ecotone.populations import facts
from ecotone.populations.fronts import hypervolume
from ecotone.populations.ranking import Scale
from ecotone.populations.trial import Goal, oriented
from ecotone.registry import Origin

if TYPE_CHECKING:
    from ecotone.experiments.compare import Comparison, Group, Line
    from ecotone.experiments.preferences import Choice
    from ecotone.search.manager import Progress

SHOWN = 5  # members of the front in the closing table
LARGE = 1e8  # scores from which digits after the point say nothing


class ProgressLine:
    """Evaluations, rate, best, front size, failures and time left: one live line, or one every 10 s in a log.

    Args:
        console: The console to write to (stderr, so that ``--json`` stays clean).
        evaluations: The budget, if it is one of evaluations.
        seconds: The budget, if it is one of seconds.
    """

    def __init__(self, console: Console, evaluations: int | None, seconds: float | None) -> None:
        self.console = console
        self.evaluations = evaluations
        self.seconds = seconds
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._last = 0.0
        self._began: tuple[float, float] | None = None

    def __enter__(self) -> ProgressLine:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, at)

    def say(self, text: str) -> None:
        """Write a sentence above the line."""
        self.console.print(Text(text, style="dim"), soft_wrap=True)  # commands in it are to be copied

    def __call__(self, progress: Progress) -> None:
        """Show the progress, at most four times a second."""
        now = time.monotonic()
        if self._began is None:
            self._began = (now, progress.spent)
        if now - self._last < (0.25 if self._live is not None else 10.0):
            return
        self._last = now
        line = Text(self._line(progress, now))
        if self._live is not None:
            self._live.update(line)
        else:
            self.console.print(line)

    def _line(self, progress: Progress, now: float) -> str:
        assert self._began is not None
        since = now - self._began[0]
        rate = (progress.spent - self._began[1]) / since if since > 0.5 else 0.0
        of = "" if self.evaluations is None else f"/{self.evaluations}"
        best = " ".join(f"{name} {value:.4g}" for name, value in progress.best_scores.items()) or "none yet"
        parts = [
            f"{progress.spent:.0f}{of} evaluations",
            f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s",
            *([f"{progress.evaluations} in full"] if progress.samples else []),
            *([f"{progress.gradients} gradients"] if progress.gradients else []),
            *([f"{progress.statistics} statistics"] if progress.statistics else []),
            f"best {best}",
            f"front {progress.front_size}",
            f"failures {progress.failures}",
        ]
        left = self._left(progress, rate)
        return " | ".join([*parts, f"{_duration(left)} left"] if left is not None else parts)

    def _left(self, progress: Progress, rate: float) -> float | None:
        estimates = []
        if self.evaluations is not None and rate > 0:
            estimates.append((self.evaluations - progress.spent) / rate)
        if self.seconds is not None:
            estimates.append(max(0.0, self.seconds - progress.elapsed))
        return min(estimates, default=None)


def closing_table(run: Run) -> Table:
    """Seed models, their average and the best merges, on search and held-out data."""
    best = run.best()
    front = [m for m in run.front() if best is None or m.id != best.id]
    scales = run.scales()
    table = score_table(f"{run.name}", run, scales)
    for reference in run.references():
        table.add_row(*score_row(str(reference.id), reference, scales))
    table.add_section()
    if best is not None:
        label = f"best (member {best.id})"
        table.add_row(*score_row(label, best, scales), style="bold")
    for member in spread(front, SHOWN):
        table.add_row(*score_row(f"front (member {member.id})", member, scales))
    return table


def start_lines(run: Run) -> list[str]:
    """The merges that the run's searches began with because they were solved from inner products, a line each."""
    with run.journal() as journal:
        found = journal.fact(facts.STARTS) or []
    several = len({one["stage"] for one in found}) > 1 or any(one["stage"] for one in found)
    lines = []
    for one in found:
        stage = f"Stage {one['stage']} began" if several else "Began"
        means = ", ".join(f"{name} {value:.4g}" for name, value in zip(one["sources"], one["means"], strict=True))
        lines.append(f"{stage} with {one['solver']['solve']}: {one['text']}. Means: {means}.")
    return lines


def accepted_lines(run: Run) -> list[str]:
    """The changes of models, code and data that were accepted: scores before and after are of different things."""
    with run.journal() as journal:
        return [f"Warning: {text}." for text in accepted_texts(journal)]


def front_table(run: Run, members: Sequence[Scored], chosen: int | str | None = None) -> Table:
    """All members of the front; the ``chosen`` one is marked."""
    scales = run.scales()
    table = score_table(f"{run.name}: front of {len(members)}", run, scales, first="member")
    for member in members:
        mark, style = ("> ", "bold") if member.id == chosen else ("", None)
        table.add_row(*score_row(f"{mark}{member.id}", member, scales), style=style)
    return table


def front_lines(run: Run, volume: Mapping[str, Any], choice: Choice | None) -> Iterable[str]:
    """The front's hypervolume, and the member that a preference chose with the command that exports it."""
    if volume:
        found = score_text(volume["hypervolume"])
        yield f"Hypervolume {found} from the reference point {_point(volume['reference_point'])}."
    both = predicted_hypervolumes(run.report() or {}, run.goals, volume.get("reference_point", {}))
    if both is not None:
        yield f"Hypervolume of the front as predicted {both[0]:.4f}; of the same members as measured {both[1]:.4f}."
    if choice is not None:
        yield f"Member {choice.member.id}: {choice.reason}."
        yield f"  {export_command(run.where, choice.member.id)}"


def front_record(run: Run, volume: Mapping[str, Any], choice: Choice | None) -> dict[str, Any]:
    """The record that ``front --json`` prints."""
    record: dict[str, Any] = {
        "objectives": [{"name": goal.name, "direction": goal.direction} for goal in run.goals],
        "members": [member.record() for member in run.front()],
        "examples": run.examples(),
        **volume,
    }
    if choice is not None:
        record["chosen"] = {
            "id": choice.member.id,
            "reason": choice.reason,
            "missing": dict(choice.missing),
            "export": export_command(run.where, choice.member.id),
        }
    found = run.report()
    return record if found is None else {**record, "report": found}


def predicted_hypervolumes(
    found: Mapping[str, Any], goals: Sequence[Goal], reference: Mapping[str, float]
) -> tuple[float, float] | None:
    """Hypervolume of a predicted front, and of the same members as they were measured; None without a prediction."""
    told = [member for member in found.get("members") or () if member["measured"] is not None]
    if not told:
        return None
    corner = oriented(reference, goals)
    predicted = points_of((member["predicted"] for member in told), goals)
    return hypervolume(predicted, corner), hypervolume(points_of((m["measured"] for m in told), goals), corner)


def search_report_text(found: Mapping[str, Any], goals: Sequence[Goal]) -> str:
    """``search_report`` as plain text, without the members of the front one by one."""
    plain = PlainConsole(width=140, file=io.StringIO(), highlight=False, markup=False)
    with plain.capture() as captured:
        for part in search_report({key: value for key, value in found.items() if key != "members"}, goals):
            plain.print(part)
    return captured.get().rstrip()


def search_report(found: Mapping[str, Any], goals: Sequence[Goal]) -> Iterator[Table | Tree | Text]:
    """The report of a search at its end. Surrogates show their errors, and the front as predicted and as measured.
    Gradient searches show each line of descent, and warnings.

    Args:
        found: The ``report()`` of the search; parts that it lacks are left out. Of a chain, each stage's is shown.
        goals: The objectives.
    """
    for index, stage in enumerate(found.get("stages") or ()):
        yield Text(_stage_words(index, stage))
        own = {key: value for key, value in (stage["report"] or {}).items() if key != "warnings"}
        yield from search_report(own, goals)
    if found.get("algorithm") == "race":
        yield Text(_race_words(found))
        yield from search_report(found["search"] or {}, goals)
    if found.get("leave_one_out"):
        yield _surrogate_table(found, goals)
    if found.get("members"):
        yield _predicted_table(found["members"], goals)
    for root in found.get("tree") or ():
        yield _tree(root)
    if found.get("lines"):
        yield _descent_table(found["lines"], goals, found.get("unit"))
    yield from map(Text, search_warnings(found))


def _stage_words(index: int, stage: Mapping[str, Any]) -> str:
    """One stage of a chain, and the merges that it began with, in words."""
    begun = f"began with {', '.join(map(str, stage['starts']))} ({stage['start']})" if stage["starts"] else ""
    words = [f"Stage {index}: {stage['algorithm']}", f"{stage['evaluations']} evaluations", begun]
    return "; ".join(filter(None, words))


def _race_words(found: Mapping[str, Any]) -> str:
    """The ends of a race's candidates, and its cost, in words."""
    ends = [f"{found['whole']} were scored on all examples"]
    ends += [f"{found[why]} {words}" for why, words in _ENDS.items() if found[why]]
    text = f"Race: of {found['candidates']} candidates {', '.join(ends)}. It took {found['spent']:.1f} evaluations."
    if found["miss"] is not None:
        off = f"{found['miss']:.2f} standard errors off (rms of {found['estimates']}; 1 is as they say)"
        text += f" Estimates from samples were {off}."
    return text


_ENDS = {
    "halving": "ended because others of their group were better",
    "bound": "ended because no remaining score could let them enter",
    "failed": "failed",
}


def search_warnings(found: Mapping[str, Any]) -> list[str]:
    """The warnings of a search, as sentences."""
    return [f"Warning: {text}" for text in found.get("warnings") or ()]


def _surrogate_table(found: Mapping[str, Any], goals: Sequence[Goal]) -> Table:
    title = "Surrogates: errors in score units"
    columns = ["objective", "link", "leave-one-out\nerror (rms)", "gap on the\nfront (rms)", "gap on the\nfront (mean)"]
    table = _plain_table(title, columns, left=2)
    for goal in goals:
        gap = found.get("gap", {}).get(goal.name, {})
        errors = (found["leave_one_out"].get(goal.name), gap.get("rms"), gap.get("mean"))
        cells = [_number(errors[0], ".4f"), _number(errors[1], ".4f"), _number(errors[2], "+.4f")]
        table.add_row(goal.name, str(found.get("links", {}).get(goal.name, "-")), *cells)
    return table


def _predicted_table(members: Sequence[Mapping[str, Any]], goals: Sequence[Goal]) -> Table:
    columns = [f"{goal.name}\n{kind}" for goal in goals for kind in ("predicted", "measured")]
    table = _plain_table("The front as predicted, and as measured", ["member", *columns], left=1)
    for member in members:
        cells = []
        for goal in goals:
            spread = member.get("std", {}).get(goal.name)
            predicted = _number(member["predicted"].get(goal.name), ".4f")
            cells.append(predicted if spread is None else f"{predicted} ±{spread:.3f}")
            cells.append(_number((member.get("measured") or {}).get(goal.name), ".4f"))
        table.add_row(str(member["number"]), *cells)
    return table


def _descent_table(descents: Sequence[Mapping[str, Any]], goals: Sequence[Goal], unit: str | None) -> Table:
    """First, best and last check of each line of gradient descent."""
    tasks = list(descents[0]["weights"])
    score = "mean of ranges" if unit == "ranges" else "mean score"
    if unit is None and len({goal.direction for goal in goals}) > 1:  # of a run before there was a unit
        score = "maximised less\nminimised scores"
    columns = ["line", "steps", "ended", f"{score}:\nfirst", "best", "last", *(f"loss of\n{task}" for task in tasks)]
    table = _plain_table("Lines of gradient descent", columns, left=3)
    for index, line in enumerate(descents):
        checks = line["checks"]
        scores = [check["score"] for check in checks if check["score"] is not None] or [None]
        best = max(scores, key=lambda score: -math.inf if score is None else score)
        losses = [[check["losses"].get(task) for check in checks if check["losses"]] or [None] for task in tasks]
        ways = [f"{_number(told[0], '.4f')} to {_number(told[-1], '.4f')}" for told in losses]
        cells = [_number(score, ".4f") for score in (scores[0], best, scores[-1])]
        weights = {weight for weight in line["weights"].values() if weight}
        label = str(index) if len(weights) == 1 else f"{index}: {_point(line['weights'])}"
        table.add_row(label, str(line["steps"]), line["ended"], *cells, *ways)
    return table


def _tree(node: Mapping[str, Any]) -> Tree:
    """A merge of nested MAP and, below it, the two nodes that it was merged from."""
    tree = Tree(Text(_node_words(node)))
    for child in node.get("children") or ():
        tree.add(_tree(child))
    return tree


def _node_words(node: Mapping[str, Any]) -> str:
    scores = "failed" if node["scores"] is None else _point(node["scores"])
    words = [f"{' + '.join(node['models'])} (member {node['number']}): {scores}"]
    if node.get("children"):
        names = ["+".join(child["models"]) for child in node["children"]]
        words.append(" and ".join(f"{share:.3f} of {name}" for share, name in zip(node["shares"], names, strict=True)))
        words.append(f"leave-one-out errors {_errors(node['leave_one_out'])}; {_pair_gap(node['members'])}")
    return "\n".join(words)


def _errors(errors: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {_number(error, '.4f')}" for name, error in errors.items())


def _pair_gap(members: Sequence[Mapping[str, Any]]) -> str:
    """The distance between prediction and measurement of a pair's front, in words."""
    gaps = [
        measured - predicted
        for member in members
        if member["measured"] is not None
        for predicted, measured in zip(member["predicted"], member["measured"], strict=True)
    ]
    if not gaps:
        return "nothing of its predicted front was measured"
    return f"gap to the predicted front {(sum(gap**2 for gap in gaps) / len(gaps)) ** 0.5:.4f} (rms)"


def export_command(where: str, member: int | str) -> str:
    """The command that exports a member."""
    return f"ecotone export {shlex.quote(where)} --member {member} --to merged-{member}"


def spread(members: Sequence[Scored], count: int) -> list[Scored]:
    """At most ``count`` members, evenly picked from first to last."""
    if len(members) <= count:
        return list(members)
    return [members[round(i * (len(members) - 1) / (count - 1))] for i in range(count)]


def score_table(title: str, run: Run, scales: tuple[Scale, Scale], first: str = "merge") -> Table:
    """An empty table with a column a score, which says on how many examples it stands, and one for the mean."""
    words = "\n".join(dict.fromkeys(scale.words for scale in scales if scale.words and scale.known))
    table = Table(title=title, title_justify="left", caption=words or None, caption_justify="left")
    table.add_column(first)
    examples = run.examples()
    for group, subset, scale in zip(("search", "held out"), ("search", "held_out"), scales, strict=True):
        for goal in scale.goals:
            arrow = "" if goal.direction == "maximize" else " (min)"
            count = examples[subset].get(goal.name)
            stands = "" if count is None else f"\nof {count:,}"
            table.add_column(f"{group}\n{goal.name}{arrow}{stands}", justify="right")
        if _has_mean(scale):
            table.add_column(f"{group}\n{scale.title}", justify="right")
    return table


def score_row(label: str, scored: Scored, scales: tuple[Scale, Scale]) -> list[str]:
    """The cells of one merge, for the scales on search data and on held-out data."""
    return [label, *_cells(scored.scores, scales[0]), *_cells(scored.held_out, scales[1])]


def _has_mean(scale: Scale) -> bool:
    return len(scale.goals) > 1 and scale.known


def status_table(status: Mapping[str, object]) -> Table:
    """Field by field."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    for key, value in status.items():
        if value not in (None, "", {}, []):
            table.add_row(key.replace("_", " "), _in_words(value))
    return table


def _in_words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_in_words(one)}" for key, one in value.items() if one not in (None, "", {}, []))
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def jobs_table(jobs: Sequence[Mapping[str, object]]) -> Table:
    """Runs on a cluster: one row a job."""
    table = Table(box=None)
    for name in ("run", "job", "state", "started", "ended", "out"):
        table.add_column(name, overflow="fold")
    for job in jobs:
        table.add_row(*(str(job[name] or "-") for name in ("run", "job", "state", "started", "ended", "out")))
    return table


def plugins_table(origins: Sequence[Origin]) -> Table:
    """Kinds that recipes can name: one row each."""
    table = Table(box=None)
    for name in ("sort", "name", "from", "place"):
        table.add_column(name, overflow="fold")
    for one in origins:
        place = Text(one.place)
        if one.error:
            place.append(f" cannot be used: {one.error}", "red")
        table.add_row(one.sort, one.name, Text(one.package), place)
    return table


def _cells(scores: Mapping[str, float] | None, scale: Scale) -> list[str]:
    values = [None if scores is None else scores.get(goal.name) for goal in scale.goals]
    if _has_mean(scale):
        values.append(scale.mean(scores))
    return ["-" if value is None else score_text(value) for value in values]


def score_text(value: float) -> str:
    """A score for people: four digits after the point, or six digits in all of one that is large."""
    return f"{value:.4f}" if abs(value) < LARGE else f"{value:.6g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def console(*, to_stderr: bool = False) -> Console:
    """A console that does not wrap tables when its output is not a terminal."""
    stream = sys.stderr if to_stderr else sys.stdout
    return PlainConsole(file=stream, width=None if stream.isatty() else 160, highlight=False, markup=False)


def lines(findings: Iterable[tuple[str, str]]) -> Table:
    """Two columns without a frame."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    for left, right in findings:
        table.add_row(left, right)
    return table


def comparison_tables(comparison: Comparison) -> Iterable[Table]:
    """The runs, largest hypervolume first, and below them the searches of which there are several seeds."""
    held_out = any(line.held_out_hypervolume is not None for line in comparison.lines)
    target = f"{comparison.target:.4g}"
    columns = ["run", "algorithm", "seed", "evals", "seconds", "front", "hyper-\nvolume", "of best", "IGD+", "epsilon"]
    columns += [f"evals to\n{target}", f"secs to\n{target}", *(["held-out\nhypervol."] if held_out else [])]
    runs = _plain_table("Fronts on search data", columns, left=2)
    for line in comparison.lines:
        runs.add_row(*_line_cells(line), *([_number(line.held_out_hypervolume, ".4f")] if held_out else []))
    yield runs
    if comparison.groups:
        yield _groups_table(comparison.groups, held_out)


def comparison_lines(comparison: Comparison) -> Iterable[str]:
    """The reference points of the tables' numbers, and notes for their reader."""
    yield f"Hypervolume from the reference point {_point(comparison.reference_point)} (--reference sets another)."
    if comparison.held_out_reference:
        yield f"On held-out data, from {_point(comparison.held_out_reference)}: the same fronts, scored again."
    share = f" ({comparison.reach} of the best run's)" if comparison.reach.endswith("%") else ""
    yield f"Evaluations and seconds of searching are to a hypervolume of {comparison.target:.4g}{share}: see --reach."
    yield (
        f"IGD+ and epsilon: distance to the union front of {len(comparison.union)}, in shares of its range; 0 is best."
    )
    yield from (f"Note: {note}" for note in comparison.notes)


def _groups_table(groups: Sequence[Group], held_out: bool) -> Table:
    columns = ["search", "seeds", "median\nhypervol.", "\nlowest", "\nhighest", "median front's\nhypervol."]
    columns += ["seeds\nthere", "median\nevals to", "median\nsecs to", *(["median\nheld out"] if held_out else [])]
    table = _plain_table("Over seeds", columns, left=1)
    for group in groups:
        found = group.record()
        volume = found["hypervolume"]
        cells = [f"{volume[key]:.4f}" for key in ("median", "low", "high")]
        cells += [_number(found["median_front_hypervolume"], ".4f"), f"{found['reached']}/{len(group.lines)}"]
        cells += [_number(found["evaluations_to_reach"], ".0f"), _number(found["seconds_to_reach"], ".3g")]
        table.add_row(
            group.label,
            str(len(group.lines)),
            *cells,
            *([_number(found["held_out_hypervolume"], ".4f")] if held_out else []),
        )
    return table


def _line_cells(line: Line) -> list[str]:
    searched = line.searched
    return [
        searched.label,
        searched.algorithm,
        str(searched.seed),
        str(searched.evaluations),
        f"{searched.seconds:.3g}",
        str(len(searched.front)),
        f"{line.hypervolume:.4f}",
        f"{line.share:.1%}",
        f"{line.igd_plus:.4f}",
        f"{line.epsilon:.4f}",
        _number(line.evaluations_to_reach, "d"),
        _number(line.seconds_to_reach, ".3g"),
    ]


def _plain_table(title: str, columns: Sequence[str], left: int) -> Table:
    """An empty table whose first ``left`` columns are words and whose others are numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=index >= left)
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _point(point: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:.4g}" for name, value in point.items())
