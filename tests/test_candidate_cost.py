"""The benchmark of what a candidate costs, on a tiny model: its record, and that all ways of scoring agree."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval.models.huggingface")
TINY = ["--layers", "2", "--width", "64", "--vocabulary", "600", "--dtype", "float32", "--batch", "8"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    module = importlib.import_module("candidate_cost")
    monkeypatch.setattr(importlib.import_module("materialise"), "RESULTS", tmp_path)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    return module


@pytest.mark.slow
def test_all_ways_agree_and_are_timed(benchmark: Any, tmp_path: Path) -> None:
    benchmark.main([*TINY, "--questions", "12", "--candidates", "2", "--words", "4", "9"])
    rows = json.loads((tmp_path / "candidate_cost.json").read_text())["rows"]
    assert [(row["words"], row["way"]) for row in rows] == [(n, way) for n in (4, 9) for way in benchmark.WAYS]
    for row in rows:
        assert row["scores"] == rows[0 if row["words"] == 4 else len(benchmark.WAYS)]["scores"]
        assert len(row["all_seconds"]) == 2
        assert all(clock[part] > 0 for clock in row["all_seconds"] for part in ("materialise", "forward", "rest"))
        assert list(row["times"]) == ["disk", "memory", "disk, no report", "memory, no report"]
    assert rows[0]["times"]["disk"] == rows[1]["times"]["memory"] == 1


def test_ways_that_disagree_are_told(benchmark: Any) -> None:
    scores = {way: [0.5, 0.5] for way in benchmark.WAYS}
    verdicts = {way: [True, False] for way in benchmark.WAYS}
    benchmark.check(scores, verdicts, 1)
    with pytest.raises(RuntimeError, match=r"candidate 1: .* apart on .*'reuse': 2"):
        benchmark.check(scores, verdicts | {"reuse": [False, True]}, 1)
    with pytest.raises(RuntimeError, match="candidate 0: expected one score of all ways"):
        benchmark.check(scores | {"disk": [0.25, 0.5]}, verdicts, 0)
