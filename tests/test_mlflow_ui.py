"""What a user sees in MLflow: three searches, each one coloured front, overlaid. Looked at in headless Chromium.

MLflow's format of saved views is undocumented; this test says whether the version at hand understands ours. With
ECOTONE_SCREENSHOT=FILE.png it also leaves a picture of the page.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import starmap
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from ecotone.experiments import tracking
from ecotone.experiments.tracking.mlflow.server import await_answer, free_port, serving
from ecotone.experiments.tracking.mlflow.server import stop as stop_server
from ecotone.experiments.tracking.mlflow.view import view_address, view_key
from ecotone.populations import facts
from ecotone.populations.facts import Note
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal
from ecotone.populations.trial import Evaluation, Goal, Scores, Trial

pytest.importorskip("mlflow")

Front: TypeAlias = list[tuple[float, float]]

GOALS = [Goal("math"), Goal("code")]
SEARCHES = {"random": 0.6, "nsga2": 0.8, "bayesian_map": 1.0}  # how far out their fronts are
EVALUATIONS = 40
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

if CHROMIUM is None and "CI" not in os.environ:
    pytest.skip("no Chromium: install Debian's package chromium", allow_module_level=True)

_MOUSE = "primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4"  # as on a desk


# -- a browser -----------------------------------------------------------------------------------------------


class Browser:
    """Headless Chromium with one page, driven through its debugging pipe (Chrome DevTools Protocol)."""

    def __init__(self) -> None:
        assert CHROMIUM is not None, "CI without Chromium: .ci/run installs it"
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        (theirs_in, self._to), (self._from, theirs_out) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 50) for end in (theirs_in, theirs_out)]

        def pipe_ends() -> None:  # Chromium reads 3 and writes 4
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
        command += ["--hide-scrollbars", "--no-proxy-server", f"--blink-settings={_MOUSE}"]
        command += [f"--user-data-dir={self._profile}", "--remote-debugging-pipe", "about:blank"]
        self._process = subprocess.Popen(
            command,
            preexec_fn=pipe_ends,
            pass_fds=(3, 4),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (theirs_in, theirs_out, *ends):
            os.close(end)
        self._buffer, self._count, self._session = b"", 0, ""
        pages = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._from], [], [], 60)[0], "Chromium is silent"
            more = os.read(self._from, 1 << 20)
            assert more, "Chromium has ended"
            self._buffer += more
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 60.0) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"not in {seconds:.0f} s: {script}\n{self.run('document.body.innerText')}"
            time.sleep(0.25)
        return value

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._profile, ignore_errors=True)


@pytest.fixture
def browser() -> Iterator[Browser]:
    browser = Browser()
    browser.resize(1300, 1160)
    yield browser
    browser.close()


# -- three searches ------------------------------------------------------------------------------------------


def a_search(directory: Path, algorithm: str, reach: float) -> Front:
    """A finished search in the journal, ``reach`` from the origin at best; returns its front, by math."""
    rng = np.random.default_rng(len(algorithm))
    goals = json.dumps([[goal.name, goal.direction] for goal in GOALS])
    told = {
        "recipe": json.dumps({"search": {"algorithm": algorithm}, "seed": 0}),
        "name": "merge",
        "algorithm": algorithm,
        "goals": goals,
        "held_out_goals": goals,
        "budget": json.dumps({"evaluations": EVALUATIONS}),
        "tracking": json.dumps({"experiment": "three searches"}),
        "models": json.dumps(["math", "code"]),
    }
    with Journal.create(directory / "journal.sqlite", starmap(Note, told.items())) as journal:
        for number in range(EVALUATIONS):
            angle, length = np.pi / 2 * rng.uniform(), reach * (1 - 0.5 * rng.uniform() ** 3)
            scores = {"math": float(length * np.sin(angle)), "code": float(length * np.cos(angle))}
            trial = Trial(number, Genome.uniform(10, [scores["math"], scores["code"]]))
            journal.asked(number, 1, [trial])
            journal.arrived([(trial, Evaluation(scores))])
            journal.told(number)
            journal.measured(
                trial.genome, Scores("held_out"), Evaluation({key: 0.9 * value for key, value in scores.items()})
            )
        journal.note(facts.STATE, "finished")
        points = [(row.scores["math"], row.scores["code"]) for row in journal.rows() if row.scores]
    return sorted(p for p in points if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points))


@pytest.fixture
def fronts(tmp_path: Path) -> dict[str, Front]:
    """The fronts of three searches, which are in the embedded store of ``tmp_path`` too."""
    found = {}
    for algorithm, reach in SEARCHES.items():
        found[f"{algorithm} seed 0, merge"] = a_search(tmp_path / algorithm, algorithm, reach)
        assert tracking.mirror(tmp_path / algorithm).complete
    return found


@pytest.fixture
def server(fronts: object, tmp_path: Path) -> Iterator[str]:
    """MLflow's server of that store; its address."""
    port = free_port(0)
    process = serving(tracking.default_uri(tmp_path), tmp_path / "random", port)
    try:
        await_answer(process, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop_server(process)


# -- what the view shows -------------------------------------------------------------------------------------

# Of each chart its title, the name of its x-axis, and its lines as they are drawn: name and colour, and its points and
# its end read off the picture at its axes. (MLflow draws each line twice, the second time without points.)
CHARTS = """
[...document.querySelectorAll('.js-plotly-plot')].map(plot => {
  const {xaxis, yaxis} = plot._fullLayout;
  const scores = (x, y) => [xaxis.p2c(x), yaxis.p2c(y)];
  const names = new Map(plot._fullData.map(line => [line.uid, line.name]));
  const line = trace => {
    const path = trace.querySelector('path.js-line'), end = path.getPointAtLength(path.getTotalLength());
    const points = [...trace.querySelectorAll('path.point')].map(
      point => scores(...point.getAttribute('transform').match(/-?[0-9.]+/g).map(Number)));
    const name = names.get(trace.getAttribute('class').match(/trace([0-9a-f]{6})/)[1]);
    return {name, colour: getComputedStyle(path).stroke, points, end: scores(end.x, end.y)};
  };
  return {
    title: plot.closest('[data-testid="experiment-view-compare-runs-card"]').querySelector('h4').textContent,
    x: plot.querySelector('.xtitle').textContent,
    lines: [...plot.querySelectorAll('.scatterlayer .trace:has(path.js-line)')].map(line),
  };
})
"""
PICTURES = "[...document.querySelectorAll('.rc-image-img')].filter(image => image.naturalWidth > 0).length"
CLOSE = "document.querySelectorAll('button[aria-label=Close]').forEach(button => button.click())"  # MLflow's assistant


@pytest.mark.slow
def test_the_view_shows_three_fronts(fronts: dict[str, Front], server: str, tmp_path: Path, browser: Browser) -> None:
    experiment = tracking.status(tmp_path / "random")["experiment_id"]
    browser.call("Page.navigate", url=view_address(server, experiment, view_key(GOALS)))
    browser.until("document.querySelectorAll('.js-plotly-plot').length >= 4")
    browser.run(CLOSE)
    charts = steady(browser, 3)
    if "ECOTONE_SCREENSHOT" in os.environ:
        browser.screenshot(Path(os.environ["ECOTONE_SCREENSHOT"]))
    on_search, on_held_out, hypervolumes = charts[:3]
    assert (on_search["x"], on_search["title"]) == ("front/math", "front/code")
    assert drawn(on_search) == {name: pytest.approx(np.array(front), abs=2e-3) for name, front in fronts.items()}
    assert (on_held_out["x"], on_held_out["title"]) == ("front_held_out/math", "front_held_out/code")
    assert drawn(on_held_out) == {
        name: pytest.approx(0.9 * np.array(front), abs=2e-3) for name, front in fronts.items()
    }
    colours = {line["name"]: line["colour"] for line in on_search["lines"]}
    assert len(set(colours.values())) == 3
    assert colours == {line["name"]: line["colour"] for line in on_held_out["lines"]}
    assert (hypervolumes["x"], hypervolumes["title"]) == ("Step", "hypervolume")
    ends = {line["name"]: line["end"] for line in hypervolumes["lines"]}
    assert ends == {name: pytest.approx([EVALUATIONS, volume(front)], abs=0.05) for name, front in fronts.items()}
    browser.resize(1300, 2200)  # what is further down is loaded when it is seen
    browser.until(f"{PICTURES} == 3")
    assert "search.algorithm=" not in browser.run("document.body.innerText"), "parameters push the pictures away"


def steady(browser: Browser, count: int, seconds: float = 60.0) -> list[dict[str, Any]]:
    """The charts, when the first ``count`` have lines and nothing changes: cards that find their width are redrawn."""
    end, before = time.monotonic() + seconds, None
    while True:
        charts: list[dict[str, Any]] = browser.run(CHARTS)
        if charts == before and len(charts) >= count and all(len(chart["lines"]) >= 3 for chart in charts[:count]):
            return charts
        assert time.monotonic() < end, charts
        before = charts
        time.sleep(0.7)


def drawn(chart: dict[str, Any]) -> dict[str, Any]:
    """The points of each line that has points."""
    return {line["name"]: np.array(line["points"]) for line in chart["lines"] if line["points"]}


def volume(front: Front) -> float:
    """What a front dominates of what is above 0; its points are in order of the first objective."""
    widths = np.diff([0.0, *(math for math, _ in front)])
    return float(sum(width * code for width, (_, code) in zip(widths, front, strict=True)))
