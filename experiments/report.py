"""What a person sees: the live progress line and the tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments.runs import Run, Scored
from populations.trial import Goal

if TYPE_CHECKING:
    from search.manager import Progress

SHOWN = 5  # members of the front in the closing table


class ProgressLine:
    """Evaluations, rate, best, front size, failures and time left: one live line, or one every 10 s in a log.

    Args:
        console: Where to write (stderr, so that ``--json`` stays clean).
        evaluations: The budget, if it is one of evaluations.
        seconds: The budget, if it is one of seconds.
    """

    def __init__(self, console: Console, evaluations: int | None, seconds: float | None) -> None:
        self.console = console
        self.evaluations = evaluations
        self.seconds = seconds
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._last = 0.0
        self._began: tuple[float, int] | None = None

    def __enter__(self) -> ProgressLine:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, at)

    def say(self, text: str) -> None:
        """Write a sentence above the line."""
        self.console.print(Text(text, style="dim"))

    def __call__(self, progress: Progress) -> None:
        """Show the progress, at most four times a second."""
        now = time.monotonic()
        if self._began is None:
            self._began = (now, progress.evaluations)
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
        rate = (progress.evaluations - self._began[1]) / since if since > 0.5 else 0.0
        of = "" if self.evaluations is None else f"/{self.evaluations}"
        best = " ".join(f"{name} {value:.4g}" for name, value in progress.best_scores.items()) or "none yet"
        parts = [
            f"{progress.evaluations}{of} evaluations",
            f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s",
            f"best {best}",
            f"front {progress.front_size}",
            f"failures {progress.failures}",
        ]
        left = self._left(progress, rate)
        return " | ".join([*parts, f"{_duration(left)} left"] if left is not None else parts)

    def _left(self, progress: Progress, rate: float) -> float | None:
        estimates = []
        if self.evaluations is not None and rate > 0:
            estimates.append((self.evaluations - progress.evaluations) / rate)
        if self.seconds is not None:
            estimates.append(max(0.0, self.seconds - progress.elapsed))
        return min(estimates, default=None)


def closing_table(run: Run) -> Table:
    """Seed models, their average and the best merges, on search and held-out data."""
    best = run.best()
    front = [m for m in run.front() if best is None or m.id != best.id]
    table = score_table(f"{run.name}", run.goals, run.held_out_goals)
    for reference in run.references():
        table.add_row(*score_row(str(reference.id), reference, run.goals, run.held_out_goals))
    table.add_section()
    if best is not None:
        label = f"best (member {best.id})"
        table.add_row(*score_row(label, best, run.goals, run.held_out_goals), style="bold")
    for member in spread(front, SHOWN):
        table.add_row(*score_row(f"front (member {member.id})", member, run.goals, run.held_out_goals))
    return table


def front_table(run: Run, members: Sequence[Scored]) -> Table:
    """All members of the front."""
    table = score_table(f"{run.name}: front of {len(members)}", run.goals, run.held_out_goals, first="member")
    for member in members:
        table.add_row(*score_row(str(member.id), member, run.goals, run.held_out_goals))
    return table


def spread(members: Sequence[Scored], count: int) -> list[Scored]:
    """At most ``count`` members, evenly picked from first to last."""
    if len(members) <= count:
        return list(members)
    return [members[round(i * (len(members) - 1) / (count - 1))] for i in range(count)]


def score_table(title: str, goals: Sequence[Goal], held_out: Sequence[Goal], first: str = "merge") -> Table:
    """An empty table with a column a score."""
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for group, names in (("search", goals), ("held out", held_out)):
        for goal in names:
            arrow = "" if goal.direction == "maximize" else " (min)"
            table.add_column(f"{group}\n{goal.name}{arrow}", justify="right")
        if len(names) > 1:
            table.add_column(f"{group}\nmean", justify="right")
    return table


def score_row(label: str, scored: Scored, goals: Sequence[Goal], held_out: Sequence[Goal]) -> list[str]:
    """The cells of one merge."""
    return [label, *_cells(scored.scores, goals), *_cells(scored.held_out, held_out)]


def status_table(status: Mapping[str, object]) -> Table:
    """Field by field."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    for key, value in status.items():
        if value not in (None, "", {}, []):
            table.add_row(key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    return table


def _cells(scores: Mapping[str, float] | None, goals: Sequence[Goal]) -> list[str]:
    values = [None if scores is None else scores.get(goal.name) for goal in goals]
    cells = ["-" if value is None else f"{value:.4f}" for value in values]
    if len(goals) > 1:
        known = [value for value in values if value is not None]
        cells.append(f"{sum(known) / len(known):.4f}" if len(known) == len(goals) else "-")
    return cells


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def console(*, to_stderr: bool = False) -> Console:
    """A console that does not wrap tables when its output is not a terminal."""
    stream = sys.stderr if to_stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 160, highlight=False, markup=False)


def lines(findings: Iterable[tuple[str, str]]) -> Table:
    """Two columns without a frame."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    for left, right in findings:
        table.add_row(left, right)
    return table
