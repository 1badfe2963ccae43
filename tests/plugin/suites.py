"""The conformance suites over the plug-in: the tests that a package of its own would have."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from ecotone_example.objective import ClosenessSettings
from ecotone_example.operator import Damped
from ecotone_example.search import HillClimbingSettings

from ecotone.experiments import tracking
from ecotone.testing.objectives import Case, ObjectiveConformance
from ecotone.testing.operators import OperatorConformance
from ecotone.testing.searches import SearchConformance, made
from ecotone.testing.trackers import Shown, TrackerSuite


class TestHillClimbing(SearchConformance):
    searches: ClassVar = {"hill_climbing": made(HillClimbingSettings())}
    never_wait = ("hill_climbing",)


class TestDamped(OperatorConformance):
    operators = (Damped(),)


def small_model(seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    module = torch.nn.Linear(4, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.eval()


class TestCloseness(ObjectiveConformance):
    cases: ClassVar = {"closeness": lambda folder: Case(ClosenessSettings(name="close", type="closeness"), small_model)}


class Lines:
    """How the tracker is set, how it is down, and what its file shows."""

    tracker = "json_lines"
    settings: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def down(self) -> Iterator[Mapping[str, Any]]:
        """Its folder cannot be made."""
        (self.folder / "file").write_text("")
        yield {"folder": str(self.folder / "file" / "lines")}

    def shown(self, directory: Path) -> Shown:
        """The content of the run's file."""
        path = Path(tracking.status(directory, self.tracker)["page"])
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        end = [line for line in lines if "mark" in line][-1]
        history: dict[str, list[tuple[int, float]]] = {}
        for line in [*(line for line in lines if "values" in line), *end["lines"]]:
            for key, value in line["values"].items():
                history.setdefault(key, []).append((line["step"], value))
        table = (end["table"]["columns"], end["table"]["data"])
        files = {file.name for file in path.with_suffix("").iterdir() if file.suffix != ".png"}
        runs = len(list(path.parent.glob("*.jsonl")))
        return Shown(history, end["metrics"], lines[0]["parameters"], table, frozenset(files), runs)


class TestJsonLines(TrackerSuite):
    @pytest.fixture
    def case(self, tmp_path: Path) -> Lines:
        return Lines(tmp_path)
