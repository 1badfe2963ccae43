"""The structured log: what a line holds, that it is always JSON, and that it never stops a run."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ecotone.experiments import logs
from ecotone.search.manager import Progress

log = logging.getLogger("ecotone")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / logs.LOG).read_text().splitlines()]


def test_a_record_with_an_event_is_one_line_and_others_are_none(tmp_path: Path) -> None:
    with logs.recorded(tmp_path):
        log.info("A worker is ready.")
        log.warning("Worker %d died.", 3, extra={"event": "worker_died", "pid": 17, "node": "10.0.0.2", "_of_ray": 1})
    log.warning("too late", extra={"event": "worker_died"})
    (line,) = lines(tmp_path)
    assert list(line) == ["time", "level", "event", "message", "pid", "node"]
    assert line["time"].endswith("+00:00")
    del line["time"]
    assert line == {
        "level": "warning",
        "event": "worker_died",
        "message": "Worker 3 died.",
        "pid": 17,
        "node": "10.0.0.2",
    }


def test_every_field_is_json_and_none_can_take_the_place_of_another(tmp_path: Path) -> None:
    fields = {
        "loss": float("nan"),
        "front": {1},
        "where": tmp_path,
        "scores": {"a": np.float64(0.5)},
        "level": "mine",
    }
    with logs.recorded(tmp_path):
        log.warning("It\nbroke.", extra={"event": "trial_failed", **fields, "row": np.arange(3)})
    (line,) = lines(tmp_path)
    assert line["loss"] == "nan"
    assert line["front"] == [1]
    assert line["where"] == str(tmp_path)
    assert line["scores"] == {"a": 0.5}
    assert line["row"] == [0, 1, 2]
    assert line["level"] == "warning"
    assert line["message"] == "It\nbroke."


def test_debug_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    stream = io.StringIO()
    with logs.streamed(stream):
        for level in ("info", "debug", "info"):
            with logs.recorded(tmp_path, level):
                log.debug("Asked.", extra={"event": "asked", "number": 0})
                log.info("Started.", extra={"event": "run_started"})
        assert log.level == logging.INFO
    assert log.level == logging.NOTSET
    assert [line["event"] for line in lines(tmp_path)] == ["run_started", "asked", "run_started", "run_started"]
    assert stream.getvalue() == (tmp_path / logs.LOG).read_text()


def test_the_file_and_stdout_may_both_have_it(tmp_path: Path) -> None:
    stream = io.StringIO()
    with logs.streamed(stream), logs.recorded(tmp_path):
        log.info("Started.", extra={"event": "run_started"})
    assert stream.getvalue() == (tmp_path / logs.LOG).read_text()


def test_warnings_are_said(tmp_path: Path) -> None:
    heard: list[str] = []
    with logs.said(heard.append), logs.recorded(tmp_path):
        log.info("Fine.", extra={"event": "worker_ready"})
        log.warning("A worker died.", extra={"event": "worker_died"})
    assert heard == ["Warning: A worker died."]


@pytest.mark.parametrize("broken", ["missing", "full"])
def test_a_file_that_cannot_be_written_costs_its_lines_only(broken: str, tmp_path: Path) -> None:
    folder = tmp_path / "missing"
    if broken == "full":
        folder.mkdir()
        (folder / logs.LOG).symlink_to("/dev/full")
    heard: list[str] = []
    with logs.said(heard.append), logs.recorded(folder):
        for _ in range(3):
            log.info("Started.", extra={"event": "run_started"})
    assert len(heard) == 1
    assert str(folder / logs.LOG) in heard[0]


def test_a_heartbeat_is_logged_now_and_then(tmp_path: Path) -> None:
    now = [0.0]
    beat = logs.Heartbeat(10.0, lambda: now[0])
    with logs.recorded(tmp_path):
        for now[0] in (0.0, 4.0, 9.0, 10.0, 15.0, 21.0):
            beat(Progress(evaluations=int(now[0]), spent=now[0], best=2, best_scores={"right": 0.75}))
    assert [line["evaluations"] for line in lines(tmp_path)] == [0, 10, 21]
    assert lines(tmp_path)[-1]["message"] == "21 evaluations, best: right 0.75."
    assert lines(tmp_path)[-1]["scores"] == {"right": 0.75}


def test_lines_in_words() -> None:
    line = '{"time": "2026-01-02T03:04:05.678+00:00", "level": "info", "event": "run_started", "message": "Begun."}'
    assert logs.in_words(line) == "2026-01-02 03:04:05 info: Begun."
    for other in ("plain text", "{}", "3", '{"time": 5, "level": "a", "message": "b"}', ""):
        assert logs.in_words(other) == other
