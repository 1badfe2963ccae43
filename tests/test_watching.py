"""Mirrors that are killed while a run goes on: started once more, told of, and what they lacked sent by `sync`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from processes import Ecotone, started, wait_until
from safetensors.numpy import save_file

from ecotone.experiments import tracking
from ecotone.experiments.tracking import notes
from ecotone.experiments.tracking.watching import LOOK_EVERY, Followers, lacking


class Settings:
    """Of a tracker that is installed."""

    title = "MLflow"

    def installed(self) -> bool:
        return True


class Time:
    """Moves by so much whenever it is asked for."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += LOOK_EVERY
        return self.now


def mirrors(monkeypatch: pytest.MonkeyPatch, *codes: str) -> list[subprocess.Popen[bytes]]:
    """Mirrors that run this code, one after the other."""
    made: list[subprocess.Popen[bytes]] = []

    def start(directory: Path, pid: int, name: str) -> subprocess.Popen[bytes]:
        made.append(subprocess.Popen([sys.executable, "-S", "-c", codes[len(made)]]))
        return made[-1]

    monkeypatch.setattr(tracking, "start", start, raising=False)
    monkeypatch.setattr("ecotone.experiments.tracking.watching.time", Time())
    return made


KILLED = "import os; os.kill(os.getpid(), 9)"
CRASHED = "raise SystemExit(3)"
ENDED = "pass"
AGAIN = "Warning: the mirror to MLflow was killed (SIGKILL). It is started once more."
GONE = (
    "Warning: the mirror to MLflow ended with exit code 3, and tracking.log says why. MLflow lacks what comes now: "
    "`ecotone sync the-run` sends the rest."
)


def test_a_mirror_that_dies_is_started_once_and_then_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    made = mirrors(monkeypatch, KILLED, CRASHED)
    followers = Followers(tmp_path, "the-run", {"mlflow": Settings()}, said.append)  # type: ignore[dict-item]
    made[0].wait()
    followers.look()
    assert said == [AGAIN]
    made[1].wait()
    for _ in range(3):
        followers.look()
    followers.leave()
    assert said == [AGAIN, GONE]


def test_a_mirror_that_dies_at_the_end_is_started_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    made = mirrors(monkeypatch, KILLED, KILLED)
    followers = Followers(tmp_path, "the-run", {"mlflow": Settings()}, said.append)  # type: ignore[dict-item]
    made[0].wait()
    monkeypatch.setattr(tracking, "wait", lambda process, *_: process.wait() is not None, raising=False)
    followers.wait(60)
    assert said == [
        "Waiting for MLflow to have everything ...",
        AGAIN,
        "Warning: MLflow does not have everything yet: its mirror was killed (SIGKILL). When that is mended, "
        "`ecotone sync the-run` sends the rest.",
    ]


def test_a_mirror_that_has_everything_is_no_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    made = mirrors(monkeypatch, ENDED)
    followers = Followers(tmp_path, "the-run", {"mlflow": Settings()}, said.append)  # type: ignore[dict-item]
    made[0].wait()
    notes.note(tmp_path, "mlflow", notes.MirrorReport("file", complete=True), {})
    followers.look()
    followers.leave()
    followers.wait(60)
    assert said == ["Waiting for MLflow to have everything ..."]


@pytest.mark.parametrize(
    ("known", "run", "words"),
    [
        ({"mirrored": 5}, {"state": "running", "seconds": 60.0}, "15 of 20 evaluations"),
        ({"mirrored": 5}, {"state": "running", "seconds": 6.0}, ""),  # it may yet have to start
        ({"mirrored": 5, "mirroring": True}, {"state": "running", "seconds": 60.0}, ""),
        ({"mirrored": 20}, {"state": "running", "seconds": 60.0}, ""),
        ({"mirrored": 20}, {"state": "finished", "seconds": 6.0}, "the results at the end"),
        ({"mirrored": 20, "complete": True}, {"state": "finished", "seconds": 6.0}, ""),
        ({"mirrored": 0}, {"state": "killed", "seconds": 1.0}, "20 of 20 evaluations"),
    ],
)
def test_status_says_what_nobody_sends(known: dict[str, Any], run: dict[str, Any], words: str) -> None:
    assert lacking({"complete": False, "mirroring": False, **known}, {"evaluations": 20, **run}) == words


def mirror_of(run: Path) -> list[psutil.Process]:
    """The processes that mirror a run."""
    found = []
    for process in psutil.process_iter():
        try:
            if "--follow" in process.cmdline() and str(run) in process.cmdline():
                found.append(process)
        except psutil.Error:  # noqa: PERF203 - it is gone
            continue
    return found


@pytest.mark.slow
def test_a_mirror_that_is_killed_twice_is_told_of_and_sync_mends_it(tmp_path: Path, ecotone: Ecotone) -> None:
    (tmp_path / "watched_toys.py").write_text(
        "import time\n\ndef left(model):\n    time.sleep(0.05)\n    return float(abs(model['w']).sum())\n"
    )
    for number in (1, 2):
        save_file({"w": np.full((2, 2), number, np.float32)}, tmp_path / f"{number}.safetensors")
    record = {
        "name": "toy",
        "models": {"experts": ["1.safetensors", "2.safetensors"]},
        "objectives": {"search": [{"name": "left", "type": "call", "call": "watched_toys:left"}]},
        "search": {"algorithm": "random"},
        "budget": {"evaluations": 400},
        "runtime": {"pool": "serial"},
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(record))
    run = tmp_path / "runs" / "toy"
    with started("run", tmp_path / "toy.yaml", "--out", run) as process:
        for _ in range(2):
            wait_until(lambda: bool(mirror_of(run)), process)
            (mirror,) = mirror_of(run)
            os.kill(mirror.pid, signal.SIGKILL)
            wait_until(lambda gone=mirror: not gone.is_running() or gone.status() == psutil.STATUS_ZOMBIE, process)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0
    assert said.count("the mirror to MLflow was killed (SIGKILL). It is started once more.") == 1
    assert "MLflow lacks what comes now" in said
    said = " ".join(said.split())
    assert f"its mirror was killed (SIGKILL). When that is mended, `ecotone sync {run}` sends the rest." in said
    known = ecotone("status", run, "--json").json["tracking"]["mlflow"]
    assert known["lacks"] == f"400 of 400 evaluations; `ecotone sync {run}` sends them"
    assert ecotone("sync", run).code == 0
    known = ecotone("status", run, "--json").json["tracking"]["mlflow"]
    assert (known["mirrored"], "lacks" in known) == (400, False)
