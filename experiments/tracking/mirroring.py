"""The mirror of one run in one tracker: what the journal has and the tracker lacks, worked out and handed over.

It knows no tracker: what there is to log, when, and in which order is the same for all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from ecotone.experiments.tracking.artifacts import write_artifacts
from ecotone.experiments.tracking.front_metrics import front_lines
from ecotone.experiments.tracking.images import front_image, is_due
from ecotone.experiments.tracking.protocol import End, Line, Record
from ecotone.experiments.tracking.scoreboard import Scoreboard
from ecotone.experiments.tracking.subject import Subject
from ecotone.experiments.tracking.summary import Summary, summary_of
from ecotone.populations import facts
from ecotone.populations.journal import Journal

_PORTION = 2000  # rows of the journal read at a time


class Mirror:
    """Keeps a tracker's record of a run up to date. Any error makes it useless, as it does the record.

    Args:
        subject: The facts of the run as a whole.
        record: The run of the tracker.
    """

    def __init__(self, subject: Subject, record: Record) -> None:
        self.subject = subject
        self.record = record
        self._go_on()

    def _go_on(self) -> None:
        """Begin where the record stands."""
        record, subject = self.record, self.subject
        self.board: Scoreboard = Scoreboard(subject.goals, record.stride, subject.created, record.cursor)
        self._after = -1

    def advance(self, journal: Journal, state: str) -> bool:
        """Log all new lines. Returns True when the search has ended and all of it is logged."""
        final = state != "running"
        self._go_on_after_an_end(journal)
        if not final:
            self.record.begin()
        self.record.log(self._lines(journal, state == "finished"))
        if final:
            self._finish(journal, state)
        return final

    def _go_on_after_an_end(self, journal: Journal) -> None:
        """Go on where the search has more than a logged end showed. Each end has a run of its own."""
        run_id = None
        while run_id != self.record.run_id and (self.record.end or self.record.front):
            run_id, count = self.record.run_id, sum(1 for _ in journal.rows())
            if count <= self.record.cursor:
                return
            self.record.go_on(count)
            self._go_on()

    def _lines(self, journal: Journal, finished: bool) -> Iterator[Line]:
        """The lines after the cursor. Trials in flight hold up later lines until the search is finished."""
        # Read in portions: a reader that lingers keeps the journal's write-ahead log from being folded in.
        while rows := list(islice(journal.rows(self._after, unscored=True), _PORTION)):
            for row in rows:
                if row.number != self._after + 1 and not finished:
                    return
                self._after = row.number
                if row.gradient is not None:
                    self.board.learn(row)
                    continue
                if not row.scored:
                    continue
                line = self.board.add(row)
                if line is not None and line.step > self.record.cursor:
                    yield line
                if is_due(self.board.count):
                    self._show_picture()
        line = self.board.last() if finished else None
        if line is not None and line.step > self.record.cursor:
            yield line

    def _show_picture(self) -> None:
        """The front as it stands, once for each step."""
        step, points, goals = self.board.count, self.board.front.points, self.subject.goals
        if len(goals) < 2 or not len(points) or step <= self.record.pictured:
            return
        signs = np.array([goal.sign for goal in goals])
        title = f"{self.subject.name}: front after {step} evaluations"
        image = front_image(goals, np.array(self.board.recent), points * signs, title, self.record.colour)
        self.record.show(image, step, round(self.board.time * 1000))

    def _finish(self, journal: Journal, state: str) -> None:
        """Log the results of an end, once for each end."""
        summary = summary_of(journal, self.board, self.subject)
        mark = f"{state} {self.board.count} {summary.fingerprint}"
        if self.record.end == mark:
            return
        if self.record.end:
            self.record.go_on(self.board.count)
            self._go_on()
            self.record.log(self._lines(journal, state == "finished"))
        if state == "finished":
            self._show_picture()
        self.record.finish(self._end(journal, state, mark, summary))

    def _end(self, journal: Journal, state: str, mark: str, summary: Summary) -> End:
        now, finished = round(self.board.time * 1000), state == "finished"
        lines = front_lines(summary, self.subject.goals, self.subject.held_out, now)
        lines += self.board.volumes.late(summary.references)
        return End(
            mark=mark,
            state=state,
            ended=_last_written(journal.path),
            evaluations=self.board.count,
            time=now,
            reasons={fact.name: journal.fact(fact) or "" for fact in (facts.STOP_REASON, facts.ERROR)},
            metrics=summary.metrics,
            front=summary.front_mark if finished else "",
            lines=lines if finished else [],
            table=summary.table,
            write=lambda folder: write_artifacts(folder, journal, self.subject, summary),
        )


def _last_written(path: Path) -> float:
    """When the run ended (unix seconds): the last change of its journal."""
    files = (path, path.with_name(path.name + "-wal"))
    return min(time.time(), max(file.stat().st_mtime for file in files if file.exists()))
